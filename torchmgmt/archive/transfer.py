"""What every transfer from elsewhere has: limits, somebody who may end it, and progress that is told."""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import IO, Any

from attrs import Attribute, field, frozen

from torchmgmt.archive.urls import Source
from torchmgmt.checks import check_number
from torchmgmt.errors import DownloadFailed
from torchmgmt.events import DownloadProgress, Listener

__all__ = ["DownloadLimits", "Transfer", "Validators"]

log = logging.getLogger(__name__)

PROGRESS_S = 5.0
# The longest that sockets and timers of every system can wait for.
MAX_WAIT_S = 1_000_000.0


def _positive(_instance: object, attribute: Attribute[Any], value: object) -> None:
    check_number(attribute.name, value, minimum=1e-3, unit="seconds", whole=False)


def _whole(_instance: object, attribute: Attribute[Any], value: object) -> None:
    check_number(attribute.name, value, minimum=1, unit="bytes")


def _waitable(seconds: Any) -> Any:
    return min(seconds, MAX_WAIT_S) if isinstance(seconds, (int, float)) else seconds


@frozen(kw_only=True)
class DownloadLimits:
    """How large an archive may be that is fetched, and how long that may take.

    Raises :class:`torchmgmt.errors.InvalidArgument` for anything but numbers in range.
    """

    max_bytes: int = field(default=64 << 30, validator=_whole)
    timeout_s: float = field(default=3600, validator=_positive, converter=_waitable)
    """For all of it; a million at most."""
    stall_s: float = field(default=60, validator=_positive, converter=_waitable)
    """Without a single byte, and for a connection to come about."""


@frozen
class Validators:
    """What a server calls the content that it sent, so that it can be asked whether that is still so."""

    etag: str = ""
    last_modified: str = ""
    other: str = ""
    """What another kind of store than HTTP has for it."""

    def __bool__(self) -> bool:
        return bool(self.etag or self.last_modified or self.other)


class Transfer:
    """One archive on its way into a file. As a context manager it ends when its time is over, or when it is told to.

    :meth:`end` may be called by any thread; the rest is for the thread that fetches.
    """

    def __init__(
        self,
        source: Source,
        limits: DownloadLimits,
        listener: Listener,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source = source
        self.limits = limits
        self._listener = listener
        self._now = now
        self._began = self._told = now()
        self._received = 0
        self._total: int | None = None
        self._timer = threading.Timer(
            limits.timeout_s, self.end, [f"it took longer than {limits.timeout_s:g} s in all"]
        )
        self._timer.daemon = True
        self._timer.name = "torchmgmt-download-limit"
        self._lock = threading.Lock()
        # guarded by _lock
        self._ended = ""
        self._socket: socket.socket | None = None

    def __enter__(self) -> Transfer:
        self._timer.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._timer.cancel()
        self._timer.join()  # nothing of it outlives the call that it was for

    def end(self, reason: str) -> None:
        """Have the thread that fetches fail with ``reason``, also while it waits for the network. Does not block."""
        with self._lock:
            self._ended = self._ended or reason
            if self._socket is not None:
                _shut(self._socket)

    def watch(self, connection: socket.socket) -> None:
        """Take note of the connection that is to be cut by :meth:`end`."""
        with self._lock:
            self._socket = connection
        self.check()

    def check(self) -> None:
        """Raise :class:`DownloadFailed` if it was told to end."""
        with self._lock:
            reason = self._ended
        if reason:
            raise self.failed(reason)

    def failed(self, reason: str) -> DownloadFailed:
        """Return the error of this transfer."""
        return DownloadFailed(self.source.shown, reason)

    def store(self, chunks: Iterable[bytes], into: IO[bytes], total: int | None) -> str:
        """Write what comes into ``into`` and return its SHA-256 in hexadecimal.

        Raises:
            DownloadFailed: larger than allowed, or not as large as it was said to be (``total`` bytes, None: not said),
                or told to end.
        """
        self._total = total
        if total is not None and total > self.limits.max_bytes:
            raise self._too_large(f"it has {total} bytes")
        hasher = hashlib.sha256()
        for chunk in chunks:
            self.check()
            self._received += len(chunk)
            if self._received > self.limits.max_bytes:
                raise self._too_large("it is larger")
            into.write(chunk)
            hasher.update(chunk)
            self._tell_sometimes()
        self.check()  # a connection that we cut looks like one that ended
        if total not in {None, self._received}:
            raise self.failed(f"only {self._received} of {total} bytes came")
        return hasher.hexdigest()

    def tell_end(self) -> None:
        """Log and tell the listener that all is there."""
        seconds = self._now() - self._began
        log.info("Downloaded %d bytes from %s in %.1f s", self._received, self.source.shown, seconds)
        self._listener(DownloadProgress(self.source.shown, self._received, self._received, seconds))

    def _too_large(self, what: str) -> DownloadFailed:
        return self.failed(f"{what}; allowed are {self.limits.max_bytes} bytes (the setting max_archive_size)")

    def _tell_sometimes(self) -> None:
        now = self._now()
        if now - self._told < PROGRESS_S:
            return
        self._told = now
        share = f" of {self._total} ({self._received / self._total:.0%})" if self._total else ""
        log.info("Downloading %s: %d bytes%s so far", self.source.shown, self._received, share)
        self._listener(DownloadProgress(self.source.shown, self._received, self._total, now - self._began))


def _shut(connection: socket.socket) -> None:
    # What wraps TLS in TLS has its socket inside. The plain method: that of an SSLSocket drops what another thread reads.
    inner = getattr(connection, "socket", connection)
    try:
        socket.socket.shutdown(inner, socket.SHUT_RDWR)
    except OSError:  # not connected any more
        pass
