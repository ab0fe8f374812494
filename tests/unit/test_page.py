"""The page that a worker shares with the embedding process: numbers, whatever becomes of the file that they are in."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator

import pytest

from torchmgmt.page import PAGE_BYTES, Page
from torchmgmt.system_calls import fix_size, memory_file


def fixed() -> int:
    fd = memory_file("torchmgmt-test")
    assert fd is not None
    os.write(fd, bytes(PAGE_BYTES))
    assert fix_size(fd)
    return fd


def unfixed() -> int:
    fd = memory_file("torchmgmt-test")
    assert fd is not None
    os.write(fd, bytes(PAGE_BYTES))
    return fd


def on_disk() -> int:
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(PAGE_BYTES))
        return os.dup(file.fileno())


KINDS: dict[str, Callable[[], int]] = {"on disk": on_disk}
if hasattr(os, "memfd_create"):
    KINDS |= {"fixed": fixed, "unfixed": unfixed}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def file(request: pytest.FixtureRequest) -> Iterator[int]:
    fd = request.param()
    yield fd
    os.close(fd)


@pytest.fixture
def pages(file: int) -> Iterator[tuple[Page, Page]]:
    """Both sides, which are two processes otherwise."""
    ours, theirs = Page(file), Page(file)
    yield ours, theirs
    ours.close()
    theirs.close()


def test_what_one_side_notes_the_other_one_sees(pages: tuple[Page, Page]) -> None:
    """In whichever kind of file they are, numbers are there at once."""
    ours, theirs = pages
    assert (ours.started, ours.abandoned) == (0, 0)
    theirs.start(2**40)
    ours.abandon(7)
    ours.recall(12, but=11)
    assert ours.started == 2**40
    assert theirs.abandoned == 7
    assert [number for number in range(9, 15) if theirs.is_recalled(number)] == [9, 10, 12]


def test_no_side_can_kill_the_other_one(file: int, pages: tuple[Page, Page]) -> None:
    """A file that is truncated, or refuses to be, reads as numbers, and can be written to again."""
    ours, theirs = pages
    theirs.start(5)
    try:
        os.ftruncate(file, 0)
    except PermissionError:
        assert ours.started == 5
    else:
        assert ours.started == 0
    theirs.start(6)
    ours.recall(9, but=0)
    assert ours.started == 6
    assert theirs.is_recalled(9)


def test_a_closed_page_says_so(file: int) -> None:
    """It is closed once or twice, and neither read nor written afterwards."""
    page = Page(file)
    page.close()
    page.close()
    with pytest.raises(ValueError, match="closed"):
        page.start(1)
    with pytest.raises(ValueError, match="closed"):
        _ = page.started
