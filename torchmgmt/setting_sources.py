"""Where settings come from: a ``config.properties``, the environment, and which of them counts.

Everything here works from declarations; which settings there are is for :mod:`torchmgmt.settings` to say.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import define, field

from torchmgmt.errors import InvalidArgument, InvalidSetting
from torchmgmt.properties import Entry, read_properties
from torchmgmt.setting_kinds import Declaration

__all__ = ["Found", "gather_values"]

ENABLE_ENVIRONMENT = "enable_envvars_config"
ALWAYS_IN_ENVIRONMENT = frozenset({ENABLE_ENVIRONMENT, "enable_model_api", "disable_token_authorization"})
"""What TorchServe's documentation has the environment set without ``enable_envvars_config``, and that itself."""

NOT_OURS: Mapping[str, str] = {
    **dict.fromkeys(("vmargs", "async_logging"), "there is no Java"),
    **dict.fromkeys(
        ("number_of_netty_threads", "netty_client_threads", "prefer_direct_buffer", "use_native_io", "io_ratio"),
        "there is no Netty",
    ),
    **dict.fromkeys(
        (
            "grpc_inference_address",
            "grpc_inference_port",
            "grpc_inference_max_connection_age_ms",
            "grpc_inference_max_connection_age_grace_ms",
            "grpc_management_address",
            "grpc_management_port",
            "grpc_management_max_connection_age_ms",
            "grpc_management_max_connection_age_grace_ms",
        ),
        "there is no gRPC server",
    ),
    **dict.fromkeys(
        (
            "metrics_mode",
            "metrics_format",
        ),
        "/metrics is in Prometheus' format, and no log has metrics",
    ),
    **dict.fromkeys(
        ("metrics_config", "model_metrics_auto_detect"),
        "all metrics are served, those of handlers too, declared or not",
    ),
    **dict.fromkeys(
        ("metric_time_interval", "system_metrics_cmd"), "this machine is measured whenever /metrics is read"
    ),
    **dict.fromkeys(("keystore_pass", "keystore_type"), "key stores are not read; see certificate_file"),
    **dict.fromkeys(
        ("header_key_sequence_id", "header_key_sequence_start", "header_key_sequence_end"), "there are no sequences"
    ),
    **dict.fromkeys(("model_server_home", "python", "tsConfigFile", "version"), "only TorchServe has a use for it"),
    "initial_worker_port": "workers listen on no port",
    "workflow_store": "workflows are not supported",
    "plugins_path": "TorchServe's plug-ins are Java archives",
    "snapshot_store": "state is kept in state_dir",
    "default_service_handler": "an archive or the call names the handler",
    "limit_max_image_pixels": "no handler for images ships with it",
    "debug": "use log_level=DEBUG",
}
"""Keys of TorchServe's config.properties that have no effect here, and why: the fate of each is said once."""


@define
class Found:
    """The values that the sources gave, and what is to be said of them."""

    values: dict[str, Any] = field(factory=dict)
    other_keys: dict[str, str] = field(factory=dict)
    """Keys of the file that are no settings, with their texts."""
    warnings: list[str] = field(factory=list)


def gather_values(
    declarations: Sequence[Declaration],
    arguments: Mapping[str, Any],
    *,
    file: Path | None,
    environment: Mapping[str, str],
) -> Found:
    """Return what the environment, before the arguments, before the file says.

    The environment counts for what :data:`ALWAYS_IN_ENVIRONMENT` has, and for everything if enable_envvars_config says
    so. A blank text is as if nothing were there. Blocks while the file is read.

    Raises:
        InvalidArgument: the file cannot be read.
        InvalidSetting: a text is wrong; names the file and line, or the variable, and the setting.
    """
    known = {declaration.name: declaration for declaration in declarations}
    found = _of_file(known, read_properties(file, environment), file) if file is not None else Found()
    found.values.update(arguments)
    switch = known[ENABLE_ENVIRONMENT]
    found.values.update(_of_environment([switch], environment))
    counting = known.values() if found.values.get(switch.name, switch.default) else _always(known)
    found.values.update(_of_environment(counting, environment))
    found.warnings += _ignored_variables(known, counting, environment)
    return found


def _of_file(known: Mapping[str, Declaration], entries: Iterable[Entry], file: Path) -> Found:
    found = Found()
    lines: dict[str, int] = {}
    for entry in entries:
        if entry.key in lines:
            found.warnings.append(
                f"{file}: {entry.key} stands in line {lines[entry.key]} and in line {entry.line}; the last one counts"
            )
        lines[entry.key] = entry.line
        declaration = known.get(entry.key)
        if declaration is None:
            found.other_keys[entry.key] = entry.text
            found.warnings.append(f"{file}, line {entry.line}: {_why_without_effect(entry.key, known)}")
        elif entry.text.strip():
            found.values[entry.key] = _parse(declaration, entry.text, f"{file}, line {entry.line}")
        else:
            found.values.pop(entry.key, None)
    return found


def _why_without_effect(key: str, known: Mapping[str, Declaration]) -> str:
    if key in NOT_OURS:
        return f"{key} has no effect: {NOT_OURS[key]}"
    # Names as others write them: jobQueueSize, job-queue-size.
    plain = {_plain(name): name for name in known}
    close = difflib.get_close_matches(_plain(key), plain, n=1, cutoff=0.75)
    return f"unknown setting {key!r}" + (f": did you mean {plain[close[0]]!r}?" if close else "")


def _plain(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum())


def _always(known: Mapping[str, Declaration]) -> list[Declaration]:
    return [declaration for name, declaration in known.items() if name in ALWAYS_IN_ENVIRONMENT]


def _of_environment(declarations: Iterable[Declaration], environment: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for declaration in declarations:
        text = environment.get(declaration.environment_name, "")
        if text.strip():
            source = f"the environment variable {declaration.environment_name}"
            values[declaration.name] = _parse(declaration, text, source)
    return values


def _parse(declaration: Declaration, text: str, source: str) -> Any:
    try:
        return declaration.parse(text.strip())
    except InvalidArgument as error:
        raise InvalidSetting(error.argument, error.given, error.allowed, source) from error


def _ignored_variables(
    known: Mapping[str, Declaration], counting: Iterable[Declaration], environment: Mapping[str, str]
) -> list[str]:
    """Say which variables somebody set for a server that does not look at them."""
    counted = {declaration.name for declaration in counting}
    names = [one.environment_name for one in known.values() if one.name not in counted]
    ignored = [name for name in names if environment.get(name, "").strip()]
    if not ignored:
        return []
    return [f"{', '.join(ignored)} in the environment: no effect without {ENABLE_ENVIRONMENT}=true"]
