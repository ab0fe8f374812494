"""Does things in a forked copy of the process that runs the tests."""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from collections.abc import Callable

__all__ = ["in_child"]


def in_child(act: Callable[[], object]) -> str:
    """Return what happened in a forked child: what was raised, or returned; it has 5 seconds."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are threads
        child = os.fork()
    if child == 0:  # pragma: no cover
        signal.alarm(5)
        try:
            said = repr(act())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        with contextlib.suppress(BaseException):
            os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    return said if status == 0 else f"ended with status {status}"
