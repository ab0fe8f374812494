"""Every setting, declared once.

:class:`Settings` holds for each setting its name (as in TorchServe's ``config.properties``), kind, unit, default, help
and command line flags. Checking a value, ``config.properties``, the environment, the command line, its ``--help`` and
``docs/settings.md`` derive from that; none of them has a second list.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from attrs import Attribute, field, fields, frozen

from torchmgmt.records import ENVELOPES
from torchmgmt.setting_kinds import (
    ADDRESS_KIND,
    FILE_KIND,
    FOLDER_KIND,
    ITEMS_KIND,
    JSON_KIND,
    LIST_KIND,
    LOG_LEVEL_KIND,
    MODELS_KIND,
    PATTERN_KIND,
    PATTERNS_KIND,
    REFUSED_KEYSTORE,
    TRUTH_KIND,
    Address,
    Declaration,
    Kind,
    amount,
    is_loopback_host,
    one_of,
    whole,
)

__all__ = ["Address", "Declaration", "Gathered", "Settings", "declarations", "gather", "is_loopback_host"]

log = logging.getLogger(__name__)


def _setting(kind: Kind, default: Any, help: str, **more: Any) -> Any:
    hashed = kind not in {JSON_KIND, MODELS_KIND}  # which have dictionaries as values
    return field(default=default, hash=hashed, metadata={"declare": partial(Declaration, kind=kind, help=help, **more)})


def _bind(_cls: type, attributes: list[Attribute[Any]]) -> list[Attribute[Any]]:
    """Tell each declaration its name, and make it the converter of its attribute."""
    bound = []
    for attribute in attributes:
        declare = attribute.metadata.get("declare")
        if declare is not None:
            declaration = declare(name=attribute.name, default=attribute.default)
            attribute = attribute.evolve(converter=declaration.accept, metadata={"declaration": declaration})  # noqa: PLW2901
        bound.append(attribute)
    return bound


@frozen(kw_only=True, field_transformer=_bind)
class Settings:
    """What the programs of torchmgmt can be told; immutable, made of checked values.

    Raises :class:`~torchmgmt.errors.InvalidArgument`, which names the setting, for a value that is not legal. Each
    setting's meaning and unit is its ``help`` below, also shown by ``python -m torchmgmt.http --help``.
    """

    model_store: Path | None = _setting(
        FOLDER_KIND,
        None,
        "The folder in which archives are looked up by name. The server takes ./model_store if it exists.",
        optional=True,
    )
    load_models: tuple[str, ...] = _setting(
        ITEMS_KIND,
        (),
        "Models that the server registers when it starts: all, or a.mar, or name=a.mar, separated by commas.",
        flags=("--models",),
    )
    models: Mapping[str, Mapping[str, Mapping[str, Any]]] = _setting(
        MODELS_KIND,
        {},
        "Parameters of single model versions, as JSON: {name: {version: {marName, minWorkers, maxWorkers, batchSize,"
        " maxBatchDelay, responseTimeout, defaultVersion, ...}}}. They count where neither the call nor the archive says"
        " anything.",
        has_own_flag=False,
    )
    model_snapshot: Mapping[str, Any] | None = _setting(
        JSON_KIND,
        None,
        "What a snapshot that TorchServe wrote says of its models, as JSON; the server restores them.",
        has_own_flag=False,
        optional=True,
    )
    state_dir: Path = _setting(
        FOLDER_KIND,
        Path("logs/config"),
        "The folder in which the server keeps which models it has, to have them again after a restart.",
    )
    no_config_snapshots: bool = _setting(
        TRUTH_KIND, False, "Keep no state and restore none: state_dir is neither written nor read.", flags=("--ncs",)
    )
    inference_address: str = _setting(
        ADDRESS_KIND, "http://127.0.0.1:8080", "Where inference is served; port 0: the system chooses."
    )
    management_address: str = _setting(
        ADDRESS_KIND,
        "http://127.0.0.1:8081",
        "Where the Management API is served; port 0: the system chooses.",
    )
    metrics_address: str = _setting(
        ADDRESS_KIND,
        "http://127.0.0.1:8082",
        "Where /metrics is served, without a key; port 0: the system chooses.",
    )
    enable_metrics_api: bool = _setting(TRUTH_KIND, True, "Serve /metrics, at metrics_address.")
    disable_system_metrics: bool = _setting(
        TRUTH_KIND, False, "Leave this machine's processor, memory and disk out of the metrics."
    )
    tracing: str = _setting(
        one_of("auto", "on", "off"),
        "auto",
        "OpenTelemetry spans of predictions, which need the extra otel. auto: if the program has set a tracer provider"
        " before it makes the manager.",
    )
    certificate_file: Path | None = _setting(
        FILE_KIND, None, "The certificate chain of https:// addresses, a PEM file.", optional=True
    )
    private_key_file: Path | None = _setting(
        FILE_KIND, None, "The private key of https:// addresses, a PEM file.", optional=True
    )
    keystore: None = _setting(
        REFUSED_KEYSTORE,
        None,
        "Refused: give certificate_file and private_key_file instead.",
        has_own_flag=False,
        optional=True,
    )
    default_workers_per_model: int | None = _setting(
        whole(0),
        None,
        "Workers of a model for which neither the call nor its archive says a number."
        " If not set: 0 when registered over HTTP, one per CPU when loaded at start, 1 from Python.",
        optional=True,
    )
    job_queue_size: int = _setting(whole(1), 100, "Requests that may wait for each model version.")
    default_response_timeout: float = _setting(amount(1e-3), 120, "How long a batch may run.", unit="s")
    default_startup_timeout: float = _setting(
        amount(1e-3), 120, "How long a worker may take to load a model.", unit="s"
    )
    unregister_model_timeout: float = _setting(
        amount(0),
        120,
        "How long requests may take to finish once their model is unregistered.",
        unit="s",
    )
    max_retry_timeout: float = _setting(
        amount(0), 300, "How long workers that fail to start are tried again.", unit="s"
    )
    on_give_up: str = _setting(
        one_of("stay", "exit"),
        "stay",
        "What the server does when starting a model's workers was given up: stay, or exit with code 3 so that whoever"
        " watches it starts it anew.",
    )
    share_weights: str = _setting(
        one_of("auto", "always", "never"),
        "auto",
        "Whether workers are forked from a process that has loaded the model once, and so share its memory. auto: if"
        " loading it left nothing behind that forked processes must not share.",
    )
    threads_per_worker: int | None = _setting(
        whole(1),
        None,
        "Threads that one operation of a worker may use. If not set: the cores divided by the most workers.",
        optional=True,
    )
    batches_in_flight: int = _setting(
        whole(1), 4, "Batches that may be with a worker at once, the one that it computes included."
    )
    max_requests: int | None = _setting(
        whole(1), None, "A worker that has answered so many requests is replaced. If not set: never.", optional=True
    )
    max_memory: int | None = _setting(
        whole(1, "bytes"),
        None,
        "A worker with more private memory is replaced; what workers share is not counted. If not set: never.",
        unit="bytes",
        optional=True,
    )
    isolate_errors: bool = _setting(
        TRUTH_KIND,
        False,
        "Run a batch that failed as a whole again, request by request, so that one bad input cannot fail its neighbours.",
    )
    cancel_running: str = _setting(
        one_of("when_needed", "now", "never"),
        "when_needed",
        "What becomes of a batch that a worker runs and for which nobody waits any more. when_needed: its worker is ended once"
        " others have waited for one for longer than a new one takes to start. now: at once. never: it is run to its end. Closing"
        " the server does not wait for it.",
    )
    scale_down_delay: float = _setting(
        amount(0),
        60,
        "For how long a worker above the least number must not have been needed before it goes.",
        unit="s",
    )
    template_idle_timeout: float = _setting(
        amount(0),
        600,
        "For how long a model may be without a worker before the process that has loaded it is given up.",
        unit="s",
    )
    enable_model_api: bool = _setting(TRUTH_KIND, False, "Allow registering and unregistering over HTTP.")
    disable_token_authorization: bool | None = _setting(
        TRUTH_KIND,
        None,
        "Serve every caller, on network addresses and through proxies, too. Anybody who reaches the management"
        " address can then run code here. If not set: callers on this machine need no token. false: everybody needs one.",
        flags=("--disable-token-auth",),
        flags_for_false=("--enable-token-auth",),
        optional=True,
    )
    token_expiration_min: float = _setting(
        amount(0.01, "minutes"), 60, "For how long the keys of token authorization count.", unit="min"
    )
    contract: str = _setting(
        one_of("documented", "torchserve-0.12"),
        "documented",
        "Where TorchServe 0.12 differs from its documentation: which of the two is followed.",
    )
    allowed_urls: tuple[str, ...] | None = _setting(
        PATTERNS_KIND,
        None,
        "Regular expressions, separated by commas, one of which the whole URL of a model that is registered over HTTP must"
        " match. If not set: file:// in the model store, and http(s):// to all but link-local hosts from callers who are on"
        " this machine or sent a key.",
        optional=True,
    )
    cors_allowed_origin: tuple[str, ...] = _setting(
        LIST_KIND, (), "Web pages from these origins (https://example.org, or *) may call; other pages may not."
    )
    cors_allowed_methods: tuple[str, ...] = _setting(
        LIST_KIND, (), "Methods that those pages may use. If not set: those of the path."
    )
    cors_allowed_headers: tuple[str, ...] = _setting(
        LIST_KIND,
        (),
        "Request headers that those pages may send. If not set: Authorization, Content-Type and X-Request-Id.",
    )
    max_request_size: int = _setting(
        whole(1, "bytes"), 6553500, "The largest body that a request may have.", unit="bytes"
    )
    max_response_size: int = _setting(
        whole(1, "bytes"),
        6553500,
        "The largest body that the answer to a prediction over HTTP, or each part of one, may have.",
        unit="bytes",
    )
    decode_input_request: bool = _setting(
        TRUTH_KIND, True, "Parse the JSON and the text of predictions over HTTP; if not, handlers get bytes."
    )
    show_handler_errors: bool = _setting(
        TRUTH_KIND,
        False,
        "Show the traceback of a handler that failed, and what its worker printed last, to callers of the inference address"
        " too. If not: the reason, in one line.",
    )
    number_of_gpu: int | None = _setting(
        whole(0),
        None,
        "GPUs that workers may use. If not set: all.",
        optional=True,
        without_effect="its workers use no GPU yet",
    )
    blacklist_env_vars: str | None = _setting(
        PATTERN_KIND,
        None,
        "A regular expression: environment variables whose whole name matches are kept from worker processes, and from pip.",
        optional=True,
    )
    install_py_dep_per_model: bool = _setting(
        TRUTH_KIND,
        False,
        "Install what the requirements file of an archive asks for, for its workers alone. It runs code of the archive, and"
        " needs a package index.",
    )
    install_py_dep_timeout: float = _setting(
        amount(1e-3), 600, "How long installing a requirements file may take.", unit="s"
    )
    service_envelope: str | None = _setting(
        one_of(*ENVELOPES),
        None,
        "The request envelope of models whose manifest names none. If not set: none.",
        optional=True,
    )
    enable_envvars_config: bool = _setting(
        TRUTH_KIND,
        False,
        "Let environment variables TS_<NAME> set every setting, before the command line and the file.",
    )
    log_level: str = _setting(LOG_LEVEL_KIND, "INFO", "What the server writes to stderr.")
    cache_dir: Path | None = _setting(
        FOLDER_KIND,
        None,
        "A folder that keeps downloaded archives, and in which archives are unpacked and versions have their working"
        " directories; programs of one user may share it. If not set: a temporary folder, and nothing is kept.",
        optional=True,
    )
    max_cache_size: int = _setting(
        whole(0, "bytes"),
        64 << 30,
        "How large the archives kept in cache_dir may be together; those not used for longest are removed.",
        unit="bytes",
    )
    max_archive_size: int = _setting(
        whole(1, "bytes"), 64 << 30, "The largest archive that is downloaded.", unit="bytes"
    )
    download_timeout: float = _setting(amount(1e-3), 3600, "How long a download may take in all.", unit="s")
    download_stall_timeout: float = _setting(
        amount(1e-3), 60, "How long a download may be without a single byte.", unit="s"
    )
    other_keys: Mapping[str, str] = field(factory=dict, hash=False)
    """What else a configuration file had: keys that are no settings, with their texts. Nothing looks at them."""

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, environment: Mapping[str, str] | None = None) -> Settings:
        """Read a ``config.properties``, TorchServe's own included; what is odd in it is logged as warnings.

        What :func:`gather` says of files and the environment holds here, too. Blocks while the file is read.

        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "config.properties")
        >>> _ = path.write_text("job_queue_size = 7")
        >>> Settings.from_file(path).job_queue_size
        7

        Raises:
            InvalidArgument: the file cannot be read.
            InvalidSetting: a value in it is wrong; names file, line and setting.
        """
        gathered = gather(file=path, environment=environment)
        for warning in gathered.warnings:
            log.warning("%s", warning)
        return gathered.settings


@frozen
class Gathered:
    """Settings from several sources, and what is to be said of those."""

    settings: Settings
    warnings: tuple[str, ...] = ()


def declarations() -> tuple[Declaration, ...]:
    """Return what every setting is, in the order of the class."""
    found = (attribute.metadata.get("declaration") for attribute in fields(Settings))
    return tuple(declaration for declaration in found if declaration is not None)


def gather(
    arguments: Mapping[str, Any] | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Gathered:
    """Return the settings that the environment, before ``arguments``, before a ``config.properties`` gives.

    ``environment`` (``os.environ`` if None) replaces ``$$VARIABLE$$`` in the file's values. Of itself it sets
    enable_model_api, disable_token_authorization and enable_envvars_config, and with that on every setting, each by
    ``TS_<NAME>``. Blocks while the file is read; any thread.

    Raises:
        InvalidArgument: the file cannot be read, or one of the ``arguments`` is wrong.
        InvalidSetting: what stands in the file or the environment is wrong; names file, line and setting.
    """
    from torchmgmt.setting_sources import gather_values  # most programs that embed the library read no file

    path = None if file is None else Path(file)
    everything = os.environ if environment is None else environment
    found = gather_values(declarations(), arguments or {}, file=path, environment=everything)
    settings = Settings(**found.values, other_keys=found.other_keys)
    return Gathered(settings, (*found.warnings, *_without_effect(settings)))


def _without_effect(settings: Settings) -> list[str]:
    """Say which settings were given that this release does not use."""
    return [
        f"{one.name} has no effect in this release: {one.without_effect}"
        for one in declarations()
        if one.without_effect and getattr(settings, one.name) != one.default
    ]
