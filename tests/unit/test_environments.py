"""Packages of a model's own: installed once for all who ask for the same, and never half."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.handlers import PATIENCE_S, until, write_folder, write_manifest
from tests.wheels import make_wheel, requirements
from torchmgmt.archive import Installing, ModelFolder, ModelSources
from torchmgmt.archive.environments import KEEP_S
from torchmgmt.errors import InvalidArchive, ManagerClosed

Logs = pytest.LogCaptureFixture


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a proxy nor an index of this machine has a say."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")


@pytest.fixture
def index(tmp_path: Path) -> Path:
    make_wheel(tmp_path / "index", "tinypkg", "1.0", "VALUE = 1\n")
    return tmp_path / "index"


def model(folder: Path, text: str, **files: str) -> Path:
    """A model's folder with this requirements file."""
    write_manifest(write_folder(folder, ""), modelName="m", handler="handler.py", requirementsFile="needs.txt")
    for name, content in {"needs": text, **files}.items():
        (folder / f"{name}.txt").write_text(content)
    return folder


def opened(folder: Path, cache: Path | None = None, **installing: object) -> ModelFolder:
    """The model, opened and released again by a program of its own, as it were."""
    sources = ModelSources(None, cache_dir=cache, installing=Installing(**installing))  # type: ignore[arg-type]
    try:
        with sources.open(folder) as found:
            return found
    finally:
        sources.close()


class SilentIndex:
    """A package index that takes calls and never answers."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/simple"
        self._calls: list[socket.socket] = []

    def wait_for_call(self) -> None:
        self._listening.settimeout(PATIENCE_S)
        self._calls.append(self._listening.accept()[0])

    def wait_for_end(self) -> None:
        """Return when whoever called is gone."""
        self._calls[0].settimeout(PATIENCE_S)
        while self._calls[0].recv(4096):
            pass

    def close(self) -> None:
        for each in (self._listening, *self._calls):
            each.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What installs is a program that takes the requirements file itself for the one package that it asks for."""
    program = """
import json, pathlib, shutil, sys
job = json.loads(sys.argv[1])
packages = pathlib.Path(job["target"], "packages")
packages.mkdir()
shutil.copy(pathlib.Path(job["folder"], job["requirements"]), packages)
"""
    (tmp_path / "program.py").write_text(program)
    monkeypatch.setattr("torchmgmt.archive.environments._PROGRAM", tmp_path / "program.py")


@pytest.fixture
def silent() -> Iterator[SilentIndex]:
    index = SilentIndex()
    yield index
    index.close()


def test_it_is_installed_once_for_all_who_ask_for_the_same(tmp_path: Path, index: Path, caplog: Logs) -> None:
    """Threads that open two models at once share one folder, which is gone when the last one gives it back."""
    folders = [model(tmp_path / name, requirements(index, "tinypkg")) for name in ("a", "b")]
    sources = ModelSources(None, installing=Installing())
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(4) as threads:
        found = list(threads.map(sources.open, folders * 2))
    packages = {each.packages for each in found}
    assert len(packages) == 1
    assert caplog.text.count("Installing what") == 1
    place = packages.pop()
    assert place is not None
    for each in found:
        assert (place / "tinypkg.py").is_file()
        each.release()
    assert not place.exists()
    sources.close()


def test_what_the_program_has_is_not_installed_again(tmp_path: Path, index: Path) -> None:
    """A file that asks for nothing else gives no packages."""
    assert opened(model(tmp_path / "m", requirements(index, "attrs", "numpy"))).packages is None


PROGRAM = """
import logging, sys
from torchmgmt.archive import Installing, ModelSources
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
with ModelSources(None, cache_dir=sys.argv[2], installing=Installing()).open(sys.argv[1]) as found:
    print("inode", found.packages.stat().st_ino, flush=True)
    sys.stdin.read()
"""


def start(folder: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(cache)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_programs_that_share_a_cache_install_it_once(tmp_path: Path, index: Path) -> None:
    """Of two that start at once, one installs and the other waits for it; later ones find it."""
    folder, cache = model(tmp_path / "m", requirements(index, "tinypkg")), tmp_path / "cache"
    programs = [start(folder, cache) for _ in range(2)]
    printed = [program.communicate(timeout=50)[0] for program in programs]
    printed.append(start(folder, cache).communicate(timeout=50)[0])
    assert sum(text.count("Installing what") for text in printed) == 1
    assert len({text.splitlines()[-1] for text in printed}) == 1


def test_a_killed_program_takes_pip_along_and_leaves_nothing_half(
    tmp_path: Path, index: Path, silent: SilentIndex
) -> None:
    """After kill -9 pip is gone, too, and the next program installs it from the start."""
    folder, cache = model(tmp_path / "m", f"--index-url {silent.url}\ntinypkg\n"), tmp_path / "cache"
    program = start(folder, cache)
    silent.wait_for_call()
    program.kill()
    program.communicate()
    silent.wait_for_end()
    assert opened(model(folder, requirements(index, "tinypkg")), cache).packages is not None
    left = {path.name for path in (cache / "environments").iterdir()}
    assert len(left) == 1
    assert not any("." in name for name in left)


@pytest.mark.usefixtures("quick")
def test_it_is_kept_for_a_while_after_its_last_use(tmp_path: Path, caplog: Logs) -> None:
    """In a cache_dir the next program finds it; one that nobody has used for long is removed."""
    folder, cache = model(tmp_path / "m", "tinypkg\n"), tmp_path / "cache"
    with caplog.at_level(logging.INFO):
        first = opened(folder, cache).packages
        assert opened(folder, cache).packages == first
        assert caplog.text.count("Installing what") == 1
        assert first is not None
        old = time.time() - KEEP_S - 60
        os.utime(first.parent, (old, old))
        opened(model(tmp_path / "n", "other\n"), cache)
    assert not first.exists()


@pytest.mark.usefixtures("quick")
def test_another_content_is_another_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can change what pip does, other than the index, gives a folder of its own; the rest of a model does not."""
    folder, cache = model(tmp_path / "m", "-r more.txt  # and / all . of it\n"), tmp_path / "cache"
    more = "tinypkg\n./wheels/local-1.0-py3-none-any.whl\n"
    (folder / "more.txt").write_text(more)
    make_wheel(folder / "wheels", "local", "1.0", "VALUE = 1\n")
    found = [opened(folder, cache).packages]
    (folder / "needs.txt").write_text("-rmore.txt\n")
    found.append(opened(folder, cache).packages)
    (folder / "more.txt").write_text(f"{more}\n")
    found.append(opened(folder, cache).packages)
    make_wheel(folder / "wheels", "local", "1.0", "VALUE = 2\n")
    found.append(opened(folder, cache).packages)
    monkeypatch.setattr("torchmgmt.archive.environments.PINNED", ("torch",))
    found.append(opened(folder, cache).packages)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "site" / "added-1.0.dist-info").mkdir(parents=True)
    found.append(opened(folder, cache).packages)
    assert len(set(found)) == 6
    (folder / "weights.bin").write_text("of no interest")
    assert opened(folder, cache).packages == found[-1]


def test_what_lies_in_the_models_folder_is_found(tmp_path: Path) -> None:
    """Paths in the file are relative to it: wheels, folders of wheels, and other files of requirements."""
    text = "--no-index\n--find-links wheels\none\n./wheels/two-1.0-py3-none-any.whl\n-r more.txt\n"
    folder = model(tmp_path / "m", text, more="wheels/three-1.0-py3-none-any.whl\n")
    for name in ("one", "two", "three"):
        make_wheel(folder / "wheels", name, "1.0", "")
    sources = ModelSources(None, installing=Installing())
    with sources.open(folder) as found:
        assert found.packages is not None
        assert {place.stem for place in found.packages.glob("*.py")} == {"one", "two", "three"}
    sources.close()


def test_what_pip_says_is_in_the_error(tmp_path: Path, index: Path) -> None:
    """A package that is not there, or that does not go with what workers have imported; nothing is left of the attempt."""
    cache = tmp_path / "cache"
    with pytest.raises(
        InvalidArchive, match=r"(?s)needs.txt asks for failed.*No matching distribution found for nosuch"
    ):
        opened(model(tmp_path / "m", requirements(index, "nosuch")), cache)
    with pytest.raises(InvalidArchive, match=r"(?s)with what workers have imported already \(.*numpy==.*constraint"):
        opened(model(tmp_path / "m", requirements(index, "numpy==1.0")), cache)
    assert list((cache / "environments").iterdir()) == []


def test_it_has_a_time_limit(tmp_path: Path, silent: SilentIndex) -> None:
    """When it is over, pip is ended, and the error names the setting."""
    folder = model(tmp_path / "m", f"--index-url {silent.url}\ntinypkg\n")
    cache = tmp_path / "cache"
    with pytest.raises(
        InvalidArchive, match=r"(?s)took longer than install_py_dep_timeout \(0.5 s\).*pip's log ends with:"
    ):
        opened(folder, cache, timeout_s=0.5)
    assert list((cache / "environments").iterdir()) == []


def test_closing_ends_it(tmp_path: Path, silent: SilentIndex) -> None:
    """Whoever waits for it gets ManagerClosed, and pip is gone."""
    folder = model(tmp_path / "m", f"--index-url {silent.url}\ntinypkg\n")
    sources = ModelSources(None, installing=Installing())
    raised: list[BaseException] = []

    def wait() -> None:
        with pytest.raises(ManagerClosed) as caught:
            sources.open(folder)
        raised.append(caught.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    silent.wait_for_call()
    sources.close()
    waiting.join(PATIENCE_S)
    assert raised
    silent.wait_for_end()


def test_the_environment_of_pip(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would have it install elsewhere has no effect; what is kept from workers is kept from it."""
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("MY_INDEX", str(index))
    folder = model(tmp_path / "m", "--no-index\n--find-links ${MY_INDEX}\ntinypkg\n")
    assert opened(folder, blacklist_env_vars="MY_IND").packages is not None
    with pytest.raises(InvalidArchive, match="No matching distribution"):
        opened(folder, blacklist_env_vars="MY_.*")
    assert not (tmp_path / "elsewhere").exists()


def test_a_program_without_pip_has_that_of_python(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in environments made by other tools; nothing of it stays in the model's packages."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not list(Path(entry).glob("pip-*.dist-info"))])
    sources = ModelSources(None, installing=Installing())
    with sources.open(model(tmp_path / "m", requirements(index, "tinypkg"))) as found:
        assert found.packages is not None
        names = {place.name.partition("-")[0].partition(".")[0] for place in found.packages.iterdir()}
    sources.close()
    assert names - {"__pycache__"} == {"tinypkg"}


def test_a_file_of_the_model_stands_in_for_none_of_pip(tmp_path: Path, index: Path) -> None:
    """Modules in the model's folder are the handler's, whatever they are called."""
    folder = model(tmp_path / "m", requirements(index, "tinypkg"))
    for name in ("pip", "json", "venv", "optparse"):
        (folder / f"{name}.py").write_text("raise SystemExit(5)")
    assert opened(folder).packages is not None


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "'needs.txt', which is not in it"),
        ("-e .\n", "editable"),
        ("-r more.txt\n", "'more.txt' asks for something editable"),
        ("x" * (1 << 20) + "y", "larger than"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    """The error names it and says why."""
    folder = model(tmp_path / "m", text or "", more="-e .\n")
    if text is None:
        (folder / "needs.txt").unlink()
    with pytest.raises(InvalidArchive, match=says):
        opened(folder)


def test_without_the_setting_it_is_ignored_with_a_word(tmp_path: Path, caplog: Logs) -> None:
    """One line says what is not installed, and how to turn that on."""
    sources = ModelSources(None)
    with sources.open(model(tmp_path / "m", "nosuch\n")) as found:
        assert found.packages is None
    sources.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"needs.txt of {tmp_path / 'm'} is not installed: set install_py_dep_per_model=true for that"
    ]


def test_the_folder_is_gone_when_the_sources_close(tmp_path: Path, index: Path) -> None:
    """Without a cache_dir nothing outlives the program, whoever still uses it."""
    sources = ModelSources(None, installing=Installing())
    found = sources.open(model(tmp_path / "m", requirements(index, "tinypkg")))
    assert found.packages is not None
    sources.close()
    until(lambda: not Path(str(found.packages)).exists(), "the end of the folder")
