"""Secrets that callers put into addresses, taken out of what is logged and answered.

A URL may hold a user and password, or a signature that opens a store; so may the text of an error that names it.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote_plus

__all__ = ["masked_query", "masked_text"]

MASK = "***"

_USER_INFO = re.compile(r"(?<=://)[^/\s?#'\"<>]+@")
_SECRET_NAME = re.compile(
    r"(?<!page_)token|secret|signature|password|passwd|credential|api.?key|access.?key|\b(sig|key|pwd)$", re.IGNORECASE
)
_PARAMETER = re.compile(r"(?<=[?&;])([^=&;\s#?]+)=([^&;\s#'\"<>]+)")


def masked_text(text: str) -> str:
    """Return ``text`` with user and password, and the values of parameters named like secrets, hidden in its URLs."""
    if "://" not in text:
        return text
    return _PARAMETER.sub(_mask_parameter, _USER_INFO.sub(f"{MASK}@", text))


def masked_query(query: str) -> str:
    """Return a query string as it may be logged: percent-encoded as it came, the secrets in it hidden."""
    if not query or not ("%" in query or ":" in query or _SECRET_NAME.search(query)):
        return query
    return "&".join(_masked_pair(pair) for pair in query.split("&"))


def _masked_pair(pair: str) -> str:
    name, sign, value = pair.partition("=")
    if sign and _SECRET_NAME.search(unquote_plus(name)):
        return f"{name}={MASK}"
    plain = unquote_plus(value)
    masked = masked_text(plain)
    return pair if masked == plain else f"{name}={quote(masked, safe='*:/')}"


def _mask_parameter(match: re.Match[str]) -> str:
    name, value = match.groups()
    return f"{name}={MASK if _SECRET_NAME.search(unquote_plus(name)) else value}"
