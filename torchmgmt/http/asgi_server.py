"""An ASGI application on uvicorn, over TLS or not, in one thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import socket
import ssl
import threading
from collections.abc import Callable

import uvicorn

from torchmgmt.http.asgi import ASGIApp, Scope
from torchmgmt.http.exchange import WholeRequest
from torchmgmt.http.limits import Limits
from torchmgmt.http.management_server import CLOSE_TIMEOUT_S, HALF_SENT_GRACE_S
from torchmgmt.http.mount import LastResort, MountedWSGI
from torchmgmt.http.sockets import BACKLOG, address_of
from torchmgmt.http.uvicorn_parts import LimitedProtocol, Serving

__all__ = ["ASGIServer", "no_work"]

logger = logging.getLogger("torchmgmt.http.server")

SETTLE_S = 0.05
"""Between the last connection taken and the closing of idle ones: a request that was sent already is then read."""
RETRY_ACCEPT_S = 0.1
END_TIMEOUT_S = 5.0
"""For what is done in no time, unless an application blocks the event loop."""


def no_work(_loop: asyncio.AbstractEventLoop) -> Callable[[], object]:
    """Give an event loop nothing else to do than to serve; return what undoes that."""
    return lambda: None


class ASGIServer:
    """Serves once made. May be used from any thread. ``url`` is where it serves.

    ``mounted`` is the WSGI application that ``app`` has in it, if there is one: its threads are ended with the server.
    ``on_drain`` is called when it begins to take no further request.
    ``begin`` is asked about each request before ``app``: what it returns serves that without a task.
    ``on_response`` is told the code of each answer, on the server's thread.
    ``run_on`` is given its event loop, before that runs, and returns what is called when it has ended; both on its thread.
    """

    def __init__(
        self,
        app: ASGIApp,
        sock: socket.socket,
        *,
        name: str = "torchmgmt-inference",
        tls: ssl.SSLContext | None = None,
        mounted: MountedWSGI | None = None,
        limits: Limits | None = None,
        begin: Callable[[Scope], WholeRequest | None] | None = None,
        on_drain: Callable[[], object] = lambda: None,
        on_response: Callable[[int], object] = lambda _code: None,
        run_on: Callable[[asyncio.AbstractEventLoop], Callable[[], object]] = no_work,
    ) -> None:
        self._on_drain = on_drain
        self._run_on = run_on
        self.url = str(address_of(sock, "https" if tls else "http"))
        self._mounted = mounted
        self._started = threading.Event()
        self._drained = threading.Event()  # set, too, when it ends without having been drained
        self._ended = threading.Event()
        self._may_end = threading.Event()
        self._cut_off = False
        self._failure: BaseException | None = None
        self._sock = sock
        guard = functools.partial(LastResort, on_response=on_response)
        serving = None if begin is None else Serving(begin, on_response, guard)
        self._server = _Uvicorn(guard(app), serving, sock, tls, limits or Limits(), self._started.set)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def __repr__(self) -> str:
        return f"<ASGIServer at {self.url}>"

    def drain(self, timeout: float = CLOSE_TIMEOUT_S) -> bool:
        """Take no further request, and wait until those in flight are answered.

        Blocks for up to ``timeout`` seconds; returns whether all were. Those that were not go on.
        """
        self._on_drain()
        self._server.should_exit = True
        return self._drained.wait(timeout) and not self._cut_off

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> bool:
        """Take no further request, finish those in flight for up to ``timeout`` seconds, and cut the others off.

        Returns whether none was cut off. Closing again does nothing more. A call of a mounted application that was cut
        off keeps its thread until it returns.
        """
        if not self.drain(timeout):
            self._server.force_exit = True
        self._ended.wait(END_TIMEOUT_S)
        if not self._cut_off:
            self._thread.join(END_TIMEOUT_S)
        return not self._cut_off

    # --- on the server's own thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        loop = _new_event_loop()
        with contextlib.ExitStack() as at_end:
            for event in (self._started, self._drained, self._ended):
                at_end.callback(event.set)
            at_end.callback(loop.close)
            at_end.callback(self._sock.close)
            try:
                at_end.callback(self._run_on(loop))
                loop.run_until_complete(self._server.serve(sockets=[self._sock]))
                self._cut_off = loop.run_until_complete(self._server.cut_off())
                self._end(loop)
                loop.run_until_complete(loop.shutdown_asyncgens())
            except BaseException as error:
                self._failure = error
                logger.exception("The server at %s ended because of a defect", self.url)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        self._drained.set()
        if self._mounted is None:
            return
        if self._mounted.is_busy:
            self._ended.set()  # nobody waits for these; but they answer through the loop, so it must run
        while self._mounted.is_busy:
            loop.run_until_complete(asyncio.sleep(0.05))
        self._mounted.stop(timeout_s=1)


class _Uvicorn(uvicorn.Server):
    """uvicorn, which takes connections one by one, and no more than it may, and looks at their deadlines."""

    def __init__(
        self,
        app: ASGIApp,
        serving: Serving | None,
        sock: socket.socket,
        tls: ssl.SSLContext | None,
        limits: Limits,
        on_started: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            app,
            http=LimitedProtocol,
            loop="none",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=math.ceil(limits.idle_s),
            timeout_graceful_shutdown=None,
        )
        super().__init__(config)
        self._serving = serving
        self._sock = sock
        self._tls = tls
        self._limits = limits
        self._on_started = on_started
        self._room = asyncio.Event()
        self._own_tasks: list[asyncio.Task[None]] = []
        self._opening: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        self.servers = []
        self._sock.setblocking(False)
        loop = asyncio.get_running_loop()
        self._own_tasks = [loop.create_task(self._accept()), loop.create_task(self._watch())]
        self.started = True
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no further connection, and wait until all that came has been answered."""
        accepting, watching = self._own_tasks
        accepting.cancel()
        await asyncio.wait([accepting])
        self._take_waiting()
        await asyncio.sleep(SETTLE_S)
        if self._opening and not self.force_exit:
            await asyncio.wait(self._opening, timeout=HALF_SENT_GRACE_S)
        for task in self._opening:
            task.cancel()
        await super().shutdown(sockets)
        watching.cancel()
        await asyncio.wait([watching])

    async def cut_off(self) -> bool:
        """End the connections and calls that are left; return whether a call was."""
        connections = [one for one in self.server_state.connections if isinstance(one, LimitedProtocol)]
        is_answering = any(connection.is_answering for connection in connections)
        for connection in connections:
            connection.transport.abort()
        await asyncio.sleep(0)  # they learn it
        calls = list(self.server_state.tasks)
        left = [*calls, *self._opening]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
        return bool(calls) or is_answering

    # --- connections --------------------------------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self._is_full():
                self._room.clear()
                await self._room.wait()
            try:
                connection, _ = await loop.sock_accept(self._sock)
            except OSError as error:  # no descriptor is left, or the client has gone
                logger.warning("A connection could not be accepted: %s", error)
                await asyncio.sleep(RETRY_ACCEPT_S)
            else:
                self._take(connection)
                self._take_waiting()  # one for each turn of the loop would be few where others ask without end

    def _take_waiting(self) -> None:
        """Take what the system has accepted already: these clients believe that they are connected."""
        while not self._is_full():
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            self._take(connection)

    def _is_full(self) -> bool:
        return len(self.server_state.connections) + len(self._opening) >= self._limits.connections

    def _take(self, connection: socket.socket) -> None:
        task = asyncio.get_running_loop().create_task(self._open(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                self._new_protocol,
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=self._limits.head_s if self._tls else None,
            )
        except (OSError, asyncio.CancelledError) as error:  # a TLS error is an OSError
            logger.debug("A connection could not be opened: %r", error)
            connection.close()
            self._room.set()

    def _new_protocol(self) -> LimitedProtocol:
        return LimitedProtocol(
            self.config, self.server_state, self._limits, self._room.set, HALF_SENT_GRACE_S, self._serving
        )

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._limits.tick_s)
            now = loop.time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, LimitedProtocol):
                    connection.check_deadlines(now)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # it does not exist for every platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
