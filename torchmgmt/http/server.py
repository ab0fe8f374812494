"""Servers on sockets: the Management API on waitress, the inference address on uvicorn, each in threads of its own.

Both are given a socket that listens already, so that an occupied port is known before anything is started.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import uvicorn
from waitress import wasyncore
from waitress.adjustments import Adjustments

from torchmgmt.errors import InvalidArgument
from torchmgmt.http.inference import create_inference_app
from torchmgmt.http.management import MAX_WAITING, create_app
from torchmgmt.http.waitress_parts import Channel, Dispatcher, Server
from torchmgmt.settings import Address, Settings

if TYPE_CHECKING:
    from torchmgmt import ModelManager

__all__ = ["InferenceServer", "ManagementServer", "address_of", "bind", "check_may_listen", "serve"]

logger = logging.getLogger(__name__)

THREADS = MAX_WAITING + 8
"""So many that calls which wait for workers can never hold them all."""
BACKLOG = 1024
FRAMING_ALLOWANCE_BYTES = 2**16
HALF_SENT_GRACE_S = 1.0
CLOSE_TIMEOUT_S = 30.0


@contextmanager
def serve(
    manager: ModelManager,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    settings: Settings | None = None,
) -> Iterator[ManagementServer]:
    """Serve the Management API of ``manager`` beside the program it lives in, while the block runs.

    Yields the server; its ``url`` has the real port (``port=0``: the system chooses). Returns at once, the requests run
    on threads of the server. Leaving the block finishes the requests in flight (for up to 30 s) and leaves no thread
    and no socket behind; the manager stays open. ``settings`` default to the manager's.

    Raises :class:`OSError` if the address is taken, and :class:`~torchmgmt.errors.InvalidArgument` for a ``host`` that
    other machines reach, unless ``settings.disable_token_authorization`` is True.
    """
    settings = settings or manager.settings
    check_port(port)
    address = Address("http", host, port)
    check_may_listen("host", address, settings)
    server = start_management(manager, bind(address), settings)
    try:
        yield server
    finally:
        server.close()


def check_port(port: object) -> None:
    """Raise :class:`InvalidArgument` unless ``port`` is a number that a TCP port can have, or 0."""
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= 65535:
        raise InvalidArgument("port", port, "a whole number from 0 to 65535")


def check_may_listen(argument: str, address: Address, settings: Settings) -> None:
    """Raise :class:`InvalidArgument` if the settings do not allow to listen there."""
    if address.scheme != "http":
        raise InvalidArgument(argument, str(address), "an http:// address: this release does not serve https yet")
    if settings.disable_token_authorization is False:
        raise InvalidArgument(
            "disable_token_authorization",
            False,
            "True or left unset: this release has no token authorization yet",
        )
    if not address.is_loopback and not settings.disable_token_authorization:
        raise InvalidArgument(
            argument,
            str(address),
            "a loopback address such as http://127.0.0.1:8081, unless --disable-token-auth"
            " (disable_token_authorization=true) opens it to everybody: this release has no token authorization yet",
        )


def start_management(manager: ModelManager, sock: socket.socket, settings: Settings) -> ManagementServer:
    """Serve the Management API on a socket that listens."""
    # With the real port and host in it, the rule of who may call knows our own origin.
    settings = attrs.evolve(settings, management_address=str(address_of(sock)))
    return ManagementServer(create_app(manager, settings=settings), sock, settings.max_request_size)


def start_inference(
    manager: ModelManager, sock: socket.socket, *, is_loading: Callable[[], bool] = lambda: False
) -> InferenceServer:
    """Serve the inference address on a socket that listens."""
    return InferenceServer(create_inference_app(manager, is_loading=is_loading), sock)


def bind(address: Address) -> socket.socket:
    """Return a socket that listens at ``address``; raise :class:`OSError` with one line if that cannot be."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # localhost may be both; clients that try ::1 first come to 127.0.0.1 next.
        family, kind, protocol, _, where = min(found, key=lambda info: info[0] != socket.AF_INET)
        sock = socket.socket(family, kind, protocol)
        try:
            if sys.platform != "win32":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
            # Now and not later: two sockets that are only bound may share a port.
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise OSError(error.errno, f"Cannot listen at {address}: {error.strerror or error}") from None
    return sock


def address_of(sock: socket.socket) -> Address:
    """Return where a socket listens, with its real port."""
    host, port = sock.getsockname()[:2]
    return Address("http", host, port)


def connection_limit() -> int:
    """Return how many connections may be open: below what the system lets this process open, with room for the rest."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 1000
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 8192 if soft == resource.RLIM_INFINITY else max(100, min(8192, soft - 256))


class ManagementServer:
    """A WSGI application on waitress. Serves from the moment it is made, in threads of its own.

    May be used from any thread. ``url`` is where it serves.
    """

    def __init__(self, app: Any, sock: socket.socket, max_request_size: int) -> None:
        self.url = str(address_of(sock))
        self._map: dict[int, Any] = {}
        self._dispatcher = Dispatcher("torchmgmt-management")
        self._server = self._make(app, sock, max_request_size)
        self._dispatcher.set_thread_count(THREADS)
        self._half_sent_until = self._deadline = float("inf")
        # Guards the pipe that wakes the loop: once closed, its number may belong to somebody else.
        self._pipe_lock = threading.Lock()
        self._pipe_open = True
        self._drained = threading.Event()  # set, too, when it ends without having been drained
        self._cut_off = False
        self._may_end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="torchmgmt-management", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<ManagementServer at {self.url}>"

    def _make(self, app: Any, sock: socket.socket, max_request_size: int) -> Server:
        adjustments = Adjustments(
            asyncore_use_poll=True,  # select() ends at descriptor 1024
            connection_limit=connection_limit(),
            # The application counts exactly; waitress counts the framing of a chunked body, too.
            max_request_body_size=max_request_size + FRAMING_ALLOWANCE_BYTES,
            clear_untrusted_proxy_headers=False,  # the guard of who may call must see them
            backlog=BACKLOG,
            ident=None,
        )
        server = Server(
            app,
            map=self._map,
            _sock=sock,
            dispatcher=self._dispatcher,
            adj=adjustments,
            sockinfo=(sock.family, sock.type, sock.proto, sock.getsockname()),
            bind_socket=False,
        )
        server.channel_class = Channel
        server.max_request_size = max_request_size
        return server

    def drain(self, timeout: float = CLOSE_TIMEOUT_S) -> bool:
        """Take no further request, and wait until those in flight are answered.

        Blocks for up to ``timeout`` seconds; returns whether all were. Those that were not go on.
        """
        self._begin_to_stop(float("inf"))
        return self._drained.wait(timeout) and not self._cut_off

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> bool:
        """Take no further request, finish those in flight for up to ``timeout`` seconds, and cut the others off.

        Returns whether none was cut off. Closing again does nothing more.
        """
        self._begin_to_stop(time.monotonic() + timeout)
        self._thread.join()
        return not self._cut_off

    def _begin_to_stop(self, deadline: float) -> None:
        self._half_sent_until = min(self._half_sent_until, time.monotonic() + HALF_SENT_GRACE_S)
        self._deadline = min(self._deadline, deadline)
        if deadline < float("inf"):
            self._may_end.set()
        self._server.stopping = True
        self._wake()

    def _wake(self) -> None:
        with self._pipe_lock:
            if self._pipe_open:
                self._server.pull_trigger()

    # --- on the server's own thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._server.stopping:
                self._turn(timeout_s=1)
            wasyncore.dispatcher.close(self._server)  # its socket only: the pipe that wakes this loop stays
            self._finish_requests()
        except Exception:
            logger.exception("The Management API at %s ended because of a defect", self.url)
        finally:
            self._end()

    def _finish_requests(self) -> None:
        while True:
            if not self._close_idle_connections():
                self._drained.set()
                if self._may_end.is_set():
                    return
            if time.monotonic() >= self._deadline:
                self._cut_off = True
                return
            self._turn(timeout_s=0.05)

    def _close_idle_connections(self) -> int:
        """Close the connections that wait for a request; return how many are left."""
        left = 0
        half_sent_is_idle = time.monotonic() >= self._half_sent_until
        for channel in self._channels():
            if channel.is_busy or (channel.is_receiving and not half_sent_is_idle):
                left += 1
            else:
                channel.handle_close()
        return left

    def _channels(self) -> list[Channel]:
        return [one for one in self._map.values() if isinstance(one, Channel)]

    def _turn(self, timeout_s: float) -> None:
        wasyncore.loop(timeout=timeout_s, use_poll=True, map=self._map, count=1)

    def _end(self) -> None:
        # In this order: a thread that answers its last request writes to the pipe, which must not be closed by then.
        for channel in self._channels():
            channel.handle_close()
        # The thread of a call that was cut off ends with that call.
        self._dispatcher.stop(timeout_s=0 if self._cut_off else 1)
        with self._pipe_lock:
            self._pipe_open = False
            wasyncore.close_all(self._map, ignore_all=True)
        self._drained.set()


class _Uvicorn(uvicorn.Server):
    """uvicorn, which says when it serves."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        await super().startup(sockets)
        self._on_started()


class InferenceServer:
    """An ASGI application on uvicorn, in one thread with an event loop of its own. Serves once made."""

    def __init__(self, app: Any, sock: socket.socket) -> None:
        self.url = str(address_of(sock))
        self._sock = sock
        self._started = threading.Event()
        self._failure: BaseException | None = None
        config = uvicorn.Config(
            app,
            loop="none",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=int(CLOSE_TIMEOUT_S),
        )
        self._server = _Uvicorn(config, self._started.set)
        self._thread = threading.Thread(target=self._run, name="torchmgmt-inference", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def __repr__(self) -> str:
        return f"<InferenceServer at {self.url}>"

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> bool:
        """Take no further request and finish those in flight for up to ``timeout`` seconds; return whether all were."""
        self._server.should_exit = True
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        self._server.force_exit = True
        self._thread.join(1)
        return False

    def _run(self) -> None:
        loop = _new_event_loop()
        try:
            loop.run_until_complete(self._server.serve(sockets=[self._sock]))
            loop.run_until_complete(loop.shutdown_asyncgens())
        except BaseException as error:
            self._failure = error
            logger.exception("The inference address %s ended because of a defect", self.url)
        finally:
            loop.close()
            self._sock.close()
            self._started.set()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # it does not exist for every platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
