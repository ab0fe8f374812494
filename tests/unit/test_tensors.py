"""Tensors come out of what travels as they went in, and their memory is not copied into a pickle."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchmgmt.encoding import decode, encode
from torchmgmt.exchange import Encoded
from torchmgmt.tensors import rebuild

KINDS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.arange(6).reshape(2, 3),
    "every second column": lambda: torch.arange(6).reshape(2, 3)[:, ::2],
    "a number": lambda: torch.tensor(3.5),
    "nothing": lambda: torch.zeros(0, 3),
    "bfloat16": lambda: torch.ones(3, dtype=torch.bfloat16),
    "truths": lambda: torch.tensor([True, False]),
    "complex, conjugate": lambda: torch.tensor([1 + 2j]).conj(),
    "repeated": lambda: torch.ones(1).expand(4),
    "in inference mode": torch.inference_mode()(lambda: torch.ones(2)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_tensor_comes_out_as_it_went_in(kind: str, frozen: bool) -> None:
    """Values, type and shape are the same, wherever in a value the tensor is."""
    tensor = KINDS[kind]()
    again = decode(encode({"body": [tensor, {"x": (tensor,)}]}, frozen=frozen))["body"]
    for each in (again[0], again[1]["x"][0]):
        assert each.dtype is tensor.dtype
        assert torch.equal(each, tensor)


def test_what_is_more_than_numbers_stays_that() -> None:
    """Parameters, tensors that want gradients, and sparse ones keep what makes them so."""
    parameter = torch.nn.Parameter(torch.ones(2))
    sparse = torch.eye(2).to_sparse()
    wanting = torch.ones(2, requires_grad=True)
    again = decode(encode([parameter, sparse, wanting]))
    assert type(again[0]) is torch.nn.Parameter
    assert again[1].is_sparse
    assert torch.equal(again[1].to_dense(), torch.eye(2))
    assert again[2].requires_grad


def test_the_memory_of_a_tensor_stays_out_of_the_pickle() -> None:
    """Encoding does not copy it, and what travelled is used where it lies."""
    tensor = torch.zeros(100_000)
    encoded = encode(tensor)
    assert len(encoded.segments[0]) < 1000
    tensor[5] = 7
    received = bytearray(encoded.segments[1])
    again = decode(Encoded([encoded.segments[0], received]))
    assert again[5] == 7
    received[:4] = b"\1\0\0\0"
    assert again[0] != 0, "it is a copy"


def test_the_memory_of_a_tensor_lives_as_long_as_what_was_encoded() -> None:
    """The tensor itself may be gone before it is sent."""
    encoded = encode(torch.full((1000,), 3.0))
    torch.full((1000,), 9.0)  # would get the memory that was given back
    assert decode(encoded).eq(3).all()


def test_a_frozen_tensor_does_not_follow_its_owner() -> None:
    """What was encoded as frozen stays what it was, even if the caller fills the same tensor anew."""
    tensor = torch.zeros(1000)
    encoded = encode({"body": tensor}, frozen=True)
    tensor.fill_(5)
    assert not decode(encoded)["body"].any()


def test_memory_that_cannot_be_used_in_place_is_copied() -> None:
    """Read-only memory, and memory at an odd place, give tensors like any other, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rebuild(bytes(8), torch.float32, (2,)).add_(1).eq(1).all()
        odd = rebuild(memoryview(bytearray(9))[1:], torch.float32, (2, 1))
    assert odd.data_ptr() % 4 == 0
    assert odd.shape == (2, 1)
