"""``pt2`` of model-config.yaml: the options of torch.compile, in the forms that TorchServe takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["compile_options", "compiled"]

log = logging.getLogger(__name__)


def compile_options(pt2: object) -> dict[str, Any] | None:
    """Return the arguments for ``torch.compile``; None if the model is not to be compiled.

    Args:
        pt2: ``{compile: {enable: true, backend: inductor, mode: reduce-overhead}}``, or, as in older archives, those options
            without ``compile`` and ``enable``, or the name of a backend; ``{export: ...}`` or None: not compiled.

    Raises:
        ValueError: it has none of these forms.
    """
    if pt2 is None:
        return None
    if isinstance(pt2, str):
        return {"backend": pt2}
    if not isinstance(pt2, Mapping):
        raise ValueError(f"pt2 in model-config.yaml must be the name of a backend or options, not {pt2!r}")
    if "compile" in pt2:
        return _enabled(pt2["compile"])
    return None if "export" in pt2 else dict(pt2)


def compiled(model: Any, pt2: object) -> Any:
    """Return ``model`` as :func:`compile_options` says: for ``torch.compile``, which works at the first call, or as it is.

    An option that this torch does not know, such as a backend that is not installed, is logged and the model left as it is:
    that is what archives in the field expect. Raises ValueError as :func:`compile_options` does.
    """
    options = compile_options(pt2)
    if options is None:
        return model
    shown = ", ".join(f"{name}={value}" for name, value in options.items()) or "its defaults"
    try:
        result = torch.compile(model, **options)
    except Exception as error:  # InvalidBackend, RuntimeError, TypeError: whatever a backend raises
        log.warning("The model is not compiled: torch.compile with %s failed: %s", shown, error)
        return model
    log.info("The model will be compiled with %s", shown)
    return result


def _enabled(options: object) -> dict[str, Any] | None:
    if not isinstance(options, Mapping) or not isinstance(options.get("enable"), bool):
        raise ValueError(
            f"pt2.compile in model-config.yaml must be options with enable: true or enable: false, not {options!r}"
        )
    if not options["enable"]:
        return None
    return {name: value for name, value in options.items() if name != "enable"}
