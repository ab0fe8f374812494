"""Shipped handlers in a test's own process: a folder with a small model, and the handler of it, initialised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from torchmgmt.handlers.base_handler import BaseHandler
from torchmgmt.handlers.context import Context

H = TypeVar("H", bound=BaseHandler)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch computes in the test's own thread: the threads that it starts otherwise stay for ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def initialised(kind: type[H], folder: Path, model: str, options: Any = None, **properties: Any) -> H:
    """A handler whose model is the class ``Net`` that ``model`` defines."""
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text("import torch\nfrom torch import nn\n\n" + model)
    handler = kind()
    handler.initialize(context_of(folder, {"modelFile": "net.py"}, options, **properties))
    return handler


def context_of(folder: Path, model: dict[str, str], options: Any = None, **properties: Any) -> Context:
    config = {} if options is None else {"handler": options}
    context = Context("m", str(folder), {"model": model}, 1, None, "0", model_yaml_config=config)
    context.system_properties.update(properties)
    return context


def answers(handler: BaseHandler, *payloads: Any) -> list[Any]:
    """What the handler answers to one batch with these bodies."""
    context = handler.context
    context.begin_batch([str(n) for n in range(len(payloads))], [{} for _ in payloads])
    return handler.handle([{"body": payload} for payload in payloads], context)
