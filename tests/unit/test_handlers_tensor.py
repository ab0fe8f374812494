"""tensor_handler: numbers in every form that they travel in, one row of the output for each request."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.shipped import answers, initialised, one_thread
from torchmgmt.handlers.inputs import InputRefused
from torchmgmt.handlers.tensor_handler import TensorHandler

__all__ = ["one_thread"]

DOUBLE = """
class Net(nn.Module):
    def forward(self, x):
        return x * 2
"""
PARTS = """
class Net(nn.Module):
    def forward(self, x):
        return {"sum": x.sum(dim=1), "parts": (x, x > 1)}
"""
EMBEDDING = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 2)

    def forward(self, x):
        return self.table(x)
"""


def handler(folder: Path, options: Any = None, model: str = DOUBLE) -> TensorHandler:
    return initialised(TensorHandler, folder, model, options)


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array), **options)
    return file.getvalue()


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_every_form_of_numbers_gives_one_answer(tmp_path: Path) -> None:
    """Lists, tensors, arrays, files of numpy (in any order of bytes and rows) and of torch, plain numbers."""
    array = np.array([[1, 2], [3, 4]], dtype=np.float32)
    payloads = [
        *([[1, 2], [3, 4]], {"data": [[1, 2], [3, 4]]}, array, array.astype(np.float64), torch.tensor(array)),
        *(npy(array), npy(array.astype(">f4")), npy(np.asfortranarray(array)), npy(array.astype(np.float64))),
        *(saved(torch.tensor(array)), bytearray(saved(torch.tensor(array).double())), struct.pack("=4f", 1, 2, 3, 4)),
    ]
    found = answers(handler(tmp_path, {"input_shape": [2, 2]}), *payloads)
    assert found == [[[2, 4], [6, 8]]] * len(payloads)


def test_requests_of_several_shapes_are_answered_in_one_batch(tmp_path: Path) -> None:
    """In order, each with its own."""
    assert answers(handler(tmp_path), [1], [[1, 2]], 3, [4]) == [[2], [[2, 4]], 6, [8]]


def test_containers_are_split_row_by_row(tmp_path: Path) -> None:
    """A mapping stays one; tuples become lists, as JSON has them."""
    found = answers(handler(tmp_path, model=PARTS), [1, 2], [3, 4])
    assert found == [{"sum": 3, "parts": [[1, 2], [False, True]]}, {"sum": 7, "parts": [[3, 4], [True, True]]}]


def test_whole_numbers_reach_a_model_that_needs_them(tmp_path: Path) -> None:
    """By the option for JSON, by themselves from a file or a tensor."""
    network = handler(tmp_path, {"dtype": "int64"}, EMBEDDING)
    rows = answers(network, [1, 2], torch.tensor([1, 2]), npy([1, 2]))
    assert rows[0] == rows[1] == rows[2] == network.model.table.weight[[1, 2]].tolist()
    assert answers(handler(tmp_path, model=EMBEDDING), torch.tensor([1, 2]), npy([1, 2])) == rows[:2]


def test_tensors_are_answered_where_asked_to(tmp_path: Path) -> None:
    """Each in memory of its own."""
    one, two = answers(handler(tmp_path, {"answer": "tensor"}), [1, 2], [3, 4])
    assert (one.tolist(), two.tolist()) == ([2, 4], [6, 8])
    assert one.untyped_storage().nbytes() == one.nbytes


class Unpickled:
    """A class that only running code makes."""


@pytest.mark.parametrize(
    "payload, text",
    [
        (b"", "neither"),
        (b"\x89PNG and so on", "input_shape"),
        ("1, 2", "text is not"),
        ([[1, 2], [3]], "one length"),
        (["a"], "list of numbers"),
        ([None], "list of numbers"),
        ({"rows": [1]}, "none of the fields"),
        (npy([1.0, 2.0])[:-4], "npy"),
        (npy(np.array([{"a": 1}], dtype=object), allow_pickle=True), "npy"),
        (npy(["text"]), "npy"),
        (saved(Unpickled()), "weights_only"),
        (saved({"a": torch.zeros(2)}), "one dense tensor"),
        (saved(torch.zeros(1).expand(1 << 40)), "larger"),
        (saved(torch.zeros(2, 2).to_sparse()), "one dense tensor"),
        (saved(torch.zeros(2))[:-30], "weights_only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "payload",
)
def test_what_are_no_numbers_is_refused(tmp_path: Path, payload: Any, text: str) -> None:
    """With what was wrong, where in the batch, and a 400; no code of a file is run."""
    with pytest.raises(InputRefused, match=text) as raised:
        answers(handler(tmp_path), [1], payload)
    assert (raised.value.error_code, raised.value.indexes) == (400, (1,))


@pytest.mark.parametrize("payload", [bytes(7), bytes(4), b"", [1, 2, 3], npy([[1.0]]), torch.zeros(2, 4)])
def test_a_shape_that_the_model_does_not_take_is_refused(tmp_path: Path, payload: Any) -> None:
    """Where the configuration says which one it takes, before it is in a batch with others."""
    with pytest.raises(InputRefused, match=r"\[-1, 2\]"):
        answers(handler(tmp_path, {"input_shape": [-1, 2]}), payload)


def test_one_size_of_the_shape_may_be_left_open(tmp_path: Path) -> None:
    """-1 stands for whatever there is."""
    network = handler(tmp_path, {"input_shape": [-1, 2], "dtype": "int16"})
    assert answers(network, struct.pack("=4h", 1, 2, 3, 4), [[5, 6]]) == [[[2, 4], [6, 8]], [[10, 12]]]


def test_a_model_that_loses_the_batch_is_told(tmp_path: Path) -> None:
    """The shape that it returned, and the batch."""
    broken = handler(tmp_path, model=DOUBLE.replace("x * 2", "x.sum(dim=0)"))
    with pytest.raises(TypeError, match=r"shape \[3\] for a batch of 2"):
        answers(broken, [1, 2, 3], [4, 5, 6])


@pytest.mark.parametrize("options", [{"dtype": "float"}, {"input_shape": 3}, {"answer": "npy"}])
def test_a_wrong_option_fails_the_loading(tmp_path: Path, options: dict[str, Any]) -> None:
    """With the key and what is allowed."""
    (key,) = options
    with pytest.raises(ValueError, match=rf"handler\.{key}"):
        handler(tmp_path, options)
