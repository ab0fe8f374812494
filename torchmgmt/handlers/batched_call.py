"""Calls a function of tensors with batches, and gives each request what is its own of what comes out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor

from torchmgmt.handlers.faults import NO_FAULT
from torchmgmt.handlers.kept_state import KeptState
from torchmgmt.handlers.showing import Layout, Single, anywhere, layout_of, mixed_part
from torchmgmt.handlers.stacking import Form, Group, NotABatch, Stackable, kind_of

__all__ = ["BatchedCall"]

log = logging.getLogger(__name__)

_ENOUGH = 8
"""After so many shapes of one kind for which the same was shown it is believed for all: to look costs three times a call."""
_MOST_FORMS = 512


@frozen
class _Refusal:
    """What comes out shows no batch."""

    reason: str = field(eq=False)

    def split(self, value: Any, count: int, where: str = "the output") -> list[Any]:
        raise NotABatch(self.reason)


@define
class _Kind:
    """What was shown for values that differ in their sizes only."""

    count: int = 0
    seen: set[Layout] = field(factory=set)

    def note(self, layout: Layout) -> None:
        """Note what was shown for values of one form."""
        self.count += 1
        self.seen.add(anywhere(layout))

    @property
    def believed(self) -> Layout | None:
        """What holds for all of them; None: that is to be found out for each form."""
        return next(iter(self.seen)) if self.count >= _ENOUGH and len(self.seen) == 1 else None


class BatchedCall:
    """Calls ``call`` with what requests of one form brought, stacked, and splits what comes out.

    How that is split is found out when values of a form come for the first time: ``call`` is called with a batch of one and with
    a batch of two, and what changes between them as the batch does is the batch (:mod:`torchmgmt.handlers.showing`).

    Args:
        call: takes the stacked value.
        rehearse: returns what is called in its place to find out how it is split, and what is kept of its state for that.
        shares_batches: whether requests of several callers may be in one batch: then it is also looked whether the answer to
            one depends on another.
        fixed_batch: the only batch that can be called with, if that is known; None: any.
    """

    def __init__(
        self,
        call: Callable[[Any], Any],
        rehearse: Callable[[], tuple[Callable[[Any], Any], KeptState]],
        *,
        shares_batches: bool,
        fixed_batch: int | None = None,
    ) -> None:
        self._call = call
        self._rehearse = rehearse
        self._shares_batches = shares_batches
        self._fixed_batch = fixed_batch
        self._kinds: dict[Form, _Kind] = {}
        self._layouts: dict[Form, Layout] = {}

    def answers(self, group: Group) -> list[Any]:
        """Return an answer for each request of a group, or what it alone raised.

        Raises:
            NotABatch: what comes out does not show which part belongs to which request; always, also for one alone.
            Exception: whatever the call raises.
        """
        value = group.values[0]
        layout = self._layouts.get(value.form)
        if layout is None:
            layout = self._layout_for(value)
        if isinstance(layout, _Refusal):
            raise NotABatch(layout.reason)
        if isinstance(layout, Single) and len(group.positions) > 1:
            return [self._attempt(each, layout) for each in group.each()]
        return self._run(group, layout)

    def _run(self, group: Group, layout: Layout) -> list[Any]:
        output = self._call(group.stacked())
        try:
            return layout.split(output, len(group.positions))
        except NotABatch as error:
            self._keep(group.values[0].form, _Refusal(str(error)))  # it is no batch from now on, whoever asks
            raise

    def _attempt(self, group: Group, layout: Layout) -> Any:
        try:
            return self._run(group, layout)[0]
        except NO_FAULT:
            raise
        except BaseException as error:
            return error

    def _layout_for(self, value: Stackable) -> Layout:
        """Return what was shown for such values, or find it out."""
        if len(self._kinds) >= _MOST_FORMS:
            self._kinds.clear()
        kind = self._kinds.setdefault(kind_of(value.form), _Kind())
        layout = kind.believed
        if layout is None:
            layout = self._shown(value)
            kind.note(layout)
        self._keep(value.form, layout)
        return layout

    def _keep(self, form: Form, layout: Layout) -> None:
        if len(self._layouts) >= _MOST_FORMS:
            self._layouts.clear()
        self._layouts[form] = layout

    def _shown(self, value: Stackable) -> Layout:
        """Find out how what comes out for such values is split; leave no trace of it."""
        call, state = self._rehearse()
        try:
            return self._layout_shown_by(_Rehearsal(call, state, value, self._fixed_batch))
        finally:
            state.put_back_all()

    def _layout_shown_by(self, rehearsal: _Rehearsal) -> Layout:
        one = rehearsal.one()
        try:
            two = rehearsal.two()
        except NO_FAULT:
            raise
        except BaseException as error:
            return self._single(error)
        try:
            layout = layout_of(one, two)
        except NotABatch as error:
            return _Refusal(str(error))
        if self._shares_batches and (part := rehearsal.mixed_part(layout, one, two)):
            return _Refusal(
                f"{part} is another one for a request that is run beside another than for the same request alone: the module"
                " mixes what is in a batch, as recurrent and attention layers do without batch_first=True, and batch"
                ' normalization in training; register with batch_size=1, or with batching="list"'
            )
        return layout

    def _single(self, error: BaseException) -> Layout:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if self._shares_batches:
            log.warning("Requests are run one by one, as a batch of two cannot be run (%s)", reason)
        return Single()


@frozen
class _Rehearsal:
    """Calls with a batch of one and a batch of two, made of what one request brought."""

    call: Callable[[Any], Any]
    state: KeptState
    value: Stackable
    fixed_batch: int | None

    def one(self) -> Any:
        """Return what comes out for the request alone; raise what the call raises."""
        alone = Stackable(self.value.form, [leaf.clone() for leaf in self.value.leaves])  # it may be written to
        stacked = Group([0], [alone]).stacked()
        try:
            return self.call(stacked)
        except NO_FAULT:
            raise
        except BaseException as error:
            if self.fixed_batch is None or self.fixed_batch == 1:
                raise
            raise NotABatch(
                f"this program takes batches of exactly {self.fixed_batch}, as it was exported so, and requests come as they"
                " come: export it with a dynamic batch dimension (dynamic_shapes={...: {0: torch.export.Dim.DYNAMIC}}), or for"
                " a batch of 1, which is run request by request"
            ) from error

    def two(self) -> Any:
        """Return what comes out for the request behind another one; raise what the call raises for both of two others."""
        other = Stackable(self.value.form, [_another(leaf) for leaf in self.value.leaves])
        self.state.put_back()
        try:
            return self.call(Group([0, 1], [other, self.value]).stacked())
        except NO_FAULT:
            raise
        except BaseException as error:  # what is in no request may be refused; the same one twice may do
            log.debug("A request that was made up was refused: %r", error)
        self.state.put_back()
        return self.call(Group([0, 1], [self.value, self.value]).stacked())

    def mixed_part(self, layout: Layout, one: Any, two: Any) -> str:
        """Return which part of the answer is another one beside another request; "" if none is for certain."""
        (alone,), (_, beside) = layout.split(one, 1), layout.split(two, 2)
        part = mixed_part(alone, beside)
        if not part:
            return ""
        self.state.put_back()
        (again,) = layout.split(self.one(), 1)
        return "" if mixed_part(alone, again) else part  # what draws random numbers is another one each time


def _another(leaf: Tensor) -> Tensor:
    """Return what another request could have brought: as large, and of one number that is in ``leaf``, or of 0 or 1.

    That number means something to whoever is asked, being the number of a word, say. Of what cannot be filled it is the same.
    """
    try:
        first = leaf.flatten()[0]
        number = first.item() if (leaf != first).any() else int(not first)
        return torch.full_like(leaf, number)
    except (RuntimeError, NotImplementedError, IndexError, TypeError):  # sparse, quantized, empty, ...
        return leaf
