"""The addresses of a server: which APIs each serves, and whether by TLS. Bound before anything is started."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import attrs
from attrs import frozen

from torchmgmt.errors import InvalidArgument
from torchmgmt.http.sockets import address_of, bind
from torchmgmt.http.tls import tls_context
from torchmgmt.settings import Address, Settings

__all__ = ["Addresses", "BoundAddress", "Role"]


class Role(Enum):
    """What an address serves."""

    INFERENCE = "inference"
    MANAGEMENT = "management"
    METRICS = "metrics"

    @property
    def setting(self) -> str:
        """The name of the setting that says where."""
        return f"{self.value}_address"


@frozen
class BoundAddress:
    """One address, which listens."""

    roles: frozenset[Role]
    sock: socket.socket
    tls: ssl.SSLContext | None = None

    @property
    def address(self) -> Address:
        """Where it listens, with the real port."""
        return address_of(self.sock, "https" if self.tls else "http")

    def settings_with_real_address(self, settings: Settings) -> Settings:
        """Return ``settings`` with the real host and port, by which the rule of who may call knows our own origin."""
        real: dict[str, Any] = {role.setting: str(self.address) for role in self.roles}
        return attrs.evolve(settings, **real)


@frozen
class Addresses:
    """All addresses of one server; a context manager that closes them. The inference address comes first."""

    bound: tuple[BoundAddress, ...]

    @classmethod
    def bind(cls, settings: Settings, roles: Iterable[Role] = (Role.INFERENCE, Role.MANAGEMENT)) -> Addresses:
        """Bind the addresses of ``roles``; those that are equal are one, unless the system is to choose their ports.

        Raises :class:`~torchmgmt.errors.InvalidArgument` if one cannot be served, and :class:`OSError`, with one line,
        if one is taken.
        """
        wanted = {role: Address.parse(role.setting, getattr(settings, role.setting)) for role in roles}
        _check_schemes(wanted)
        needs_tls = any(address.scheme == "https" for address in wanted.values())
        tls = tls_context(settings.certificate_file, settings.private_key_file) if needs_tls else None
        with contextlib.ExitStack() as undo:
            bound = []
            for address, served in _grouped(wanted):
                sock = undo.enter_context(contextlib.closing(bind(address)))
                bound.append(BoundAddress(frozenset(served), sock, tls if address.scheme == "https" else None))
            undo.pop_all()
        return cls(tuple(bound))

    def __getitem__(self, role: Role) -> Address:
        """Where ``role`` is served, with the real port; raises :class:`KeyError` if it is not."""
        for one in self.bound:
            if role in one.roles:
                return one.address
        raise KeyError(role)

    def __iter__(self) -> Iterator[Address]:
        return iter([one.address for one in self.bound])

    def __enter__(self) -> Addresses:
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets; those of servers that ran are closed already, which does no harm."""
        for one in self.bound:
            one.sock.close()


def _grouped(wanted: Mapping[Role, Address]) -> list[tuple[Address, list[Role]]]:
    """Return each different address with what it serves."""
    groups: list[tuple[Address, list[Role]]] = []
    for role, address in wanted.items():
        for other, roles in groups:
            if address.port and _where(address) == _where(other):
                roles.append(role)
                break
        else:
            groups.append((address, [role]))
    return groups


def _check_schemes(wanted: Mapping[Role, Address]) -> None:
    """Refuse http and https on one port: a client that speaks first tells nobody which it means."""
    for role, address in wanted.items():
        for other_role, other in wanted.items():
            if address.port and _where(address) == _where(other) and address.scheme != other.scheme:
                allowed = f"{other}, or on another port than {other_role.setting}: one port speaks either http or https"
                raise InvalidArgument(role.setting, str(address), allowed)


def _where(address: Address) -> tuple[str, int]:
    # As bind has it: IPv4 comes first.
    return "127.0.0.1" if address.host.lower() == "localhost" else address.host.lower(), address.port
