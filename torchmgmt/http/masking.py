"""Secrets that callers put into parameters, taken out of the query strings that are logged."""

from __future__ import annotations

from urllib.parse import quote, unquote_plus

from torchmgmt.redaction import HIDDEN, is_secret, redacted_text

__all__ = ["masked_query"]


def masked_query(query: str) -> str:
    """Return a query string as it may be logged: percent-encoded as it came, the secrets in it hidden."""
    if not query or not ("%" in query or ":" in query or is_secret(query)):
        return query
    return "&".join(_masked_pair(pair) for pair in query.split("&"))


def _masked_pair(pair: str) -> str:
    name, sign, value = pair.partition("=")
    if sign and is_secret(name):
        return f"{name}={HIDDEN}"
    plain = unquote_plus(value)
    masked = redacted_text(plain)
    return pair if masked == plain else f"{name}={quote(masked, safe='*:/')}"
