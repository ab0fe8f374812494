"""Which server serves what: an address of its own for each API, or one for several.

The Management API on an http:// address of its own is served by waitress; all else, TLS included, by uvicorn, which
mounts the same application: there is never a second set of resources.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from attrs import frozen

from torchmgmt.errors import InvalidArgument
from torchmgmt.http import operations as ops
from torchmgmt.http.addresses import Addresses, BoundAddress, Role
from torchmgmt.http.asgi import ASGIApp
from torchmgmt.http.asgi_server import ASGIServer, no_work
from torchmgmt.http.callers import log_who_may_call
from torchmgmt.http.contract import contract_of
from torchmgmt.http.inference import InferenceApp, create_inference_app
from torchmgmt.http.limits import Limits, connection_limit
from torchmgmt.http.management import create_app
from torchmgmt.http.management_server import CLOSE_TIMEOUT_S, THREADS, ManagementServer
from torchmgmt.http.mount import MountedWSGI, Paths, counted
from torchmgmt.http.operations import Operation
from torchmgmt.http.sockets import address_of, bind
from torchmgmt.http.tls import tls_context
from torchmgmt.http.tokens import Keys, fixed_keys, keys_for
from torchmgmt.settings import Address, Settings

if TYPE_CHECKING:
    from torchmgmt import ModelManager

__all__ = [
    "RunningServer",
    "Servers",
    "address_of",
    "bind",
    "serve",
    "start_inference",
    "start_management",
    "start_server",
    "start_servers",
]


logger = logging.getLogger(__name__)

# Where both APIs have paths below one segment, on an address that serves both.
INVOKE = re.compile(r"(?:POST|OPTIONS) /models/[^/]+/invoke/?")
REPOSITORY = re.compile(r"[A-Z]+ /v2/repository(?:/.*)?")
INFERENCE_SEGMENTS = frozenset({"", "v2", "api-description"})


class RunningServer(Protocol):
    """What both kinds of servers have; see :class:`~torchmgmt.http.management_server.ManagementServer`."""

    url: str

    def drain(self, timeout: float = CLOSE_TIMEOUT_S) -> bool:
        """Take no further request, and wait until those in flight are answered; return whether all were."""

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> bool:
        """Finish what is in flight for up to ``timeout`` seconds, and end; return whether nothing was cut off."""


@contextmanager
def serve(
    manager: ModelManager,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    certificate_file: str | Path | None = None,
    private_key_file: str | Path | None = None,
    settings: Settings | None = None,
) -> Iterator[RunningServer]:
    """Serve the Management API of ``manager`` beside the program it lives in, while the block runs.

    Yields the server; its ``url`` has the real port (``port=0``: the system chooses). Returns at once, the requests run
    on threads of the server. Leaving the block finishes the requests in flight (for up to 30 s) and leaves no thread
    and no socket behind; the manager stays open. ``settings`` default to the manager's.

    With ``certificate_file`` and ``private_key_file``, PEM files, it serves https.

    Where callers need keys (``host`` is one that other machines reach, or the settings say so), those that the
    environment does not fix are made and stand in ``key_file.json`` in the working directory while the block runs;
    ``settings.disable_token_authorization=True`` serves everybody instead.

    Raises :class:`OSError` if the address is taken, or the key file cannot be written, and
    :class:`~torchmgmt.errors.InvalidArgument` for certificates that cannot be used.
    """
    settings = settings or manager.settings
    check_port(port)
    tls = None
    if certificate_file is not None or private_key_file is not None:
        tls = tls_context(_path(certificate_file), _path(private_key_file))
    address = Address("https" if tls else "http", host, port)
    with closing(bind(address)) as sock, keys_for(settings, [address]) as keys:
        server = start_server(manager, BoundAddress(frozenset({Role.MANAGEMENT}), sock, tls), settings, keys)
        try:
            yield server
        finally:
            server.close()


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def check_port(port: object) -> None:
    """Raise :class:`InvalidArgument` unless ``port`` is a number that a TCP port can have, or 0."""
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= 65535:
        raise InvalidArgument("port", port, "a whole number from 0 to 65535")


def start_management(
    manager: ModelManager, sock: socket.socket, settings: Settings | None = None, keys: Keys | None = None
) -> RunningServer:
    """Serve the Management API on a socket that listens."""
    return start_server(manager, BoundAddress(frozenset({Role.MANAGEMENT}), sock), settings, keys)


def start_inference(
    manager: ModelManager, sock: socket.socket, settings: Settings | None = None, keys: Keys | None = None
) -> RunningServer:
    """Serve the inference address on a socket that listens."""
    return start_server(manager, BoundAddress(frozenset({Role.INFERENCE}), sock), settings, keys)


def start_server(
    manager: ModelManager,
    bound: BoundAddress,
    settings: Settings | None = None,
    keys: Keys | None = None,
    *,
    metrics: ASGIApp | None = None,
    limits: Limits | None = None,
    is_loading: Callable[[], bool] = lambda: False,
    on_response: Callable[[int], object] = lambda _code: None,
) -> RunningServer:
    """Serve on one address what its roles say; ``metrics`` is the application that has ``/metrics``.

    While ``is_loading`` returns True, /ping does not answer that all is well. ``on_response`` is told the code of each
    answer, on whichever thread gives it.

    ``settings`` default to the manager's, ``keys`` to those that the environment fixes.
    """
    settings = bound.settings_with_real_address(settings or manager.settings)
    keys = fixed_keys() if keys is None else keys
    for role in (Role.MANAGEMENT, Role.INFERENCE):
        if role in bound.roles:
            log_who_may_call(role.value, bound.address, settings)
    if bound.roles == {Role.METRICS} and not bound.address.is_loopback:
        logger.info("The metrics at %s are there for everybody who reaches it: they need no key", bound.address)
    if bound.tls is None and bound.roles == {Role.MANAGEMENT}:
        management = create_app(manager, settings=settings, keys=keys)
        return ManagementServer(counted(management, on_response), bound.sock, settings.max_request_size, limits)
    name = "torchmgmt-" + "-".join(role.value for role in Role if role in bound.roles)
    mounted = None
    if Role.MANAGEMENT in bound.roles:
        mounted = MountedWSGI(
            create_app(manager, settings=settings, keys=keys),
            name=f"{name}-wsgi",
            number_of_threads=THREADS,
            max_body_bytes=settings.max_request_size,
        )
    draining = threading.Event()
    inference = None
    if Role.INFERENCE in bound.roles:
        inference = create_inference_app(
            manager,
            settings=settings,
            keys=keys,
            is_loading=is_loading,
            is_draining=draining.is_set,
            **({} if mounted is None else _of_both_apis(settings)),
        )
    return ASGIServer(
        _application(bound, inference, mounted, metrics),
        bound.sock,
        name=name,
        tls=bound.tls,
        mounted=mounted,
        limits=limits,
        begin=None if inference is None else inference.begin,
        on_drain=draining.set,
        on_response=on_response,
        run_on=manager.run_on if Role.INFERENCE in bound.roles else no_work,
    )


def _application(
    bound: BoundAddress, inference: InferenceApp | None, mounted: MountedWSGI | None, metrics: ASGIApp | None
) -> ASGIApp:
    by_segment: dict[str, ASGIApp] = {}
    if metrics is not None and Role.METRICS in bound.roles:
        by_segment["metrics"] = metrics
    if inference is None:
        default = mounted or metrics
        if default is None:
            raise ValueError("nothing is to be served")
        return Paths(by_segment, default)
    if mounted is None:
        return Paths(by_segment, inference) if by_segment else inference
    by_segment.update(dict.fromkeys(_segments(ops.MANAGEMENT) - INFERENCE_SEGMENTS, mounted))
    return Paths(by_segment, inference, ((INVOKE, inference), (REPOSITORY, mounted)))


def _of_both_apis(settings: Settings) -> dict[str, Any]:
    """Return how the API description names, and lists, what one address serves."""
    return {
        "title": "torchmgmt Management and Inference API",
        "operations": (*contract_of(settings).operations().values(), *ops.INFERENCE),
    }


def _segments(operations: tuple[Operation, ...]) -> set[str]:
    return {operation.path[1:].partition("/")[0] for operation in operations}


@frozen
class Servers:
    """All servers of one program, of which those without the Management API come first. May be used from any thread."""

    running: tuple[RunningServer, ...]

    def drain(self, timeout: float) -> bool:
        """Drain one after the other, together for up to ``timeout`` seconds; return whether all were."""
        deadline = time.monotonic() + timeout
        drained = [server.drain(max(0.0, deadline - time.monotonic())) for server in self.running]
        return all(drained)

    def close(self, timeout: float) -> bool:
        """Close all, each within ``timeout`` seconds; return whether nothing was cut off."""
        whole = [server.close(timeout) for server in self.running]
        return all(whole)


def start_servers(
    manager: ModelManager,
    addresses: Addresses,
    settings: Settings,
    keys: Keys,
    *,
    metrics: ASGIApp | None = None,
    is_loading: Callable[[], bool] = lambda: False,
    on_response: Callable[[int], object] = lambda _code: None,
) -> Servers:
    """Serve ``manager`` at all ``addresses``. If one server cannot be started, those that were are closed.

    ``metrics``, ``is_loading`` and ``on_response`` are as for :func:`start_server`.
    """
    limits = Limits(connections=connection_limit(len(addresses.bound)))
    running: list[RunningServer] = []
    try:
        for bound in sorted(addresses.bound, key=lambda one: Role.MANAGEMENT in one.roles):
            server = start_server(
                manager,
                bound,
                settings,
                keys,
                metrics=metrics,
                limits=limits,
                is_loading=is_loading,
                on_response=on_response,
            )
            running.append(server)
    except BaseException:
        Servers(tuple(running)).close(0)
        raise
    return Servers(tuple(running))
