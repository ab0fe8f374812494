"""The desired state as text: what is written is read back, and what cannot be read is refused with the place."""

from __future__ import annotations

import json
import string
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmgmt.desired import Desired
from torchmgmt.errors import InvalidArgument
from torchmgmt.records import ModelKey, Scale
from torchmgmt.state import (
    Change,
    DesiredState,
    StoredModel,
    StoredVersion,
    change_to_json,
    from_json,
    from_torchserve,
    to_json,
)

NAMES = st.text(string.ascii_letters + "äö 漢.-", min_size=1, max_size=5).filter(lambda name: name.strip() == name)
PARAMETERS = st.dictionaries(NAMES, st.one_of(st.text(max_size=4), st.integers(), st.booleans()), max_size=3)
SNAPSHOT = {
    "name": "startup.cfg",
    "modelCount": 2,
    "created": 1,
    "models": {
        "m": {
            "1.0": {
                "defaultVersion": False,
                "marName": "m.mar",
                "minWorkers": 1,
                "maxWorkers": 2,
                "batchSize": 4,
                "maxBatchDelay": 50,
                "responseTimeout": 9,
                "startupTimeout": 8,
                "runtimeType": "PYTHON",
                "parallelLevel": 1,
            },
            "2.0": {"defaultVersion": True, "marName": "m2.mar", "minWorkers": 1, "maxWorkers": 1},
        },
    },
}


@st.composite
def states(draw: st.DrawFn) -> DesiredState:
    models = []
    for name in draw(st.lists(NAMES, unique=True, max_size=3)):
        versions = draw(st.lists(NAMES, unique=True, min_size=1, max_size=3))
        stored = [
            StoredVersion(
                key=ModelKey(name, version),
                url=draw(NAMES),
                place=draw(st.sampled_from(["", "/a/b.mar"])),
                digest=draw(st.none() | st.just("0" * 64)),
                trusted=draw(st.booleans()),
                loaded_at_startup=draw(st.booleans()),
                scale=Scale(draw(st.integers(0, 2)), draw(st.integers(2, 4))),
                parameters=draw(PARAMETERS),
            )
            for version in versions
        ]
        models.append(StoredModel(draw(st.sampled_from(versions)), tuple(stored)))
    return DesiredState(tuple(models), tuple(draw(st.lists(NAMES, unique=True, max_size=2))))


@given(states())
def test_what_is_written_is_read_back(state: DesiredState) -> None:
    """Every state survives the way to text and back."""
    assert from_json(to_json(state)) == state


@given(states(), st.lists(states(), max_size=3))
def test_changes_make_of_one_state_the_next(first: DesiredState, others: list[DesiredState]) -> None:
    """Whatever follows a state is a change that survives the way to text, or stands in another order and is none."""
    text, last = to_json(first), first
    for state in others:
        change = last.change_to(state)
        if change is None:
            assert [model.name for model in last.changed(Change(state.models)).models] != [m.name for m in state.models]
            continue
        text, last = text + change_to_json(change), state
        assert from_json(text) == state
        assert from_json(text + b'{"models') == state


@given(states(), st.randoms(use_true_random=False))
def test_what_stays_the_same_object_is_no_part_of_a_change(state: DesiredState, random: Random) -> None:
    """Among models that stay, some go, change and come: the change names these, and makes the new state."""
    kept = [model for model in state.models if random.random() < 0.7]
    new = [
        StoredModel(m.default, m.versions[::-1]) if len(m.versions) > 1 and random.random() < 0.5 else m for m in kept
    ]
    more = [StoredModel("1", (StoredVersion(key=ModelKey("new!", "1"), url="", scale=Scale(0, 0)),))]
    wanted = DesiredState((*new, *more), state.seen)
    change = state.change_to(wanted)
    assert change is not None
    assert state.changed(change) == wanted
    assert {model.name for model in change.models} == {m.name for m in new if m not in kept} | {"new!"}
    assert set(change.removed) == {model.name for model in state.models} - {model.name for model in kept}
    if kept:
        assert state.change_to(DesiredState((*more, *kept), state.seen)) is None, "what is new comes last"


def test_a_change_in_the_middle_that_is_none_is_refused() -> None:
    """Half a line may be the last one only: behind it nothing can have been written."""
    line = change_to_json(Change(removed=("m",)))
    with pytest.raises(ValueError, match="change 2 after it is no JSON"):
        from_json(to_json(DesiredState()) + line + b"{\n" + line)
    with pytest.raises(ValueError, match="change 1 has 'more', which this release does not know"):
        from_json(to_json(DesiredState()) + b'{"models": [], "removed": [], "more": 1}\n')


@given(states())
def test_what_is_loaded_is_wanted(state: DesiredState) -> None:
    """Taking a stored state over gives the same state to store."""
    desired = Desired()
    desired.load(state)
    again = desired.state()
    assert again.models == state.models
    assert set(again.seen) == set(state.seen)


ONE = StoredVersion(key=ModelKey("m", "1"), url="m.mar", scale=Scale(1, 1))


def document(**changes: object) -> dict[str, object]:
    return {**json.loads(to_json(DesiredState((StoredModel("1", (ONE,)),)))), **changes}


@pytest.mark.parametrize(
    "item, expected",
    [
        (b"{", "it is no JSON"),
        (b"[]", "it is no state file of torchmgmt"),
        (b'{"a": 1}', 'it has no "format"'),
        (document(format=2), "its format is 2, but this release knows only 1"),
        (document(more=1), "it has 'more', which this release does not know"),
        (document(models={}), "'models' of it is {}, but must be list"),
        (document(models=[{"name": "m", "default": "2", "versions": []}]), "the default of model 'm' is '2'"),
        (document(models=[1]), "model 1 is 1, but must be an object"),
        (document(seen=[1]), "'seen' of it is [1], but must be a list of texts"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_the_place(item: object, expected: str) -> None:
    """Also what a later release wrote: a key that is not known would be lost at the next write."""
    text = item if isinstance(item, bytes) else json.dumps(item).encode()
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refused:
        from_json(text)
    assert expected in str(refused.value)


def test_a_snapshot_of_torchserve_is_read() -> None:
    """Names, versions, default, workers and limits."""
    (model,) = from_torchserve(SNAPSHOT).models
    first, second = model.versions
    assert (model.name, model.default, second.url) == ("m", "2.0", "m2.mar")
    assert (first.url, first.scale, first.trusted) == ("m.mar", Scale(1, 2), False)
    assert first.parameters == {
        "model_name": "m",
        "batch_size": 4,
        "max_batch_delay": 50,
        "response_timeout": 9,
        "startup_timeout": 8,
        "runtime": "PYTHON",
    }


@pytest.mark.parametrize("wrong", [{}, {"models": 1}, {"models": {"m": 1}}, {"models": {"m": {"1": {}}}}])
def test_what_is_no_snapshot_is_refused(wrong: dict[str, object]) -> None:
    """With an InvalidArgument that names the setting."""
    with pytest.raises(InvalidArgument, match="model_snapshot"):
        from_torchserve(wrong)
