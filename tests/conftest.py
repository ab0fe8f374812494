"""What every test of ours stands on: reproducible properties, and no import of what is broken on purpose."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.handlers import until
from tests.leaks import LeakGuard
from torchmgmt import ProcessBackend

# No deadline per example: machines that run this share their cores. In CI every run tries the same examples, so that a
# red build is about the change that it tests; locally they vary.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Collect test files alone: looking for docstring examples would import handlers made to crash."""
    if collection_path.suffix == ".py" and not collection_path.name.startswith("test_"):
        return True
    return None


@pytest.fixture(scope="session", autouse=True)
def _records_without_frames() -> Iterator[None]:
    """Have the errors in log records be text: pytest keeps the records, and an error's frames have what is to be gone."""
    before = logging.getLogRecordFactory()
    formatter = logging.Formatter()

    def args_of(record: logging.LogRecord) -> Any:
        return record.args if isinstance(record.args, tuple) else ()

    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(*args, **kwargs)
        if record.exc_info:
            record.exc_text, record.exc_info = formatter.formatException(record.exc_info), None
        if any(isinstance(each, BaseException) for each in args_of(record)):
            record.msg, record.args = record.getMessage(), ()
        return record

    logging.setLogRecordFactory(make)
    yield
    logging.setLogRecordFactory(before)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def backend(leak_guard: LeakGuard) -> Iterator[ProcessBackend]:
    """A backend for every test that does not test backends: importing torch once is enough.

    Its torch-only process and its two threads are there before the first test that uses it, so a test that leaves a
    worker behind is still found out.
    """
    backend = ProcessBackend()
    backend.warm()
    until(lambda: backend.forkserver.pid is not None, "the torch-only process has been started")
    yield backend
    backend.close()
