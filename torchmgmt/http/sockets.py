"""Sockets that listen, bound before anything is started, so that an occupied port is known in time."""

from __future__ import annotations

import socket
import sys

from torchmgmt.settings import Address

__all__ = ["BACKLOG", "address_of", "bind"]

BACKLOG = 1024


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


def address_of(sock: socket.socket, scheme: str = "http") -> Address:
    """Return where a socket listens, with its real port."""
    host, port = sock.getsockname()[:2]
    return Address(scheme, host, port)
