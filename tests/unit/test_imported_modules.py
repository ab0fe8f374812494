"""What is taken out of ``sys.modules`` while a model loads comes back, and what came new stays."""

from __future__ import annotations

import sys
import threading
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchmgmt.worker.modules import ImportedModules

OLD = ("a", "b", "c")
NEW = ("x", "y")

removals = st.sampled_from([*OLD, *NEW]).map(lambda name: ("remove", name))
additions = st.sampled_from([*OLD, *NEW]).map(lambda name: ("add", name))
moves = st.sampled_from(OLD).map(lambda name: ("move", name))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(removals | additions | moves, max_size=6))
def test_what_was_there_is_there_again(monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, str]]) -> None:
    """Whatever is taken out or displaced, by taking it out first, and whatever is added meanwhile."""
    before = {name: ModuleType(name) for name in OLD}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "modules", dict(before))
        with ImportedModules().kept():
            for step, name in steps:
                sys.modules.pop(name, None)
                if step != "remove":
                    sys.modules[name] = ModuleType(name) if step == "add" else before[name]
            new = {name: module for name, module in sys.modules.items() if name in NEW}
        there = {name: module for name, module in sys.modules.items() if name in {*OLD, *NEW}}
        assert there == {**before, **new}


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


@pytest.mark.parametrize("is_another_missing", [False, True])
def test_what_is_replaced_in_its_place_stays(monkeypatch: pytest.MonkeyPatch, is_another_missing: bool) -> None:
    """It is what the handler's author wanted, whatever else comes back."""
    other, stand_in = ModuleType("other"), ModuleType("stand_in")
    monkeypatch.setattr(sys, "modules", {**sys.modules, "first": ModuleType("first"), "other": other})
    with ImportedModules().kept():
        sys.modules["other"] = stand_in
        sys.modules["new"] = ModuleType("new")
        if is_another_missing:
            del sys.modules["first"]
    assert sys.modules["other"] is stand_in
    assert "first" in sys.modules


def test_imports_of_other_threads_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that the handler has started may import what it needs while the rest is over."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    modules, is_over = ImportedModules(), threading.Event()

    def come_and_go() -> None:
        while not is_over.is_set():
            for number in range(100):
                sys.modules[f"late{number}"] = ModuleType("late")
            for number in range(100):
                sys.modules.pop(f"late{number}")

    thread = threading.Thread(target=come_and_go)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(200):
            with modules.kept():
                pass
    finally:
        sys.setswitchinterval(interval)
        is_over.set()
        thread.join()
    assert sys.modules["threading"] is threading
