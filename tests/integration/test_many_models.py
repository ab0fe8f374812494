"""Thousands of models: what each costs does not grow with their number. By counting, as times are the machine's affair."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.handlers import until
from torchmgmt import ModelInfo, ModelManager, Settings
from torchmgmt.served import ServedVersion

FEW, MANY = 100, 1000


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "handler.py").write_text("def handle(data, context):\n    return data and [1 for _ in data]\n")
    return folder


def register(manager: ModelManager, source: Path, numbers: range) -> None:
    for number in numbers:
        manager.register(source, model_name=f"m{number:05}", handler="handler.py", initial_workers=0)


def counts() -> tuple[int, int]:
    """Descriptors and threads of this program."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208 - their number is enough


def test_a_version_without_workers_has_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    """However many are registered, the program has what it had with the first."""
    folder = write_folder(tmp_path / "model")
    with ModelManager() as manager:
        register(manager, folder, range(1))
        before = counts()
        register(manager, folder, range(1, MANY))
        assert counts() == before


def test_archives_of_their_own_in_a_shared_cache_need_no_descriptor_each(tmp_path: Path) -> None:
    """Each unpacked copy is held against other programs, all of them through one descriptor."""
    manifest = {"runtime": "python", "model": {"modelName": "m", "handler": "handler.py", "modelVersion": "1.0"}}
    for number in range(FEW):
        with zipfile.ZipFile(tmp_path / f"{number}.mar", "w") as archive:
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
            archive.writestr(
                "handler.py", f"def handle(data, context):\n    return data and [{number} for _ in data]\n"
            )
    with ModelManager(settings=Settings(cache_dir=tmp_path / "cache")) as manager:
        before = counts()
        for number in range(FEW):
            manager.register(tmp_path / f"{number}.mar", model_name=f"m{number}", initial_workers=0)
        until(lambda: counts() == (before[0] + 1, before[1]))
        for number in range(FEW):
            manager.unregister(f"m{number}")
        until(lambda: counts() == before)


def test_a_version_takes_as_much_memory_among_many_as_among_few(tmp_path: Path) -> None:
    """The memory of the program grows in proportion to the number of versions, and all of it comes back."""
    folder = write_folder(tmp_path / "model")
    with ModelManager() as manager:
        register(manager, folder, range(FEW))
        start = _blocks()
        register(manager, folder, range(FEW, 2 * FEW))
        few = (_blocks() - start) / FEW
        register(manager, folder, range(2 * FEW, MANY))
        many = (_blocks() - start) / (MANY - FEW)
        assert 20 < many < 1.2 * few
        for number in range(FEW, MANY):
            manager.unregister(f"m{number:05}")
        assert _blocks() - start < 0.05 * many * (MANY - FEW)


def _blocks() -> int:
    gc.collect()
    return sys.getallocatedblocks()


def test_a_page_of_the_list_costs_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked up of the models that are on other pages, and nothing for health of those that need no workers."""
    seen: list[str] = []
    real: Callable[..., ModelInfo] = ServedVersion.info

    def info(served: ServedVersion, **options: bool) -> ModelInfo:
        seen.append(served.spec.key.name)
        return real(served, **options)

    monkeypatch.setattr(ServedVersion, "info", info)
    folder = write_folder(tmp_path / "model")
    with ModelManager() as manager:
        register(manager, folder, range(FEW))
        page = [info.name for info in manager.models(start=40, limit=5)]
        assert page == seen == [f"m{number:05}" for number in range(40, 45)]
        seen.clear()
        assert manager.wanted() == ()
        assert manager.models(start=FEW) == manager.models(limit=0) == ()
        assert seen == []
        assert [info.name for info in manager.models(start=FEW - 2)] == [f"m{FEW - 2:05}", f"m{FEW - 1:05}"]


def test_what_failed_at_the_start_is_on_its_page(tmp_path: Path) -> None:
    """A model that could not be loaded stands in the list where its name belongs, and is wanted."""
    folder = write_folder(tmp_path / "model")
    with ModelManager() as manager:
        register(manager, folder, range(3))
        with pytest.raises(Exception, match="nowhere"):
            manager.register("nowhere.mar", model_name="m00001b", initial_workers=0, loaded_at_startup=True)
        assert [info.name for info in manager.models(start=1, limit=2)] == ["m00001", "m00001b"]
        assert [info.name for info in manager.wanted()] == ["m00001b"]
        assert len(manager.models()) == 4
