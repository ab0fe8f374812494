"""What loading a model makes unique: what each worker would have for itself, had it loaded the model, and would share if forked.

A folder with a name of its own, a name or a number out of random bytes, the process's id, a generator that nobody seeded: a
handler takes it for its worker's own. In forked workers it is the same in all, so one caller's data would reach another.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from torchmgmt.worker.audit import LoadAudit, Trace
from torchmgmt.worker.entropy import Entropy
from torchmgmt.worker.generators import GlobalGenerators, is_of_system
from torchmgmt.worker.holdings import Held, held_values, namespaces
from torchmgmt.worker.moments import Span
from torchmgmt.worker.provenance import Provenance, Site
from torchmgmt.worker.substitutes import Substitutes

if TYPE_CHECKING:
    from torchmgmt.records import ModelSpec
    from torchmgmt.worker.loader import Handler
    from torchmgmt.worker.modules import ImportedModules

__all__ = ["LoadWatch"]

log = logging.getLogger(__name__)

# A shorter text says nothing of its own, and would break up others.
_SHORTEST_GIVEN = 6
# What writes files without an audit event, and which of its arguments is the path.
_WRITERS = (("os", "mkfifo", 0), ("os", "mknod", 0), ("torch", "save", 1), ("torch.jit", "save", 1))
_DIGEST = re.compile(r"(?<![0-9A-Za-z])(?=[0-9]*[a-fA-F])[0-9a-fA-F]{16,}(?![0-9A-Za-z])")


class LoadWatch:
    """Watches while a process loads a model. A context manager; afterwards it is asked what was found.

    Args:
        spec: the model.
        modules: what was imported before.
    """

    def __init__(self, spec: ModelSpec, modules: ImportedModules) -> None:
        self._given = sorted(
            _texts_in([spec.model_dir, spec.key.name, spec.key.version, spec.manifest, spec.config]), key=len
        )[::-1]
        self._provenance = Provenance(spec)
        self._modules = modules
        self._entropy = Entropy(self._provenance)
        self._audit = LoadAudit(self._provenance)
        self._writers = Substitutes()
        self._span = Span()
        self.generators = GlobalGenerators()
        """The global generators, to be settled in each worker."""

    def __enter__(self) -> LoadWatch:
        self._entropy.start()
        self._audit.start()
        for module, name, place in _WRITERS:
            if module in sys.modules:
                self._writers.put(sys.modules[module], name, functools.partial(self._audit.writing, place))
        return self

    def __exit__(self, *error: object) -> None:
        self._audit.stop()
        importers = list(self._modules.later())
        self._writers.undo(importers)
        self._entropy.stop(importers)
        self._span.end()
        self.generators.note(self._entropy.seeds)

    def findings(self, handler: Handler) -> list[str]:
        """Return, in words, what was made unique while ``handler`` was loaded, each with where, as far as that is known.

        What cannot be looked into counts as something: rather more memory than a wrong answer.
        """
        try:
            return self._findings(handler)
        except Exception as error:  # an object of the handler's that does not behave as its kind does
            log.warning("What the handler holds cannot be looked into", exc_info=True)
            return [f"what could not be looked into ({type(error).__name__}: {error})"]

    def _findings(self, handler: Handler) -> list[str]:
        held = list(self._held(handler))
        found = [f"{what} ({_origin(site)})" for what, site in {**self._audit.unique, **self._entropy.unique}.items()]
        found += self._traces()
        found += self._names(held, " ".join(found))
        found += self._values(held)
        by_others = self._entropy.is_drawn_by_imports or any("numbers of random" in each for each in found)
        if self.generators.is_python_drawn_from and not by_others:
            found.append("what was made of numbers of random, which nobody had seeded")
        if any(map(is_of_system, self.generators.torch_seed.values())):
            found.append("torch's global generator, with a seed that may be the system's")
        return found

    def _held(self, handler: Handler) -> Iterator[Held]:
        own = handler.module.__name__

        def is_model(name: str) -> bool:
            module = handler.module if name == own else sys.modules.get(name)
            return module is None or self._provenance.is_model(name, getattr(module, "__file__", None))

        roots: list[tuple[str, object]] = [(type(handler.owner).__qualname__, handler.owner)]
        # The handler's own may not be among the imported ones any more, if it was called like one of Python's.
        modules = {name: sys.modules.get(name) for name in self._modules.later_names()} | {own: handler.module}
        roots += namespaces(modules, is_model)
        seeds: dict[str, object] = {**self._entropy.seeds, **self.generators.torch_seed}
        return held_values([*roots, *((f"the seed of {name}", seed) for name, seed in seeds.items())], is_model)

    def _traces(self) -> Iterator[str]:
        for trace in self._audit.traces.values():
            if os.path.lexists(trace.path) and not (trace.is_common and not self._has_unique_name(trace)):
                what = "the folder" if trace.is_folder else "the file"
                yield f"{what} {trace.path} ({_origin(trace.site)})"

    def _has_unique_name(self, trace: Trace) -> bool:
        name = os.path.basename(trace.path)  # noqa: PTH119 - a plain text
        is_temporary = any(each in name for each in self._entropy.names)
        return is_temporary or self._is_pid(name) or self._span.has(name)

    def _names(self, held: list[Held], found: str) -> Iterator[str]:
        """Give the temporary names that are kept, or were asked for to be used later, but those that were ``found``."""
        for name, about in self._entropy.names.items():
            if name in found:
                continue
            holder = next((each.where for each in held if name in _text_of(each.value)), None)
            if holder is not None or about.is_for_later:
                kept = "" if holder is None else f", kept in {holder}"
                yield f"the temporary name {name}{kept} ({_origin(about.site)})"

    def _values(self, held: list[Held]) -> Iterator[str]:
        """Give what is kept that no other worker would have, but could not be told when it was got."""
        own = [each for each in held if not each.is_foreign]  # libraries keep time for their own ends
        pid = f"the id of the process ({_origin(self._entropy.pid_read)})" if self._entropy.pid_read else ""
        kinds: list[tuple[str, list[Held], Callable[[Any], bool]]] = [
            ("a time stamp", own, lambda value: self._span.has(self._plain(value))),
            (pid, held, self._is_pid),
            ("the name of the process", held, lambda value: multiprocessing.current_process().name in _text_of(value)),
            ("a generator with a seed of the system's", held, _is_seeded_by_system),
        ]
        for what, values, is_it in kinds:
            holder = next((each.where for each in values if is_it(each.value)), None)
            if holder is not None:
                yield f"{what}, kept in {holder}"

    def _is_pid(self, value: Any) -> bool:
        """Whether it is the id of this process, or a text with it; never if the model has not asked for the id."""
        if self._entropy.pid_read is None or isinstance(value, bool):
            return False
        if isinstance(value, int):
            return value == os.getpid()
        return re.search(rf"(?<!\d){os.getpid()}(?!\d)", self._plain(_text_of(value))) is not None

    def _plain(self, value: Any) -> Any:
        """Return a text without what the model was told, such as its folder, and without digests, which have any numbers."""
        text = _text_of(value)
        if not text:
            return value
        for each in self._given:
            text = text.replace(each, "")
        return _DIGEST.sub("", text)


def _text_of(value: Any) -> str:
    """Return the text that a value is; empty if it is none."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return str(value) if isinstance(value, (str, os.PathLike)) else ""


def _texts_in(value: Any) -> Iterator[str]:
    """Give the texts in mappings and lists of them."""
    if isinstance(value, str) and len(value) >= _SHORTEST_GIVEN:
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(each)


def _origin(site: Site) -> str:
    return f"{site.called} in {site}" if site.called else str(site)


def _is_seeded_by_system(value: Any) -> bool:
    return isinstance(value, torch.Generator) and is_of_system(value.initial_seed())
