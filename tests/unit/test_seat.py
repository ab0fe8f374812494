"""A seat beside an idle worker: taken and sent in one step, by one caller, whatever interrupts it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.handlers import PATIENCE_S
from tests.interruptions import interruptions
from torchmgmt.seat import Seat


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    with left, right:
        yield left, right


def received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 20)
    except BlockingIOError:
        return b""


def seat_of(sock: socket.socket) -> Seat:
    return Seat(7, lambda item: None if item == "large" else str(item).encode(), sock.send)


def test_who_comes_first_has_it(pair: tuple[socket.socket, socket.socket]) -> None:
    """What the second one would send is not sent."""
    seat = seat_of(pair[0])
    first, second = object(), object()
    seat.take(first, "first")
    seat.take(second, "second")
    assert received(pair[1]) == b"first"
    assert seat.was_sent()
    assert seat.close() is first
    assert seat.close() is first


def test_a_seat_that_is_closed_is_taken_by_nobody(pair: tuple[socket.socket, socket.socket]) -> None:
    """Who comes later sends nothing."""
    seat = seat_of(pair[0])
    assert seat.close() is None
    seat.take(object(), "late")
    assert seat.close() is None
    assert received(pair[1]) == b""


def test_what_cannot_be_sent_at_once_takes_none(pair: tuple[socket.socket, socket.socket]) -> None:
    """It goes the usual way, and the seat is there for others."""
    seat = seat_of(pair[0])
    seat.take(object(), "large")
    other = object()
    seat.take(other, "other")
    assert seat.close() is other
    assert received(pair[1]) == b"other"


def test_of_many_threads_one_has_it(pair: tuple[socket.socket, socket.socket]) -> None:
    """All come at once; one request arrives, and it is that of who has the seat."""
    for _ in range(50):
        seat = seat_of(pair[0])
        barrier = threading.Barrier(4)

        def come(number: int, seat: Seat = seat, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(PATIENCE_S)
            seat.take(number, number)

        threads = [threading.Thread(target=come, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert received(pair[1]) == str(seat.close()).encode()


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError, ValueError])
def test_it_is_taken_and_sent_or_neither(pair: tuple[socket.socket, socket.socket], error: type[BaseException]) -> None:
    """Wherever who takes it is interrupted, and by whatever: that always comes out."""
    for interruption in interruptions(error=error):
        seat = seat_of(pair[0])
        was_interrupted = interruption.of(lambda seat=seat: seat.take("me", "request"))  # type: ignore[misc]
        assert was_interrupted == bool(interruption.where), interruption.where
        assert (seat.close(), received(pair[1]), seat.was_sent()) in {
            ("me", b"request", True),
            (None, b"", False),
        }, interruption.where


def test_what_is_sent_in_part_is_not_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    """Its owner hears of that, as it does where nothing can be sent at all."""
    part = Seat(7, lambda _item: b"x" * (8 << 20), pair[0].send)
    part.take("me", "")
    assert part.close() == "me"
    assert not part.was_sent()
    pair[0].close()
    none = seat_of(pair[0])
    none.take("me", "")
    assert none.close() == "me"
    assert not none.was_sent()
