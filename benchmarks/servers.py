"""A server program: started, asked, weighed and ended. Those with TorchServe's Management API are managed through it, too."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import psutil
from attrs import frozen

from benchmarks.measure import pss_mb
from benchmarks.processes import end_session, tree

LOOPBACK = "127.0.0.1"
_HEALTHY_WITHIN_S = 60.0
_POLL_S = 0.002
_ANSWER_WITHIN_S = 120.0
_CALLERS = 8


class ServerFailed(Exception):
    """A server did not start, or answered with an error."""


@frozen
class Launch:
    """How a server program is started."""

    command: Sequence[str]
    inference_port: int
    management_port: int
    """0: it has no Management API."""
    folder: Path
    """Where it runs and where its output goes; the caller removes it."""
    environment: Mapping[str, str] | None = None
    """None: that of this process."""
    behind_launcher: bool = False
    """Whether the command only starts the server as a child and waits; the launcher is not weighed then."""
    health: tuple[str, bytes] = ("/ping", b'"Healthy"')
    """The path that answers 200 when it serves, and what the answer has to hold then."""


def free_ports(count: int) -> list[int]:
    """Return ports that nothing on the loopback address listens on at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Server:
    """A running server. Use it in a ``with`` block; all its processes are gone at the end. Raises ServerFailed."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._log = launch.folder / "server.log"
        self.healthy_after_s = 0.0
        """How long it took from the command to a healthy ``/ping``."""

    def __enter__(self) -> Server:
        with self._log.open("wb") as log:
            started = time.perf_counter()
            self._process = subprocess.Popen(
                self._launch.command,
                cwd=self._launch.folder,
                env=self._launch.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_healthy(started + _HEALTHY_WITHIN_S)
            self.healthy_after_s = time.perf_counter() - started
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end()

    @property
    def inference_port(self) -> int:
        """Where it takes requests."""
        return self._launch.inference_port

    @property
    def management_port(self) -> int:
        """Where it is managed."""
        return self._launch.management_port

    def register(self, archive: str, workers: int = 1, **more: object) -> None:
        """Register an archive of its model store; block until so many workers are ready."""
        query = urlencode({"url": archive, "initial_workers": workers, "synchronous": "true", **more})
        self._ask("POST", f"/models?{query}", self._launch.management_port)

    def scale(self, name: str, workers: int) -> None:
        """Set the number of workers; block until they are ready."""
        query = urlencode({"min_worker": workers, "max_worker": workers, "synchronous": "true"})
        self._ask("PUT", f"/models/{name}?{query}", self._launch.management_port)

    def check_ready(self, name: str, workers: int) -> None:
        """Raise ServerFailed unless so many workers are ready: nobody's time counts for less than was asked."""
        description = json.loads(self._ask("GET", f"/models/{name}", self._launch.management_port))
        states = [worker["status"] for worker in description[0]["workers"]]
        if states != ["READY"] * workers:
            raise ServerFailed(f"{workers} workers of {name} should be ready; their states are {states}")

    def unregister(self, name: str) -> None:
        """Unregister the only version of a model."""
        self._ask("DELETE", f"/models/{name}", self._launch.management_port)

    def predict_many(self, name: str, data: object, count: int) -> None:
        """Ask for so many predictions, 8 at a time, as JSON; block until all are answered."""
        self.post_many(f"/predictions/{name}", data, count)

    def post_many(self, path: str, data: object, count: int) -> None:
        """The same, to any path where it takes requests."""
        body = json.dumps(data).encode()

        def predict(_number: int) -> None:
            self._ask("POST", path, self._launch.inference_port, body)

        with ThreadPoolExecutor(_CALLERS) as callers:
            list(callers.map(predict, range(count)))

    def pss_mb(self) -> float:
        """Return what all its processes weigh together, in MB."""
        return pss_mb(process.pid for process in self._processes())

    def own_pss_mb(self) -> float:
        """Return what the process that manages the models weighs, without workers and what they are made from."""
        return pss_mb(process.pid for process in self._processes()[:1])

    def check_alive(self) -> None:
        """Raise ServerFailed, with its last line, if it has ended."""
        if self._process.poll() is not None:
            raise ServerFailed(f"it ended with exit status {self._process.returncode}: {self._last_line()}")

    def _wait_healthy(self, until: float) -> None:
        while not self._is_healthy():
            self.check_alive()
            if time.perf_counter() > until:
                raise ServerFailed(f"it was not healthy after {_HEALTHY_WITHIN_S:g} s: {self._last_line()}")
            time.sleep(_POLL_S)

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, self._launch.inference_port, timeout=5)
        try:
            path, text = self._launch.health
            connection.request("GET", path)
            answer = connection.getresponse()
            said = answer.read()
            return answer.status == http.client.OK and text in said
        except (OSError, http.client.HTTPException):  # not there yet, or not all of it
            return False
        finally:
            connection.close()

    def _ask(self, method: str, path: str, port: int, body: bytes | None = None) -> bytes:
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_ANSWER_WITHIN_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            answer = connection.getresponse()
            said = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerFailed(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()
        if answer.status >= http.client.BAD_REQUEST:
            raise ServerFailed(f"{method} {path}: {answer.status} {said[:300]!r}")
        return said

    def _last_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _processes(self) -> list[psutil.Process]:
        """The one that serves first, then all that descend from it."""
        return tree(self._process.pid)[1 if self._launch.behind_launcher else 0 :]

    def _end(self) -> None:
        processes = self._processes()
        # A launcher that gets the signal would leave the server behind. One with a Management API ends its workers by
        # itself; LitServe leaves them to whoever asks them.
        end_session(self._process, processes[:1] if self._launch.management_port else processes)
