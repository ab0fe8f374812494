"""Batch: items that a Batcher has cut from its queue to be run together, each with the future of its answer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from attrs import define, field

from torchmgmt.admission import Admission
from torchmgmt.errors import WrongNumberOfAnswers, copy_of
from torchmgmt.log_relay import log_guarded
from torchmgmt.owned_future import Owner, Waits

if TYPE_CHECKING:
    from typing import TypeGuard

__all__ = ["Batch", "Placed", "Promise", "Waiting", "answers_in", "is_placed", "settle"]

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
C_contra = TypeVar("C_contra", contravariant=True)


class Promise(Protocol[C_contra]):
    """What is given the outcome of one item, once. A :class:`concurrent.futures.Future` is one; all of it as there."""

    def running(self) -> bool:
        """Whether the item was begun, and has no outcome yet."""

    def done(self) -> bool:
        """Whether it has its outcome, or was cancelled."""

    def cancelled(self) -> bool:
        """Whether it was cancelled."""

    def set_running_or_notify_cancel(self) -> bool:
        """Mark it as begun; False if it was cancelled. Raises RuntimeError if it was begun before, or has ended."""

    def set_result(self, result: C_contra, /) -> None:
        """Take the answer; raise InvalidStateError if there is an outcome."""

    def set_exception(self, exception: BaseException, /) -> None:
        """Take an error; raise as ``set_result`` does."""

    def add_done_callback(self, fn: Callable[[Any], object], /) -> None:
        """Have ``fn`` called with it once it is done."""


class Placed(Promise[Any], Protocol):
    """A promise that knows where it waits: it gives up its place itself, and its item can be begun again."""

    owner: Owner | None
    place: Waits | None

    def set_waiting(self) -> bool:
        """Mark it as not begun; False if it has ended."""


def is_placed(promise: Promise[Any]) -> TypeGuard[Placed]:
    """Whether a promise knows where it waits."""
    return hasattr(promise, "place")


@define(eq=False)
class Waiting(Generic[T, R]):
    """One accepted item and the promise of its answer."""

    item: T
    future: Promise[R]
    since: float
    rank: float
    """Its place in the queue, the least first: when it came, or would have come with the priority that others have."""
    admission: Admission
    """Where it is counted."""
    timeout_s: float | None = None
    """How long it may take in all."""
    wait_s: float | None = None
    """For how long it may wait to be started, whatever else it has time for."""
    start_by: float | None = None
    """When it is too late to start it."""
    has_limit: bool = False
    """Whether its time is limited."""
    ask: Callable[[], object] = bool
    """Has the owner look at it."""
    is_seated: bool = False
    """Whether it may be with a worker, and the owner not have seen it yet."""
    next: Waiting[T, R] | None = None
    is_counted: bool = False

    def leave(self, _future: object = None) -> None:
        """Take no room in the queue any more. Any thread; idempotent."""
        if self.is_counted:
            self.admission.leave(self)

    def begin(self, now: float) -> bool:
        """Mark it as running; False if it has ended, or it is too late."""
        future = self.future
        if future.done() or (self.start_by is not None and self.start_by <= now):
            return False
        try:
            return future.set_running_or_notify_cancel()
        except RuntimeError:  # it has ended at this moment
            return False


@define(eq=False)
class Batch(Generic[T, R]):
    """Items that are run together. One of :meth:`finish`, :meth:`fail`, :meth:`split` and :meth:`give_back` is to be called, once."""

    _entries: Sequence[Waiting[T, R]]
    _on_end: Callable[[int], object]
    _take_back: Callable[[int, Sequence[Waiting[T, R]]], object]
    items: list[T] = field(init=False)
    """The items in the order in which they were submitted."""

    def __attrs_post_init__(self) -> None:
        self.items = [entry.item for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def arrived(self) -> list[float]:
        """When each item was submitted, by the batcher's clock."""
        return [entry.since for entry in self._entries]

    def is_over(self) -> bool:
        """Whether every item has its outcome already: nobody waits for this batch any more."""
        return all(entry.future.done() for entry in self._entries)

    def give_back(self) -> bool:
        """Have its items wait again where they were cut from, as if they had never been; False if one of them cannot.

        If not, one of the others is still to be called.
        """
        futures: list[Placed] = [entry.future for entry in self._entries if is_placed(entry.future)]
        if len(futures) < len(self._entries):
            return False
        waiting = [entry for entry, future in zip(self._entries, futures, strict=True) if future.set_waiting()]
        self._take_back(len(self._entries), waiting)
        return True

    def split(self) -> Sequence[Batch[T, R]]:
        """Return a batch for each of its items, which is to be used in its place."""
        return [Batch([entry], self._on_end, self._take_back) for entry in self._entries]

    def finish(self, outcomes: Sequence[R | BaseException]) -> Sequence[int]:
        """Answer each item with its outcome, in order; an outcome that is an exception fails that item alone.

        Returns the places of those that nobody waits for any more: they were cancelled, or their deadline has passed.

        A wrong number of outcomes fails all of them with an error that names both numbers: nobody could tell whose
        answer is whose.
        """
        if len(outcomes) != len(self._entries):
            return self.fail(WrongNumberOfAnswers(len(self._entries), len(outcomes)))
        self._on_end(len(self._entries))  # first: who is answered may ask again before the next one is answered
        settled = [settle(entry.future, outcome) for entry, outcome in zip(self._entries, outcomes, strict=True)]
        return () if all(settled) else _places_of_false(settled)

    def fail(self, error: BaseException) -> Sequence[int]:
        """Answer every item with ``error``, each with a copy of its own; return as :meth:`finish` does."""
        self._on_end(len(self._entries))
        errors = [error if place == 0 else copy_of(error) for place in range(len(self._entries))]
        return _places_of_false([settle(entry.future, each) for entry, each in zip(self._entries, errors, strict=True)])


def settle(future: Promise[Any], outcome: object) -> bool:
    """Give ``future`` its one outcome; False if it has one (it was cancelled, or its deadline has passed)."""
    try:
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        return False
    except (
        BaseException
    ) as error:  # of one of its callbacks, as sys.exit() raises it: others wait for their outcomes, too
        log_guarded(log, logging.ERROR, "A callback of a future failed", exc_info=error)
    return True


def answers_in(returned: object) -> list[Any]:
    """Return what a function returned for a list of items as answers by their places.

    A list, a tuple or another sequence is that, and an array or a tensor, whose rows they are: its dimension 0. What has no
    order of its own, or is one thing that can be iterated over, is not: nobody could tell whose answer is whose.

    Raises:
        TypeError: it is something else, such as a set, a dictionary, text, a named tuple or a generator.
    """
    if _is_by_place(returned):
        return list(returned)  # type: ignore[call-overload,no-any-return]
    raise TypeError(
        f"a batch was answered with an object of type {type(returned).__qualname__}, of which nobody can tell which part"
        " belongs to which item; the function must return a list with one answer for each item, in their order"
    )


def _is_by_place(returned: Any) -> bool:
    if isinstance(returned, tuple):
        return not (
            hasattr(returned, "_fields") or hasattr(returned, "n_fields")
        )  # of one record, as torch.max returns
    if isinstance(returned, Sequence):
        return not isinstance(returned, (str, bytes, bytearray, memoryview))
    return _is_array(returned) and returned.ndim > 0


def _is_array(value: object) -> bool:
    kinds = ((sys.modules.get("numpy"), "ndarray"), (sys.modules.get("torch"), "Tensor"))
    return any(isinstance(value, getattr(module, name, ())) for module, name in kinds)


def _places_of_false(settled: Sequence[bool]) -> Sequence[int]:
    return [place for place, is_settled in enumerate(settled) if not is_settled]
