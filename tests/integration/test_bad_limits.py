"""Limits of the runtime that are no limits: refused by their names, in a call, in an archive, and in the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.handlers import ECHO, Deployer, write_folder
from tests.integration.test_bad_input import HUGE, NAN, check, identify
from torchmgmt import ModelManager, Settings
from torchmgmt.errors import InvalidArchive, InvalidArgument, TorchmgmtError
from torchmgmt.records import CancelRunning, ShareWeights

WHOLE = (0, -1, 1.5, "2", True, [], HUGE)
SECONDS = (-1, -0.1, "1", True, NAN, float("inf"), [], HUGE)

REGISTER = [
    ("backend", ("ray", "", 5, [], True, "Process")),
    ("share_weights", ("sometimes", "", 5, True, [], b"auto")),
    ("cancel_running", ("sometimes", "", 5, True, [], b"now")),
    ("threads_per_worker", WHOLE),
    ("batches_in_flight", WHOLE),
    ("max_requests", WHOLE),
    ("max_memory", WHOLE),
    ("isolate_errors", (0, 1, "true", "", [], HUGE)),
    ("scale_down_delay", SECONDS),
    ("template_idle_timeout", SECONDS),
]
KEYS = {
    "backend": "backend",
    "share_weights": "shareWeights",
    "cancel_running": "cancelRunning",
    "threads_per_worker": "threadsPerWorker",
    "batches_in_flight": "batchesInFlight",
    "max_requests": "maxRequests",
    "max_memory": "maxMemory",
    "isolate_errors": "isolateErrors",
    "scale_down_delay": "scaleDownDelay",
    "template_idle_timeout": "templateIdleTimeout",
}
ENUMS: Mapping[str, Callable[[str], object]] = {"share_weights": ShareWeights, "cancel_running": CancelRunning}
IN_YAML: Mapping[str, Sequence[str]] = {
    "backend": ("ray", "5", "[process]"),
    "shareWeights": ("sometimes", "true", "5", "[]"),
    "cancelRunning": ("sometimes", "true", "5", "[]"),
    "threadsPerWorker": ("0", "-1", "1.5", "many", "true", "[]"),
    "batchesInFlight": ("0", "four", "2.5", "null"),
    "maxRequests": ("0", "1e3", "often", "{}"),
    "maxMemory": ("0", "2GB", "-1", "false"),
    "isolateErrors": ("1", "maybe", "null", "[]"),
    "scaleDownDelay": ("-1", "soon", ".nan", ".inf", "true"),
    "templateIdleTimeout": ("-0.5", "never", "[]"),
}


@pytest.mark.parametrize("argument, values", REGISTER, ids=identify)
def test_register_refuses(tmp_path: Path, manager: ModelManager, argument: str, values: Sequence[Any]) -> None:
    """A wrong limit in a call is named, with what was given and what is allowed; nothing is registered."""
    folder = write_folder(tmp_path / "m", ECHO)
    for value in values:
        with pytest.raises(TorchmgmtError) as caught:
            manager.register(folder, model_name="m", handler="handler", initial_workers=0, **{argument: value})
        assert len(manager) == 0
        check(caught.value, argument, value)


@pytest.mark.parametrize("key, text", [(key, text) for key, texts in IN_YAML.items() for text in texts])
def test_an_archive_is_refused(tmp_path: Path, manager: ModelManager, key: str, text: str) -> None:
    """A wrong limit in model-config.yaml makes the archive invalid, and is named as it is written there."""
    folder = write_folder(tmp_path / "m", ECHO, config=f"{key}: {text}\n")
    with pytest.raises(InvalidArchive) as caught:
        manager.register(folder, model_name="m", handler="handler")
    assert key in str(caught.value)
    assert len(manager) == 0


def test_every_limit_can_stand_in_every_place(tmp_path: Path, manager: ModelManager) -> None:
    """What may be said in a call may be said in an archive, by the name that an archive would use, with the same effect."""
    told: dict[str, Any] = {
        "share_weights": "never",
        "cancel_running": "now",
        "threads_per_worker": 2,
        "batches_in_flight": 3,
        "max_requests": 1000,
        "max_memory": 1 << 40,
        "isolate_errors": True,
        "scale_down_delay": 1.5,
        "template_idle_timeout": 7,
    }
    deploy = Deployer(tmp_path, manager)
    config = "".join(f"{KEYS[name]}: {value}\n" for name, value in told.items())
    by_call = deploy(ECHO, model_name="call", initial_workers=0, **told).describe().spec
    by_archive = deploy(ECHO, model_name="archive", initial_workers=0, config=config).describe().spec
    names = {"max_memory": "max_memory_bytes", "scale_down_delay": "scale_down_delay_s"}
    names["template_idle_timeout"] = "template_idle_timeout_s"
    for name, value in told.items():
        expected = ENUMS[name](value) if name in ENUMS else value
        field = names.get(name, name)
        assert getattr(by_call, field) == getattr(by_archive, field) == expected, name


@pytest.mark.parametrize("value", ["auto", "ALWAYS", "Never", ShareWeights.NEVER])
def test_share_weights_is_said_as_one_likes(tmp_path: Path, manager: ModelManager, value: str | ShareWeights) -> None:
    """In any case, or as the member; describe says it in lower case."""
    model = Deployer(tmp_path, manager)(ECHO, initial_workers=0, share_weights=value)
    expected = value.value if isinstance(value, ShareWeights) else value.lower()
    assert model.describe().to_dict()["shareWeights"] == expected


@pytest.mark.parametrize("config", ["maxRequests: null\n", "maxMemory:\n", "threadsPerWorker: ~\n"])
def test_nothing_is_no_limit(tmp_path: Path, manager: ModelManager, config: str) -> None:
    """A key without a value says what leaving it out says, where that is a meaning."""
    model = Deployer(tmp_path, manager)(ECHO, initial_workers=0, config=config)
    spec = model.describe().spec
    assert spec.max_requests is spec.max_memory_bytes is spec.threads_per_worker is None


@pytest.mark.parametrize("argument, values", REGISTER[1:], ids=identify)
def test_settings_refuse(argument: str, values: Sequence[Any]) -> None:
    """A wrong limit in the settings is named there."""
    for value in values:
        with pytest.raises(InvalidArgument) as caught:
            Settings(**{argument: value})
        assert caught.value.argument == argument
