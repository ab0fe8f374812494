"""blacklist_env_vars: what worker processes have of the program's environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.handlers import EVAL, write_folder
from torchmgmt import ModelManager, ProcessBackend, Settings
from torchmgmt.errors import InvalidArgument

ALL = "sorted(os.environ)"
INITIAL = "open('/proc/self/environ').read()"


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "secret-1")
    monkeypatch.setenv("MY_PASSWORD_FILE", "secret-2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")


@pytest.fixture
def own_backend(secrets: None) -> Iterator[ProcessBackend]:
    """A backend that several managers use, begun with these variables."""
    backend = ProcessBackend()
    yield backend
    backend.close()


@pytest.mark.parametrize("sharing", ["auto", "never"])
def test_variables_whose_whole_name_matches_are_in_no_worker(
    tmp_path: Path, own_backend: ProcessBackend, sharing: str
) -> None:
    """Not while the handler is loaded and not later, whoever the backend belongs to; the others are as they were."""
    source = f"import os\nLOADED = {ALL}\n{EVAL}"
    settings = Settings(blacklist_env_vars=".*PASSWORD|OMP_.*")
    with ModelManager(settings=settings, backend=own_backend) as manager:
        model = manager.register(
            write_folder(tmp_path / "m", source), model_name="m", handler="handler", share_weights=sharing
        )
        for found in (model.predict(ALL), model.predict("LOADED")):
            assert not {"MY_PASSWORD", "OMP_NUM_THREADS"} & set(found)
            assert {"MY_PASSWORD_FILE", "PATH"} <= set(found)
    with ModelManager(backend=own_backend) as manager:
        model = manager.register(tmp_path / "m", model_name="m", handler="handler", share_weights=sharing)
        assert {"MY_PASSWORD", "OMP_NUM_THREADS"} <= set(model.predict(ALL))


def test_the_processes_of_a_managers_own_backend_never_had_them(tmp_path: Path) -> None:
    """Not even the system tells a worker what they were."""
    with ModelManager(settings=Settings(blacklist_env_vars=".*PASSWORD")) as manager:
        model = manager.register(write_folder(tmp_path / "m", EVAL), model_name="m", handler="handler")
        found = model.predict(INITIAL)
        assert "secret-1" not in found
        assert "secret-2" in found
        assert model.predict("os.environ['OMP_NUM_THREADS']") == "3"


def test_what_is_no_regular_expression_is_refused() -> None:
    """Where the backend is made, and nothing is started."""
    with pytest.raises(InvalidArgument, match="blacklist_env_vars is '\\*', but must be a regular expression, or None"):
        ProcessBackend("*")
