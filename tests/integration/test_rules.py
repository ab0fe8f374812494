"""The rules of names, versions and defaults, held against a model of them: any sequence of calls, one truth."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from torchmgmt import ModelManager
from torchmgmt.errors import AlreadyRegistered, DefaultVersionInUse, ModelNotFound, ModelVersionNotFound

NAMES = st.sampled_from(["cat", "dog"])
VERSIONS = st.sampled_from(["1.0", "2.0", "3.0"])


class LifeOfModels(RuleBasedStateMachine):
    """Registers, sets defaults and unregisters on a real manager, without workers, beside a dictionary that says what
    must be so: name -> versions in their order, and the default.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        (Path(self.folder.name) / "echo.py").write_text("def handle(data, context): return data")
        self.manager = ModelManager()
        self.versions: dict[str, list[str]] = {}
        self.default: dict[str, str] = {}

    def teardown(self) -> None:
        """Every life ends clean."""
        assert self.manager.close().clean
        self.folder.cleanup()

    @rule(name=NAMES, version=VERSIONS)
    def register(self, name: str, version: str) -> None:
        """A version is registered once; the first one becomes the default."""
        call = {"model_name": name, "version": version, "handler": "echo.py", "initial_workers": 0}
        if version in self.versions.get(name, []):
            with pytest.raises(AlreadyRegistered) as caught:
                self.manager.register(self.folder.name, **call)
            assert (caught.value.name, caught.value.version) == (name, version)
            return
        model = self.manager.register(self.folder.name, **call)
        assert (model.name, model.version) == (name, version)
        self.versions.setdefault(name, []).append(version)
        self.default.setdefault(name, version)

    @rule(name=NAMES, version=VERSIONS)
    def set_default(self, name: str, version: str) -> None:
        """Only what is registered becomes the default."""
        if error := self.missing(name, version):
            with pytest.raises(error):
                self.manager.set_default(name, version)
            return
        self.manager.set_default(name, version)
        self.default[name] = version

    @rule(name=NAMES, version=st.none() | VERSIONS)
    def unregister(self, name: str, version: str | None) -> None:
        """The default goes last; no version named means the default."""
        if error := self.missing(name, version) or self.still_needed(name, version):
            with pytest.raises(error):
                self.manager.unregister(name, version)
            return
        gone = version or self.default[name]
        self.manager.unregister(name, version)
        self.versions[name].remove(gone)
        if not self.versions[name]:
            del self.versions[name], self.default[name]

    def missing(self, name: str, version: str | None) -> type[Exception] | None:
        """The error for a version that is not registered."""
        if name not in self.versions:
            return ModelNotFound
        return None if version is None or version in self.versions[name] else ModelVersionNotFound

    def still_needed(self, name: str, version: str | None) -> type[Exception] | None:
        """The error for the default while there are others."""
        is_default = version is None or version == self.default[name]
        return DefaultVersionInUse if is_default and len(self.versions[name]) > 1 else None

    @invariant()
    def the_manager_agrees(self) -> None:
        """What is listed and described is what was done."""
        assert list(self.manager) == sorted(self.versions)
        assert [(info.name, info.version) for info in self.manager.models()] == sorted(self.default.items())
        for name, versions in self.versions.items():
            infos = self.manager.versions(name)
            assert [info.version for info in infos] == versions
            assert [info.version for info in infos if info.is_default] == [self.default[name]]
            assert self.manager.describe(name).version == self.default[name]


LifeOfModels.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestLifeOfModels = LifeOfModels.TestCase
