"""What modules and functions that are registered as they are get of a batch, and what becomes of their output."""

from __future__ import annotations

import io
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.unit.live import Running, one_thread
from torchmgmt.errors import InvalidArgument
from torchmgmt.handlers.stacking import NotABatch
from torchmgmt.live import live_object

__all__ = ["one_thread"]

Pair = namedtuple("Pair", "left right")


def test_a_module_gets_the_items_stacked_and_its_output_is_split() -> None:
    """An item has no batch dimension: neither what is asked with, nor what is answered."""
    net = nn.Linear(3, 2)
    items = torch.randn(4, 3)
    for answer, item in zip(Running(net, None)(*items), items, strict=True):
        assert answer.shape == (2,)
        assert torch.allclose(answer, net(item), atol=1e-6)
        assert not answer.requires_grad


def test_a_single_item_is_not_copied() -> None:
    """What a lone request brought goes in where it lies."""
    item = torch.zeros(3)
    Running(lambda batch: batch.add_(1))(item)
    assert item.eq(1).all()


def test_containers_are_stacked_and_split_leaf_by_leaf() -> None:
    """Dictionaries, lists, tuples and named tuples keep their form, in both directions."""

    def swap(value: Any) -> Any:
        assert isinstance(value["b"], Pair)
        return Pair([value["b"].right, {"x": value["a"]}], None)

    first = {"a": torch.zeros(2), "b": Pair(torch.tensor(1), torch.ones(1))}
    second = {"a": torch.ones(2), "b": Pair(torch.tensor(2), torch.zeros(1))}
    answers = Running(swap)(first, second)
    assert type(answers[1]) is Pair
    assert answers[1].right is None
    assert answers[1].left[0].tolist() == [0.0]
    assert answers[1].left[1]["x"].tolist() == [1.0, 1.0]


def test_fields_are_arguments_by_their_names() -> None:
    """predict(fields=...) calls forward with each of them, stacked."""
    answers = Running(lambda y, x: x - y).rows(*({"x": torch.tensor(n), "y": torch.tensor(1)} for n in range(3)))
    assert [int(answer) for answer in answers] == [-1, 0, 1]


@pytest.mark.parametrize("value", [[1.0, 2.0], np.array([1.0, 2.0], dtype=np.float32), torch.tensor([1.0, 2.0])])
def test_arrays_and_numbers_become_tensors(value: Any) -> None:
    """What JSON and numpy bring can be asked with, too."""
    (answer,) = Running(lambda batch: batch.sum(1))(value)
    assert answer == 3.0


def test_bytes_are_read_as_the_files_of_numpy_and_torch() -> None:
    """A body that came over HTTP is a tensor if it is a file of one."""
    file = io.BytesIO()
    np.save(file, np.ones(3, dtype=np.float32))
    other = io.BytesIO()
    torch.save(torch.ones(3), other)
    assert [float(each) for each in Running(lambda batch: batch.sum(1))(file.getvalue(), other.getvalue())] == [3, 3]


def test_other_shapes_and_types_are_run_apart() -> None:
    """Requests that do not stack form groups, each of one shape and type; answers stay in order."""
    calls = []

    def note(batch: Tensor) -> Tensor:
        calls.append((tuple(batch.shape), batch.dtype))
        return batch.sum(1)

    values = [torch.ones(2), torch.ones(3), torch.ones(2) * 2, torch.ones(3, dtype=torch.int64)]
    running = Running(note)
    assert [float(answer) for answer in running(*values)] == [2, 3, 4, 3]
    calls.clear()  # there were more, to see what the batch is
    assert [float(answer) for answer in running(*values)] == [2, 3, 4, 3]
    assert calls == [((2, 2), torch.float32), ((1, 3), torch.float32), ((1, 3), torch.int64)]


def test_a_group_that_fails_fails_no_other() -> None:
    """Its requests get the error, the others their answers."""

    def picky(batch: Tensor) -> Tensor:
        if batch.shape[1] == 3:
            raise ValueError("three")
        return batch

    good, bad, worse = Running(picky)(torch.ones(2), torch.ones(3), "text")
    assert good.tolist() == [1, 1]
    assert str(bad) == "three"
    assert isinstance(worse, NotABatch)
    assert "data is an object of type str" in str(worse)


def test_with_isolate_errors_a_group_is_run_again_one_by_one() -> None:
    """One bad input fails none of its shape either."""

    def picky(batch: Tensor) -> Tensor:
        if (batch < 0).any():
            raise ValueError("negative")
        return batch

    answers = Running(picky, isolates_errors=True)(torch.ones(2), -torch.ones(2), torch.ones(3))
    assert [isinstance(answer, ValueError) for answer in answers] == [False, True, False]


def test_a_batch_of_one_kind_that_fails_raises() -> None:
    """So that the worker does with it what it does with any handler's error."""
    with pytest.raises(ZeroDivisionError):
        Running(lambda _batch: 1 // 0)(torch.ones(1), torch.ones(1))


def test_a_list_without_tensors_is_a_list_of_answers() -> None:
    """A function that ends in labels gives each request its own."""
    labels = Running(lambda batch: ["even" if each % 2 == 0 else "odd" for each in batch])(*map(torch.tensor, range(3)))
    assert labels == ["even", "odd", "even"]


def test_a_function_gets_the_list_of_what_was_asked_with() -> None:
    """Unless it asks for more: data as it came, fields as a dictionary."""
    running = Running(lambda values: [repr(value) for value in values], None)
    assert running.rows({"body": "a"}, {"x": 1}) == ["'a'", "{'x': 1}"]


def test_a_tensor_of_answers_is_a_list_of_them() -> None:
    """A function of a list may stack and compute at once."""
    assert [int(each) for each in Running(lambda values: torch.tensor(values) * 2, "list")(1, 2)] == [2, 4]


@pytest.mark.parametrize(
    "source, batching, words",
    [
        (nn.Linear, None, "an instance, Linear(...)"),
        (dict, None, "an instance of it"),
        (5, None, "a live object"),
        (np, None, "a live object"),
        (type("H", (), {"handle": print})(), "stack", "None for a handler"),
    ],
)
def test_what_cannot_be_run_is_refused(source: Any, batching: str | None, words: str) -> None:
    """The error says what is allowed in its place."""
    with pytest.raises(InvalidArgument) as refused:
        live_object(source, batching)
    assert words in str(refused.value)
