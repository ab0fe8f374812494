"""What a connection may take, in time and in bytes, before it is ended; the same on the WSGI and on the ASGI side."""

from __future__ import annotations

from typing import Any

from attrs import field, frozen, validators

__all__ = [
    "LONG_LENGTH",
    "MANY_HOSTS",
    "MOST_LENGTH_DIGITS",
    "NOT_HTTP_1",
    "SLOW",
    "TOO_MUCH_HEAD",
    "UNREADABLE_TARGET",
    "Limits",
    "connection_limit",
]

SLOW = "The request took too long to arrive"
NOT_HTTP_1 = "The request is neither HTTP/1.1 nor HTTP/1.0"
LONG_LENGTH = "The Content-Length has more digits than any length"
MANY_HOSTS = "There is more than one Host"
UNREADABLE_TARGET = "The target of the request is no URL"
TOO_MUCH_HEAD = "The request line and the headers are larger than the {} bytes that are allowed"

MOST_LENGTH_DIGITS = 20
"""Of a Content-Length: 2**64 has so many. What begins with zeros may have more, of which ``int`` takes 4300."""
_POSITIVE: Any = validators.gt(0)


def connection_limit(servers: int = 1) -> int:
    """Return how many connections each of ``servers`` may hold open: together fewer than the files this process may."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 1000
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 8192 if soft == resource.RLIM_INFINITY else max(100, min(8192, (soft - 256) // servers))


@frozen(kw_only=True)
class Limits:
    """Bounds of one server's connections. What is answered slowly by us counts against none of them.

    Raises :class:`ValueError` for one that is not above 0.
    """

    connections: int = field(factory=connection_limit, validator=_POSITIVE)
    """Open at once; further ones wait, unaccepted, until one is closed."""
    head_bytes: int = field(default=2**16, validator=_POSITIVE)
    """The request line and the headers together."""
    head_s: float = field(default=20.0, validator=_POSITIVE)
    """From the first byte (on a new connection: from its opening, the TLS handshake apart) to the end of the headers."""
    body_s: float = field(default=20.0, validator=_POSITIVE)
    """For the body, longer by what it takes at ``body_bytes_per_s``: a slow network is no attack."""
    body_bytes_per_s: float = field(default=500.0, validator=_POSITIVE)
    idle_s: float = field(default=75.0, validator=_POSITIVE)
    """Between two requests on one connection. Longer than the 60 s after which common proxies let go."""
    write_s: float = field(default=60.0, validator=_POSITIVE)
    """For how long a client may take nothing of an answer that waits for it."""
    linger_s: float = field(default=5.0, validator=_POSITIVE)
    """For how long what a refused client still sends is thrown away, so that it can read the refusal."""

    @property
    def tick_s(self) -> float:
        """How often the deadlines are to be looked at."""
        return min(1.0, *(limit / 4 for limit in (self.head_s, self.body_s, self.idle_s, self.write_s, self.linger_s)))

    def body_deadline_s(self, received_bytes: int) -> float:
        """How long a body of which so much came may have taken."""
        return self.body_s + received_bytes / self.body_bytes_per_s
