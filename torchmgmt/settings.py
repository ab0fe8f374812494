"""Every setting, declared once.

:class:`Settings` holds for each setting its name (as in TorchServe's ``config.properties``), kind, unit, default, help
and command line flags. Checking a value, reading it from text, the command line and its ``--help`` derive from that; a
further source of settings needs :func:`parse_setting` and a name, no second list.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import Attribute, field, fields, frozen

from torchmgmt.errors import InvalidArgument
from torchmgmt.records import check_number

if TYPE_CHECKING:
    import argparse

__all__ = [
    "Address",
    "Declaration",
    "Settings",
    "add_arguments",
    "declarations",
    "from_arguments",
    "is_loopback_host",
    "parse_setting",
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
    optional: bool = False
    """Whether None, which means not said, is legal."""

    @property
    def all_flags(self) -> tuple[str, ...]:
        """Every flag that sets it: ``--the-name`` first."""
        return tuple(dict.fromkeys(("--" + self.name.replace("_", "-"), *self.flags)))

    def accept(self, value: Any) -> Any:
        """Return ``value`` as it is kept, or raise :class:`InvalidArgument`."""
        return None if value is None and self.optional else self.kind.accept(self.name, value)


def _whole(minimum: int, unit: str = "") -> Kind:
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


def _seconds(minimum: float) -> Kind:
    def read(setting: str, text: str) -> float:
        try:
            return int(text) if text.strip().isdecimal() else float(text)
        except ValueError:
            what = f"a number of seconds, at least {minimum}"
            raise InvalidArgument(setting, text, what) from None

    def accept(setting: str, value: Any) -> float:
        check_number(setting, value, minimum=minimum, unit="seconds", whole=False)
        seconds: float = value
        return seconds

    return Kind("SECONDS", read, accept)


def _read_truth(setting: str, text: str) -> bool:
    try:
        return TRUTH[text.strip().lower()]
    except KeyError:
        raise InvalidArgument(setting, text, "true or false") from None


def _accept_truth(setting: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(setting, value, "True or False")
    return value


def _accept_path(setting: str, value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise InvalidArgument(setting, value, "the path of a folder")
    return Path(value)


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


def _accept_log_level(setting: str, value: Any) -> str:
    if not isinstance(value, str) or value.upper() not in LOG_LEVELS:
        raise InvalidArgument(setting, value, "one of " + ", ".join(LOG_LEVELS))
    return value.upper()


def _as_is(_setting: str, text: str) -> str:
    return text


def _one_of(*words: str) -> Kind:
    def accept(setting: str, value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in words:
            raise InvalidArgument(setting, value, f"{', '.join(words[:-1])} or {words[-1]}")
        return value.lower()

    return Kind("|".join(words), _as_is, accept)


TRUTH_KIND = Kind("true|false", _read_truth, _accept_truth)
PATH_KIND = Kind("DIR", _as_is, _accept_path)
ADDRESS_KIND = Kind("URL", _as_is, _accept_address)
LIST_KIND = Kind("ITEM", _read_list, _accept_list, takes_many=True)
LOG_LEVEL_KIND = Kind("|".join(LOG_LEVELS), _as_is, _accept_log_level)


def _setting(kind: Kind, default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"declare": partial(Declaration, kind=kind, help=help, **more)})


def _bind(_cls: type, attributes: list[Attribute[Any]]) -> list[Attribute[Any]]:
    """Tell each declaration its name, and make it the converter of its attribute."""
    bound = []
    for attribute in attributes:
        declaration = attribute.metadata["declare"](name=attribute.name, default=attribute.default)
        metadata = {"declaration": declaration}
        bound.append(attribute.evolve(converter=declaration.accept, metadata=metadata))
    return bound


@frozen(kw_only=True, field_transformer=_bind)
class Settings:
    """What the programs of torchmgmt can be told; immutable, made of checked values.

    Raises :class:`~torchmgmt.errors.InvalidArgument`, which names the setting, for a value that is not legal. Each
    setting's meaning and unit is its ``help`` below, also shown by ``python -m torchmgmt.http --help``.
    """

    model_store: Path | None = _setting(  # noqa: RUF009 - makes an attrs field
        PATH_KIND,
        None,
        "The folder in which archives are looked up by name. The server takes ./model_store if it exists.",
        optional=True,
    )
    load_models: tuple[str, ...] = _setting(
        LIST_KIND,
        (),
        "Models that the server registers when it starts: all, or a.mar, or name=a.mar.",
        flags=("--models",),
    )
    inference_address: str = _setting(
        ADDRESS_KIND, "http://127.0.0.1:8080", "Where /ping is served; port 0: the system chooses."
    )
    management_address: str = _setting(
        ADDRESS_KIND,
        "http://127.0.0.1:8081",
        "Where the Management API is served; port 0: the system chooses.",
    )
    default_workers_per_model: int | None = _setting(
        _whole(0),
        None,
        "Workers of a model for which neither the call nor its archive says a number."
        " If not set: 0 when registered over HTTP, one per CPU when loaded at start, 1 from Python.",
        optional=True,
    )
    job_queue_size: int = _setting(_whole(1), 100, "Requests that may wait for each model version.")
    default_response_timeout: float = _setting(_seconds(1e-3), 120, "How long a batch may run.", unit="s")
    default_startup_timeout: float = _setting(
        _seconds(1e-3), 120, "How long a worker may take to load a model.", unit="s"
    )
    unregister_model_timeout: float = _setting(
        _seconds(0),
        120,
        "How long requests may take to finish once their model is unregistered.",
        unit="s",
    )
    max_retry_timeout: float = _setting(
        _seconds(0), 300, "How long workers that fail to start are tried again.", unit="s"
    )
    on_give_up: str = _setting(
        _one_of("stay", "exit"),
        "stay",
        "What the server does when starting a model's workers was given up: stay, or exit with code 3 so that whoever"
        " watches it starts it anew.",
    )
    share_weights: str = _setting(
        _one_of("auto", "always", "never"),
        "auto",
        "Whether workers are forked from a process that has loaded the model once, and so share its memory. auto: if"
        " loading it left nothing behind that forked processes must not share.",
    )
    threads_per_worker: int | None = _setting(
        _whole(1),
        None,
        "Threads that one operation of a worker may use. If not set: the cores divided by the most workers.",
        optional=True,
    )
    batches_in_flight: int = _setting(
        _whole(1), 4, "Batches that may be with a worker at once, the one that it computes included."
    )
    max_requests: int | None = _setting(
        _whole(1), None, "A worker that has answered so many requests is replaced. If not set: never.", optional=True
    )
    max_memory: int | None = _setting(
        _whole(1, "bytes"),
        None,
        "A worker with more private memory is replaced; what workers share is not counted. If not set: never.",
        unit="bytes",
        optional=True,
    )
    scale_down_delay: float = _setting(
        _seconds(0),
        60,
        "For how long a worker above the least number must not have been needed before it goes.",
        unit="s",
    )
    template_idle_timeout: float = _setting(
        _seconds(0),
        600,
        "For how long a model may be without a worker before the process that has loaded it is given up.",
        unit="s",
    )
    enable_model_api: bool = _setting(TRUTH_KIND, False, "Allow registering and unregistering over HTTP.")
    disable_token_authorization: bool | None = _setting(
        TRUTH_KIND,
        None,
        "Serve every caller, on network addresses and through proxies, too. Anybody who reaches the management"
        " address can then run code here. If not set: callers on this machine only.",
        flags=("--disable-token-auth",),
        optional=True,
    )
    max_request_size: int = _setting(
        _whole(1, "bytes"), 6553500, "The largest body that a request may have.", unit="bytes"
    )
    log_level: str = _setting(LOG_LEVEL_KIND, "INFO", "What the server writes to stderr.")


def declarations() -> tuple[Declaration, ...]:
    """Return what every setting is, in the order of the class."""
    return tuple(attribute.metadata["declaration"] for attribute in fields(Settings))


def parse_setting(declaration: Declaration, text: str) -> Any:
    """Return the value of a setting from its text, as a file or the environment has it, or raise InvalidArgument."""
    return declaration.accept(declaration.kind.read(declaration.name, text))


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add every setting's flags to ``parser``; what was given lands in the namespace, what was not does not."""
    import argparse  # the caller, who made the parser, has it; a program that only embeds the library does not

    for declaration in declarations():
        options: dict[str, Any] = {}
        if declaration.kind is TRUTH_KIND:
            options.update(nargs="?", const=True)
        elif declaration.kind.takes_many:
            options.update(nargs="+", action="extend")
        parser.add_argument(
            *declaration.all_flags,
            dest=declaration.name,
            default=argparse.SUPPRESS,
            metavar=declaration.kind.metavar,
            help=_help_text(declaration),
            type=str if declaration.kind.takes_many else _argparse_type(declaration),
            **options,
        )


def from_arguments(namespace: argparse.Namespace) -> Settings:
    """Return the settings of a namespace that :func:`add_arguments` filled; the rest have their defaults."""
    known = {declaration.name for declaration in declarations()}
    return Settings(**{name: value for name, value in vars(namespace).items() if name in known})


def _argparse_type(declaration: Declaration) -> Callable[[str], Any]:
    import argparse

    def parse(text: str) -> Any:
        try:
            return parse_setting(declaration, text)
        except InvalidArgument as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _help_text(declaration: Declaration) -> str:
    facts = [f"unit: {declaration.unit}"] if declaration.unit else []
    if declaration.default not in {None, ()}:
        facts.append(f"default: {declaration.default}")
    text = declaration.help + (f" [{', '.join(facts)}]" if facts else "")
    return text.replace("%", "%%")
