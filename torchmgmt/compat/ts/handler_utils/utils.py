"""``ts.handler_utils.utils``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torchmgmt.handlers.context import Context

__all__ = ["import_class", "send_intermediate_predict_response"]


def import_class(class_name: str, module_prefix: str | None = None) -> Any:
    """Return a class by its dotted name, below the package ``module_prefix`` if that is given.

    Raises:
        ImportError: there is no such module, or no such class in it; or the name has no module.
    """
    module_name, _, name = (class_name or "").rpartition(".")
    where = ".".join(filter(None, (module_prefix, module_name)))
    if not name or not where:
        raise ImportError(f"class_name must be the name of a class with its module, not {class_name!r}")
    module = importlib.import_module(where)
    if not hasattr(module, name):
        raise ImportError(f"module {where} has no class {name}")
    return getattr(module, name)


def send_intermediate_predict_response(
    ret: Sequence[Any], req_id_map: Mapping[int, str], message: str, code: int, context: Context
) -> None:
    """Send a part of the answer to each request of the batch; of the processes that share a model, the first one does.

    ``req_id_map``, ``message`` and ``code`` count for nothing: ``ret`` has a part for each request, in order. See
    :meth:`torchmgmt.handlers.context.Context.send_intermediate`.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        context.send_intermediate(ret)
