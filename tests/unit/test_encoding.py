"""Values come out as they went in, and what is large is not copied on its way."""

from __future__ import annotations

import gc
import os
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.interruptions import interruptions
from tests.unit.patterns import pattern
from torchmgmt import encoding
from torchmgmt.encoding import decode, encode
from torchmgmt.exchange import Encoded

MANY = 100_000
HEADS = st.none() | st.integers() | st.text(max_size=20) | st.tuples(st.integers(), st.booleans())


def test_arrays_stay_out_of_the_pickle():
    """A numpy array travels as its own buffer: encoding does not copy it."""
    array = np.arange(100_000, dtype=np.float32)
    encoded = encode({"body": array, "n": 1})
    assert len(encoded.segments) == 2
    assert len(encoded.segments[0]) < 1000
    assert np.shares_memory(np.frombuffer(encoded.segments[1], dtype=np.float32), array)
    again = decode(encoded)
    assert again["n"] == 1
    assert np.array_equal(again["body"], array)


@pytest.mark.parametrize("size", [0, (1 << 16) - 1, 1 << 16, 1 << 20])
@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: {"body": data, "n": 1}], ids=["alone", "in a row"])
def test_large_bytes_stay_out_of_the_pickle(size: int, wrap: Any):
    """Bytes come out as bytes; large ones, as bodies of requests are, travel as a buffer of their own."""
    value = wrap(pattern(size, 0))
    encoded = encode(value)
    assert len(encoded.segments) == (2 if size >= 1 << 16 else 1)
    travelled = Encoded([bytearray(segment) for segment in encoded.segments])
    again = decode(travelled)
    assert again == value
    assert type(again["body"] if isinstance(again, dict) else again) is bytes


def test_pickle_buffers_stay_out_of_the_pickle():
    """Whatever a class hands out as a PickleBuffer is not copied either."""
    data = bytearray(pattern(MANY, 0))
    encoded = encode([pickle.PickleBuffer(data), b"small"])
    assert len(encoded.segments[0]) < 1000
    data[0] = 77
    assert bytes(encoded.segments[1])[0] == 77
    body, small = decode(encoded)
    assert bytes(body) == bytes(data)
    assert small == b"small"


def test_a_frozen_value_does_not_follow_its_owner():
    """What was encoded as frozen stays what it was, even if the caller fills the same array anew."""
    array = np.zeros(1000)
    fixed = np.ones(1000)
    fixed.flags.writeable = False
    encoded = encode([array, fixed], frozen=True)
    array += 7
    again, same = decode(encoded)
    assert not again.any()
    assert np.shares_memory(same, fixed)  # nobody can write to it: no copy


@given(value=st.recursive(HEADS | st.binary(max_size=50), lambda inner: st.lists(inner, max_size=3), max_leaves=8))
def test_decode_undoes_encode(value: object):
    """Any picklable value comes out as it went in."""
    assert decode(encode(value)) == value


def test_a_fortran_array_keeps_its_order():
    """Arrays that are not laid out in C order arrive as they were."""
    array = np.asfortranarray(np.arange(12).reshape(3, 4))
    again = decode(encode(array))
    assert np.array_equal(again, array)


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_rests_while_much_is_unpickled(is_enabled: bool) -> None:
    """It is not asked to look for garbage among what is just being made, and is afterwards what it was before."""
    encoded = encode([[number] for number in range(50_000)])
    collected: list[str] = []
    gc.collect()
    gc.callbacks.append(note := lambda phase, _info: collected.append(phase))
    try:
        (gc.enable if is_enabled else gc.disable)()
        value = decode(encoded)
        assert len(collected) <= 2 * is_enabled  # the one that is due when it goes on
        assert gc.isenabled() is is_enabled
    finally:
        gc.enable()
        gc.callbacks.remove(note)
    assert len(value) == 50_000


def test_the_collector_goes_on_when_a_pickle_is_broken() -> None:
    """Whatever unpickling raises."""
    with pytest.raises(pickle.UnpicklingError):
        decode(Encoded([b"nonsense" * 10_000]))
    assert gc.isenabled()


def exit_code_of_fork() -> int:
    """Fork, and return whether the garbage collector of the new process is on."""
    pid = os.fork()
    if pid == 0:
        os._exit(gc.isenabled())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Forking:
    """Forks when it is unpickled, as another thread may at that moment."""

    def __reduce__(self):
        return exit_code_of_fork, ()


def test_who_is_forked_while_much_is_unpickled_collects_garbage():
    """Though the collector rests meanwhile in the process that unpickles."""
    assert decode(encode([Forking(), *range(20_000)]))[0] == 1
    assert gc.isenabled()


def test_the_collector_goes_on_whatever_interrupts_the_unpickling() -> None:
    """Ctrl-C at any point of it does not leave the program without garbage collection."""
    much = encode([str(number) for number in range(5000)])
    for interruption in interruptions():
        interruption.of(lambda: decode(much))
        assert gc.isenabled(), interruption.where
        assert encoding._rest._users == 0, interruption.where
