"""What a manager with a state file has again after a restart, and what becomes of that which cannot be restored."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.http.archives import BROKEN, ECHO, write_model
from torchmgmt import ModelManager, Settings, VersionState
from torchmgmt.errors import InvalidArgument, InvalidStateFile, ModelNotFound, NoWorker, StateFileInUse
from torchmgmt.records import ModelKey, Scale
from torchmgmt.state import StoredModel, from_json


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "state.json"


def seen(manager: ModelManager) -> dict[str, list[tuple[str, bool, Scale, int, VersionState]]]:
    """What a caller sees of all models, in order."""
    return {
        name: [
            (info.version, info.is_default, info.scale, info.spec.batch_size, info.state)
            for info in manager.versions(name)
        ]
        for name in manager
    }


def archive(store: Path, name: str, version: str = "1.0") -> Path:
    """Write a real .mar file."""
    manifest = {"runtime": "python", "model": {"modelName": name, "modelVersion": version, "handler": "handler.py"}}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        file.writestr("handler.py", ECHO)
    path = store / f"{name}.mar"
    path.write_bytes(content.getvalue())
    return path


def test_a_restart_brings_everything_back(tmp_path: Path, state_file: Path) -> None:
    """Versions in their order, defaults, numbers of workers and parameters; and they serve."""
    write_model(tmp_path, "one", name="m", version="1")
    write_model(tmp_path, "two", name="m", version="2")
    archive(tmp_path, "n")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        manager.register("one", backend="thread", batch_size=3, initial_workers=1, max_workers=2)
        manager.register("two", backend="thread", initial_workers=0)
        manager.register("n.mar", backend="thread", model_name="mine", version="7", trusted=False)
        manager.set_default("m", "2")
        manager.scale("m", 2, version="2")
        before = seen(manager)
    with ModelManager(tmp_path, state_file=state_file) as manager:
        assert seen(manager) == before
        assert before["m"][1] == ("2", True, Scale(2, 2), 1, VersionState.READY)
        assert manager.predict("m", "x") == manager.predict("mine", "x", version="7") == "x"
        assert manager.describe("mine").to_dict()["modelUrl"] == "n.mar"
        manager.unregister("mine")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        assert list(manager) == ["m"]


def test_each_change_is_on_the_disk_when_its_call_returns(tmp_path: Path, state_file: Path) -> None:
    """Also of a registration that does not wait; one that failed leaves nothing."""
    write_model(tmp_path, "m", version="1")
    write_model(tmp_path, "m2", name="m", version="2")
    write_model(tmp_path, "broken", BROKEN)

    def stored() -> Sequence[StoredModel]:
        return from_json(state_file.read_bytes()).models

    with ModelManager(tmp_path, state_file=state_file) as manager:
        assert not state_file.exists()
        manager.register("m", backend="thread", synchronous=False)
        assert [model.name for model in stored()] == ["m"]
        with pytest.raises(Exception, match="broken on purpose"):
            manager.register("broken", backend="thread")
        manager.register("m2", backend="thread", initial_workers=0)
        manager.scale("m", 0, 3, version="1", synchronous=False)
        assert stored()[0].versions[0].scale == Scale(0, 3)
        manager.set_default("m", "2")
        assert stored()[0].default == "2"
        manager.unregister("m", "1")
        assert [version.key.version for version in stored()[0].versions] == ["2"]
        manager.unregister("m")
        assert stored() == ()


def test_without_a_state_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the settings of a server say."""
    store, here = tmp_path / "store", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    write_model(store, "m")
    with ModelManager(store, settings=Settings(state_dir=here / "state")) as manager:
        manager.register("m", backend="thread")
        manager.scale("m", 0)
    assert list(here.iterdir()) == []


def test_a_relative_path_is_restored_from_another_folder(
    tmp_path: Path, state_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found where it was, and described as it was called."""
    write_model(tmp_path, "m")
    monkeypatch.chdir(tmp_path)
    with ModelManager(state_file=state_file) as manager:
        manager.register("./m", backend="thread")
    monkeypatch.chdir("/")
    with ModelManager(state_file=state_file) as manager:
        assert manager.describe("m").to_dict()["modelUrl"] == "./m"
        assert manager.predict("m", "x") == "x"


def test_what_cannot_be_restored_stops_no_other_and_stays(tmp_path: Path, state_file: Path) -> None:
    """It is shown as FAILED with its reason, survives further changes and restarts, and comes back as it was."""
    one = write_model(tmp_path, "one", name="m", version="1")
    write_model(tmp_path, "two", name="m", version="2")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        manager.register("one", backend="thread", batch_size=5)
        manager.register("two", backend="thread")
        before = seen(manager)
    one.rename(tmp_path / "away")
    for _ in range(2):
        with ModelManager(tmp_path, state_file=state_file) as manager:
            failed = manager.describe("m", "1")
            assert failed.state is VersionState.FAILED
            assert failed.last_error == "Model not found at: one"
            with pytest.raises(NoWorker, match="Model not found at: one"):
                manager.predict("m", "x", version="1")
            assert manager.predict("m", "x", version="2") == "x"
            manager.scale("m", 1, version="2")
    (tmp_path / "away").rename(one)
    with ModelManager(tmp_path, state_file=state_file) as manager:
        assert seen(manager) == before


def test_registering_it_again_makes_it_the_default_again(tmp_path: Path, state_file: Path) -> None:
    """Another version took its place only because it could not be restored."""
    one = write_model(tmp_path, "one", name="m", version="1")
    write_model(tmp_path, "two", name="m", version="2")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        manager.register("one", backend="thread")
        manager.register("two", backend="thread")
    one.rename(tmp_path / "away")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        assert manager.describe("m").version == "2"
        manager.register("away", backend="thread")
        assert manager.describe("m").version == "1"


def test_unregistering_what_could_not_be_restored_forgets_it(tmp_path: Path, state_file: Path) -> None:
    """Here and on the disk."""
    path = write_model(tmp_path, "m")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        manager.register("m", backend="thread")
    shutil.rmtree(path)
    with ModelManager(tmp_path, state_file=state_file) as manager:
        manager.unregister("m")
        with pytest.raises(ModelNotFound):
            manager.describe("m")
    assert from_json(state_file.read_bytes()).models == ()


def test_another_model_at_its_place_is_not_taken_for_it(tmp_path: Path, state_file: Path) -> None:
    """The reason says what is there now."""
    path = write_model(tmp_path, "m", version="1")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        manager.register("m", backend="thread")
    shutil.rmtree(path)
    write_model(tmp_path, "m", version="2")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        (info,) = manager.versions("m")
        assert (info.version, info.state) == ("1", VersionState.FAILED)
        assert "it holds m:2 now, and m:1 is to be restored from it" in info.last_error


def test_a_changed_archive_is_restored_with_a_warning(
    tmp_path: Path, state_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The stored digest is then the new one's, so that it is said once."""
    path = archive(tmp_path, "m")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        manager.register("m.mar", backend="thread")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("more.txt", "more")
    for _ in range(2):
        with ModelManager(tmp_path, state_file=state_file) as manager:
            assert manager.predict("m", "x") == "x"
    assert [record.getMessage() for record in caplog.records if "has changed since" in record.getMessage()] != []
    assert len([record for record in caplog.records if "has changed since" in record.getMessage()]) == 1


def test_two_managers_cannot_share_a_state_file(state_file: Path) -> None:
    """The second one is refused; closing the first one frees it."""
    with ModelManager(state_file=state_file), pytest.raises(StateFileInUse):
        ModelManager(state_file=state_file)
    ModelManager(state_file=state_file).close()


def test_what_a_later_release_wrote_is_refused_and_kept(state_file: Path) -> None:
    """No manager comes to be, so that none overwrites it."""
    state_file.parent.mkdir()
    state_file.write_text('{"format": 2}')
    with pytest.raises(InvalidStateFile, match="its format is 2"):
        ModelManager(state_file=state_file)
    assert state_file.read_text() == '{"format": 2}'


def test_a_disk_that_fails_stops_no_call(
    tmp_path: Path, state_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models are registered and serve; once the disk works again, all of it is written."""
    write_model(tmp_path, "m")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        monkeypatch.setattr("os.fsync", _full)
        manager.register("m", backend="thread")
        manager.scale("m", 2)
        assert manager.predict("m", "x") == "x"
        assert not state_file.exists()
        monkeypatch.undo()
        manager.scale("m", 1)
    assert len([record for record in caplog.records if "could not be written" in record.getMessage()]) == 1
    assert from_json(state_file.read_bytes()).models[0].versions[0].scale == Scale(1, 1)


def _full(_fd: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_snapshot_of_torchserve_is_restored_where_there_is_no_state(tmp_path: Path, state_file: Path) -> None:
    """With its default and its numbers; after that the state counts."""
    write_model(tmp_path, "one", name="m", version="1")
    write_model(tmp_path, "two", name="m", version="2")
    common = {"minWorkers": 0, "maxWorkers": 1, "batchSize": 4, "maxBatchDelay": 1, "responseTimeout": 9}
    versions = {
        "1": {**common, "defaultVersion": False, "marName": "one"},
        "2": {**common, "defaultVersion": True, "marName": "two"},
        "3": {**common, "defaultVersion": False, "marName": "missing"},
    }
    snapshot = {"name": "x", "modelCount": 1, "models": {"m": versions}}
    with ModelManager(tmp_path, state_file=state_file, restore=False) as manager:
        assert set(manager.restore(snapshot)) == {ModelKey("m", "1"), ModelKey("m", "2")}
        assert [(info.version, info.is_default, info.scale) for info in manager.versions("m")][:2] == [
            ("1", False, Scale(0, 1)),
            ("2", True, Scale(0, 1)),
        ]
        assert manager.describe("m", "3").state is VersionState.FAILED
        manager.unregister("m", "1")
    with ModelManager(tmp_path, state_file=state_file, restore=False) as manager:
        assert manager.restore(snapshot) == (ModelKey("m", "2"),)


def test_a_snapshot_that_is_none_is_refused(tmp_path: Path) -> None:
    """With the reason."""
    with ModelManager(tmp_path) as manager, pytest.raises(InvalidArgument, match="model_snapshot"):
        manager.restore({"models": 1})


def test_items_of_load_models_and_the_state(tmp_path: Path, state_file: Path) -> None:
    """What was unregistered stays away, unless it is named at this start; what is new or failed is loaded."""
    for name in ("a", "b", "c"):
        write_model(tmp_path, name)
    with ModelManager(tmp_path, state_file=state_file) as manager:
        for name in ("a", "b"):
            manager.register(name, backend="thread", loaded_at_startup=True)
        manager.unregister("b")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        assert manager.items_to_load(["a", "b", "c"], over_state=False) == ["c"]
        assert manager.items_to_load(["a", "b", "c"], over_state=True) == ["b", "c"]


def test_what_was_loaded_once_is_known_also_when_nothing_is_left(tmp_path: Path, state_file: Path) -> None:
    """After the last model was unregistered, too, and after further restarts that change nothing."""
    write_model(tmp_path, "a")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        manager.register("a", backend="thread", loaded_at_startup=True)
        manager.unregister("a")
    for _restart in range(2):
        with ModelManager(tmp_path, state_file=state_file) as manager:
            assert manager.items_to_load(["a", "b"], over_state=False) == ["b"]


def test_a_new_version_at_the_place_of_an_item_takes_over(tmp_path: Path, state_file: Path) -> None:
    """An archive that was replaced by its next version is loaded, and the old version is not asked for any more."""
    path = write_model(tmp_path, "m", version="1")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        manager.register("m", backend="thread", loaded_at_startup=True)
    shutil.rmtree(path)
    write_model(tmp_path, "m", version="2")
    with ModelManager(tmp_path, state_file=state_file) as manager:
        assert manager.items_to_load(["m"], over_state=False) == ["m"]
        manager.register("m", backend="thread", loaded_at_startup=True)
        (info,) = manager.versions("m")
        assert (info.version, info.is_default, info.state) == ("2", True, VersionState.READY)
    with ModelManager(tmp_path, state_file=state_file) as manager:
        assert [info.version for info in manager.versions("m")] == ["2"]


class Restarts(RuleBasedStateMachine):
    """Random calls, and restarts in between: after each, a second manager sees in the file what the first one has."""

    names = st.sampled_from(["a", "b"])
    versions = st.sampled_from(["1", "2", "3"])
    workers = st.integers(0, 2)

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="state-test-"))
        self.copies = itertools.count()
        write_model(self.folder, "any")
        self.manager = self.start(self.folder / "state.json")

    def start(self, state_file: Path) -> ModelManager:
        return ModelManager(self.folder, state_file=state_file)

    def has(self, name: str, version: str) -> bool:
        return name in self.manager and version in [info.version for info in self.manager.versions(name)]

    @rule(name=names, version=versions, workers=workers, batch_size=st.none() | st.integers(1, 3), wait=st.booleans())
    def register(self, name: str, version: str, workers: int, batch_size: int | None, wait: bool) -> None:
        if not self.has(name, version):
            self.manager.register(
                "any",
                model_name=name,
                version=version,
                backend="thread",
                initial_workers=workers,
                batch_size=batch_size,
                synchronous=wait,
            )

    @rule(name=names, version=versions, least=workers, more=workers)
    def scale(self, name: str, version: str, least: int, more: int) -> None:
        if self.has(name, version):
            self.manager.scale(name, least, least + more, version=version)

    @rule(name=names, version=versions)
    def set_default(self, name: str, version: str) -> None:
        if self.has(name, version):
            self.manager.set_default(name, version)

    @rule(name=names, version=versions)
    def unregister(self, name: str, version: str) -> None:
        if self.has(name, version) and (
            self.manager.describe(name).version != version or len(self.manager.versions(name)) == 1
        ):
            self.manager.unregister(name, version)

    @rule()
    def restart(self) -> None:
        wanted = shape(self.manager)
        self.manager.close()
        self.manager = self.start(self.folder / "state.json")
        assert shape(self.manager) == wanted

    @precondition(lambda self: (self.folder / "state.json").exists())
    @rule()
    def crash(self) -> None:
        """What lies on the disk now, as it lies there if the program were killed, brings all of it back."""
        copy = self.folder / f"copy{next(self.copies)}.json"
        shutil.copy(self.folder / "state.json", copy)
        with self.start(copy) as other:
            assert shape(other) == shape(self.manager)

    @invariant()
    def nothing_is_left_beside(self) -> None:
        assert not list(self.folder.glob("*.tmp"))

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.manager.close()
            shutil.rmtree(self.folder)


def shape(manager: ModelManager) -> dict[str, list[tuple[Any, ...]]]:
    """All that is to survive."""
    return {name: [each[:4] for each in versions] for name, versions in seen(manager).items()}


def test_a_restart_at_any_point_restores_exactly_what_was_there() -> None:
    """Random registrations, scalings, defaults and removals."""
    few = settings(max_examples=12, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Restarts, settings=few)


@pytest.fixture(autouse=True)
def _leave_no_copy(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("*.tmp"))
