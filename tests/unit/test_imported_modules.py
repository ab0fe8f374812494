"""What is taken out of ``sys.modules`` while a model loads comes back, and what came new stays."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchmgmt.worker.modules import ImportedModules

OLD = ("a", "b", "c")
NEW = ("x", "y")

removals = st.sampled_from([*OLD, *NEW]).map(lambda name: ("remove", name))
additions = st.sampled_from([*OLD, *NEW]).map(lambda name: ("add", name))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(removals | additions, max_size=6))
def test_what_was_there_is_there_again(monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, str]]) -> None:
    """Whatever is taken out or displaced, by taking it out first, and whatever is added meanwhile."""
    before = {name: ModuleType(name) for name in OLD}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "modules", dict(before))
        with ImportedModules().kept():
            for step, name in steps:
                sys.modules.pop(name, None)
                if step == "add":
                    sys.modules[name] = ModuleType(name)
            new = {name: module for name, module in sys.modules.items() if name in NEW}
        assert {**sys.modules} == {**before, **new}


def test_it_also_holds_when_loading_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error passes, and what was taken out is there nonetheless."""
    monkeypatch.setattr(sys, "modules", {**sys.modules, "late": ModuleType("late")})
    late, modules = sys.modules["late"], ImportedModules()

    def load() -> None:
        with modules.kept():
            del sys.modules["late"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load()
    assert sys.modules["late"] is late


def test_nothing_is_looked_at_where_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is replaced in its place is what the handler's author wanted: to see that, each would be looked at."""
    monkeypatch.setattr(sys, "modules", {**sys.modules, "other": ModuleType("other"), "last": ModuleType("last")})
    stand_in = ModuleType("stand_in")
    with ImportedModules().kept():
        sys.modules["other"] = stand_in
        sys.modules["new"] = ModuleType("new")
    assert sys.modules["other"] is stand_in
