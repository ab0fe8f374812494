"""The bare peer: the least that Python can do without any library around it.

A script that imports torch and loads a file, and two processes that send each other bytes over a socket pair.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from queue import SimpleQueue

from benchmarks.script import READY

LOAD = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("model", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
model = getattr(module, sys.argv[2])()
model.load_state_dict(torch.load(sys.argv[3], map_location="cpu", weights_only=True))
model.eval()
print({READY!r}, flush=True)
sys.stdin.read()
"""
"""Imports torch, makes the model, loads the same file in the way BaseHandler does, then waits. Arguments: the model's
file, its class, the state dict."""

_ECHO = """
import socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
while data := sock.recv(65536):
    sock.sendall(data)
"""

_BULK_ECHO = """
import socket, sys
sock, size = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
buffer = bytearray(size)
while sock.recv_into(buffer, size, socket.MSG_WAITALL) == size:
    sock.sendall(buffer)
"""

# A RUN and a DONE frame of a no-op handler with a small body are about as long.
MESSAGE = b"x" * 160


class PingPong:
    """Two Python processes and one socket pair: a message there, the same message back. Use it in a ``with`` block."""

    def __enter__(self) -> PingPong:
        self._sock, theirs = socket.socketpair()
        command = [sys.executable, "-c", _ECHO, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self.round_trip()
        return self

    @property
    def pid(self) -> int:
        """The process on the other end."""
        return self._process.pid

    def __exit__(self, *_exc: object) -> None:
        self._sock.close()
        self._process.wait(20)

    def round_trip(self) -> None:
        """Send one message and block until it is back."""
        self._sock.sendall(MESSAGE)
        if len(self._sock.recv(65536)) != len(MESSAGE):
            raise RuntimeError("the bare ping-pong lost its other end")


class BulkPingPong:
    """The same with a message of ``size`` bytes, which the other end has received whole before it sends it back."""

    def __init__(self, size: int) -> None:
        self._sent = bytes(size)
        self._received = bytearray(size)

    def __enter__(self) -> BulkPingPong:
        self._sock, theirs = socket.socketpair()
        command = [sys.executable, "-c", _BULK_ECHO, str(theirs.fileno()), str(len(self._sent))]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self.round_trip()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._sock.close()
        self._process.wait(20)

    def round_trip(self) -> None:
        """Send one message and block until it is back."""
        self._sock.sendall(self._sent)
        size = len(self._received)
        if self._sock.recv_into(self._received, size, socket.MSG_WAITALL) != size:
            raise RuntimeError("the bare socket lost its other end")


class ThreadedPingPong(PingPong):
    """The same, but a second thread reads the answers and wakes up the caller through a Future.

    The least that a library can do that lets any number of threads share one worker.
    """

    def __enter__(self) -> ThreadedPingPong:
        self._waiting: SimpleQueue[Future[bytes]] = SimpleQueue()
        self._reader: threading.Thread | None = None
        super().__enter__()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._sock.shutdown(socket.SHUT_WR)
        if self._reader is not None:
            self._reader.join(20)
        super().__exit__()

    def round_trip(self) -> None:
        """Send one message and block until the reading thread has handed its answer over."""
        if self._reader is None:
            super().round_trip()
            return
        future: Future[bytes] = Future()
        self._waiting.put(future)
        self._sock.sendall(MESSAGE)
        future.result()

    def _read(self) -> None:
        while data := self._sock.recv(65536):
            self._waiting.get().set_result(data)
