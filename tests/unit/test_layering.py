"""Imports run downward only: the layer table of DESIGN.md, held against every import statement of the package."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

PACKAGE = "torchmgmt"

# A room is a module or sub-package directly under torchmgmt/. A new one belongs here before it may be imported.
LAYERS: dict[int, frozenset[str]] = {
    1: frozenset(
        {
            "allocator",
            "checks",
            "errors",
            "events",
            "exchange",
            "forks",
            "interpreter",
            "lifecycle",
            "log_relay",
            "process_signals",
            "records",
            "redaction",
            "seat",
            "signals_held",
            "system_calls",
            "thread_call",
            "variables",
        }
    ),
    2: frozenset(
        {
            "settings",
            "setting_kinds",
            "setting_sources",
            "properties",
            "archive",
            "arrivals",
            "registry",
            "state",
            "state_file",
            "desired",
            "answer_future",
            "streams",
            "loops",
            "channel",
            "by_value",
            "encoding",
            "tensors",
            "live",
            "segments",
            "dispatcher",
            "loop_takeover",
            "management_call",
            "owned_future",
            "page",
        }
    ),
    3: frozenset(
        {
            "admission",
            "batcher",
            "batch",
            "deadlines",
            "runner",
            "backends",
            "pool",
        }
    ),
    4: frozenset(
        {
            "manager",
            "model",
            "registration",
            "failed_loads",
            "restoring",
            "registrar",
            "catalogue",
            "closing",
            "listing",
            "announcer",
            "intake",
            "request",
            "served",
            "tracing",
        }
    ),
    5: frozenset({"worker", "handlers", "compat"}),
    6: frozenset({"http", "metrics", "launcher"}),
}
LAYER_OF = {room: layer for layer, rooms in LAYERS.items() for room in rooms}

# Which whole layers a room sees beneath it. Layer 5 runs in another process: the manager and the pool are not there.
LAYERS_BENEATH = {1: (), 2: (1,), 3: (1, 2), 4: (1, 2, 3), 5: (1, 2), 6: ()}

# What a room sees of its own layer.
NEIGHBOURS = {
    # The facts build on each other in one order, so that there is no ring: errors, checks, lifecycle, records, events.
    "checks": {"errors"},
    "lifecycle": {"errors"},
    "records": {"errors", "checks", "lifecycle"},
    "events": {"errors", "lifecycle", "records", "exchange"},
    "settings": {"setting_kinds", "setting_sources"},
    "setting_sources": {"setting_kinds", "properties"},
    "state_file": {"state"},
    "desired": {"state"},
    "channel": {"encoding", "segments"},
    "answer_future": {"encoding", "loops", "owned_future"},
    "dispatcher": {"loop_takeover"},
    "streams": {"answer_future", "loops", "segments"},
    "encoding": {"by_value", "tensors"},
    "live": {"by_value", "tensors"},
    "batcher": {"admission", "batch", "deadlines", "runner"},
    "batch": {"admission"},
    "deadlines": {"batch"},
    "pool": {"backends"},
    "manager": {"model", "registration", "registrar", "catalogue", "closing", "announcer", "intake", "served"},
    "registrar": {"catalogue", "registration", "restoring", "failed_loads", "announcer", "served"},
    "intake": {"catalogue", "request", "announcer", "served", "tracing"},
    "catalogue": {"listing", "failed_loads", "served"},
    "closing": {"catalogue", "announcer", "served"},
    "listing": {"failed_loads", "served"},
    "served": {"announcer"},
    "restoring": {"registration", "failed_loads"},
    "worker": {"handlers", "compat"},
    "compat": {"handlers"},
}

# The top layer is written as any application would be: against the public names.
FACE = "__init__"
PUBLIC = frozenset(
    {
        FACE,
        "allocator",
        "checks",
        "errors",
        "events",
        "exchange",
        "interpreter",
        "metrics",
        "records",
        "redaction",
        "settings",
    }
)

# The package face hands these on, but only when they are asked for.
LAZY_IN_FACE = frozenset({"launcher"})

EVERYWHERE = frozenset({FACE, *LAYER_OF})
IN_THE_WORKER = LAYERS[5]
THIRD_PARTY: dict[str, frozenset[str]] = {
    "attr": EVERYWHERE,
    "attrs": EVERYWHERE,
    "typing_extensions": frozenset(),  # only under TYPE_CHECKING: it is no dependency of ours
    "torch": IN_THE_WORKER,
    "torchvision": IN_THE_WORKER,
    "numpy": IN_THE_WORKER,
    "PIL": IN_THE_WORKER,
    "ts": IN_THE_WORKER,  # the names that compat provides
    "yaml": frozenset({"settings", "archive", "worker", "compat"}),
    "requests": frozenset({"launcher", "archive"}),
    "urllib3": frozenset({"archive"}),
    "fsspec": frozenset({"archive"}),
    "javaproperties": frozenset({"properties"}),
    "cloudpickle": frozenset({"by_value"}),
    "psutil": EVERYWHERE - LAYERS[1] - {FACE, "channel", "encoding", "segments", "dispatcher", "registry"},
    "prometheus_client": frozenset({"metrics"}),
    "opentelemetry": frozenset({"tracing"}),
    "falcon": frozenset({"http"}),
    "python_multipart": frozenset({"worker"}),  # of the extra http: only what came over HTTP is a form
    "waitress": frozenset({"http"}),
    "uvicorn": frozenset({"http"}),
    "uvloop": frozenset({"http"}),
    "httptools": frozenset({"http"}),
    "a2wsgi": frozenset({"http"}),
}

# Parts of the standard library that DESIGN.md, decision 1, keeps out of the embedding process.
RESTRICTED_STANDARD = {"multiprocessing": frozenset({"worker"})}


@attrs.frozen
class Import:
    """One imported name, as an absolute dotted path."""

    target: str
    line: int
    in_function: bool


def imports_of(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every import of `module`, those in functions included, those for type checkers alone left out."""
    package = module if is_package else module.rpartition(".")[0]
    yield from _imports_in(ast.parse(source), package, in_function=False)


def _imports_in(node: ast.AST, package: str, *, in_function: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, in_function)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute(node, package)
        # The name may be a module itself (`from torchmgmt import manager`): keep it in the path.
        for alias in node.names:
            yield Import(f"{base}.{alias.name}", node.lineno, in_function)
    elif isinstance(node, ast.If) and _is_type_checking(node.test):
        for child in node.orelse:
            yield from _imports_in(child, package, in_function=in_function)
    else:
        inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            yield from _imports_in(child, package, in_function=inside)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, node.module] if node.module else parts)


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def room_of(module: str) -> str:
    """`torchmgmt.archive.cache` -> `archive`; the package itself -> `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else FACE


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What in `source`, were it the text of `module`, goes against the table."""
    room = room_of(module)
    if room not in EVERYWHERE:
        return [f"{module}: the room {room!r} has no layer. Say which in LAYERS, and in DESIGN.md's list."]
    found = []
    for imported in imports_of(source, module, is_package=is_package):
        complaint = _complaint(room, imported)
        if complaint:
            found.append(f"{module}:{imported.line} imports {imported.target}: {complaint}")
    return found


def _complaint(room: str, imported: Import) -> str | None:
    top, _, rest = imported.target.partition(".")
    if top == PACKAGE:
        first = rest.partition(".")[0]
        # Any other name after `torchmgmt.` is an attribute of the package face.
        return _complaint_inside(room, first if first in LAYER_OF else FACE, imported)
    if top in RESTRICTED_STANDARD:
        allowed = RESTRICTED_STANDARD[top]
        return None if room in allowed else f"only {_names(allowed)} may"
    if top in sys.stdlib_module_names:
        return None
    if top not in THIRD_PARTY:
        return "it is not in THIRD_PARTY; a new dependency is a decision"
    allowed = THIRD_PARTY[top]
    return None if room in allowed else f"only {_names(allowed)} may, and `if TYPE_CHECKING:`"


def _complaint_inside(room: str, target: str, imported: Import) -> str | None:
    if target == room:
        return None
    if room == FACE:
        return _complaint_in_face(target, imported)
    layer = LAYER_OF[room]
    if layer == max(LAYERS):
        return None if target in PUBLIC else f"layer {layer} uses the public names only"
    if target == FACE:
        return "the package face imports this room, not the other way round"
    if LAYER_OF[target] in LAYERS_BENEATH[layer] or target in NEIGHBOURS.get(room, ()):
        return None
    return f"{room} is in layer {layer}, {target} in layer {LAYER_OF[target]}"


def _complaint_in_face(target: str, imported: Import) -> str | None:
    if LAYER_OF[target] <= LAYER_OF["manager"]:
        return None
    if target in LAZY_IN_FACE:
        return None if imported.in_function else "only inside a function, when it is asked for"
    return "the package face gives the library alone"


def _names(rooms: frozenset[str]) -> str:
    return ", ".join(sorted(rooms)) or "nothing"


def _modules(repository: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted((repository / PACKAGE).rglob("*.py")):
        parts = path.relative_to(repository).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == FACE else parts), path


def test_every_import_runs_downward(repository: Path) -> None:
    """No module imports a room of its own layer or above, save where the table says so."""
    found = [
        violation
        for module, path in _modules(repository)
        for violation in violations(path.read_text(encoding="utf-8"), module, is_package=path.name == f"{FACE}.py")
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "module, source",
    [
        ("torchmgmt.registry", "from torchmgmt.manager import ModelManager"),
        ("torchmgmt.registry", "from . import manager"),
        ("torchmgmt.registry", "import torchmgmt.pool.autoscaling"),
        ("torchmgmt.registry", "from torchmgmt import errors, manager"),
        ("torchmgmt.archive.cache", "from ..pool import WorkerPool"),
        ("torchmgmt.batcher", "def f():\n    from torchmgmt.pool import WorkerPool"),
        ("torchmgmt.pool", "from .batcher import Batcher"),
        ("torchmgmt.pool", "from torchmgmt import ModelManager"),
        ("torchmgmt.backends.process", "import torch"),
        ("torchmgmt.backends.process", "import torch.multiprocessing"),
        ("torchmgmt.backends.process", "from multiprocessing.shared_memory import SharedMemory"),
        ("torchmgmt.worker.main", "from torchmgmt.pool import WorkerPool"),
        ("torchmgmt.compat.ts.context", "import torchmgmt.manager"),
        ("torchmgmt.http.management", "from torchmgmt.pool import WorkerPool"),
        ("torchmgmt.http.management", "from torchmgmt.launcher import register_model"),
        ("torchmgmt.manager", "import requests"),
        ("torchmgmt.manager", "try:\n    import falcon\nexcept ImportError:\n    pass"),
        ("torchmgmt.manager", "import pandas"),
        ("torchmgmt.errors", "import psutil"),
        ("torchmgmt.lifecycle", "from torchmgmt.records import ModelKey"),
        ("torchmgmt.manager", "if not TYPE_CHECKING:\n    import torch"),
        ("torchmgmt.manager", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch"),
        ("torchmgmt.attic", ""),
        ("torchmgmt", "from torchmgmt.launcher import register_model"),
        ("torchmgmt", "def __getattr__(name):\n    from torchmgmt import http"),
    ],
)
def test_what_goes_upward_is_found(module: str, source: str) -> None:
    """The check sees relative, nested and submodule imports, and rooms that have no layer."""
    assert len(violations(source, module, is_package=module == PACKAGE)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("torchmgmt.registry", "from torchmgmt.errors import ModelNotFound\nimport attrs, os"),
        ("torchmgmt.archive.cache", "from .manifest import Manifest\nfrom . import rules"),
        ("torchmgmt.archive", "from .manifest import Manifest\nfrom ..records import ModelKey"),
        ("torchmgmt.pool", "from torchmgmt.backends.process import ProcessBackend"),
        ("torchmgmt.pool", "from concurrent.futures import Future"),
        ("torchmgmt.pool", "import typing\nif typing.TYPE_CHECKING:\n    import torch"),
        ("torchmgmt.worker.main", "import torch.multiprocessing, multiprocessing"),
        ("torchmgmt.worker.main", "from torchmgmt.compat import ts\nfrom torchmgmt import channel"),
        ("torchmgmt.handlers.base", "from ts.context import Context"),
        ("torchmgmt.http.management", "import falcon\nfrom torchmgmt import ModelManager"),
        ("torchmgmt.http.management", "from torchmgmt.errors import ModelNotFound"),
        ("torchmgmt", "from torchmgmt.manager import ModelManager"),
        ("torchmgmt", "def __getattr__(name):\n    from torchmgmt import launcher"),
    ],
)
def test_what_runs_downward_is_left_alone(module: str, source: str) -> None:
    """The check forbids no more than the table."""
    is_package = module in {PACKAGE, "torchmgmt.archive"}
    assert violations(source, module, is_package=is_package) == []
