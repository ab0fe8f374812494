"""Classes and functions that travel by their code: what comes back is the program's own, and is left as it is."""

from __future__ import annotations

import abc
import enum
import gc
import importlib
import io
import pickle
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import pytest

from torchmgmt.by_value import CodePickler, CodeUnpickler
from torchmgmt.encoding import decode, encode_answer, encode_with_code
from torchmgmt.exchange import Encoded

# Another process: answers each value with what a function, which travels with it, makes of it.
OTHER = """
import pickle, sys
from torchmgmt.encoding import decode, encode_answer
from torchmgmt.exchange import Encoded

while True:
    try:
        call, value = decode(Encoded(pickle.load(sys.stdin.buffer)))
    except EOFError:
        break
    pickle.dump([bytes(each) for each in encode_answer(call(value)).segments], sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""


def of_main(kind: Any) -> Any:
    """Make a class or function what it is in a program: one of its main module, which no other process has."""
    kind.__module__ = "__main__"
    kind.__qualname__ = kind.__name__
    return kind


@of_main
def same(value: Any) -> Any:
    return value


class Other:
    """Another process, in which nothing is found that this one has in its main module."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, value: Any, call: Callable[[Any], Any] = same) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        encoded, code = encode_with_code((call, value))
        assert code
        pickle.dump([bytes(each) for each in encoded.segments], self.process.stdin)
        self.process.stdin.flush()
        return decode(Encoded(pickle.load(self.process.stdout)))


@pytest.fixture(scope="module")
def other() -> Iterator[Other]:
    other = Other()
    yield other
    with other.process:
        assert other.process.stdin is not None
        other.process.stdin.close()


@of_main
@dataclass
class Point:
    x: int
    seen: list[int] = field(default_factory=list)

    made = 0

    def moved(self) -> Point:
        return Point(self.x + 1)


@of_main
@dataclass(frozen=True, slots=True)
class Frozen:
    x: int


@of_main
class Pair(NamedTuple):
    left: Any
    right: Any


@of_main
class Colour(enum.Enum):
    RED = 1
    GREEN = 2


@of_main
class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self) -> float: ...


@of_main
class Square(Shape):
    def __init__(self, side: float) -> None:
        self.side = side

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Square) and self.side == other.side

    __hash__ = None  # type: ignore[assignment]

    def area(self) -> float:
        return self.side**2


T = TypeVar("T")


@of_main
@dataclass
class Box(Generic[T]):
    inside: T


@of_main
def double(value: Any) -> Any:
    return value.double()


@of_main
def call_with_5(function: Callable[[int], Any]) -> Any:
    return function(5)


@pytest.mark.parametrize(
    "value",
    [
        Point(1),
        Frozen(1),
        Pair(1, Point(2)),
        Colour.GREEN,
        Square(3),
        Box(Box([Point(1), Colour.RED])),
        {"many": [Point(each) for each in range(50)]},
        Point,
        Colour,
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_comes_back_is_of_the_programs_own_class(other: Other, value: Any) -> None:
    """It is equal, and so are the classes the same."""
    for _ in range(2):
        again = other(value)
        assert again == value
        assert type(again) is type(value)


def test_the_programs_class_stays_as_it_is(other: Other) -> None:
    """What another process does to its own, or what the program has done since, changes nothing in the other one."""

    @of_main
    def spoil(point: Any) -> Any:
        kind = type(point)
        kind.made += 1
        kind.moved = None
        return point, kind.made

    moved, Point.made = Point.moved, 40
    try:
        _, first = other(Point(1), spoil)
        _, second = other(Point(1), spoil)
        assert second == first + 1
        assert (Point.made, Point.moved) == (40, moved)
        assert other(Point(1), spoil)
    finally:
        Point.made = 0


def test_a_class_that_another_process_made_is_made_here(other: Other) -> None:
    """Once: it is the same class in each answer. Its instances go back as what they were."""

    @of_main
    def answer(value: Any) -> Any:
        known = globals().setdefault(
            "known", type("Answer", (), {"double": lambda self: self.value * 2, "__module__": "__main__"})
        )
        made = known()
        made.value = value
        return made

    first, second = other(4, answer), other(5, answer)
    assert (first.double(), second.double()) == (8, 10)
    assert other(first, double) == 8


def test_two_classes_of_one_name_are_two(other: Other) -> None:
    """A notebook's cell that is run again makes another class; values are of the one that they were of."""

    def point() -> type[Any]:
        return of_main(type("Again", (), {}))  # type: ignore[no-any-return]

    first, second = point(), point()
    assert type(other(first())) is first
    assert type(other(second())) is second


def test_functions_travel_as_they_are_now(other: Other) -> None:
    """Each time anew, with what they refer to."""
    step = 1

    @of_main
    def add(value: int) -> int:
        return value + step

    assert other(1, add) == 2
    step = 10
    assert other(1, add) == 11
    assert other(add, call_with_5) == 15


def test_arrays_in_them_stay_out_of_the_pickle() -> None:
    """They are as large as they are alone."""
    encoded, code = encode_with_code({"body": Pair(np.zeros(100_000), b"")})
    assert code == "__main__.Pair"
    assert len(encoded.segments) == 2
    assert len(encoded.segments[0]) < 10_000


@pytest.mark.parametrize(
    "value",
    [1, {"body": np.ones(3)}, {"body": ["__main__", {"of": b"__main__\x94\x93"}]}, [10.5] * 999, types.SimpleNamespace],
)
def test_what_has_a_name_everywhere_has_no_code(value: Any) -> None:
    """Whatever it looks like."""
    encoded, code = encode_with_code(value)
    assert code == ""
    assert repr(decode(encoded)) == repr(value)


def test_modules_that_are_registered_for_it_go_along(other: Other) -> None:
    """As cloudpickle has it for live objects; classes, functions, and those of modules in it."""
    module = types.ModuleType("its_own")
    exec("class Made:\n    pass\n\ndef call(value):\n    return type(value).__name__", vars(module))
    sys.modules["its_own"] = module
    cloudpickle.register_pickle_by_value(module)
    try:
        assert type(other(module.Made())) is module.Made
        assert other(module.Made(), module.call) == "Made"
    finally:
        cloudpickle.unregister_pickle_by_value(module)
        del sys.modules["its_own"]


def test_what_came_along_goes_back_though_a_module_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may find another module under that name; what the program sent is what it gets back."""
    script = """
import pickle, sys, types, cloudpickle
from torchmgmt.by_value import CodePickler
module = types.ModuleType("sched")
exec("class Made: pass", vars(module))
sys.modules["sched"] = module
cloudpickle.register_pickle_by_value(module)
CodePickler(sys.stdout.buffer, protocol=5).dump(module.Made)
"""
    written = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=30).stdout
    made = CodeUnpickler(io.BytesIO(written)).load()
    assert (made.__module__, made.__name__) == ("sched", "Made")
    monkeypatch.setitem(sys.modules, "sched", importlib.import_module("sched"))
    assert type(decode(encode_answer(made()))) is made


def test_the_main_module_of_a_spawned_program_goes_along(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    """There it has another name, under which another process has its own; cloudpickle's registry is left as it was."""
    module = types.ModuleType("__mp_main__")
    exec("class Made:\n    pass\n\ndef call(value):\n    return type(value).__name__", vars(module))
    monkeypatch.setitem(sys.modules, "__mp_main__", module)
    assert type(other(module.Made())) is module.Made
    assert other(module.Made(), module.call) == "Made"
    assert "__mp_main__" not in cloudpickle.list_registry_pickle_by_value()
    cloudpickle.register_pickle_by_value(module)
    try:
        assert type(other(module.Made())) is module.Made
        assert "__mp_main__" in cloudpickle.list_registry_pickle_by_value()
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def test_what_cannot_be_pickled_at_all_says_so() -> None:
    """Not that it has no name; a class whose methods refer to such a thing is named."""
    with pytest.raises(TypeError, match=r"cannot pickle '_thread\.lock' object"):
        encode_with_code(Pair(threading.Lock(), 1))
    lock = threading.Lock()
    holding = of_main(type("Holding", (), {"method": lambda self: lock}))
    for encode in (encode_with_code, encode_answer):
        with pytest.raises(pickle.PicklingError, match=r"Holding of __main__ goes along by its code.*lock.*a module"):
            encode(holding())


def _local() -> Any:
    class Local:
        pass

    return Local()


@pytest.mark.parametrize(
    "value", [lambda: None, _local(), Pair(lambda: None, 1)], ids=["lambda", "local", "in another"]
)
def test_what_has_no_name_in_a_module_that_others_import_is_refused(value: Any) -> None:
    """As always: only what is of the main module goes along."""
    for encode in (encode_with_code, encode_answer):
        with pytest.raises(pickle.PicklingError, match="has no name in tests"):
            encode([value])


def test_classes_are_not_kept_for_ever() -> None:
    """One that the program has dropped is gone, though it has travelled."""
    kind = of_main(type("Dropped", (), {}))
    decode(encode_with_code(kind())[0])
    gone = weakref.ref(kind)
    del kind
    gc.collect()
    assert gone() is None


def test_a_read_that_breaks_off_leaves_nothing_half_made() -> None:
    """The class is made when it is read as a whole, in a process that does not know it."""
    broken = """
import sys
from torchmgmt.encoding import decode
from torchmgmt.exchange import Encoded
data = sys.stdin.buffer.read()
for length in (len(data) // 2, len(data) - 40, len(data)):
    try:
        print(decode(Encoded([data[:length]])).moved().x)
    except Exception as error:
        print(type(error).__name__)
"""
    (data,) = encode_with_code(Point(1))[0].segments
    done = subprocess.run(
        [sys.executable, "-c", broken], input=bytes(data), capture_output=True, check=True, timeout=30
    )
    assert done.stdout.split()[-1] == b"2"
    assert b"2" not in done.stdout.split()[:-1]


def test_an_object_that_is_written_down_whole_knows_the_programs_classes() -> None:
    """As a live object is: what its classes are is what values are of."""
    file = io.BytesIO()
    CodePickler(file, protocol=5).dump({"call": lambda: Point(1), "kind": Point})
    file.seek(0)
    again = CodeUnpickler(file).load()
    assert again["kind"] is Point
    assert type(again["call"]()) is Point
