"""The server program: what ``python -m torchmgmt.http`` does from its arguments to its exit code.

Exit codes: 0 after SIGTERM or SIGINT, 1 if it cannot serve (an address is taken, the store is missing), 2 if its
arguments are wrong, 3 if starting a model's workers was given up and ``on_give_up`` is ``exit``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import attrs
from attrs import define, field, frozen

from torchmgmt import ModelManager, VersionState
from torchmgmt.errors import InvalidArgument, TorchmgmtError
from torchmgmt.events import Event, VersionStateChanged
from torchmgmt.http.access_log import written_in_background
from torchmgmt.http.addresses import Addresses, Role
from torchmgmt.http.command_line import parse_command_line
from torchmgmt.http.server import Servers, start_servers
from torchmgmt.http.tokens import Keys, forget_environment, keys_for
from torchmgmt.settings import Settings

__all__ = ["main"]

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.001
"""How long a thread may keep the others waiting; with Python's 5 ms a flood of requests slows management four times."""
DRAIN_TIMEOUT_S = 20.0
CLOSE_TIMEOUT_S = 8.0
"""Together below the 30 s that orchestrators wait between SIGTERM and SIGKILL."""
LAST_RESORT_S = 5.0
LOADED_AT_ONCE = 4
GAVE_UP = 3
"""The exit code after giving up, and what stands for it among the numbers of signals: no signal 3 is handled here."""
ARCHIVE_SUFFIXES = (".mar", ".tgz", ".tar.gz")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code. Must be called on the main thread."""
    command = parse_command_line(arguments)
    _configure_logging(command.settings.log_level)
    for warning in command.warnings:
        logger.warning("%s", warning)
    try:
        program = Program.prepare(command.settings)
    except InvalidArgument as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(error.strerror or str(error), 1)
    with program.keys, written_in_background():
        return program.run()


@frozen
class ModelToLoad:
    """One item of ``load_models``."""

    url: str
    name: str | None = None

    @classmethod
    def parse(cls, item: str) -> ModelToLoad:
        """Read ``a.mar`` or ``name=a.mar``; a URL may have its own ``=``."""
        name, sign, url = item.partition("=")
        if sign and url and name and not any(char in name for char in "/:?"):
            return cls(url, name)
        return cls(item)


@define
class Program:
    """A server that is ready to run: addresses are bound, nothing is started."""

    settings: Settings
    store: Path | None
    addresses: Addresses
    keys: Keys
    _signals: queue.SimpleQueue[int] = field(factory=queue.SimpleQueue)

    @classmethod
    def prepare(cls, settings: Settings) -> Program:
        """Check what can be checked and bind the addresses; raise InvalidArgument or OSError with one line."""
        store = _find_store(settings)
        with contextlib.ExitStack() as undo:
            addresses = undo.enter_context(Addresses.bind(settings))
            keys = keys_for(settings, addresses)
            undo.pop_all()
        forget_environment(os.environ)
        return cls(attrs.evolve(settings, model_store=store), store, addresses, keys)

    def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        manager = ModelManager(self.store, settings=self.settings, listeners=[self._on_event])
        manager.warm()
        servers = start_servers(manager, self.addresses, self.settings, self.keys)
        self._print_start_lines()
        loader = Loader(manager, self.settings)
        loader.start()
        reason = self._signals.get()
        logger.info("Stopping: requests in flight are finished; a second signal hastens that")
        # At once, because a stop that takes too long ends with os._exit.
        self.keys.close()
        loader.stop()
        self._stop(Stopper(manager, servers))
        return GAVE_UP if reason == GAVE_UP else 0

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # A SimpleQueue, because its put may interrupt itself; setting an Event here could wait for its own lock.
        self._signals.put(number)

    def _on_event(self, event: Event) -> None:
        if self.settings.on_give_up != "exit" or not isinstance(event, VersionStateChanged):
            return
        if event.after is VersionState.FAILED:
            logger.error("Ending, as on_give_up says: the workers of %s could not be started", event.key)
            self._signals.put(GAVE_UP)

    def _stop(self, stopper: Stopper) -> None:
        stopper.start()
        while stopper.is_alive():
            try:
                if self._signals.get(timeout=0.05) == GAVE_UP:
                    continue  # it ends already
            except queue.Empty:
                continue
            logger.warning("Stopping at once")
            stopper.hasten()

    def _print_start_lines(self) -> None:
        on = "on" if self.settings.enable_model_api else "off (--enable-model-api turns it on)"
        _say(f"Model store: {self.store.resolve() if self.store else 'none'}")
        _say(f"Registering and unregistering over HTTP: {on}")
        _say(f"Inference address: {self.addresses[Role.INFERENCE]}")
        _say(f"Management address: {self.addresses[Role.MANAGEMENT]}")


class Loader(threading.Thread):
    """Registers the models to load at start, some at once; one that fails is logged and stops no other."""

    def __init__(self, manager: ModelManager, settings: Settings) -> None:
        super().__init__(name="torchmgmt-loader", daemon=True)
        self._manager = manager
        self._settings = settings
        self._stopped = threading.Event()

    def run(self) -> None:
        """Load all, then say that the server is started."""
        models = _models_to_load(self._settings)
        with ThreadPoolExecutor(LOADED_AT_ONCE, "torchmgmt-loader") as executor:
            for model in models:
                executor.submit(self._load, model)
        if not self._stopped.is_set():
            _say("Model server started")

    def stop(self) -> None:
        """Begin no further model. Those being loaded end when the manager is closed."""
        self._stopped.set()

    def _load(self, model: ModelToLoad) -> None:
        if self._stopped.is_set():
            return
        workers = self._settings.default_workers_per_model
        begun = time.monotonic()
        try:
            registered = self._manager.register(
                model.url,
                model_name=model.name,
                default_workers=(os.cpu_count() or 1) if workers is None else workers,
                loaded_at_startup=True,
            )
        except TorchmgmtError as error:
            # The rest of it, a worker's traceback, has been logged where it happened.
            logger.error("Could not load %s: %s", model.url, str(error).partition("\n")[0])
        except Exception:
            logger.exception("Could not load %s", model.url)
        else:
            seconds = time.monotonic() - begun
            logger.info("Loaded %s version %s in %.1f s", registered.name, registered.version, seconds)


class Stopper(threading.Thread):
    """Ends everything in order: take no request, finish those in flight, stop the workers, close the connections."""

    def __init__(self, manager: ModelManager, servers: Servers) -> None:
        super().__init__(name="torchmgmt-stopper", daemon=True)
        self._manager = manager
        self._servers = servers

    def run(self) -> None:
        """Stop; takes at most about half a minute."""
        self._servers.drain(DRAIN_TIMEOUT_S)
        # What still waits for a worker is answered now: closing the manager ends the wait.
        report = self._manager.close(CLOSE_TIMEOUT_S)
        self._servers.close(1)
        if report.clean:
            logger.info("Stopped")
        else:
            logger.warning("Stopped, but not cleanly: %s", report)

    def hasten(self) -> None:
        """Wait for no request and no worker any more."""
        threading.Thread(target=self._manager.close, args=(0,), daemon=True).start()
        self._servers.close(1)  # enough to tell those who waited for the manager
        self.join(LAST_RESORT_S)
        if self.is_alive():
            logger.error("Stopping takes too long; the workers end with this process")
            os._exit(1)


def _find_store(settings: Settings) -> Path | None:
    if settings.model_store is None:
        usual = Path("model_store")
        return usual if usual.is_dir() else None
    if not settings.model_store.is_dir():
        raise InvalidArgument("model_store", str(settings.model_store), "a folder that exists")
    return settings.model_store


def _models_to_load(settings: Settings) -> list[ModelToLoad]:
    models = []
    for item in settings.load_models:
        if item.lower() == "all":
            models += [ModelToLoad(name) for name in _archives_in(settings.model_store)]
        else:
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


def _configure_logging(level: str) -> None:
    """Send the log to stderr. Only the program does this; the library leaves logging to whom it lives with."""
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLevelName(level)))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _fail(line: str, code: int) -> int:
    sys.stderr.write(f"torchmgmt: error: {line}\n")
    return code
