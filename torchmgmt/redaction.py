"""Secrets that callers put into URLs, taken out of what is shown, logged and answered.

A URL may hold a user and password, or a signature that opens a store; so may the text of an error that names it.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

__all__ = ["HIDDEN", "is_secret", "redacted", "redacted_text"]

HIDDEN = "***"
"""What stands where a secret stood."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[/\\]{2}[^\s'\"<>]+")
# A password that was not encoded may hold a "?" or "#": then it is no legal URL, and stands in the error that says so.
_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:[/\\]{2})[^/\\]*@")
_PARAMETER = re.compile(r"(?P<name>(?<=[?&;])[^=&;#]+)=[^&;#]*")
# Signatures and keys of S3, Google and Azure, tokens of artifact stores. Azure calls its signature "sig", Google its account
# "GoogleAccessId".
_SECRET = re.compile(
    r"(?<![a-z])sig|signature|(?<!page_)token|secret|passw|pwd|key|credential|auth|access|session|jwt|(?<![a-z])code",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether a parameter of a query has the name of a secret; ``name`` as it stands there, percent-encoded or not."""
    return _SECRET.search(unquote_plus(name)) is not None


def redacted(url: str) -> str:
    """Return ``url`` without user and password, and without what its query calls a key, token, signature or the like."""
    return _PARAMETER.sub(_hidden, _USER.sub(rf"\g<scheme>{HIDDEN}@", url))


def redacted_text(text: str) -> str:
    """Return ``text`` with each URL in it :func:`redacted`."""
    return _URL.sub(lambda url: redacted(url[0]), text) if "://" in text else text


def _hidden(parameter: re.Match[str]) -> str:
    return f"{parameter['name']}={HIDDEN}" if is_secret(parameter["name"]) else parameter[0]
