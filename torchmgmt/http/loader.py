"""The models that the server registers when it starts."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from torchmgmt.errors import AlreadyRegistered, InvalidArgument, ManagerClosed, TorchmgmtError
from torchmgmt.records import ModelKey
from torchmgmt.settings import Settings

if TYPE_CHECKING:
    from torchmgmt import ModelManager

__all__ = ["Loader", "ModelToLoad", "models_to_load"]

logger = logging.getLogger(__name__)

ARCHIVE_SUFFIXES = (".mar", ".tgz", ".tar.gz")
NO_MODELS = "standalone"
"""TorchServe's documentation has this word for a server that begins without models."""


@frozen
class ModelToLoad:
    """One item of ``load_models``."""

    url: str
    name: str | None = None

    def __str__(self) -> str:
        return f"{self.name}={self.url}" if self.name else self.url

    @classmethod
    def parse(cls, item: str) -> ModelToLoad:
        """Read ``a.mar`` or ``name=a.mar``; a URL may have its own ``=``."""
        name, sign, url = (part.strip() for part in item.partition("="))
        if sign and url and name and not any(char in name for char in "/:?"):
            return cls(url, name)
        return cls(item.strip())


class Loader(threading.Thread):
    """Restores what the state file holds, then registers the models to load at start, as many at once as there are cores.

    Of these, models that were restored are left out, and, unless they were ``named_at_start``, also those that a call
    unregistered before: what was said at this start counts before the state, that before the configuration file. One
    that fails is logged, is shown by ``models()`` as FAILED with the reason, and stops no other. ``on_loaded`` is
    called on this thread when all were tried, unless :meth:`stop` was called before.
    """

    def __init__(
        self,
        manager: ModelManager,
        settings: Settings,
        on_loaded: Callable[[], None],
        *,
        on_restored: Callable[[Sequence[ModelKey]], None] = lambda _restored: None,
        named_at_start: bool = True,
    ) -> None:
        super().__init__(name="torchmgmt-loader", daemon=True)
        self._manager = manager
        self._settings = settings
        self._on_loaded = on_loaded
        self._on_restored = on_restored
        self._named_at_start = named_at_start
        self._stopped = threading.Event()
        self._loaded = threading.Event()

    @property
    def is_loading(self) -> bool:
        """Whether there are models that were not tried yet; True before the thread is started. Any thread."""
        return not self._loaded.is_set()

    def run(self) -> None:
        """Load all, then say so."""
        try:
            models = self._restore()
        except ManagerClosed:
            return
        with ThreadPoolExecutor(_cores(), "torchmgmt-loader") as executor:
            for model in models:
                executor.submit(self._load, model)
        if not self._stopped.is_set():
            self._loaded.set()
            self._on_loaded()

    def stop(self) -> None:
        """Begin no further model. Those being loaded end when the manager is closed."""
        self._stopped.set()

    def _restore(self) -> list[ModelToLoad]:
        """Restore what is stored; return what is left to load."""
        if self._stopped.is_set():
            return []
        try:
            self._on_restored(self._manager.restore(self._settings.model_snapshot))
        except InvalidArgument as error:
            logger.error("The snapshot is not restored: %s", error)
        items = models_to_load(self._settings)
        left = self._manager.items_to_load([str(item) for item in items], over_state=self._named_at_start)
        return [item for item in items if str(item) in left]

    def _load(self, model: ModelToLoad) -> None:
        if self._stopped.is_set():
            return
        workers = self._settings.default_workers_per_model
        begun = time.monotonic()
        try:
            registered = self._manager.register(
                model.url,
                model_name=model.name,
                default_workers=_cores() if workers is None else workers,
                loaded_at_startup=True,
            )
        except AlreadyRegistered as error:
            logger.warning("%s is not loaded: %s", model.url, error)
        except TorchmgmtError as error:
            # The rest of it, a worker's traceback, has been logged where it happened.
            logger.error("Could not load %s: %s", model.url, str(error).partition("\n")[0])
        except Exception:
            logger.exception("Could not load %s", model.url)
        else:
            seconds = time.monotonic() - begun
            logger.info("Loaded %s version %s in %.1f s", registered.name, registered.version, seconds)


def models_to_load(settings: Settings) -> list[ModelToLoad]:
    """Return what ``load_models`` asks for; ``all`` is every archive in the model store."""
    models = []
    for item in settings.load_models:
        if item.lower() == "all":
            models += [ModelToLoad(name) for name in _archives_in(settings.model_store)]
        elif item.lower() != NO_MODELS:
            models.append(ModelToLoad.parse(item))
    return models


def _archives_in(store: Path | None) -> list[str]:
    if store is None:
        logger.error("--models all needs a model store; there is none")
        return []
    return sorted(path.name for path in store.iterdir() if _is_archive(path))


def _is_archive(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return (path / "MAR-INF" / "MANIFEST.json").is_file()
    return path.name.endswith(ARCHIVE_SUFFIXES)


def _cores() -> int:
    """Return how many cores this process may use, at least 1."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
