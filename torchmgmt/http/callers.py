"""Who may call: the rule of keys, of this machine, and of the pages in its browsers.

One :class:`Guard` for each address. It is a plain object that is asked about each request, so that the WSGI and the ASGI
side share it; :class:`CallerGuard` hangs it into Falcon.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from urllib.parse import urlsplit

import falcon
import falcon.asgi
from attrs import field, frozen

from torchmgmt.errors import InvalidArgument
from torchmgmt.http.contract import contract_of, needs_key
from torchmgmt.http.errors import Forbidden, KeyRequired
from torchmgmt.http.tokens import KeyName, Keys, Verdict
from torchmgmt.settings import Address, Settings, is_loopback_host

__all__ = ["CallerGuard", "Guard", "host_name", "log_who_may_call"]

logger = logging.getLogger(__name__)

CHANGING_METHODS = frozenset({"POST", "PUT", "DELETE", "PATCH"})
OPEN_TO_ALL = frozenset(
    {
        ("OPTIONS", "/"),
        ("GET", "/api-description"),
        ("GET", "/ping"),
        ("GET", "/live"),
        ("GET", "/ready"),
        ("GET", "/metrics"),
        ("GET", "/v2/health/live"),
        ("GET", "/v2/health/ready"),
    }
)
READINESS_OF_ONE = "/ready/"
NEW_KEY = ("GET", "/token")

HOW_TO_SEND = "send the header 'Authorization: Bearer KEY'"
REFUSALS: Mapping[Verdict, str] = {
    Verdict.MISSING: "This request needs the {name} key: " + HOW_TO_SEND + "; the key is in the server's key_file.json",
    Verdict.MALFORMED: "The header Authorization has another form than 'Bearer KEY'; the {name} key is needed",
    Verdict.WRONG: "The key in the header Authorization is not the {name} key, or a newer one has replaced it",
    Verdict.EXPIRED: "The {name} key has expired; GET /token?type={name} with the API key makes a new one",
}

Header = Callable[[str], "str | None"]
"""Name of a header, in lower case -> its value in this request; None if it is not there."""


@frozen
class Guard:
    """Decides who may call one address. Waits for nothing; may be asked from any thread."""

    settings: Settings
    address: Address
    key_name: KeyName
    """The key that opens this address."""
    keys: Keys = field(factory=Keys)
    _needs_key: bool = field(init=False)

    @_needs_key.default
    def _default_needs_key(self) -> bool:
        return needs_key(self.settings, self.address)

    def __attrs_post_init__(self) -> None:
        if self._needs_key and self.key_name not in self.keys:
            raise InvalidArgument(
                "keys",
                self.keys,
                f"keys with a {self.key_name.value} key, as {self.address} needs one: those of torchmgmt.http.tokens.keys_for,"
                f" or TORCHMGMT_{self.key_name.name}_KEY in the environment",
            )

    def admit(self, method: str, path: str, header: Header) -> bool:
        """Raise if the request may not be served to whoever sent it; return whether it carries a valid key.

        Two dangers are met here besides missing keys. A page in a browser on this machine can post to a loopback address
        without asking first (a form needs no preflight): its Origin gives it away. A page whose own name was made to
        resolve to 127.0.0.1 can even read the answer: the Host gives that away.
        """
        makes_key = (method, path) == NEW_KEY and bool(self.keys)
        name = KeyName.API if makes_key else self.key_name
        verdict = self.keys.judge(name, header("authorization")) if self.keys else Verdict.MISSING
        has_key = verdict is Verdict.VALID
        if method in CHANGING_METHODS:
            self._check_origin(header, has_key=has_key)
        if has_key or _is_open(method, path, header):
            return has_key
        if makes_key or self._needs_key:
            self._refuse(name, verdict)
        if not self.settings.disable_token_authorization:
            self._check_is_local(header)
        return False

    def _refuse(self, name: KeyName, verdict: Verdict) -> None:
        reason = REFUSALS[verdict].format(name=name.value)
        logger.info("Refused: %s", reason)
        refusal = contract_of(self.settings).key_refusal
        raise refusal(reason, carries_one=verdict is not Verdict.MISSING)

    def _check_is_local(self, header: Header) -> None:
        host = header("host")
        forwarded = "X-Forwarded-For" if header("x-forwarded-for") is not None else ""
        forwarded = "Forwarded" if header("forwarded") is not None else forwarded
        if forwarded or not _names_loopback(host):
            seen = f"it carries {forwarded}" if forwarded else f"its Host is {host!r}"
            raise KeyRequired(
                f"This request does not count as coming from this machine: {seen}. Call it under a loopback name such as"
                " localhost, or start the server with --enable-token-auth and send a key, or with --disable-token-auth"
                " to serve every caller"
            )

    def _check_origin(self, header: Header, *, has_key: bool) -> None:
        origin = header("origin")
        if origin is None or self._is_own_origin(origin, header("host")):
            return
        allowed = {known.rstrip("/").lower() for known in self.settings.cors_allowed_origin}
        if origin.lower() in allowed:
            return
        # To say * is to let every page use the models, not to let every page put code on this machine.
        if "*" in allowed and (has_key or self.key_name is KeyName.INFERENCE):
            return
        raise Forbidden(
            f"Origin is {origin!r}: pages of other origins may not change anything here; cors_allowed_origin names those"
            " that may"
        )

    def _is_own_origin(self, origin: str, host_header: str | None) -> bool:
        if not host_header or origin.lower() not in {
            f"{scheme}://{host_header.lower()}" for scheme in ("http", "https")
        }:
            return False
        # Host and Origin agree for a page whose name was rebound to our address, too; an IP address cannot be rebound.
        host = host_name(host_header)
        return is_loopback_host(host) or _is_ip_address(host) or host == self.address.host


def _is_open(method: str, path: str, header: Header) -> bool:
    # A browser sends no key with a preflight; its answer depends on nothing but the path.
    is_preflight = method == "OPTIONS" and header("access-control-request-method") is not None
    return is_preflight or (method, path) in OPEN_TO_ALL or (method == "GET" and path.startswith(READINESS_OF_ONE))


@lru_cache(maxsize=64)
def _names_loopback(host: str | None) -> bool:
    return is_loopback_host(host_name(host))


def host_name(host: str | None) -> str:
    """Return the name or address in a Host header, without port and brackets; empty if it is none."""
    try:
        return urlsplit(f"//{host or ''}").hostname or ""
    except ValueError:
        return ""


def _is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def log_who_may_call(what: str, address: Address, settings: Settings) -> None:
    """Say in the log who may call ``address`` (of the ``what`` API), unless only this machine reaches it and may."""
    if needs_key(settings, address):
        reach = "callers on this machine, too" if address.is_loopback else "other machines reach it"
        clear = "" if address.is_loopback or address.scheme == "https" else "; without https they travel unencrypted"
        logger.info("The %s API at %s needs a key (%s)%s", what, address, reach, clear)
    elif not address.is_loopback:
        logger.warning(
            "The %s API at %s is open to everybody who reaches it, as disable_token_authorization says", what, address
        )


@frozen
class CallerGuard:
    """Asks the guard before anything else looks at a request, and notes in its context whether it ``has_key``."""

    guard: Guard

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Refuse with the code of the contract, or 403."""
        req.context.has_key = self.guard.admit(req.method, req.path, req.get_header)

    async def process_request_async(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """The same on the ASGI side."""
        req.context.has_key = self.guard.admit(req.method, req.path, req.get_header)
