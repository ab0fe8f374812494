"""Sources: where a name leads, and that a caller over HTTP gets nowhere but into the model store."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmgmt.archive import sources
from torchmgmt.archive.allowed import Rules
from torchmgmt.archive.urls import Source
from torchmgmt.errors import (
    InvalidArchive,
    InvalidArgument,
    SourceNotAllowed,
    SourceNotFound,
    TorchmgmtError,
)


def resolve(url: str | os.PathLike[str], *, model_store: Path | None, trusted: bool) -> Path:
    """Resolve for the library, or for a caller over HTTP by the rules that count without any setting."""
    rules = None if trusted else Rules(None, may_fetch=True)
    return sources.resolve(Source.parse(url), model_store=model_store, rules=rules)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with an archive and a folder, beside files that are nobody's business."""
    store = tmp_path / "store"
    (store / "sub").mkdir(parents=True)
    (store / "digits.mar").write_bytes(b"x")
    (store / "with space #1.mar").write_bytes(b"x")
    (store / "sub" / "deep.mar").write_bytes(b"x")
    (tmp_path / "secret.mar").write_bytes(b"x")
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "here.mar").write_bytes(b"x")
    monkeypatch.chdir(tmp_path / "cwd")
    return store


both = pytest.mark.parametrize("trusted", [True, False], ids=["library", "http"])


# ------------------------------------------------------------------------------------ for everybody


@both
def test_a_bare_name_is_looked_up_in_the_store(store: Path, trusted: bool) -> None:
    """Archives and plain folders alike."""
    assert resolve("digits.mar", model_store=store, trusted=trusted) == store / "digits.mar"
    assert resolve("sub", model_store=store, trusted=trusted) == store / "sub"


@both
@pytest.mark.parametrize("prefix", ["", "file://", "file://localhost", "FILE://"])
def test_an_absolute_path_below_the_store(store: Path, trusted: bool, prefix: str) -> None:
    """As a path and as a URL, in a sub-folder too."""
    url = f"{prefix}{store}/sub/deep.mar"
    assert resolve(url, model_store=store, trusted=trusted) == store / "sub" / "deep.mar"


@both
def test_file_urls_are_percent_decoded(store: Path, trusted: bool) -> None:
    """And a '#' is part of the path: only a digest after it is taken off, and none but a whole one."""
    want = store / "with space #1.mar"
    for name in ("with%20space%20%231.mar", "with space #1.mar"):
        assert resolve(f"file://{store}/{name}", model_store=store, trusted=trusted) == want
    assert resolve(f"file://{want}#sha256={'0' * 64}", model_store=store, trusted=trusted) == want
    with pytest.raises(InvalidArgument, match="64 hexadecimal digits"):
        resolve(f"file://{store}/digits.mar#sha256=0", model_store=store, trusted=trusted)


@both
def test_nothing_there_says_so(store: Path, trusted: bool) -> None:
    """The text is the contract's."""
    with pytest.raises(SourceNotFound) as caught:
        resolve("nope.mar", model_store=store, trusted=trusted)
    assert str(caught.value) == "Model not found at: nope.mar"
    assert caught.value.name == "nope.mar"


@both
@pytest.mark.parametrize("url", ["", "  ", "a\0b", "file:///a%00b", "\ud800.mar", None, 3, b"x"])
def test_what_is_no_source_is_an_invalid_argument(store: Path, trusted: bool, url: object) -> None:
    """It names url, what was given and what is allowed."""
    with pytest.raises(InvalidArgument) as caught:
        resolve(url, model_store=store, trusted=trusted)  # type: ignore[arg-type]
    assert caught.value.argument == "url"


@both
def test_a_pipe_is_no_archive(store: Path, trusted: bool) -> None:
    """Opening one would block for ever."""
    os.mkfifo(store / "pipe.mar")
    with pytest.raises(InvalidArchive, match="neither a file nor a folder"):
        resolve("pipe.mar", model_store=store, trusted=trusted)


@both
def test_a_loop_of_links_is_not_found(store: Path, trusted: bool) -> None:
    """Whatever this Python raises for one."""
    (store / "loop.mar").symlink_to("loop.mar")
    with pytest.raises((SourceNotFound, SourceNotAllowed)):
        resolve("loop.mar", model_store=store, trusted=trusted)


@both
def test_a_name_too_long_for_any_file_is_not_found(store: Path, trusted: bool) -> None:
    """The operating system's error does not come through."""
    with pytest.raises(SourceNotFound):
        resolve("x" * 5000, model_store=store, trusted=trusted)


# ----------------------------------------------------------------------------------- for the library


def test_the_store_comes_before_the_working_directory(store: Path) -> None:
    """A bare name that is in both is the store's; one that is in neither is not found."""
    Path("digits.mar").write_bytes(b"mine")
    assert resolve("digits.mar", model_store=store, trusted=True) == store / "digits.mar"
    assert resolve("here.mar", model_store=store, trusted=True) == Path.cwd() / "here.mar"
    assert resolve("digits.mar", model_store=None, trusted=True) == Path.cwd() / "digits.mar"


@pytest.mark.parametrize("url", ["./here.mar", "../secret.mar", "../store/sub", Path("here.mar")])
def test_the_library_may_use_any_path(store: Path, url: str | Path) -> None:
    """Relative paths are those of the working directory at the time of the call."""
    path = resolve(url, model_store=store, trusted=True)
    assert path.is_absolute()
    assert path.samefile(url)


def test_another_host_is_no_path(store: Path) -> None:
    """Two slashes instead of three is the usual mistake."""
    with pytest.raises(InvalidArgument, match="file:///path"):
        resolve("file://digits.mar", model_store=store, trusted=True)


# --------------------------------------------------------------------------------------- over HTTP


@pytest.mark.parametrize(
    "url",
    [
        "../secret.mar",
        "sub/deep.mar",
        "./digits.mar",
        "sub/../digits.mar",
        "..",
        ".",
        "..\\secret.mar",
        "sub\\deep.mar",
        "file:///store/%2e%2e/secret.mar",
        "/store/../secret.mar",
    ],
)
def test_relative_paths_are_not_allowed(store: Path, url: str) -> None:
    """Neither up nor down; the text is the contract's."""
    with pytest.raises(SourceNotAllowed) as caught:
        resolve(url, model_store=store, trusted=False)
    assert str(caught.value) == f"Relative path is not allowed in url: {url}"


@pytest.mark.parametrize("prefix", ["", "file://", "file://localhost"])
@pytest.mark.parametrize("name", ["secret.mar", "there-is-no-such-file", "store", "store-2/x"])
def test_paths_outside_the_store_are_not_allowed(store: Path, prefix: str, name: str) -> None:
    """Whether something is there makes no difference; the store itself is no model either."""
    url = f"{prefix}{store.parent}/{name}"
    with pytest.raises(SourceNotAllowed) as caught:
        resolve(url, model_store=store, trusted=False)
    assert str(caught.value).startswith(f"Given URL {url} does not match any allowed URL(s)")
    assert str(store) in str(caught.value)


def test_another_host_is_not_allowed(store: Path) -> None:
    """A file URL with a host is somebody else's file."""
    with pytest.raises(SourceNotAllowed, match="does not match any allowed URL"):
        resolve(f"file://host{store}/digits.mar", model_store=store, trusted=False)


def test_a_link_out_of_the_store_is_not_allowed(store: Path) -> None:
    """Neither by its name nor by its path, nor through a folder."""
    (store / "link.mar").symlink_to(store.parent / "secret.mar")
    (store / "folder").symlink_to(store.parent)
    for url in ("link.mar", f"{store}/link.mar", "folder", f"{store}/folder/secret.mar"):
        with pytest.raises(SourceNotAllowed):
            resolve(url, model_store=store, trusted=False)


def test_links_within_the_store_are_fine(store: Path) -> None:
    """As is a store that is itself reached through a link."""
    (store / "latest.mar").symlink_to("digits.mar")
    other = store.parent / "other"
    other.symlink_to(store)
    want = store.resolve() / "digits.mar"
    assert resolve("latest.mar", model_store=other, trusted=False) == want
    assert resolve(f"{other}/digits.mar", model_store=store, trusted=False) == want


def test_without_a_store_nothing_can_be_registered(store: Path) -> None:
    """The message names what to set."""
    for url in ("digits.mar", str(store / "digits.mar")):
        with pytest.raises(SourceNotFound, match="--model-store"):
            resolve(url, model_store=None, trusted=False)


@given(
    url=st.lists(
        st.sampled_from(["..", ".", "", "/", "\\", "sub", "secret.mar", "%2e", "file://", "~", "x"])
        | st.text(max_size=3),
        max_size=8,
    ).map("".join),
    rooted=st.booleans(),
)
def test_no_url_leads_out_of_the_store(tmp_path_factory: pytest.TempPathFactory, url: str, rooted: bool) -> None:
    """Whatever a caller over HTTP writes: a path below the store, or an error of ours."""
    store = tmp_path_factory.getbasetemp() / "any-store"
    (store / "sub").mkdir(parents=True, exist_ok=True)
    (store.parent / "secret.mar").touch()
    try:
        path = resolve(f"{store}/{url}" if rooted else url, model_store=store, trusted=False)
    except TorchmgmtError:
        return
    assert PurePosixPath(store.resolve()) in path.resolve().parents
