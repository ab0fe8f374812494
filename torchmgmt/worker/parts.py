"""Answers in parts: what a handler sends before it knows the rest, or yields."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from torchmgmt.encoding import encode
from torchmgmt.exchange import Encoded, Form, RequestHead, ResponseProperties
from torchmgmt.handlers.faults import NO_FAULT, BatchAbandoned
from torchmgmt.worker.answers import rendered

if TYPE_CHECKING:
    from torchmgmt.worker.open_inference import Asked

__all__ = ["NO_MORE", "PartSender", "Parts"]

NO_MORE: Any = object()
"""What a request is answered with whose answer has come in parts, and is complete."""


class PartSender:
    """Where the parts of one batch go. By default nowhere: then each answer is taken whole."""

    def send(self, index: int, part: Encoded) -> None:
        """Send a part of the answer to the request at ``index`` of the batch as it came."""

    def is_abandoned(self) -> bool:
        """Whether nobody waits for the batch any more."""
        return False


class Parts:
    """The parts of the answers to the requests that a handler is given.

    Args:
        requests: what is known of them.
        indexes: where they stand in the batch as it came.
        sender: where parts go that somebody waits for; others are kept until the answer is whole.
        properties: returns what the handler has set for each answer beside its body, or None.
        asked: what those of them that are inference requests say of the answer; None: none is one.
        encode_value: pickles what is answered to a request that was no body.
    """

    def __init__(
        self,
        requests: Sequence[RequestHead],
        indexes: Sequence[int],
        sender: PartSender,
        properties: Callable[[], Sequence[ResponseProperties | None] | None],
        asked: Sequence[Asked | None] | None = None,
        encode_value: Callable[[Any], Encoded] = encode,
    ) -> None:
        self._requests = requests
        self._indexes = indexes
        self._sender = sender
        self._properties = properties
        self._asked = [None] * len(requests) if asked is None else asked
        self._encode_value = encode_value
        self._kept: dict[int, list[Any]] = {}
        self._begun: set[int] = set()
        self.any_sent = False

    def send(self, answers: Sequence[Any]) -> None:
        """Take a part for each request, in order.

        Raises:
            ValueError: there are more or fewer than requests.
            BatchAbandoned: nobody waits for any of them.
        """
        if len(answers) != len(self._requests):
            raise ValueError(f"{len(answers)} parts were sent for a batch of {len(self._requests)} requests")
        for index, part in enumerate(answers):
            self._send_one(index, part)

    def drained(self, answers: Sequence[Any]) -> Sequence[Any]:
        """Take what those of ``answers`` yield that are generators, by turns; return what is left to answer."""
        if not any(type(answer) is GeneratorType for answer in answers):
            return answers
        left = list(answers)
        live = [index for index, answer in enumerate(left) if type(answer) is GeneratorType]
        try:
            while live:
                live = [index for index in live if self._step(index, left)]
        finally:
            for index in live:
                left[index].close()
        return left

    def outcome(self, index: int, answer: Any) -> Encoded:
        """Return ``answer`` as it travels; with the parts that were kept, if there are any."""
        kept = self._kept.get(index)
        if kept is not None:
            return self._whole(kept if answer is NO_MORE else [*kept, answer], index)
        if answer is NO_MORE:
            return Encoded(()) if index in self._begun else self._whole([], index)
        return self._encoded(answer, index)

    def _step(self, index: int, left: list[Any]) -> bool:
        """Take the next part of one answer; whether there may be more."""
        try:
            part = next(left[index])
        except StopIteration as end:
            left[index] = NO_MORE if end.value is None else end.value
            return False
        except NO_FAULT:
            raise
        except BaseException as error:  # this request's own: the others go on
            left[index] = error
            return False
        self._send_one(index, part)
        return True

    def _send_one(self, index: int, part: Any) -> None:
        self._check_wanted()
        _, _, _, _, head, in_parts = self._requests[index]
        if not in_parts or (head is not None and head[0] != Form.HTTP):
            self._kept.setdefault(index, []).append(part)
            return
        sent = self._encoded(part, index)
        if index not in self._begun:
            self._begun.add(index)
            properties = self._properties()
            sent.properties = properties[index] if properties is not None else None
        self.any_sent = True
        self._sender.send(self._indexes[index], sent)

    def _check_wanted(self) -> None:
        now = time.monotonic()
        are_over = all(deadline is not None and deadline <= now for _, _, _, deadline, _, _ in self._requests)
        if are_over or self._sender.is_abandoned():
            raise BatchAbandoned

    def _encoded(self, answer: Any, index: int) -> Encoded:
        """Return an answer as it travels: pickled, or as the body of a response to a body."""
        head = self._requests[index][4]
        return self._encode_value(answer) if head is None else rendered(answer, head, self._asked[index])

    def _whole(self, parts: Sequence[Any], index: int) -> Encoded:
        """Return parts as one answer: the list of them, or one body after the other."""
        head = self._requests[index][4]
        if head is None or head[0] != Form.HTTP:  # another protocol has one answer, not bodies one after the other
            return self._encoded(list(parts), index)
        bodies = [rendered(part, head) for part in parts]
        content_type = bodies[0].content_type if bodies else ""
        return Encoded([b"".join(body.segments[0] for body in bodies)], content_type=content_type)
