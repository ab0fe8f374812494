"""What a caller calls a model's source, taken apart once: the place, the digest it must have, and what may be shown."""

from __future__ import annotations

import os
import re

from attrs import frozen

from torchmgmt.errors import InvalidArgument

__all__ = ["Source", "redacted"]

ALLOWED = "the name of a file in the model store, a path, or a URL; #sha256= and 64 hexadecimal digits may follow"

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
_PIN = re.compile(r"#sha256=(?P<digest>[^#]*)\Z", re.IGNORECASE)
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:[/\\]{2})[^/\\?#]*@")
# A parameter of a query is secret if its name says so: signatures and keys of S3, Google and Azure, tokens of artifact
# stores. Azure calls its signature "sig", Google its account "GoogleAccessId".
_SECRET = re.compile(
    r"(?P<name>[?&;][^=&;#]*"
    r"(?:sig|token|secret|passw|pwd|key|credential|auth|access|session|jwt|code)[^=&;#]*=)[^&;#]*",
    re.IGNORECASE,
)
HIDDEN = "***"


def redacted(url: str) -> str:
    """Return ``url`` without user and password, and without what its query calls a key, token, signature or the like."""
    return _SECRET.sub(rf"\g<name>{HIDDEN}", _USER.sub(rf"\g<scheme>{HIDDEN}@", url))


@frozen(repr=False)
class Source:
    """Where a model is to come from; ``str`` is what may be shown of it."""

    place: str
    """Name, path or URL, with the credentials it has; no part of a message, log or description."""
    scheme: str
    """Of a URL, in lower case; empty for a name or path."""
    sha256: str | None
    """What the archive's digest must be, in lower case; None: anything."""
    shown: str
    """As the caller gave it, less credentials."""

    @classmethod
    def parse(cls, url: object) -> Source:
        """Take ``url`` apart.

        Raises:
            InvalidArgument: no text, empty, with a NUL, or with another fragment than ``#sha256=`` and a digest.
        """
        text = _check(url)
        found = _SCHEME.match(text)
        scheme = found["scheme"].lower() if found else ""
        shown = redacted(text) if scheme else text
        pin = _PIN.search(text)
        place, digest = (text[: pin.start()], pin["digest"]) if pin else (text, None)
        # In the name of a file a "#" is a letter like any other; the rest of a URL after one is never sent.
        is_unknown = scheme not in {"", "file"} and "#" in place
        if is_unknown or not place or (digest is not None and not _DIGEST.fullmatch(digest)):
            raise InvalidArgument("url", shown, ALLOWED)
        return cls(place, scheme, digest.lower() if digest else None, shown)

    @property
    def is_remote(self) -> bool:
        """Whether it must be fetched."""
        return self.scheme not in {"", "file"}

    def __str__(self) -> str:
        return self.shown

    def __repr__(self) -> str:
        return f"<Source {self.shown}>"


def _check(url: object) -> str:
    text = os.fspath(url) if isinstance(url, os.PathLike) else url
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise InvalidArgument("url", redacted(text) if isinstance(text, str) else text, ALLOWED)
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can bring
        raise InvalidArgument("url", redacted(text), ALLOWED) from error
    return text
