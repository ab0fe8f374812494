"""A manager without workers: what the HTTP side calls, each call noted, each answer or error chosen by the test."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import attrs

from torchmgmt import HttpBody, Response
from torchmgmt.errors import AlreadyRegistered, DefaultVersionInUse, ModelNotFound, ModelVersionNotFound
from torchmgmt.lifecycle import VersionState, WorkerState
from torchmgmt.records import ModelInfo, ModelKey, ModelSpec, Scale, WorkerInfo
from torchmgmt.settings import Settings


def info_of(name: str, version: str = "1.0", *, workers: int = 0, state: VersionState | None = None) -> ModelInfo:
    ready = VersionState.READY if workers else VersionState.REGISTERED
    began = datetime(2026, 11, 22, 23, 55, 48, 901000, tzinfo=timezone.utc)
    return ModelInfo(
        spec=ModelSpec(key=ModelKey(name, version), model_dir="/x", handler="h", url=f"{name}.mar"),
        state=state or ready,
        is_default=True,
        scale=Scale(workers, workers),
        workers=[
            WorkerInfo(id=str(9000 + n), state=WorkerState.READY, start_time=began, pid=1 + n) for n in range(workers)
        ],
        queue_capacity=100,
    )


class FakeModel:
    def __init__(self, info: ModelInfo) -> None:
        self.name, self.version, self.state = info.name, info.version, info.state
        self._info = info

    def describe(self) -> ModelInfo:
        return self._info


class FakeManager:
    """Notes calls in ``calls``; raises ``error`` if set; waits for ``gate`` while registering."""

    def __init__(self, *infos: ModelInfo, settings: Settings | None = None) -> None:
        self.settings = settings or Settings(enable_model_api=True)
        self.model_store: Path | None = None
        self.infos = list(infos)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def _note(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.calls.append((name, args, kwargs))
        if self.error is not None:
            raise self.error

    def run_on(self, _loop: asyncio.AbstractEventLoop) -> Callable[[], object]:
        return lambda: None

    def register(self, url: str, **kwargs: Any) -> FakeModel:
        self._note("register", url, **kwargs)
        self.entered.release()
        assert self.gate.wait(30)
        workers = kwargs["initial_workers"]
        workers = kwargs["default_workers"] if workers is None else workers
        return FakeModel(info_of(kwargs["model_name"] or "noop", workers=workers))

    def models(self, *, start: int = 0, limit: int | None = None) -> tuple[ModelInfo, ...]:
        self._note("models")
        infos = sorted(self.infos, key=lambda info: info.name)
        return tuple(infos[start : None if limit is None else start + limit])

    def wanted(self) -> tuple[ModelInfo, ...]:
        self._note("wanted")
        return tuple(each for each in self.infos if each.scale.min_workers or each.state is VersionState.FAILED)

    def versions(self, name: str) -> tuple[ModelInfo, ...]:
        found = tuple(info for info in self.infos if info.name == name)
        if not found:
            raise ModelNotFound(name)
        return found

    def describe(self, name: str, version: str | None = None, *, customized: bool = False) -> ModelInfo:
        self._note("describe", name, version, customized=customized)
        for info in self.versions(name):
            if version in {None, info.version}:
                return info
        raise ModelVersionNotFound(name, str(version))

    def scale(self, name: str, min_worker: int, max_worker: int, **kwargs: Any) -> ModelInfo:
        self._note("scale", name, min_worker, max_worker, **kwargs)
        return self.describe(name, kwargs["version"])

    def set_default(self, name: str, version: str) -> None:
        self._note("set_default", name, version)
        self.describe(name, version)

    def unregister(self, name: str, version: str | None = None) -> None:
        self._note("unregister", name, version)
        self.describe(name, version)

    def stream(self, name: str, body: HttpBody, *, version: str | None = None, **kwargs: Any) -> FakeStream:
        self._note("stream", name, body, version=version, **kwargs)
        self.describe(name, version)
        return FakeStream(Response(content_type="text/plain", body=b"answer"))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({info.name for info in self.infos}))


class FakeStream:
    """The parts of an answer that are all there."""

    def __init__(self, *parts: Response) -> None:
        self._parts = list(parts)
        self.is_closed = False

    @property
    def is_complete(self) -> bool:
        return not self._parts

    async def next_body(self) -> Response | None:
        return self._parts.pop(0) if self._parts else None

    def whole_body(self) -> Response | None:
        return self._parts.pop(0) if len(self._parts) == 1 else None

    def call_when_due(self, _callback: Callable[[], object]) -> bool:
        return True

    def close(self) -> None:
        self.is_closed = True


class KeepingManager(FakeManager):
    """A manager without workers that keeps what it is told: what is registered is there until it is unregistered.

    Counts in ``done`` what was done, of what was asked.
    """

    MOST_LISTED = 3  # a fake can be scaled to two billions

    def __init__(self, *infos: ModelInfo, settings: Settings | None = None) -> None:
        super().__init__(*infos, settings=settings)
        self.done: Counter[str] = Counter()

    def register(self, url: str, **kwargs: Any) -> FakeModel:
        self._note("register", url, **kwargs)
        name = kwargs["model_name"] or "noop"
        present = [info for info in self.infos if info.name == name]
        version = "2.0" if "2" in url else "1.0"
        if any(info.version == version for info in present):
            raise AlreadyRegistered(name, version)
        workers = kwargs.get("initial_workers") or kwargs.get("default_workers") or 0
        info = attrs.evolve(self._scaled(info_of(name, version), workers, workers), is_default=not present)
        self.infos.append(attrs.evolve(info, spec=attrs.evolve(info.spec, url=url)))
        self.done["register"] += 1
        return FakeModel(self.infos[-1])

    def _scaled(self, info: ModelInfo, least: int, most: int) -> ModelInfo:
        shown = info_of(info.name, info.version, workers=min(least, self.MOST_LISTED))
        return attrs.evolve(info, scale=Scale(least, most), workers=shown.workers, state=shown.state)

    def models(self, *, start: int = 0, limit: int | None = None) -> tuple[ModelInfo, ...]:
        found = tuple(info for info in super().models() if info.is_default)
        self.done["models"] += bool(found)
        return found[start : None if limit is None else start + limit]

    def describe(self, name: str, version: str | None = None, *, customized: bool = False) -> ModelInfo:
        self._note("describe", name, version, customized=customized)
        found = self._find(name, version)
        self.done["describe"] += 1
        return attrs.evolve(found, customized_metadata={"labels": ["a"]}) if customized else found

    def _find(self, name: str, version: str | None) -> ModelInfo:
        for info in self.versions(name):
            if info.version == version or (version is None and info.is_default):
                return info
        raise ModelVersionNotFound(name, str(version))

    def scale(self, name: str, min_worker: int, max_worker: int, **kwargs: Any) -> ModelInfo:
        self._note("scale", name, min_worker, max_worker, **kwargs)
        found = self._find(name, kwargs["version"])
        scaled = self._scaled(found, min_worker, max_worker)
        self.infos[self.infos.index(found)] = scaled
        self.done["scale"] += 1
        return scaled

    def set_default(self, name: str, version: str) -> None:
        self._note("set_default", name, version)
        chosen = self._find(name, version)
        self.done["set_default"] += 1
        self.infos = [
            attrs.evolve(info, is_default=info is chosen) if info.name == name else info for info in self.infos
        ]

    def unregister(self, name: str, version: str | None = None) -> None:
        self._note("unregister", name, version)
        found = self._find(name, version)
        if found.is_default and len(self.versions(name)) > 1:
            raise DefaultVersionInUse(name, found.version)
        self.infos.remove(found)
        self.done["unregister"] += 1
