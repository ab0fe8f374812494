"""The registry's rules: one claim for a version, the first is the default, the default outlives the others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torchmgmt.errors import (
    AlreadyRegistered,
    DefaultVersionInUse,
    ModelNotFound,
    ModelVersionNotFound,
    TorchmgmtError,
)
from torchmgmt.records import ModelKey
from torchmgmt.registry import Registry, Withdrawal


def registry_with(*keys: str) -> Registry[str]:
    """A registry in which every "name:version" has itself as its value."""
    registry: Registry[str] = Registry()
    for key in keys:
        name, _, version = key.partition(":")
        registry.reserve(ModelKey(name, version))
        registry.add(ModelKey(name, version), key)
    return registry


def test_the_first_version_becomes_the_default_and_later_ones_do_not():
    """add says whether the version became the default: the first of each model, no other."""
    registry = registry_with()
    assert [registry.add(ModelKey(name, version), "") for name, version in ("a1", "a2", "b2", "a0")] == [
        True,
        False,
        True,
        False,
    ]
    assert (registry.default("a"), registry.default("b")) == ("1", "2")


def test_get_without_a_version_is_the_default():
    """Who names no version gets the default one, who names one gets that."""
    registry = registry_with("a:1", "a:2")
    assert registry.get("a") == "a:1"
    registry.set_default("a", "2")
    assert registry.get("a") == "a:2"
    assert registry.get("a", "1") == "a:1"


def test_find_gives_what_get_gives_and_none_where_get_raises():
    """For who asks whether a version is there."""
    registry = registry_with("a:1", "a:2")
    assert [registry.find("a"), registry.find("a", "2")] == ["a:1", "a:2"]
    assert [registry.find("a", "9"), registry.find("b"), registry.find("b", "1")] == [None, None, None]


def test_only_the_first_of_two_claims_succeeds():
    """Of two callers who register one version at once, one is refused before anything is loaded."""
    registry = registry_with()
    registry.reserve(ModelKey("a", "1"))
    with pytest.raises(AlreadyRegistered) as caught:
        registry.reserve(ModelKey("a", "1"))
    assert (caught.value.name, caught.value.version) == ("a", "1")


def test_a_registered_version_cannot_be_claimed():
    """Registering what is there already is a conflict; another version of it is not."""
    registry = registry_with("a:1")
    with pytest.raises(AlreadyRegistered):
        registry.reserve(ModelKey("a", "1"))
    registry.reserve(ModelKey("a", "2"))


def test_a_claim_can_be_given_up():
    """After a failed registration the version is free again."""
    registry = registry_with()
    for _ in range(2):
        registry.reserve(ModelKey("a", "1"))
        registry.release(ModelKey("a", "1"))
        registry.release(ModelKey("a", "1"))


def test_a_claimed_version_is_not_registered_yet():
    """What is being loaded cannot be found, listed or counted."""
    registry = registry_with()
    registry.reserve(ModelKey("a", "1"))
    assert ("a" in registry, len(registry), registry.names(), list(registry)) == (False, 0, [], [])
    with pytest.raises(ModelNotFound):
        registry.get("a")


def test_an_unknown_model_and_an_unknown_version_are_told_apart():
    """The error says whether the name or the version is wrong."""
    registry = registry_with("a:1")
    with pytest.raises(ModelNotFound) as no_model:
        registry.get("b", "1")
    assert no_model.value.name == "b"
    with pytest.raises(ModelVersionNotFound) as no_version:
        registry.get("a", "9")
    assert (no_version.value.name, no_version.value.version) == ("a", "9")


def test_second_removal_is_not_found():
    """A model that was removed is gone, and its name is free."""
    registry = registry_with("a:1")
    assert registry.remove("a") == "a:1"
    with pytest.raises(ModelNotFound):
        registry.remove("a")
    registry.reserve(ModelKey("a", "1"))


@pytest.mark.parametrize("version", [None, "1"])
def test_the_default_is_not_removed_while_others_exist(version: str | None):
    """The default goes last, named or not; a refused removal changes nothing."""
    registry = registry_with("a:1", "a:2")
    with pytest.raises(DefaultVersionInUse) as caught:
        registry.remove("a", version)
    assert (caught.value.name, caught.value.version) == ("a", "1")
    assert registry.versions("a") == ["a:1", "a:2"]
    assert registry.remove("a", "2") == "a:2"
    assert registry.remove("a", version) == "a:1"


def test_setting_an_unknown_default_changes_nothing():
    """A refused default leaves the old one."""
    registry = registry_with("a:1")
    with pytest.raises(ModelVersionNotFound):
        registry.set_default("a", "9")
    with pytest.raises(ModelNotFound):
        registry.set_default("b", "1")
    assert registry.default("a") == "1"


def test_withdrawing_the_default_makes_the_oldest_left_the_default():
    """A registration that failed late takes its version out even if that was the default."""
    registry = registry_with("a:1", "a:2", "a:3")
    assert registry.withdraw(ModelKey("a", "1"), registry.get("a", "1")) == Withdrawal(True, new_default="2")
    assert (registry.default("a"), registry.versions("a")) == ("2", ["a:2", "a:3"])


def test_withdrawing_what_is_not_there_is_nothing():
    """withdraw cleans up: it may be called for what never came to be, or was removed meanwhile."""
    registry = registry_with("a:1")
    assert registry.withdraw(ModelKey("a", "2"), "a:2") == Withdrawal(was_there=False)
    assert registry.withdraw(ModelKey("b", "1"), "b:1") == Withdrawal(was_there=False)
    assert list(registry) == ["a:1"]


def test_a_failed_registration_does_not_withdraw_its_successor():
    """If the version was unregistered and registered again meanwhile, the new one stays."""
    registry: Registry[object] = Registry()
    failed, successor = object(), object()
    registry.add(ModelKey("a", "1"), failed)
    registry.remove("a", "1")
    registry.add(ModelKey("a", "1"), successor)
    assert not registry.withdraw(ModelKey("a", "1"), failed).was_there
    assert registry.get("a") is successor


def test_a_listing_is_a_copy():
    """Whoever walks over models or versions may remove some on the way."""
    registry = registry_with("a:1", "b:1", "b:2")
    for value in registry:
        registry.withdraw(ModelKey(*value.split(":")), value)
    assert len(registry) == 0


NAMES = st.sampled_from(["noop", "digits", "Zebra", "ä"])
VERSIONS = st.sampled_from(["1.0", "2.0", "10", "latest"])
KEYS = st.builds(ModelKey, NAMES, VERSIONS)


class RegistryRules(RuleBasedStateMachine):
    """Random calls against the rules as DESIGN.md states them, written down a second time with plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.registry: Registry[object] = Registry()
        self.claimed: set[ModelKey] = set()
        # In the order in which they came.
        self.registered: list[tuple[ModelKey, object]] = []
        self.defaults: dict[str, str] = {}

    def keys(self, name: str) -> list[ModelKey]:
        return [key for key, _ in self.registered if key.name == name]

    def value(self, key: ModelKey) -> object:
        return dict(self.registered)[key]

    def why_not_found(self, name: str, version: str | None) -> TorchmgmtError | None:
        if not self.keys(name):
            return ModelNotFound(name)
        if version is not None and ModelKey(name, version) not in self.keys(name):
            return ModelVersionNotFound(name, version)
        return None

    def forget(self, key: ModelKey) -> None:
        self.registered = [entry for entry in self.registered if entry[0] != key]

    def check(self, expected: TorchmgmtError | None, call: Any, *args: object) -> Any:
        """Make the call; it has to raise exactly ``expected``, if that is an error."""
        if expected is None:
            return call(*args)
        with pytest.raises(TorchmgmtError) as caught:
            call(*args)
        assert type(caught.value) is type(expected)
        assert caught.value.args == expected.args
        return None

    @rule(key=KEYS)
    def reserve(self, key: ModelKey) -> None:
        taken = key in self.claimed or key in self.keys(key.name)
        self.check(AlreadyRegistered(key.name, key.version) if taken else None, self.registry.reserve, key)
        self.claimed.add(key) if not taken else None

    @rule(key=KEYS)
    def release(self, key: ModelKey) -> None:
        self.registry.release(key)
        self.claimed.discard(key)

    @precondition(lambda self: self.claimed)
    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.claimed)))
        value = object()
        is_first = not self.keys(key.name)
        assert self.registry.add(key, value) is is_first
        self.claimed.remove(key)
        self.registered.append((key, value))
        if is_first:
            self.defaults[key.name] = key.version

    @rule(name=NAMES, version=VERSIONS)
    def get(self, name: str, version: str) -> None:
        found = self.check(self.why_not_found(name, version), self.registry.get, name, version)
        assert found is None or found is self.value(ModelKey(name, version))

    @rule(name=NAMES)
    def get_default(self, name: str) -> None:
        found = self.check(self.why_not_found(name, None), self.registry.get, name)
        assert found is None or found is self.value(ModelKey(name, self.defaults[name]))
        self.check(self.why_not_found(name, None), self.registry.default, name)
        self.check(self.why_not_found(name, None), self.registry.versions, name)

    @rule(name=NAMES, version=VERSIONS)
    def set_default(self, name: str, version: str) -> None:
        expected = self.why_not_found(name, version)
        self.check(expected, self.registry.set_default, name, version)
        if expected is None:
            self.defaults[name] = version

    @rule(name=NAMES, version=VERSIONS | st.none())
    def remove(self, name: str, version: str | None) -> None:
        expected = self.why_not_found(name, version)
        wanted = self.defaults.get(name, "") if version is None else version
        if expected is None and wanted == self.defaults[name] and len(self.keys(name)) > 1:
            expected = DefaultVersionInUse(name, wanted)
        removed = self.check(expected, self.registry.remove, name, version)
        if expected is None:
            assert removed is self.value(ModelKey(name, wanted))
            self.forget(ModelKey(name, wanted))

    @rule(key=KEYS, is_current=st.booleans())
    def withdraw(self, key: ModelKey, is_current: bool) -> None:
        was_there = is_current and key in self.keys(key.name)
        withdrawal = self.registry.withdraw(key, self.value(key) if was_there else object())
        assert withdrawal.was_there is was_there
        new_default = None
        if was_there:
            self.forget(key)
            if self.defaults[key.name] == key.version and self.keys(key.name):
                new_default = self.defaults[key.name] = self.keys(key.name)[0].version
        assert withdrawal.new_default == new_default

    @invariant()
    def it_lists_what_is_registered(self) -> None:
        names = sorted({key.name for key, _ in self.registered})
        assert self.registry.names() == names
        assert len(self.registry) == len(self.registered)
        assert set(self.registry) == {value for _, value in self.registered}
        for name in names:
            assert name in self.registry
            assert self.registry.versions(name) == [self.value(key) for key in self.keys(name)]

    @invariant()
    def each_model_has_a_default_that_exists(self) -> None:
        for name in self.registry.names():
            assert self.registry.default(name) == self.defaults[name]
            assert self.registry.get(name) is self.registry.get(name, self.registry.default(name))


class TestRegistryRules(RegistryRules.TestCase):
    """Whatever is called in whatever order, the registry follows the rules, its refusals included."""

    settings = settings(max_examples=100, stateful_step_count=40)
