"""The keys of token authorization: where they come from, how long they count, and the file that callers find them in.

Each key is fixed by the environment (``TORCHMGMT_MANAGEMENT_KEY``, ``TORCHMGMT_INFERENCE_KEY``, ``TORCHMGMT_API_KEY``, or
the same with ``TS_``; the former wins) or made by the server. Those that the server made stand in ``key_file.json``, in
TorchServe's form. No method here logs, raises or shows a key.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from datetime import datetime, timedelta, timezone
from enum import Enum
from pathlib import Path
from types import TracebackType

from attrs import define, field, frozen

from torchmgmt.errors import InvalidArgument
from torchmgmt.http.contract import needs_key
from torchmgmt.http.errors import BadRequest
from torchmgmt.http.operations import KeyName
from torchmgmt.settings import Address, Settings

__all__ = ["KEY_FILE", "Key", "KeyName", "Keys", "Verdict", "fixed_keys", "forget_environment", "keys_for"]

logger = logging.getLogger(__name__)

KEY_FILE = "key_file.json"
PREFIXES = ("TORCHMGMT_", "TS_")
RANDOM_BYTES = 32

_FIT_KEY = re.compile(r"[\x21-\x7e]{8,1024}")


class Verdict(Enum):
    """What is to be said of the key that a request carries."""

    VALID = "valid"
    MISSING = "missing"
    MALFORMED = "malformed"
    WRONG = "wrong"
    EXPIRED = "expired"


@frozen
class Key:
    """One key. Its representation does not show it."""

    text: str = field(repr=False)
    expires: datetime | None = None
    """None if it counts for ever."""
    is_fixed: bool = False
    """Whether it comes from the environment."""

    def to_dict(self) -> dict[str, str]:
        """Return it as an item of the key file."""
        item = {"key": self.text}
        if self.expires is not None:
            item["expiration time"] = _utc(self.expires)
        return item


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _utc(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


@define(eq=False)
class Keys:
    """The keys of one server, and their file. May be used from any thread; a context manager that closes them.

    Without arguments there are none: nothing is valid, and the whole is false.
    """

    _keys: Mapping[KeyName, Key] = field(factory=dict, repr=False)
    lifetime: timedelta = timedelta(hours=1)
    """For how long a management or inference key counts that is made here."""
    path: Path | None = None
    """The key file; None if no key is to be written."""
    _now: Callable[[], datetime] = field(default=_now, repr=False)
    _lock: threading.Lock = field(factory=threading.Lock, init=False, repr=False)
    _written: bytes = field(default=b"", init=False, repr=False)  # guarded by _lock
    _owner_pid: int = field(factory=os.getpid, init=False, repr=False)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __contains__(self, name: KeyName) -> bool:
        return name in self._keys

    def __enter__(self) -> Keys:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def judge(self, name: KeyName, authorization: str | None) -> Verdict:
        """Return what is to be said of a request's Authorization header where the key ``name`` is wanted. No waiting."""
        if authorization is None:
            return Verdict.MISSING
        scheme, _, given = authorization.strip().partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            return Verdict.MALFORMED
        key = self._keys.get(name)
        # Headers arrive as latin-1; compare_digest takes str only if it is ASCII.
        if key is None or not hmac.compare_digest(_bytes(given.strip()), _bytes(key.text)):
            return Verdict.WRONG
        return Verdict.EXPIRED if key.expires is not None and self._now() >= key.expires else Verdict.VALID

    def fill(self) -> None:
        """Make the keys that are not there and write the file, if anything is to stand in it.

        Raises :class:`OSError`, with what to do, if it cannot be written.
        """
        with self._lock:
            missing = [name for name in KeyName if name not in self._keys]
            keys = {**self._keys, **{name: self._make(name) for name in missing}}
            self._write_locked(keys)
            self._keys = keys
        if self._written:
            logger.info("The keys that callers need are in %s", self.path)

    def renew(self, name: KeyName) -> Key:
        """Replace the key by a new one, in the file too; from then on the old one is wrong.

        Raises :class:`BadRequest` if it is fixed by the environment, and :class:`OSError` if the file cannot be written;
        the old key counts then.
        """
        with self._lock:
            before = self._keys.get(name)
            if before is not None and before.is_fixed:
                raise BadRequest(f"The {name.value} key is fixed by the environment of the server; change it there")
            keys = {**self._keys, name: self._make(name)}
            self._write_locked(keys)
            self._keys = keys
        logger.info("There is a new %s key", name.value)
        return keys[name]

    def close(self) -> None:
        """Remove the key file if it is still the one written here. Closing again does nothing more."""
        if self.path is None or os.getpid() != self._owner_pid:
            return
        with self._lock:
            try:
                if self._written and self.path.read_bytes() == self._written:
                    self.path.unlink()
            except OSError as error:
                if not isinstance(error, FileNotFoundError):
                    logger.warning("Could not remove %s: %s", self.path, error.strerror)
            self._written = b""

    def _make(self, name: KeyName) -> Key:
        expires = None if name is KeyName.API else self._now() + self.lifetime
        return Key(secrets.token_urlsafe(RANDOM_BYTES), expires)

    def _write_locked(self, keys: Mapping[KeyName, Key]) -> None:
        items = {name.value: keys[name].to_dict() for name in KeyName if name in keys and not keys[name].is_fixed}
        if self.path is None or not items:
            return
        content = (json.dumps(items, indent=2) + "\n").encode()
        self._warn_of_another_locked()
        try:
            _write_private(self.path, content)
        except OSError as error:
            hint = (
                "start in a folder that may be written to, or fix all keys by TORCHMGMT_{MANAGEMENT,INFERENCE,API}_KEY"
            )
            raise OSError(error.errno, f"Cannot write {self.path}: {error.strerror}; {hint}") from None
        self._written = content

    def _warn_of_another_locked(self) -> None:
        if not self._written and self.path is not None and os.path.lexists(self.path):
            logger.warning(
                "%s was there already, left by a server that was killed or of one that runs: it is replaced", self.path
            )


def keys_for(
    settings: Settings,
    addresses: Iterable[Address],
    *,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Keys:
    """Return the keys of a server at ``addresses``: those of the environment and, where keys are needed, new ones.

    New keys are written to ``key_file.json`` in ``folder`` (the working directory), which only the user may read;
    closing the keys removes it. Raises :class:`InvalidArgument` for an unfit key in ``environ`` (the process's), and
    :class:`OSError` if the file cannot be written.
    """
    keys = fixed_keys(environ, settings=settings)
    if any(needs_key(settings, address) for address in addresses):
        keys.path = (folder or Path()).absolute() / KEY_FILE
        keys.fill()
    return keys


def fixed_keys(environ: Mapping[str, str] | None = None, *, settings: Settings | None = None) -> Keys:
    """Return the keys that ``environ`` (the process's environment) fixes; none if it fixes none.

    ``settings`` say for how long those count that are made later on, and whether there are keys at all. Raises
    :class:`InvalidArgument`, without the key, for one that is too short to be safe or unfit for a header.
    """
    settings = settings or Settings()
    if settings.disable_token_authorization:
        return Keys()
    environ = os.environ if environ is None else environ
    found = {name: _fixed_key(name, environ) for name in KeyName}
    fixed = {name: key for name, key in found.items() if key is not None}
    return Keys(fixed, timedelta(minutes=settings.token_expiration_min))


def forget_environment(environ: MutableMapping[str, str]) -> None:
    """Take the keys out of ``environ``, so that processes started from now on, workers, do not inherit them."""
    for name in KeyName:
        for prefix in PREFIXES:
            environ.pop(_variable(prefix, name), None)


def _fixed_key(name: KeyName, environ: Mapping[str, str]) -> Key | None:
    for variable in (_variable(prefix, name) for prefix in PREFIXES):
        text = environ.get(variable, "").strip()
        if not text:
            continue
        if not _FIT_KEY.fullmatch(text):
            shown = f"({len(text)} characters, not shown)"
            raise InvalidArgument(variable, shown, "from 8 to 1024 visible ASCII characters without spaces")
        return Key(text, is_fixed=True)
    return None


def _variable(prefix: str, name: KeyName) -> str:
    return f"{prefix}{name.value.upper()}_KEY"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 600 from the start
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
