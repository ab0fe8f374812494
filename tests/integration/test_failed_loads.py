"""Versions that were to be there from the start and could not be loaded: shown with their reason until that changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.http.archives import BROKEN, ECHO, write_model
from torchmgmt import ModelManager, Settings, VersionState
from torchmgmt.errors import (
    AlreadyRegistered,
    InvalidArgument,
    ModelNotFound,
    NoWorker,
    TorchmgmtError,
    WorkerStartFailed,
)


def load(manager: ModelManager, url: str, **more: object) -> None:
    """Register as the server does when it starts; what failed is what the test looks at."""
    with pytest.raises(TorchmgmtError):
        manager.register(url, backend="thread", loaded_at_startup=True, **more)  # type: ignore[arg-type]


def test_a_failed_load_is_shown_with_its_reason(tmp_path: Path) -> None:
    """In the list, in describe and in versions, FAILED, with what its archive says; other failures leave no trace."""
    write_model(tmp_path, "broken", BROKEN, version="2.0", config="minWorkers: 2\nmaxWorkers: 2\nbatchSize: 3\n")
    with ModelManager(tmp_path) as manager:
        with pytest.raises(WorkerStartFailed):
            manager.register("broken", backend="thread")
        assert manager.models() == ()
        load(manager, "broken")
        load(manager, "nope.mar")
        broken, nope = manager.models()
        assert (broken.name, broken.version, broken.state) == ("broken", "2.0", VersionState.FAILED)
        assert "broken on purpose" in broken.last_error
        assert broken.to_dict()["batchSize"] == 3
        assert broken.spec.loaded_at_startup
        assert (nope.name, nope.version, nope.last_error) == ("nope", "1.0", "Model not found at: nope.mar")
        assert manager.describe("broken") == manager.describe("broken", "2.0") == broken
        assert manager.versions("broken") == (broken,)
        with pytest.raises(ModelNotFound):
            manager.describe("broken", "9")


def test_its_use_says_why_it_cannot_be_used(tmp_path: Path) -> None:
    """Predicting, scaling and making it the default raise NoWorker with the reason."""
    write_model(tmp_path, "broken", BROKEN)
    with ModelManager(tmp_path) as manager:
        load(manager, "broken")
        for use in (
            lambda: manager.predict("broken", "x"),
            lambda: manager.scale("broken", 1),
            lambda: manager.set_default("broken", "1.0"),
            lambda: manager.describe("broken", customized=True),
        ):
            with pytest.raises(NoWorker, match=r"could not be loaded at the start .*register it again"):
                use()


@pytest.mark.parametrize("call_it", [None, "mine"])
def test_it_is_forgotten_once_it_is_registered(tmp_path: Path, call_it: str | None) -> None:
    """Also when name and version were a guess, because its archive could not be read before."""
    with ModelManager(tmp_path) as manager:
        load(manager, "late", model_name=call_it)
        load(manager, "other")
        write_model(tmp_path, "late", name="real", version="3.1")
        model = manager.register("late", backend="thread", model_name=call_it)
        assert (model.name, model.version) == (call_it or "real", "3.1")
        assert [info.name for info in manager.models()] == sorted([model.name, "other"])
        assert [info.version for info in manager.versions(model.name)] == ["3.1"]
        assert model.predict("x") == "x"


def test_a_second_failure_leaves_the_first_where_it_was(tmp_path: Path) -> None:
    """A call that registers it in vain is told why, and the list still says what the start wanted."""
    write_model(tmp_path, "broken", BROKEN)
    with ModelManager(tmp_path) as manager:
        load(manager, "broken")
        with pytest.raises(WorkerStartFailed):
            manager.register("broken", backend="thread")
        (info,) = manager.models()
        assert info.state is VersionState.FAILED


def test_it_can_be_unregistered(tmp_path: Path) -> None:
    """A version alone, or all of a model; then it is as if it never had been."""
    write_model(tmp_path, "one", BROKEN, name="m", version="1")
    write_model(tmp_path, "two", BROKEN, name="m", version="2")
    with ModelManager(tmp_path) as manager:
        load(manager, "one")
        load(manager, "two")
        manager.unregister("m", "2")
        assert [info.version for info in manager.versions("m")] == ["1"]
        load(manager, "two")
        manager.unregister("m")
        assert manager.models() == ()
        with pytest.raises(ModelNotFound):
            manager.unregister("m")


def test_beside_a_version_that_serves(tmp_path: Path) -> None:
    """The list shows the one that serves, all versions show both, and unregistering the model takes both."""
    write_model(tmp_path, "good", ECHO, name="m", version="1")
    write_model(tmp_path, "bad", BROKEN, name="m", version="2")
    with ModelManager(tmp_path) as manager:
        manager.register("good", backend="thread")
        load(manager, "bad")
        (shown,) = manager.models()
        assert (shown.version, shown.state) == ("1", VersionState.READY)
        states = [(info.version, info.state) for info in manager.versions("m")]
        assert states == [("1", VersionState.READY), ("2", VersionState.FAILED)]
        assert manager.predict("m", "x") == "x"
        with pytest.raises(NoWorker):
            manager.predict("m", "x", version="2")
        manager.unregister("m")
        assert manager.models() == ()


def test_loading_one_twice_is_no_failure_of_it(tmp_path: Path) -> None:
    """The first one serves; the second is refused, and nothing is FAILED."""
    write_model(tmp_path, "good")
    with ModelManager(tmp_path) as manager:
        manager.register("good", backend="thread")
        with pytest.raises(AlreadyRegistered):
            manager.register("good", backend="thread", loaded_at_startup=True)
        assert [info.state for info in manager.versions("good")] == [VersionState.READY]


def test_the_settings_give_a_version_what_nobody_else_says(tmp_path: Path) -> None:
    """The call counts before the archive, that before the settings' models, those before the defaults."""
    write_model(tmp_path, "m", config="batchSize: 2\nmaxBatchDelay: 20\n")
    write_model(tmp_path, "newer", name="m", version="2.0")
    parameters = {"batchSize": 9, "maxBatchDelay": 9, "responseTimeout": 9, "minWorkers": 2, "maxWorkers": 3}
    settings = Settings(models={"m": {"1.0": parameters, "2.0": {"defaultVersion": True}}})
    with ModelManager(tmp_path, settings=settings) as manager:
        item = manager.register("m", batch_size=1, backend="thread").describe().to_dict()
        keys = ("batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout", "minWorkers", "maxWorkers")
        assert [item[key] for key in keys] == [1, 20, 9, 120, 2, 3]
        manager.register("newer", backend="thread")
        assert manager.describe("m").version == "2.0"


def test_a_wrong_parameter_of_the_settings_is_blamed_on_them(tmp_path: Path) -> None:
    """What only the workers' limits refuse names the place in the settings, not the archive."""
    write_model(tmp_path, "m")
    with ModelManager(tmp_path, settings=Settings(models={"m": {"1.0": {"threadsPerWorker": "x"}}})) as manager:
        with pytest.raises(InvalidArgument, match=r"models\.m\.1\.0\.threadsPerWorker in the settings is 'x'"):
            manager.register("m", backend="thread")
        assert manager.models() == ()


def test_a_parameter_of_the_settings_that_nothing_looks_at_is_said(tmp_path: Path, caplog) -> None:
    """A typing error among them is no silent loss."""
    write_model(tmp_path, "m")
    with ModelManager(
        tmp_path, settings=Settings(models={"m": {"1.0": {"batch_size": 4, "minWorkers": 0}}})
    ) as manager:
        manager.register("m", backend="thread")
    (text,) = [record.getMessage() for record in caplog.records if record.name == "torchmgmt.registration"]
    assert text.startswith("models.m.1.0 in the settings: ['batch_size'] have no effect, only ['backend', 'batchSize'")
