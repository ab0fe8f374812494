"""What a caller calls a model's source, taken apart once: the place, the digest it must have, and what may be shown."""

from __future__ import annotations

import os
import re

from attrs import frozen

from torchmgmt.errors import InvalidArgument
from torchmgmt.redaction import HIDDEN, redacted

__all__ = ["Source"]

ALLOWED = "the name of a file in the model store, a path, or a URL; #sha256= and 64 hexadecimal digits may follow"

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
_PIN = re.compile(r"#sha256=(?P<digest>[^#]*)\Z", re.IGNORECASE)
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


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
        shown = redacted(text) if "://" in text else text  # also where a blank before it makes it a path
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

    @property
    def lacks_credentials(self) -> bool:
        """Whether it is what was shown, or saved, of a URL that had credentials."""
        return self.is_remote and any(f"{before}{HIDDEN}" in self.place for before in ("://", "="))

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
