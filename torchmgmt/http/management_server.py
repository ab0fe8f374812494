"""The Management API on waitress: a thread for each request, and one that reads and writes the connections."""

from __future__ import annotations

import logging
import socket
import threading
import time
from typing import Any

from waitress import wasyncore
from waitress.adjustments import Adjustments

from torchmgmt.http.limits import Limits
from torchmgmt.http.management import MAX_WAITING
from torchmgmt.http.sockets import BACKLOG, address_of
from torchmgmt.http.waitress_parts import Channel, Dispatcher, Server

__all__ = ["CLOSE_TIMEOUT_S", "HALF_SENT_GRACE_S", "THREADS", "ManagementServer"]

logger = logging.getLogger("torchmgmt.http.server")

THREADS = MAX_WAITING + 8
"""So many that calls which wait for workers can never hold them all."""
FRAMING_ALLOWANCE_BYTES = 2**16
HALF_SENT_GRACE_S = 1.0
"""For how long a request that has come in part when the server is stopped may still become a whole one."""
CLOSE_TIMEOUT_S = 30.0


class ManagementServer:
    """A WSGI application on waitress. Serves from the moment it is made, in threads of its own.

    May be used from any thread. ``url`` is where it serves.
    """

    def __init__(self, app: Any, sock: socket.socket, max_request_size: int, limits: Limits | None = None) -> None:
        self.url = str(address_of(sock))
        self._limits = limits or Limits()
        self._map: dict[int, Any] = {}
        self._dispatcher = Dispatcher("torchmgmt-management")
        self._server = self._make(app, sock, max_request_size)
        self._dispatcher.set_thread_count(THREADS)
        self._half_sent_until = self._deadline = float("inf")
        self._next_look = 0.0
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
            connection_limit=self._limits.connections,
            max_request_header_size=self._limits.head_bytes,
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
        server.limits = self._limits
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
                self._turn(timeout_s=self._limits.tick_s)
                self._end_what_takes_too_long()
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

    def _end_what_takes_too_long(self) -> None:
        now = time.monotonic()
        if now < self._next_look:  # under load a turn is short
            return
        self._next_look = now + self._limits.tick_s
        for channel in self._channels():
            channel.check_deadlines(now)

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
