"""What a forked process does with itself, whether it is to be a template or a worker: output, signals, its end."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import select
import signal
import site
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

from torchmgmt.process_signals import LAST_WORDS
from torchmgmt.variables import without_matching
from torchmgmt.worker.shutdown import inherit_no_exit_functions
from torchmgmt.worker.stop_signals import ignore_stops

__all__ = [
    "EXIT_NOT_LOADED",
    "EXIT_STOPPED",
    "add_packages",
    "be_process",
    "die_with",
    "hide_variables",
    "keep_standard_streams_open",
    "redirect_output",
    "restore_environment",
    "run_to_exit",
]

EXIT_STOPPED = 0
EXIT_NOT_LOADED = 1


def run_to_exit(body: Callable[[], int]) -> NoReturn:
    """Run ``body`` and exit with the status that it returns.

    Never returns: the interpreter's own shutdown belongs to the process that was forked.
    """
    status = EXIT_NOT_LOADED
    try:
        status = body()
    except SystemExit as error:
        traceback.print_exc()  # where it was called is worth as much as the status
        status = _status_of(error)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):  # the handler may have put anything in its place
                stream.flush()
        os._exit(status)


def be_process(output_fd: int) -> None:
    """Take over, right after the fork from the torch-only process: signals, output, logging, a session of its own."""
    redirect_output(output_fd)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ignore_stops()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    faulthandler.enable()
    faulthandler.register(LAST_WORDS, all_threads=True)
    _log_to_stderr()
    inherit_no_exit_functions()
    os.setsid()


def redirect_output(output_fd: int) -> None:
    """Send stdout and stderr to ``output_fd``, which is closed."""
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    os.close(output_fd)


def keep_standard_streams_open() -> None:
    """Have something under the descriptors 0 to 2, should the handler have closed them.

    Else the next socket or page of shared memory gets such a number, and what the handler prints goes there.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def restore_environment(environment: Mapping[str, str | None]) -> None:
    """Set variables to what the program had; None: it had none."""
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def hide_variables(pattern: str | None) -> None:
    """Drop the environment variables whose whole names match; None: none."""
    kept = without_matching(os.environ, pattern)
    for name in os.environ.keys() - kept.keys():
        del os.environ[name]


def add_packages(folder: str) -> None:
    """Have ``folder`` come first on ``sys.path``, here and in Python programs that are started from here.

    What is imported already stays what it is.
    """
    before = list(sys.path)
    site.addsitedir(folder)  # packages may have .pth files there, which name more folders
    sys.path[:] = [entry for entry in sys.path if entry not in before] + before
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))


def _status_of(error: SystemExit) -> int:
    """Return the exit status that Python gives ``error``, and print its text, if it has one, as Python does."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    sys.stderr.write(f"{error.code}\n")
    return 1


def _log_to_stderr() -> None:
    """Send what handlers log to stderr, each line with the priority from which the embedding process takes its level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PriorityFormatter("%(name)s: %(message)s"))
    # Handlers log at INFO and expect to see it, as under TorchServe.
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


class _PriorityFormatter(logging.Formatter):
    """Begins each line with its syslog priority, as in sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        mark = f"<{_priority(record.levelno)}>"
        return "\n".join(mark + line for line in super().format(record).splitlines() or [""])


def _priority(level: int) -> int:
    for least, priority in ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6)):
        if level >= least:
            return priority
    return 7


def die_with(root_pidfd: int) -> None:
    """End this process at once when the embedding process is gone, whatever the handler is doing.

    A closed channel does not tell: a child of the handler may hold it open, and a busy worker does not read.
    """

    def watch() -> None:
        poller = select.poll()
        poller.register(root_pidfd, select.POLLIN)
        poller.poll()
        os._exit(EXIT_STOPPED)

    if root_pidfd >= 0:
        threading.Thread(target=watch, name="torchmgmt-parent-watch", daemon=True).start()
