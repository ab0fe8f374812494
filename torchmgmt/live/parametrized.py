"""Modules with parametrizations (weight norm, spectral norm, ...), which torch pickles no other way than by their state.

torch gives such a module a class of its own, made as it runs, that refuses to be pickled. What is pickled here is the
class that the module had before, and its attributes; the other class is made of that again.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__all__ = ["original_class", "reduce_parametrized"]

_MODULE = "torch.nn.utils.parametrize"


def original_class(kind: type[Any]) -> type[Any] | None:
    """Return the class that a module of class ``kind`` had before it was parametrized; None if it is not."""
    if kind.__module__ != _MODULE or not kind.__name__.startswith("Parametrized"):
        return None
    parametrize = sys.modules[_MODULE]
    needed = hasattr(parametrize, "_inject_new_class") and hasattr(parametrize, "_inject_property")
    return kind.__bases__[0] if needed and len(kind.__bases__) == 1 else None


def reduce_parametrized(module: Any, original: type[Any]) -> tuple[Any, ...]:
    """Return what pickle makes ``module`` of again, which is of class ``original`` but for its parametrizations."""
    return _blank, (original,), dict(vars(module)), None, None, _fill


def _blank(original: Any) -> Any:
    return original.__new__(original)


def _fill(module: Any, state: dict[str, Any]) -> None:
    parametrize = importlib.import_module(_MODULE)
    vars(module).update(state)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:
        parametrize._inject_property(module, name)
