"""Kinds: how the values of settings are written, and which are legal; and what one setting's declaration says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from torchmgmt.checks import check_number
from torchmgmt.errors import InvalidArgument

__all__ = [
    "ADDRESS_KIND",
    "FILE_KIND",
    "FOLDER_KIND",
    "ITEMS_KIND",
    "JSON_KIND",
    "LIST_KIND",
    "LOG_LEVEL_KIND",
    "MODELS_KIND",
    "PATTERNS_KIND",
    "PATTERN_KIND",
    "REFUSED_KEYSTORE",
    "TRUTH_KIND",
    "Address",
    "Declaration",
    "Kind",
    "amount",
    "is_loopback_host",
    "one_of",
    "whole",
]

DEFAULT_PORTS = {"http": 80, "https": 443}
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
TRUTH: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False}


@frozen
class Address:
    """Where a server listens: ``http://host:port``. Port 0 lets the system choose."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, argument: str, text: object) -> Address:
        """Read ``http://host[:port]``; raise :class:`InvalidArgument` that names ``argument`` for anything else."""
        from urllib.parse import urlsplit  # only what serves has an address

        allowed = "an address such as http://127.0.0.1:8081, without path"
        if not isinstance(text, str):
            raise InvalidArgument(argument, text, allowed)
        try:
            parts = urlsplit(text.strip())
            port = parts.port
        except ValueError:  # a port that is no number from 0 to 65535, a bracket without its twin
            raise InvalidArgument(argument, text, allowed) from None
        extra = parts.path.strip("/") or parts.query or parts.fragment or parts.username
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname or extra:
            raise InvalidArgument(argument, text, allowed)
        return cls(parts.scheme, parts.hostname, DEFAULT_PORTS[parts.scheme] if port is None else port)

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can reach it."""
        return is_loopback_host(self.host)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def is_loopback_host(host: str) -> bool:
    """Whether ``host``, without port or brackets, is ``localhost`` or a loopback IP address. Asks no name server."""
    import ipaddress  # a program that only embeds the library asks for no address

    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@frozen
class Kind:
    """How the values of a setting are written, and which are legal."""

    metavar: str
    read: Callable[[str, str], Any]
    """(setting, text) -> value; raises InvalidArgument."""
    accept: Callable[[str, Any], Any]
    """(setting, value from Python or from ``read``) -> the value as kept; raises InvalidArgument."""
    takes_many: bool = False


@frozen
class Declaration:
    """What one setting is."""

    name: str
    kind: Kind
    default: Any
    help: str
    unit: str = ""
    flags: Sequence[str] = ()
    """TorchServe's own flags for it, beside the one made from the name."""
    flags_for_false: Sequence[str] = ()
    """TorchServe's flags that set it to False."""
    has_own_flag: bool = True
    """Whether ``--the-name`` sets it on the command line."""
    optional: bool = False
    """Whether None, which means not said, is legal."""
    without_effect: str = ""
    """Why a value other than the default changes nothing in this release; empty if it does."""

    @property
    def all_flags(self) -> tuple[str, ...]:
        """Every flag that takes its value: ``--the-name`` first."""
        own = ("--" + self.name.replace("_", "-"),) if self.has_own_flag else ()
        return tuple(dict.fromkeys((*own, *self.flags)))

    @property
    def environment_name(self) -> str:
        """The environment variable for it, as in TorchServe."""
        return "TS_" + self.name.upper()

    @property
    def is_switch(self) -> bool:
        """Whether its flag alone, without a value, turns it on."""
        return self.kind is TRUTH_KIND

    @property
    def default_text(self) -> str:
        """The default as a file would have it; empty if not to set it means something of its own."""
        if self.default is None or self.default in ((), {}):
            return ""
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)

    def parse(self, text: str) -> Any:
        """Return the value that ``text`` stands for in a file, a variable or a flag, or raise :class:`InvalidArgument`."""
        return self.accept(self.kind.read(self.name, text))

    def accept(self, value: Any) -> Any:
        """Return ``value`` as it is kept, or raise :class:`InvalidArgument`."""
        return None if value is None and self.optional else self.kind.accept(self.name, value)


def whole(minimum: int, unit: str = "") -> Kind:
    """Whole numbers of at least ``minimum``."""

    def read(setting: str, text: str) -> int:
        try:
            return int(text)
        except ValueError:
            what = f"a whole number{' of ' + unit if unit else ''}, at least {minimum}"
            raise InvalidArgument(setting, text, what) from None

    def accept(setting: str, value: Any) -> int:
        check_number(setting, value, minimum=minimum, unit=unit)
        return int(value)

    return Kind("N", read, accept)


def amount(minimum: float, unit: str = "seconds") -> Kind:
    """Numbers of at least ``minimum``, which may have a fraction."""

    def read(setting: str, text: str) -> float:
        try:
            return int(text) if text.strip().isdecimal() else float(text)
        except ValueError:
            raise InvalidArgument(setting, text, f"a number of {unit}, at least {minimum}") from None

    def accept(setting: str, value: Any) -> float:
        check_number(setting, value, minimum=minimum, unit=unit, whole=False)
        accepted: float = value
        return accepted

    return Kind(unit.upper(), read, accept)


def one_of(*words: str) -> Kind:
    """One of some words, in any case."""

    def accept(setting: str, value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in words:
            raise InvalidArgument(setting, value, f"{', '.join(words[:-1])} or {words[-1]}")
        return value.lower()

    return Kind("|".join(words), _as_is, accept)


def _as_is(_setting: str, text: str) -> str:
    return text


def _read_truth(setting: str, text: str) -> bool:
    try:
        return TRUTH[text.strip().lower()]
    except KeyError:
        raise InvalidArgument(setting, text, "true or false") from None


def _accept_truth(setting: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(setting, value, "True or False")
    return value


def _path(what: str) -> Callable[[str, Any], Path]:
    def accept(setting: str, value: Any) -> Path:
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise InvalidArgument(setting, value, f"the path of a {what}")
        return Path(value)

    return accept


def _accept_address(setting: str, value: Any) -> str:
    return str(Address.parse(setting, value))


def _read_list(_setting: str, text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _accept_list(setting: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return _read_list(setting, value)
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise InvalidArgument(setting, value, "texts separated by commas or spaces, or a list of them")
    return tuple(part for item in value for part in _read_list(setting, item))


def _read_items(_setting: str, text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _accept_items(setting: str, value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
        raise InvalidArgument(setting, value, "texts separated by commas, or a list of them")
    return tuple(part for item in items for part in _read_items(setting, item))


def _accept_log_level(setting: str, value: Any) -> str:
    if not isinstance(value, str) or value.upper() not in LOG_LEVELS:
        raise InvalidArgument(setting, value, "one of " + ", ".join(LOG_LEVELS))
    return value.upper()


def _accept_pattern(setting: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(setting, value, "a regular expression")
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidArgument(setting, value, f"a regular expression; this one is none: {error}") from None
    return value


def _accept_patterns(setting: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = _read_items(setting, value)
    if not isinstance(value, Sequence):
        raise InvalidArgument(setting, value, "regular expressions separated by commas, or a list of them")
    return tuple(_accept_pattern(setting, item) for item in value)


def _read_json(setting: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(setting, text, f"a JSON object; this is none: {error}") from None


def _accept_json(setting: str, value: Any) -> dict[str, Any]:
    """Return a copy, so that nobody changes it later."""
    if not isinstance(value, Mapping):
        raise InvalidArgument(setting, value, "a JSON object")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(setting, value, f"a JSON object; this cannot be one: {error}") from None
    return copy


def _accept_models(setting: str, value: Any) -> dict[str, Any]:
    """Check that it is {name: {version: {parameter: value}}}, and those parameters that TorchServe has."""
    models = _accept_json(setting, value)
    for name, versions in models.items():
        _check_object(f"{setting}.{name}", versions, "a JSON object of versions")
        for version, parameters in versions.items():
            place = f"{setting}.{name}.{version}"
            _check_object(place, parameters, "a JSON object of parameters")
            for parameter, kind in MODEL_PARAMETERS.items():
                if parameter in parameters:
                    kind.accept(f"{place}.{parameter}", parameters[parameter])
    return models


def _check_object(place: str, value: object, allowed: str) -> None:
    if not isinstance(value, dict):
        raise InvalidArgument(place, value, allowed)


def _accept_text(setting: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(setting, value, "text")
    return value


def _refuse_keystore(setting: str, value: Any) -> None:
    allowed = (
        "left out: Java key stores are not read. Give the certificate chain and the private key as PEM files in"
        " certificate_file and private_key_file; `openssl pkcs12 -in STORE.p12 -nokeys -out cert.pem` and"
        " `openssl pkcs12 -in STORE.p12 -nocerts -nodes -out key.pem` write them"
        " (`keytool -importkeystore -srckeystore STORE -destkeystore STORE.p12 -deststoretype PKCS12` before, for JKS)"
    )
    raise InvalidArgument(setting, value, allowed)


TRUTH_KIND = Kind("true|false", _read_truth, _accept_truth)
FOLDER_KIND = Kind("DIR", _as_is, _path("folder"))
FILE_KIND = Kind("FILE", _as_is, _path("file"))
ADDRESS_KIND = Kind("URL", _as_is, _accept_address)
ITEMS_KIND = Kind("ITEM", _read_items, _accept_items, takes_many=True)
LIST_KIND = Kind("ITEM", _read_list, _accept_list, takes_many=True)
LOG_LEVEL_KIND = Kind("|".join(LOG_LEVELS), _as_is, _accept_log_level)
PATTERN_KIND = Kind("REGEX", _as_is, _accept_pattern)
PATTERNS_KIND = Kind("REGEX,REGEX", _read_items, _accept_patterns)
JSON_KIND = Kind("JSON", _read_json, _accept_json)
REFUSED_KEYSTORE = Kind("FILE", _as_is, _refuse_keystore)

MODEL_PARAMETERS: Mapping[str, Kind] = {
    "minWorkers": whole(0),
    "maxWorkers": whole(0),
    "batchSize": whole(1),
    "maxBatchDelay": whole(0, "milliseconds"),
    "responseTimeout": amount(1e-3),
    "startupTimeout": amount(1e-3),
    "maxRetryTimeoutInSec": amount(0),
    "defaultVersion": TRUTH_KIND,
    "marName": Kind("NAME", _as_is, _accept_text),
}
"""What TorchServe has under ``models``; the rest of what may stand in a model-config.yaml is checked with the model."""
MODELS_KIND = Kind("JSON", _read_json, _accept_models)
