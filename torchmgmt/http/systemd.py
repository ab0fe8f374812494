"""Readiness as systemd's ``Type=notify`` services tell it (sd_notify), and container tools after it."""

from __future__ import annotations

import logging
import os
import socket

__all__ = ["notify_systemd"]

logger = logging.getLogger(__name__)


def notify_systemd(state: str) -> None:
    """Send a state such as ``READY=1`` to the socket in NOTIFY_SOCKET; do nothing if there is none. Never raises."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1)
            sock.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)
    except OSError as error:
        logger.warning("Could not tell %s at NOTIFY_SOCKET: %s", state, error)
