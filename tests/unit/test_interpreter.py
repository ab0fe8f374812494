"""Which interpreter is started: the one that runs, the one that was named, and never the program itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchmgmt import interpreter as module
from torchmgmt.interpreter import STARTED, interpreter

RUNNING = sys.executable


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program runs as ``app``, which is no interpreter by its name, and has named none."""
    app = tmp_path / "app"
    app.symlink_to(RUNNING)
    be(app, monkeypatch)
    return app


def be(path: Path | str, monkeypatch: pytest.MonkeyPatch, *, is_frozen: bool = False) -> None:
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(module, "_AT_FIRST", str(path))
    monkeypatch.setattr(sys, "frozen", is_frozen, raising=False)
    monkeypatch.delitem(sys.modules, "multiprocessing.spawn", raising=False)


def name(path: Path | str | bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have multiprocessing know of ``path``; it is bytes since Python 3.11."""
    known = os.fsencode(path) if isinstance(path, Path) else path
    monkeypatch.setitem(sys.modules, "multiprocessing.spawn", SimpleNamespace(get_executable=lambda: known))  # type: ignore[misc]


def test_it_is_the_one_that_runs() -> None:
    """Whatever multiprocessing was told by itself when it was imported."""
    assert interpreter() == RUNNING


def test_a_named_one_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As text or as bytes; whatever it is called, it is what the program wants."""
    for named in ("/opt/python3", b"/opt/python3", tmp_path / "interpreter"):
        name(named, monkeypatch)
        assert interpreter() == os.fsdecode(named)


def test_what_multiprocessing_knew_before_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that sets ``sys.executable`` right after multiprocessing was imported gets what it has set."""
    name(RUNNING, monkeypatch)
    monkeypatch.setattr(sys, "executable", "/opt/python3")
    assert interpreter() == "/opt/python3"


def test_a_program_that_embeds_python_is_not_started(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused with what to do, until it names an interpreter."""
    with pytest.raises(OSError, match=r"embeds Python.*multiprocessing\.set_executable"):
        interpreter()
    name(None, monkeypatch)
    with pytest.raises(OSError, match="embeds Python"):
        interpreter()
    name("/opt/any", monkeypatch)
    assert interpreter() == "/opt/any"


def test_a_program_cannot_name_itself(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not under another path either, frozen or not."""
    other = program.with_name("other")
    other.symlink_to(program)
    name(other, monkeypatch)
    with pytest.raises(OSError, match="embeds Python"):
        interpreter()
    monkeypatch.setattr(sys, "frozen", True)
    with pytest.raises(OSError, match="frozen"):
        interpreter()


@pytest.mark.parametrize("called", ["python3.11", "Python", "pypy3", "mayapy", "hython3.10", "pvpython", "PYTHON.EXE"])
def test_an_interpreter_is_known_by_its_name(called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one that a program with Python in it brings along."""
    path = tmp_path / called
    path.symlink_to(RUNNING)
    be(path, monkeypatch)
    assert interpreter() == str(path)


@pytest.mark.parametrize("called", ["app", "python-tool", "mayapy"])
def test_a_frozen_program_is_not_started(called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called; nor is a script that starts it."""
    frozen = tmp_path / called
    frozen.symlink_to(RUNNING)
    be(frozen, monkeypatch, is_frozen=True)
    with pytest.raises(OSError, match=r"frozen.*multiprocessing\.set_executable"):
        interpreter()
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(OSError, match="frozen"):
        interpreter()
    name("/opt/any", monkeypatch)
    assert interpreter() == "/opt/any"


def test_a_frozen_program_may_bring_an_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is another file than itself."""
    brought = tmp_path / "python3"
    brought.write_text("")
    be(brought, monkeypatch, is_frozen=True)
    assert interpreter() == str(brought)


def test_no_interpreter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``sys.executable`` is empty."""
    be("", monkeypatch)
    with pytest.raises(OSError, match=r"sys\.executable is empty"):
        interpreter()


def test_a_program_that_was_started_as_an_interpreter_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all names deceive, there is no chain without end."""
    monkeypatch.setenv(STARTED, "1")
    with pytest.raises(OSError, match="was itself started"):
        interpreter()
