"""What the function of a Batcher may answer a batch with: something of which each item has its own part for certain."""

from __future__ import annotations

import os
from collections import deque, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from torchmgmt import Batcher
from torchmgmt.batch import answers_in

Maximum = namedtuple("Maximum", "value place")


@pytest.mark.parametrize(
    "returned",
    [
        {"first", "second"},
        frozenset({1, 2}),
        {1: "first", 2: "second"},
        {1: "first", 2: "second"}.values(),
        "ab",
        b"ab",
        bytearray(b"ab"),
        memoryview(b"ab"),
        (item for item in (1, 2)),
        iter([1, 2]),
        Maximum(3, 0),
        os.times(),
        torch.zeros(2, 2).max(dim=0),
        np.array(1),
        np.float32(1),
        torch.tensor(1),
        None,
        1,
    ],
    ids=lambda returned: type(returned).__name__,
)
def test_what_can_be_iterated_over_is_no_list_of_answers(returned: object) -> None:
    """Of a set, a dictionary, text or one record nobody can tell whose answer is whose."""
    with pytest.raises(
        TypeError, match=rf"object of type {type(returned).__qualname__}, .* list with one answer for each"
    ):
        answers_in(returned)


@pytest.mark.parametrize(
    "kind", [list, tuple, deque, np.array, torch.tensor, lambda answers: range(answers[0], answers[1] + 1)]
)
def test_a_sequence_has_the_answers_in_order(kind: Callable[[list[int]], Any]) -> None:
    """And so have the rows of an array or a tensor."""
    assert [int(answer) for answer in answers_in(kind([5, 6]))] == [5, 6]
    rows = answers_in(torch.tensor([[1, 2], [3, 4]]))
    assert [row.tolist() for row in rows] == [[1, 2], [3, 4]]


def test_each_item_of_a_batch_is_told_so() -> None:
    """As it is told of whatever the function raises; the next batch is run."""
    answers: list[Any] = [{1, 2}, [3]]
    with Batcher(lambda _items: answers.pop(0), batch_size=2, cuts_early=False) as batcher:
        for future in [batcher.submit(n) for n in range(2)]:
            assert "of type set" in str(future.exception(30))
        assert batcher.submit(3).result(30) == 3
