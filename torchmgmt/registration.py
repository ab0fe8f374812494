"""What a registration asks for: the call's own arguments, then the archive's, then the settings', checked and joined.

It opens nothing and starts nothing. What is wrong in a call is an InvalidArgument that names the argument; what is wrong
in an archive is an InvalidArchive that names the key of its ``model-config.yaml``; what is wrong in the settings' models
is an InvalidArgument that names the place.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from attrs import Attribute, field, frozen
from attrs.converters import optional as optional_converter
from attrs.validators import optional

from torchmgmt.checks import check_number, number, plain_fields, text, truth
from torchmgmt.errors import InvalidArchive, InvalidArgument
from torchmgmt.events import Listener
from torchmgmt.live import HANDLER, MODEL_FILES, Batching, live_file, live_object
from torchmgmt.records import (
    CancelRunning,
    ModelKey,
    ModelSpec,
    Scale,
    ShareWeights,
    backend_name,
    cancel_running_of,
    share_weights_of,
)
from torchmgmt.settings import Settings

if TYPE_CHECKING:
    from torchmgmt.archive import ModelFolder, ModelSources

__all__ = ["Wishes", "key_of", "open_source", "scale_of", "shown", "sources_of", "spec_of"]

logger = logging.getLogger(__name__)

RUNTIMES = ("python", "python3", "lsp")
DEFAULT_VERSION = "1.0"
CONFIG_KEYS: Mapping[str, str] = {
    "batch_size": "batchSize",
    "max_batch_delay": "maxBatchDelay",
    "response_timeout": "responseTimeout",
    "startup_timeout": "startupTimeout",
    "max_retry_timeout": "maxRetryTimeoutInSec",
    "job_queue_size": "jobQueueSize",
    "client_timeout": "clientTimeoutInMills",
    "queue_timeout": "queueTimeoutInMills",
    "min_worker": "minWorkers",
    "max_worker": "maxWorkers",
    # Ours, written as TorchServe writes its own.
    "backend": "backend",
    "share_weights": "shareWeights",
    "threads_per_worker": "threadsPerWorker",
    "batches_in_flight": "batchesInFlight",
    "max_requests": "maxRequests",
    "max_memory": "maxMemory",
    "isolate_errors": "isolateErrors",
    "cancel_running": "cancelRunning",
    "scale_down_delay": "scaleDownDelay",
    "template_idle_timeout": "templateIdleTimeout",
}
"""From the names of our arguments to the keys in ``model-config.yaml``."""


def _runtime(_instance: object, _attribute: Attribute[Any], value: object) -> None:
    if not isinstance(value, str) or value.lower() not in RUNTIMES:
        raise InvalidArgument("runtime", value, "python, python3 or LSP, in any case")


def _batching(_instance: object, _attribute: Attribute[Any], value: object) -> None:
    if value not in {each.value for each in Batching}:
        raise InvalidArgument("batching", value, "stack or list")


@frozen(kw_only=True, field_transformer=plain_fields)
class Wishes:
    """The arguments of ``ModelManager.register`` beside the url; None is what the call leaves open."""

    model_name: str | None = field(default=None, validator=optional(text("model_name")))
    version: str | None = field(default=None, validator=optional(text("version")))
    handler: str | None = field(default=None, validator=optional(text("handler")))
    runtime: str | None = field(default=None, validator=optional(_runtime))
    batch_size: int | None = field(default=None, validator=optional(number("batch_size", 1)))
    max_batch_delay: int | None = field(default=None, validator=optional(number("max_batch_delay", 0, "milliseconds")))
    initial_workers: int | None = field(default=None, validator=optional(number("initial_workers", 0)))
    max_workers: int | None = field(default=None, validator=optional(number("max_workers", 0)))
    response_timeout: float | None = field(
        default=None, validator=optional(number("response_timeout", 1e-3, "seconds", whole=False))
    )
    startup_timeout: float | None = field(
        default=None, validator=optional(number("startup_timeout", 1e-3, "seconds", whole=False))
    )
    backend: str | None = field(default=None, validator=optional(backend_name))
    share_weights: ShareWeights | None = field(default=None, converter=optional_converter(share_weights_of))
    threads_per_worker: int | None = field(default=None, validator=optional(number("threads_per_worker", 1)))
    batches_in_flight: int | None = field(default=None, validator=optional(number("batches_in_flight", 1)))
    max_requests: int | None = field(default=None, validator=optional(number("max_requests", 1)))
    max_memory: int | None = field(default=None, validator=optional(number("max_memory", 1, "bytes")))
    isolate_errors: bool | None = field(default=None, validator=optional(truth("isolate_errors")))
    cancel_running: CancelRunning | None = field(default=None, converter=optional_converter(cancel_running_of))
    scale_down_delay: float | None = field(
        default=None, validator=optional(number("scale_down_delay", 0, "seconds", whole=False))
    )
    template_idle_timeout: float | None = field(
        default=None, validator=optional(number("template_idle_timeout", 0, "seconds", whole=False))
    )
    batching: str | None = field(default=None, validator=optional(_batching))
    model_class: object = None
    synchronous: bool = field(default=True, validator=truth("synchronous"))
    default_workers: int = field(default=1, validator=number("default_workers", 0))
    trusted: bool = field(default=True, validator=truth("trusted"))
    may_fetch: bool = field(default=False, validator=truth("may_fetch"))
    loaded_at_startup: bool = field(default=False, validator=truth("loaded_at_startup"))

    def __attrs_post_init__(self) -> None:
        if self.initial_workers is not None and self.max_workers is not None:
            check_number("max_workers", self.max_workers, minimum=self.initial_workers)


def sources_of(model_store: str | os.PathLike[str] | None, settings: Settings, listener: Listener) -> ModelSources:
    """Return where models come from; raise InvalidArgument if ``model_store``, or that of the settings, is no path."""
    from torchmgmt.archive import (  # a fifth of what importing all of this costs
        DownloadLimits,
        Installing,
        ModelSources,
    )

    return ModelSources(
        settings.model_store if model_store is None else model_store,
        cache_dir=settings.cache_dir,
        max_cache_bytes=settings.max_cache_size,
        download_limits=DownloadLimits(
            max_bytes=settings.max_archive_size,
            timeout_s=settings.download_timeout,
            stall_s=settings.download_stall_timeout,
        ),
        installing=Installing(settings.install_py_dep_timeout, settings.blacklist_env_vars)
        if settings.install_py_dep_per_model
        else None,
        allowed_urls=settings.allowed_urls,
        listener=listener,
    )


def open_source(sources: ModelSources, url: object, wishes: Wishes) -> ModelFolder:
    """Return the folder of an archive, or a live object, or a model file, with the folder that it is to be run in.

    The caller releases it. Blocks and raises as :meth:`ModelSources.open` does; raises InvalidArgument, too, for a live
    object that is none, or arguments that do not go with it.
    """
    from torchmgmt.archive import ModelFolder

    if wishes.trusted and not isinstance(url, (str, bytes, os.PathLike)):
        live = live_object(url, wishes.batching)
        _check_goes_with_live(wishes)
        if wishes.model_class is not None:
            raise InvalidArgument(
                "model_class", wishes.model_class, "None, unless the path of a file of weights is given"
            )
        return ModelFolder(Path.cwd(), live.shown, manifest=None, config={}, digest=None, live=live)
    place = cast("str | os.PathLike[str]", url)  # what is neither is refused by who opens it
    file = sources.find(place) if wishes.trusted and _names_model_file(url) else None
    if file is None or file.is_dir():
        _check_is_for_live(wishes)
        return sources.open(place, trusted=wishes.trusted, may_fetch=wishes.may_fetch)
    _check_goes_with_live(wishes)
    live = live_file(file, wishes.model_class, wishes.batching)
    return ModelFolder(file.parent, os.fspath(place), manifest=None, config={}, digest=None, live=live)


def shown(url: object) -> str:
    """Return how a source is called; a live object tells nothing of itself that could not be something else tomorrow."""
    return str(url) if isinstance(url, (str, os.PathLike)) else "a live object"


def _names_model_file(url: object) -> bool:
    text = os.fspath(url) if isinstance(url, os.PathLike) else url
    return isinstance(text, str) and Path(text).suffix.lower() in MODEL_FILES


def _check_goes_with_live(wishes: Wishes) -> None:
    """Raise InvalidArgument for what an archive has and a live object has not, or the other way round."""
    if wishes.model_name is None:
        raise InvalidArgument("model_name", None, "given: a live object or model file has no manifest that names it")
    if wishes.handler is not None:
        raise InvalidArgument("handler", wishes.handler, "None: a live object or model file needs none")


def _check_is_for_live(wishes: Wishes) -> None:
    """Raise InvalidArgument for what an archive cannot be given."""
    for name in ("batching", "model_class"):
        if (given := getattr(wishes, name)) is not None:
            suffixes = ", ".join(sorted(MODEL_FILES))
            raise InvalidArgument(
                name, given, f"None for an archive: it is for live objects and model files ({suffixes})"
            )


def key_of(folder: ModelFolder, wishes: Wishes) -> ModelKey:
    """Return the name and version to register; raise InvalidArchive if nobody names the model."""
    manifest = folder.manifest
    name = wishes.model_name or (manifest.model_name if manifest else None)
    if name is None:
        raise InvalidArchive(folder.url, "it has no manifest that names the model; give model_name=... and handler=...")
    return ModelKey(name, wishes.version or (manifest.version if manifest else DEFAULT_VERSION))


def spec_of(folder: ModelFolder, wishes: Wishes, settings: Settings) -> ModelSpec:
    """Return what the workers are to load, and the limits to keep.

    Raises:
        InvalidArchive: a value in the archive is wrong, or nobody names the model or the handler.
        InvalidArgument: its backend cannot give it the packages of its own that it asks for.
    """
    key, manifest = key_of(folder, wishes), folder.manifest
    _warn_of_unknown(key, settings)
    config = {**_parameters(key, settings), **folder.config}
    handler = HANDLER if folder.live else wishes.handler or (manifest.handler if manifest else None)
    if handler is None:
        raise InvalidArchive(folder.url, "it names no handler; give handler=...")

    def value(argument: str, default: object) -> Any:
        wish = getattr(wishes, argument, None)
        return config.get(CONFIG_KEYS[argument], default) if wish is None else wish

    packages = _packages_of(folder, value("backend", "process"))
    with _blaming_the_source(folder, key, settings):
        return ModelSpec(
            key=key,
            model_dir=str(folder.path),
            handler=handler,
            url=folder.url,
            manifest=manifest.raw if manifest else _made_up_manifest(key, handler),
            config=folder.config,
            runtime=(wishes.runtime or (manifest.runtime if manifest else "python")).lower(),
            envelope=(manifest.envelope if manifest else None) or settings.service_envelope,
            packages=packages,
            blacklist_env_vars=settings.blacklist_env_vars,
            batch_size=value("batch_size", 1),
            max_batch_delay_ms=value("max_batch_delay", 100),
            response_timeout_s=value("response_timeout", settings.default_response_timeout),
            startup_timeout_s=value("startup_timeout", settings.default_startup_timeout),
            max_retry_timeout_s=value("max_retry_timeout", settings.max_retry_timeout),
            job_queue_size=value("job_queue_size", settings.job_queue_size),
            client_timeout_ms=value("client_timeout", 0),
            queue_timeout_ms=value("queue_timeout", 0),
            backend=value("backend", "process"),
            share_weights=value("share_weights", settings.share_weights),
            threads_per_worker=value("threads_per_worker", settings.threads_per_worker),
            batches_in_flight=value("batches_in_flight", settings.batches_in_flight),
            max_requests=value("max_requests", settings.max_requests),
            max_memory_bytes=value("max_memory", settings.max_memory),
            isolate_errors=value("isolate_errors", settings.isolate_errors),
            cancel_running=value("cancel_running", settings.cancel_running),
            scale_down_delay_s=value("scale_down_delay", settings.scale_down_delay),
            template_idle_timeout_s=value("template_idle_timeout", settings.template_idle_timeout),
            is_sealed=folder.is_sealed,
            pristine_dir=None if folder.pristine is None else str(folder.pristine),
            loaded_at_startup=wishes.loaded_at_startup,
            live=folder.live,
            is_trusted=wishes.trusted,
        )


def _packages_of(folder: ModelFolder, backend: str) -> str | None:
    """Return where the model's own packages are; raise InvalidArgument if its workers could not have any."""
    if folder.packages is None:
        return None
    if backend == "thread":
        allowed = (
            "process: its requirements file asks for packages that this program does not have, and threads of it have no"
            " packages of their own; or install them beside torchmgmt"
        )
        raise InvalidArgument("backend", backend, allowed)
    return str(folder.packages)


def scale_of(folder: ModelFolder, wishes: Wishes, settings: Settings) -> Scale:
    """Return how many workers to begin with; raise InvalidArchive if the archive's own numbers are wrong.

    A call that says how many to start says thereby how many there may be, unless it says that, too. Where only one of
    two numbers is the archive's, it gives way to the other.
    """
    if wishes.initial_workers is not None:
        most = wishes.initial_workers if wishes.max_workers is None else wishes.max_workers
        return Scale(wishes.initial_workers, most)
    per_model = settings.default_workers_per_model
    default = wishes.default_workers if per_model is None else per_model
    key = key_of(folder, wishes)
    with _blaming_the_source(folder, key, settings):
        stated_least, stated_most = _stated_workers(folder, _parameters(key, settings))
        if stated_least is not None and stated_most is not None and wishes.max_workers is None:
            return Scale(stated_least, stated_most)
    begin_with = default if stated_least is None else stated_least
    limit = stated_most if wishes.max_workers is None else wishes.max_workers
    return Scale(begin_with, begin_with) if limit is None else Scale(min(begin_with, limit), limit)


def is_default_version(key: ModelKey, settings: Settings) -> bool:
    """Whether the settings say of this version that it is to be its model's default."""
    return _parameters(key, settings).get("defaultVersion") is True


def _parameters(key: ModelKey, settings: Settings) -> Mapping[str, Any]:
    """Return what the settings have for this one version, by the keys of a model-config.yaml."""
    return settings.models.get(key.name, {}).get(key.version, {})


def _warn_of_unknown(key: ModelKey, settings: Settings) -> None:
    """Say which of the settings' parameters for this version nothing looks at."""
    known = {*CONFIG_KEYS.values(), "defaultVersion", "marName"}
    unknown = [name for name in _parameters(key, settings) if name not in known]
    if unknown:
        place = f"models.{key.name}.{key.version}"
        logger.warning("%s in the settings: %s have no effect, only %s", place, unknown, sorted(known))


def _stated_workers(folder: ModelFolder, parameters: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the least and the most workers that the archive states, or, if it states neither, the parameters."""
    is_in_archive = "minWorkers" in folder.config or "maxWorkers" in folder.config
    source = folder.config if is_in_archive else parameters
    return _stated(source, "minWorkers"), _stated(source, "maxWorkers")


def _stated(source: Mapping[str, Any], key: str) -> int | None:
    """Return a stated number of workers, checked; None if there is none."""
    if key not in source:
        return None
    check_number(key, source[key], minimum=0)
    return int(source[key])


@contextlib.contextmanager
def _blaming_the_source(folder: ModelFolder, model: ModelKey, settings: Settings) -> Iterator[None]:
    """The call's own arguments were checked before, so what is wrong now came with the archive or the settings."""
    try:
        yield
    except InvalidArgument as error:
        key = CONFIG_KEYS.get(error.argument, error.argument)
        if key not in folder.config and key in _parameters(model, settings):
            place = f"models.{model.name}.{model.version}.{key} in the settings"
            raise InvalidArgument(place, error.given, error.allowed) from error
        raise InvalidArchive(
            folder.url, f"{key} in its configuration is {error.given!r}, but must be {error.allowed}"
        ) from error


def _made_up_manifest(key: ModelKey, handler: str) -> Mapping[str, Any]:
    """What a handler finds as ``context.manifest`` of a folder without one."""
    return {
        "runtime": "python",
        "model": {"modelName": key.name, "modelVersion": key.version, "handler": handler},
        "archiverVersion": "0.12.0",
    }
