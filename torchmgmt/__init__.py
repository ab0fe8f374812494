"""torchmgmt manages PyTorch models at run time: register, load, scale, describe, upgrade, unregister.

>>> from torchmgmt import ModelManager
>>> with ModelManager() as manager:
...     print(manager.models())
()
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchmgmt.answer_future import AnswerFuture as AnswerFuture
    from torchmgmt.backends.process import ProcessBackend as ProcessBackend
    from torchmgmt.backends.thread import ThreadBackend as ThreadBackend
    from torchmgmt.batch import Batch as Batch
    from torchmgmt.batcher import Batcher as Batcher
    from torchmgmt.exchange import Form as Form
    from torchmgmt.exchange import HttpBody as HttpBody
    from torchmgmt.exchange import Response as Response
    from torchmgmt.launcher import register_model as register_model
    from torchmgmt.launcher import register_model_with_params as register_model_with_params
    from torchmgmt.lifecycle import VersionState as VersionState
    from torchmgmt.lifecycle import WorkerState as WorkerState
    from torchmgmt.manager import ModelManager as ModelManager
    from torchmgmt.model import Model as Model
    from torchmgmt.pool import WorkerPool as WorkerPool
    from torchmgmt.records import CloseReport as CloseReport
    from torchmgmt.records import ModelInfo as ModelInfo
    from torchmgmt.records import ModelKey as ModelKey
    from torchmgmt.records import ModelSpec as ModelSpec
    from torchmgmt.records import ShareWeights as ShareWeights
    from torchmgmt.records import Sharing as Sharing
    from torchmgmt.records import WorkerInfo as WorkerInfo
    from torchmgmt.settings import Settings as Settings
    from torchmgmt.streams import AnswerStream as AnswerStream

    __version__: str

_HOMES = {
    "AnswerFuture": "answer_future",
    "AnswerStream": "streams",
    "Batch": "batch",
    "Batcher": "batcher",
    "CloseReport": "records",
    "Form": "exchange",
    "HttpBody": "exchange",
    "Model": "model",
    "ModelInfo": "records",
    "ModelKey": "records",
    "ModelManager": "manager",
    "ModelSpec": "records",
    "ProcessBackend": "backends.process",
    "Response": "exchange",
    "Settings": "settings",
    "ShareWeights": "records",
    "Sharing": "records",
    "ThreadBackend": "backends.thread",
    "VersionState": "lifecycle",
    "WorkerInfo": "records",
    "WorkerPool": "pool",
    "WorkerState": "lifecycle",
    "register_model": "launcher",
    "register_model_with_params": "launcher",
}
"""Where each public name lives. Loaded when first asked for: requests alone, which the launcher needs, costs 150 ms, and
a worker process has no use for the manager."""

__all__ = [  # noqa: PLE0604 - computed, so that it cannot differ
    *sorted(_HOMES),
    "__version__",
]


# Without any handler, Python would print warnings to stderr; what is shown is for the program to say.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("torchmgmt")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
