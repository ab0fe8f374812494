"""Heads of requests that came before: what they mean need not be found out again.

Most callers send the same head again and again, and to parse it takes a third of the time of a small prediction. What a
head means depends on its bytes alone, so one that is the same, byte for byte, is recognized instead. Who may call is not
part of that: it is asked for every request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from torchmgmt.http.exchange import WholeRequest

__all__ = ["KnownHead", "KnownHeads"]

LONGEST = 1024
"""A longer head is not kept."""
MOST = 512
"""So many are kept, with 3 kB each at most; the oldest goes first."""

_END = b"\r\n\r\n"


@frozen(eq=False)
class KnownHead:
    """What a head means, of which a body of a known size comes."""

    head_bytes: int
    message_bytes: int
    """How large the head and the body are together."""
    fields: Mapping[str, Any]
    """What it adds to the scope of a request, but for the headers."""
    headers: Sequence[tuple[bytes, bytes]]
    request: WholeRequest
    """Is never served itself, but makes those that are."""


class KnownHeads:
    """The heads that one server has seen lately. For the thread of its event loop."""

    def __init__(self) -> None:
        self._by_head: dict[bytes, KnownHead] = {}

    def find(self, data: bytes) -> KnownHead | None:
        """Return what the head of ``data`` means, if that is known and ``data`` is one whole request."""
        known = self._by_head.get(data[: data.find(_END, 0, LONGEST) + len(_END)])
        return known if known is not None and known.message_bytes == len(data) else None

    def add(self, data: bytes, scope: Mapping[str, Any], request: WholeRequest) -> None:
        """Keep what the head of ``data`` means, if that is one request whose head says how large it is, and nothing else.

        ``data`` begins with the request of which the parser and the application have made ``scope`` and ``request``.
        """
        end = data.find(_END, 0, LONGEST) + len(_END)
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if end < len(_END) or dict(headers).get(b"content-length") != b"%d" % (len(data) - end):
            return
        if len(self._by_head) >= MOST:
            del self._by_head[next(iter(self._by_head))]
        fields = {name: scope[name] for name in ("method", "path", "raw_path", "query_string")}
        self._by_head[data[:end]] = KnownHead(end, len(data), fields, tuple(headers), request.again({}))
