"""Versions of a model: side by side, one of them the default; and where their limits come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.handlers import ECHO, Deployer, Gate, until, write_folder, write_manifest
from torchmgmt import ModelManager, ProcessBackend, Settings
from torchmgmt.errors import AlreadyRegistered, DefaultVersionInUse, ModelNotFound, ModelVersionNotFound

CONFIG = "minWorkers: 0\nmaxWorkers: 3\nbatchSize: 4\nmaxBatchDelay: 7\nresponseTimeout: 11\nstartupTimeout: 13\njobQueueSize: 17\n"


def says(text: str) -> str:
    return f"def handle(data, context):\n    return data and [{text!r} for row in data]\n"


def test_versions_live_side_by_side(deploy: Deployer, manager: ModelManager) -> None:
    """Each version answers with its own code in its own workers; without a version the first one answers."""
    for version in ("1.0", "2.0", "beta"):
        deploy(says(version), version=version)
    assert manager.predict("m") == "1.0"
    assert [manager.predict("m", version=version) for version in ("beta", "2.0", "1.0")] == ["beta", "2.0", "1.0"]
    assert [(info.version, info.is_default) for info in manager.versions("m")] == [
        ("1.0", True),
        ("2.0", False),
        ("beta", False),
    ]
    pids = [worker.pid for info in manager.versions("m") for worker in info.workers]
    assert len(set(pids)) == 3
    assert [info.version for info in manager.models()] == ["1.0"]
    assert len(manager) == 1


def test_each_version_has_its_own_queue(deploy: Deployer, manager: ModelManager, gate: Gate) -> None:
    """A version that is busy, with a queue, holds up no other version of the model."""
    one, two = deploy(), deploy(version="2.0")
    running = one.submit(f"wait_for({gate.path!r})")
    until(running.running, "the request runs")
    waiting = [one.submit("1") for _ in range(5)]
    assert two.predict("'meanwhile'", timeout=20) == "meanwhile"
    assert [info.queue_length for info in manager.versions("m")] == [5, 0]
    gate.open()
    assert [future.result(20) for future in waiting] == [1] * 5


def test_set_default_sends_requests_to_another_version(deploy: Deployer, manager: ModelManager) -> None:
    """set_default decides who answers requests without a version; a Model stays with its own version."""
    one, two = deploy(says("one")), deploy(says("two"), version="2.0")
    manager.set_default("m", "2.0")
    assert (manager.predict("m"), one.predict(), two.predict()) == ("two", "one", "two")
    assert manager["m"] == two
    assert manager.describe("m").version == "2.0"
    manager.set_default("m", "2.0")
    with pytest.raises(ModelVersionNotFound, match=r"9\.9"):
        manager.set_default("m", "9.9")
    assert manager.describe("m").version == "2.0"


def test_no_request_is_lost_while_the_default_changes(deploy: Deployer, manager: ModelManager) -> None:
    """Requests without a version are all answered while the default goes to a new version and the old one is removed."""
    deploy(says("old"), initial_workers=1)
    futures = [manager.submit("m") for _ in range(20)]
    deploy(says("new"), version="2.0")
    futures += [manager.submit("m") for _ in range(20)]
    manager.set_default("m", "2.0")
    futures += [manager.submit("m") for _ in range(20)]
    manager.unregister("m", "1.0")
    futures += [manager.submit("m") for _ in range(20)]
    assert [future.result(20) for future in futures] == ["old"] * 40 + ["new"] * 40


def test_the_default_cannot_be_unregistered_while_others_exist(deploy: Deployer, manager: ModelManager) -> None:
    """The default version stays while others exist; the last version can go, and its name is free then."""
    one, two = deploy(says("one")), deploy(says("two"), version="2.0")
    for call in (lambda: manager.unregister("m"), lambda: manager.unregister("m", "1.0"), one.unregister):
        with pytest.raises(DefaultVersionInUse, match="Cannot remove default version for model m"):
            call()
    assert one.predict() == "one"
    two.unregister()
    with pytest.raises(ModelVersionNotFound):
        two.predict()
    assert manager.unregister("m").clean
    with pytest.raises(ModelNotFound):
        one.predict()
    assert (len(manager), list(manager), "m" in manager) == (0, [], False)
    assert deploy(says("again")).predict() == "again"


def test_a_second_unregistration_finds_nothing(deploy: Deployer) -> None:
    """Unregistering a version that is gone is ModelNotFound."""
    model = deploy(ECHO)
    model.unregister()
    with pytest.raises(ModelNotFound):
        model.unregister()


def test_a_version_is_registered_once(deploy: Deployer, manager: ModelManager) -> None:
    """Registering a version again is refused while it exists, and leaves the existing one alone."""
    model = deploy(says("first"))
    with pytest.raises(AlreadyRegistered, match=r"version 1\.0 is already registered for model m"):
        deploy(says("second"))
    assert model.predict() == "first"
    assert len(manager.versions("m")) == 1


def test_a_name_is_not_free_before_it_is_left(deploy: Deployer, manager: ModelManager, gate: Gate) -> None:
    """While a version drains it takes no request, its name cannot be taken; what it accepted is answered."""
    import threading

    model = deploy()
    running = model.submit(f"wait_for({gate.path!r}) or 'ran'")
    until(running.running, "the request runs")
    waiting = model.submit("'waited'")
    going = threading.Thread(target=model.unregister)
    going.start()
    until(lambda: "m" not in manager, "the model is withdrawn")
    with pytest.raises(ModelNotFound):
        model.predict("1")
    with pytest.raises(AlreadyRegistered):
        deploy(ECHO)
    gate.open()
    going.join(20)
    assert (running.result(0), waiting.result(0)) == ("ran", "waited")
    assert deploy(ECHO).predict("free") == "free"


def test_unregistering_without_time_fails_what_runs(deploy: Deployer) -> None:
    """With timeout 0 what runs and what waits fails with an error, and the report counts it."""
    model = deploy()
    running = model.submit("threading.Event().wait()")
    waiting = model.submit("1")
    until(running.running, "the request runs")
    report = model.unregister(timeout=0)
    assert (report.clean, report.failed_requests) == (False, 2)
    assert running.exception(0) is not None
    assert waiting.exception(0) is not None


def test_what_the_call_says_beats_the_configuration(deploy: Deployer) -> None:
    """A value in the call wins over the archive's model-config.yaml, which wins over the default."""
    spec = deploy(ECHO, config=CONFIG, max_batch_delay=None).describe().spec
    assert (spec.batch_size, spec.max_batch_delay_ms, spec.response_timeout_s) == (4, 7, 11)
    assert (spec.startup_timeout_s, spec.job_queue_size) == (13, 17)
    info = deploy(
        ECHO,
        version="2.0",
        config=CONFIG,
        batch_size=2,
        max_batch_delay=5,
        response_timeout=9,
        startup_timeout=8.5,
        initial_workers=1,
    ).describe()
    spec = info.spec
    assert (spec.batch_size, spec.max_batch_delay_ms, spec.response_timeout_s) == (2, 5, 9)
    assert (spec.startup_timeout_s, spec.job_queue_size) == (8.5, 17)
    assert (info.scale.min_workers, info.scale.max_workers) == (1, 1)


def test_workers_of_the_configuration(deploy: Deployer) -> None:
    """minWorkers and maxWorkers of the configuration count when the call says no number of workers."""
    info = deploy(ECHO, config="minWorkers: 2\nmaxWorkers: 3\n").describe()
    assert (info.scale.min_workers, info.scale.max_workers, len(info.workers)) == (2, 3, 2)


def test_defaults_are_those_of_the_contract(manager: ModelManager, tmp_path: Path) -> None:
    """Without call, configuration and settings: one worker, batches of 1, 100 ms, 120 s and 120 s, 100 in the queue."""
    folder = write_folder(tmp_path / "model", ECHO)
    item = manager.register(folder, model_name="m", handler="handler").describe().to_dict()
    assert (item["minWorkers"], item["maxWorkers"], item["batchSize"], item["maxBatchDelay"]) == (1, 1, 1, 100)
    assert (item["responseTimeout"], item["startupTimeout"], item["maxRetryTimeoutInSec"]) == (120, 120, 300)
    assert item["jobQueueStatus"]["remainingCapacity"] == 100
    assert item["modelUrl"] == str(folder)


def test_settings_stand_behind_the_configuration(backend: ProcessBackend, tmp_path: Path) -> None:
    """The manager's settings count where neither call nor configuration says anything."""
    settings = Settings(
        default_workers_per_model=0, job_queue_size=5, default_response_timeout=6, default_startup_timeout=7
    )
    with ModelManager(backend=backend, settings=settings) as manager:
        deploy = Deployer(tmp_path, manager)
        info = deploy(ECHO).describe()
        assert (info.scale.min_workers, info.queue_capacity) == (0, 5)
        assert (info.spec.response_timeout_s, info.spec.startup_timeout_s) == (6, 7)
        info = deploy(ECHO, version="2.0", config=CONFIG).describe()
        assert (info.queue_capacity, info.spec.response_timeout_s) == (17, 11)


def test_name_and_version_come_from_the_manifest_unless_given(manager: ModelManager, tmp_path: Path) -> None:
    """A folder's manifest names model, version and handler; what the call says wins."""
    folder = write_manifest(
        write_folder(tmp_path / "model", ECHO), modelName="named", modelVersion="3.1", handler="handler.py"
    )
    model = manager.register(folder)
    assert (model.name, model.version) == ("named", "3.1")
    other = manager.register(folder, model_name="mine", version="7", handler="handler")
    assert (other.name, other.version, other.predict(1)) == ("mine", "7", 1)
    assert list(manager) == ["mine", "named"]


def test_names_may_be_any_text(deploy: Deployer, manager: ModelManager) -> None:
    """A model's name may have spaces, quotes, percent signs and any script; it is served and described by it."""
    for name in ("an image model", "模型", "100%s{}", "a'b\"c", "ü\u200bé", "-rf", "..", "new\nline"):
        model = deploy(ECHO, model_name=name)
        assert manager.predict(name, name) == name
        assert model.describe().to_dict()["modelName"] == name
        model.unregister()
