"""Which URLs a caller over HTTP may register from: the operator's patterns, or the rule that counts without any."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen

from torchmgmt.errors import InvalidArgument, SourceNotAllowed

if TYPE_CHECKING:
    import ipaddress

__all__ = ["Rules", "not_allowed", "refuse_dots"]

_SEPARATORS = re.compile(r"[/\\]")
# The metadata services of Amazon (over IPv6), Alibaba and Google (over IPv6), which are not link-local but just as
# willing to hand out the machine's keys.
_METADATA = ("fd00:ec2::254", "100.100.100.200", "fd20:ce::254")
_NAT64 = "64:ff9b::/96"


def not_allowed(shown: str, hint: str) -> SourceNotAllowed:
    """Return the error of a URL that no rule allows; ``hint`` says what would."""
    return SourceNotAllowed(shown, f"Given URL {shown} does not match any allowed URL(s): {hint}")


def _compile(patterns: Sequence[str] | None) -> tuple[re.Pattern[str], ...] | None:
    if patterns is None:
        return None
    if isinstance(patterns, str):
        raise InvalidArgument("allowed_urls", patterns, "a sequence of regular expressions, or None")
    try:
        return tuple(re.compile(pattern) for pattern in patterns)
    except (re.error, TypeError) as error:
        raise InvalidArgument("allowed_urls", patterns, f"regular expressions ({error})") from None


@frozen
class Rules:
    """What one caller over HTTP may register from.

    Raises :class:`torchmgmt.errors.InvalidArgument` for what is no regular expression.
    """

    patterns: tuple[re.Pattern[str], ...] | None = field(converter=_compile)
    """``allowed_urls``; None: ``file://`` below the model store, and ``http(s)://`` for who ``may_fetch``."""
    may_fetch: bool = False
    """Whether, without patterns, remote hosts are allowed: the caller is on this machine or sent a key."""

    def matches(self, url: str) -> bool:
        """Whether a pattern matches the whole of ``url``; False without patterns."""
        return any(pattern.fullmatch(url) for pattern in self.patterns or ())

    def check_url(self, url: str, shown: str) -> None:
        """Refuse a URL by what it is called; ``url`` is without user and password, as it would be requested.

        Raises:
            SourceNotAllowed: no rule allows it.
        """
        refuse_dots(url, shown)
        if self.patterns is not None:
            if not self.matches(url):
                raise not_allowed(shown, "no pattern of the setting allowed_urls matches the whole of it")
        elif not url.lower().startswith(("http://", "https://")):
            raise not_allowed(shown, "file:// and http(s):// alone are allowed unless the setting allowed_urls says so")
        elif not self.may_fetch:
            raise not_allowed(
                shown,
                "remote hosts are for callers with a valid key, as the management address can be reached from other"
                " machines; send a key, or allow the URL with the setting allowed_urls",
            )

    def check_host(self, url: str, shown: str) -> None:
        """Refuse an allowed URL by where its host leads; asks the name server, and so may block for seconds.

        Raises:
            SourceNotAllowed: the host, or an address that it resolves to, is link-local.
        """
        if not self._names_host(url):
            for address in _addresses(url):
                self._check_address(address, shown)

    def check_peer(self, url: str, address: str, shown: str) -> None:
        """Refuse the address that was really connected to; for a name that resolves to another one each time.

        Raises:
            SourceNotAllowed: it is link-local.
        """
        if not self._names_host(url):
            self._check_address(address, shown)

    def _check_address(self, address: str, shown: str) -> None:
        if is_link_local(address):
            raise not_allowed(
                shown,
                f"its host is link-local ({address}); only a pattern of allowed_urls that names the host allows that",
            )

    def _names_host(self, url: str) -> bool:
        """Whether a pattern is about this very host: ``https?://.*`` says nothing of link-local ones."""
        from urllib.parse import urlsplit

        elsewhere = urlsplit(url)._replace(netloc="other.invalid").geturl()
        return any(pattern.fullmatch(url) and not pattern.fullmatch(elsewhere) for pattern in self.patterns or ())


def refuse_dots(url: str, shown: str) -> None:
    """Refuse a URL whose path has a ``..``; to be asked of it as it was written, too, as clients tidy what they request.

    Raises:
        SourceNotAllowed: it has one.
    """
    if has_dots(url):
        raise SourceNotAllowed(shown, f"Relative path is not allowed in url: {shown}")


def has_dots(url: str) -> bool:
    """Whether the path of a URL has a ``..``, in whatever way it is written: servers differ in which they follow."""
    from urllib.parse import unquote, urlsplit

    path = urlsplit(url).path
    for _ in range(3):  # %252e is an encoded %2e, which some proxy may decode first
        if ".." in _SEPARATORS.split(path):
            return True
        path = unquote(path)
    return False


def is_link_local(address: str) -> bool:
    """Whether an IP address is link-local or a metadata service's, also where it is an IPv4 one inside of IPv6."""
    import ipaddress

    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # a socket that is no IP one
        return False
    known = {ipaddress.ip_address(text) for text in _METADATA}
    return any(each.is_link_local or each in known for each in (found, *_inside(found)))


def _inside(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    import ipaddress

    if isinstance(address, ipaddress.IPv4Address):
        return []
    inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in ipaddress.ip_network(_NAT64):
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in inner if each is not None]


def _addresses(url: str) -> list[str]:
    """What the host resolves to; nothing if it does not: then it cannot be connected to, or a proxy knows better."""
    from urllib.parse import urlsplit

    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(address[4][0]) for address in found]
