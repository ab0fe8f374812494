"""The server program: what ``python -m torchmgmt.http`` does from its arguments to its exit code.

Its exit codes stand in ``--help``, which is :mod:`torchmgmt.http.command_line`'s.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import attrs
from attrs import define, field

from torchmgmt import ModelManager, VersionState
from torchmgmt.allocator import keep_freed_memory
from torchmgmt.errors import InvalidArgument, TorchmgmtError
from torchmgmt.events import Event, VersionStateChanged
from torchmgmt.http.access_log import LineFormatter, written_in_background
from torchmgmt.http.addresses import Addresses, Role
from torchmgmt.http.background import start_in_background, stop_in_background
from torchmgmt.http.command_line import Action, CommandLine, parse_command_line
from torchmgmt.http.console import STARTED, Console
from torchmgmt.http.loader import Loader
from torchmgmt.http.metrics_app import create_metrics_app
from torchmgmt.http.orphans import OrphanReaper
from torchmgmt.http.pid_file import PidFile
from torchmgmt.http.server import Servers, start_servers
from torchmgmt.http.systemd import notify_systemd
from torchmgmt.http.tokens import Keys, forget_environment, keys_for
from torchmgmt.metrics import Metrics
from torchmgmt.records import ModelKey
from torchmgmt.settings import Settings

__all__ = ["main", "serve_here"]

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.001
"""How long a thread may keep the others waiting; with Python's 5 ms a flood of requests slows management four times."""
YOUNG_OBJECTS = 20_000
"""So many new objects the collector lets be before it looks at them: requests in flight are not worth a look."""
KEPT_BYTES = 128 << 20
"""Of freed memory: for the bodies of the next requests."""
DRAIN_TIMEOUT_S = 20.0
CLOSE_TIMEOUT_S = 8.0
"""Together below the 30 s that orchestrators wait between SIGTERM and SIGKILL."""
REPEAT_S = 1.0
"""A signal that comes so soon after the first is the same one again: ``timeout`` and Ctrl-C in a pipeline send it twice."""
LAST_RESORT_S = 5.0
STATE_FILE = Path("torchmgmt", "state.json")
"""Below state_dir. Not in it: TorchServe takes each file in its logs/config for a snapshot, and cannot start with others."""
GAVE_UP = 3
"""The exit code after giving up, and what stands for it among the numbers of signals: no signal 3 is handled here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments (``sys.argv`` if None) ask for; return the exit code. Must be called on the main thread.

    To serve takes until SIGTERM or SIGINT.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = parse_command_line(given)
    if command.action is Action.STOP:
        return stop_in_background(Console())
    if command.action is Action.START:
        _begin_log(command)  # whoever starts it sees the warnings, which stand in its log, too
        return start_in_background(given, Console())
    return serve_here(command, Console())


def serve_here(command: CommandLine, console: Console) -> int:
    """Serve in this process until SIGTERM or SIGINT; return the exit code. Must be called on the main thread."""
    _begin_log(command)
    with contextlib.ExitStack() as stack:
        try:
            if command.action is not Action.SERVE:
                stack.enter_context(PidFile.of_working_directory().held())
            program = Program.prepare(command, console)
        except InvalidArgument as error:
            return console.fail(str(error), 2)
        except OSError as error:
            return console.fail(error.strerror or str(error), 1)
        stack.enter_context(program.keys)
        stack.enter_context(written_in_background())
        return program.run()


@define
class Program:
    """A server that is ready to run: addresses are bound, nothing is started."""

    settings: Settings
    config_file: Path | None
    store: Path | None
    console: Console
    addresses: Addresses
    keys: Keys
    names_models: bool = False
    _signals: queue.SimpleQueue[int] = field(factory=queue.SimpleQueue)

    @classmethod
    def prepare(cls, command: CommandLine, console: Console) -> Program:
        """Check what can be checked and bind the addresses; raise InvalidArgument or OSError with one line."""
        settings = command.settings
        store = _find_store(settings)
        with contextlib.ExitStack() as undo:
            addresses = undo.enter_context(Addresses.bind(settings, _roles(settings)))
            keys = keys_for(settings, addresses)
            undo.pop_all()
        forget_environment(os.environ)
        settings = attrs.evolve(settings, model_store=store)
        return cls(settings, command.file, store, console, addresses, keys, command.names_models)

    def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            manager = self._make_manager()
        except (TorchmgmtError, OSError) as error:
            return self.console.fail(f"{error} (--state-dir names another folder, --ncs keeps no state)", 1)
        manager.warm()
        if OrphanReaper.is_needed():
            OrphanReaper().start()
        loader = Loader(
            manager,
            self.settings,
            self._on_loaded,
            on_restored=self._on_restored,
            named_at_start=self.names_models,
        )
        metrics = Metrics(manager, with_host=not self.settings.disable_system_metrics)
        servers = start_servers(
            manager,
            self.addresses,
            self.settings,
            self.keys,
            metrics=create_metrics_app(metrics),
            is_loading=lambda: loader.is_loading,
            on_response=metrics.count_response,
        )
        self._print_start_lines()
        _collect_less_garbage()
        keep_freed_memory(KEPT_BYTES)
        loader.start()
        reason = self._signals.get()
        began = time.monotonic()
        notify_systemd("STOPPING=1")
        logger.info("Stopping: requests in flight are finished; a second signal hastens that")
        # At once, because a stop that takes too long ends with os._exit.
        self.keys.close()
        loader.stop()
        self._stop(Stopper(manager, servers), began)
        return GAVE_UP if reason == GAVE_UP else 0

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # A SimpleQueue, because its put may interrupt itself; setting an Event here could wait for its own lock.
        self._signals.put(number)

    @property
    def _state_file(self) -> Path | None:
        return None if self.settings.no_config_snapshots else self.settings.state_dir / STATE_FILE

    def _make_manager(self) -> ModelManager:
        return ModelManager(
            self.store,
            settings=self.settings,
            state_file=self._state_file,
            restore=False,  # the loader does, while /ping answers already
            listeners=[self._on_event],
        )

    def _on_restored(self, restored: Sequence[ModelKey]) -> None:
        if restored:
            names = ", ".join(f"{key.name} version {key.version}" for key in restored)
            self.console.say(f"Restored: {names}; start with --ncs to begin without what was there")

    def _on_loaded(self) -> None:
        self.console.say(STARTED)
        self.console.let_go()
        notify_systemd("READY=1")

    def _on_event(self, event: Event) -> None:
        if self.settings.on_give_up != "exit" or not isinstance(event, VersionStateChanged):
            return
        if event.after is VersionState.FAILED:
            logger.error("Ending, as on_give_up says: the workers of %s could not be started", event.key)
            self._signals.put(GAVE_UP)

    def _stop(self, stopper: Stopper, began: float) -> None:
        stopper.start()
        while stopper.is_alive():
            try:
                if self._signals.get(timeout=0.05) == GAVE_UP or time.monotonic() < began + REPEAT_S:
                    continue  # it ends already
            except queue.Empty:
                continue
            logger.warning("Stopping at once")
            stopper.hasten()

    def _print_start_lines(self) -> None:
        on = "on" if self.settings.enable_model_api else "off (--enable-model-api turns it on)"
        self.console.say(f"Configuration file: {self.config_file.resolve() if self.config_file else 'none'}")
        self.console.say(f"Model store: {self.store.resolve() if self.store else 'none'}")
        state = f"{self._state_file.resolve()} (--ncs turns it off)" if self._state_file else "none"
        self.console.say(f"State file: {state}")
        self.console.say(f"Registering and unregistering over HTTP: {on}")
        self.console.say(f"Inference address: {self.addresses[Role.INFERENCE]}")
        self.console.say(f"Management address: {self.addresses[Role.MANAGEMENT]}")
        if self.settings.enable_metrics_api:
            self.console.say(f"Metrics address: {self.addresses[Role.METRICS]}")


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


def _collect_less_garbage() -> None:
    """Have the collector look at what a request leaves, not again and again at all that was made at the start."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


def _roles(settings: Settings) -> list[Role]:
    return [role for role in Role if role is not Role.METRICS or settings.enable_metrics_api]


def _find_store(settings: Settings) -> Path | None:
    if settings.model_store is None:
        usual = Path("model_store")
        return usual if usual.is_dir() else None
    if not settings.model_store.is_dir():
        raise InvalidArgument("model_store", str(settings.model_store), "a folder that exists")
    return settings.model_store


def _begin_log(command: CommandLine) -> None:
    """Send the log to stderr. Only the program does this; the library leaves logging to whom it lives with."""
    level = command.settings.log_level
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLevelName(level)))
    for warning in command.warnings:
        logger.warning("%s", warning)
