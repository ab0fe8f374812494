"""Which file objects may hold what is not written yet."""

from __future__ import annotations

import gc
import gzip
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torchmgmt.worker.open_files import open_files


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    gc.collect()


def found(*files: Any) -> list[Any]:
    """Return those of ``files`` that are found, in the order in which they are."""
    return [each for each in open_files() if any(each is file for file in files)]


def test_who_writes_to_another_comes_before_that(folder: Path) -> None:
    """Text is flushed before the buffer below it, and a compressed file before the file that it is in."""
    with (folder / "text").open("w") as text, gzip.open(folder / "zip", "wt") as packed:
        below: Any = packed.buffer  # type: ignore[attr-defined]
        order = found(packed, below, below.fileobj, text, text.buffer)
        assert len(order) == 5
        assert order.index(packed) < order.index(below) < order.index(below.fileobj)
        assert order.index(text) < order.index(text.buffer)


def test_frozen_files_are_found(folder: Path) -> None:
    """A file that was opened before the collector's objects were frozen is found as any other."""
    with (folder / "a").open("wb") as file:
        gc.freeze()
        assert found(file) == [file]


def test_what_holds_nothing_to_write_is_not_found(folder: Path) -> None:
    """Files that are only read, closed, in memory or without a buffer are left alone."""
    (folder / "read").touch()
    closed = (folder / "closed").open("w")
    closed.close()
    memory, texts = io.BytesIO(), io.StringIO()
    with (folder / "read").open() as read, (folder / "raw").open("wb", buffering=0) as raw, (folder / "w").open("w"):
        assert found(closed, memory, texts, read, read.buffer, raw) == []


def test_pipes_and_sockets_are_found() -> None:
    """What is kept for another process counts as a file does."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb"), os.fdopen(writer, "wb") as pipe:
        assert found(pipe) == [pipe]


class Odd(io.TextIOBase):
    """A file of the handler's making that does not answer."""

    def writable(self) -> bool:
        raise RuntimeError


def test_odd_files_are_left_out(folder: Path) -> None:
    """A file object that raises when it is asked, or was never opened, keeps no other from being found."""
    odd, never = Odd(), io.TextIOWrapper.__new__(io.TextIOWrapper)
    with (folder / "w").open("w") as file:
        assert found(odd, never, file) == [file]
