"""Which part of an output belongs to which request: it is shown before the first answer, or there is none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.unit.live import Running, one_thread
from torchmgmt.handlers.stacking import NotABatch

__all__ = ["one_thread"]

in_beta = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
"""For kinds of tensors and layers that torch warns of."""


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda batch: torch.zeros(7, 2), "the output has shape (7, 2) for a batch of one as for a batch of two"),
        (lambda batch: {"a": [batch, torch.zeros(2)]}, "the output['a'][1] has shape (2,) for a batch of one as for a"),
        (lambda batch: batch.sum(), "the output has shape () for a batch of one as for a batch of two"),
        (lambda batch: batch.mean(0), "the output has shape (1,) for a batch of one as for a batch of two"),
        (
            lambda batch: batch.mean(0, keepdim=True),
            "the output has shape (1, 1) for a batch of one as for a batch of two",
        ),
        (lambda batch: batch @ batch.T, "the output has shape (1, 1) for one request, and (2, 2) for two"),
        (lambda batch: batch.repeat(2, 1), "the output has shape (2, 1) for one request, and (4, 1) for two"),
        (lambda batch: [1, 2], "the output has 2 answers for a batch of one, and 2 for a batch of two"),
        (lambda batch: [], "the output has 0 answers for a batch of one, and 0 for a batch of two"),
        (lambda batch: (batch, "label"), "the output[1] is an object of type str"),
        (lambda batch: {"logits": batch, "version": 3}, "the output['version'] is an object of type int"),
        (lambda batch: "label", "the output is an object of type str"),
        (lambda batch: {1, 2}, "the output is an object of type set"),
        (lambda batch: batch if len(batch) == 1 else None, "the output is a tensor that is dense"),
        (
            lambda batch: {"a": batch} if len(batch) == 1 else {"b": batch},
            "the output is an object of type dict for one",
        ),
        (lambda batch: batch.to_sparse(), "the output is a tensor that is of layout torch.sparse_coo"),
        (lambda batch: torch.nested.nested_tensor(list(batch)), "the output is a tensor that is nested"),
        (lambda batch: nn.utils.rnn.pack_sequence(list(batch)), "the output is a PackedSequence"),
        (torch.nonzero, "the output has shape"),
        (lambda batch: batch[batch > 0], "the output has shape"),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3])
@in_beta
def test_an_output_that_is_no_batch_is_none_for_any_number_of_requests(
    make: Callable[[Tensor], Any], words: str, count: int
) -> None:
    """Whoever wrote the function reads what came out of it, and where; also who is alone, and every time."""
    running = Running(make, batch_size=1)
    items = list(torch.arange(1.0, 1 + count)[:, None])
    for _ in range(2):
        with pytest.raises(NotABatch) as failed:
            running(*items)
        assert words in str(failed.value)


# -- whose it is, is shown ---------------------------------------------------------------------------------------------


class Attending(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, *, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, items: Tensor) -> Any:
        return self.attention(items, items, items, need_weights=self.need_weights)


def encoder(*, batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class OutputOf(nn.Module):
    """The output of a recurrent layer without its state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, items: Tensor) -> Any:
        return self.layer(items)[0]


SEPARATE: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(8, 4, num_layers=2, batch_first=True),
    "lstm both ways": lambda: nn.LSTM(8, 4, batch_first=True, bidirectional=True, proj_size=2),
    "gru": lambda: nn.GRU(8, 4, num_layers=3, batch_first=True),
    "rnn": lambda: nn.RNN(8, 4, batch_first=True),
    "attention": lambda: Attending(batch_first=True, need_weights=True),
    "attention alone": lambda: Attending(batch_first=True, need_weights=False),
    "transformer": lambda: encoder(batch_first=True),
    "convolution": lambda: nn.Conv1d(5, 3, 3),
    "normalization": lambda: nn.BatchNorm1d(5),
    "cell": lambda: nn.Sequential(nn.Flatten(), nn.LSTMCell(40, 6)),
}
MIXING: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(8, 4),
    "gru": lambda: nn.GRU(8, 4, num_layers=3),
    "lstm without state": lambda: OutputOf(nn.LSTM(8, 4)),
    "lstm both ways without state": lambda: OutputOf(nn.LSTM(8, 4, bidirectional=True)),
    "attention": lambda: Attending(batch_first=False, need_weights=True),
    "attention alone": lambda: Attending(batch_first=False, need_weights=False),
    "transformer": lambda: encoder(batch_first=False),
    "softmax": lambda: nn.Softmax(0),
}


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for part in value or () for leaf in leaves(part)]


@pytest.mark.parametrize("make", SEPARATE.values(), ids=SEPARATE.keys())
@pytest.mark.parametrize("count", [1, 2, 5])
@in_beta
def test_each_request_gets_its_own_states(make: Callable[[], nn.Module], count: int) -> None:
    """Whichever dimension of which output the batch is, an answer is what the module makes of the item alone."""
    torch.manual_seed(1)
    net = make().eval()
    items = torch.randn(count, 5, 8)
    for answer, item in zip(Running(net)(*items), items, strict=True):
        wanted = [leaf.squeeze(dim) for leaf, dim in zip(leaves(net(item[None])), dims(net, item), strict=True)]
        assert [tuple(leaf.shape) for leaf in leaves(answer)] == [tuple(leaf.shape) for leaf in wanted]
        assert all(torch.allclose(got, leaf, atol=1e-5) for got, leaf in zip(leaves(answer), wanted, strict=True))


def dims(net: nn.Module, item: Tensor) -> list[int]:
    """Where the batch is in each output: in the states of recurrent layers behind that of layers."""
    count = len(leaves(net(item[None])))
    return [0] + [1] * (count - 1) if isinstance(net, nn.RNNBase) else [0] * count


@pytest.mark.parametrize("make", MIXING.values(), ids=MIXING.keys())
@pytest.mark.parametrize("count", [1, 2])
def test_a_module_that_mixes_requests_is_refused(make: Callable[[], nn.Module], count: int) -> None:
    """Nobody is given what another one's data was made into; also not the one who happens to be alone."""
    torch.manual_seed(1)
    running = Running(make().eval())
    for _ in range(2):
        with pytest.raises(NotABatch, match="batch_first=True"):
            running(*torch.randn(count, 5, 8))


@pytest.mark.parametrize(
    "other",
    [
        lambda batch: batch.to(torch.int64),
        lambda batch: batch > 0,
        lambda batch: batch.numpy().astype(str),
        lambda batch: batch.numpy().astype(np.float16),
        lambda batch: batch.to(torch.bfloat16),
        lambda batch: batch.to(torch.float8_e4m3fn),
        lambda batch: batch.to(torch.complex64),
        lambda batch: batch.to("meta"),
        lambda batch: batch / 0,
        lambda batch: [each.tolist() for each in batch],
    ],
)
def test_numbers_of_any_kind_can_come_out(other: Callable[[Tensor], Any]) -> None:
    """Those that can be compared are, and no other kind is an error."""
    assert len(Running(other)(*torch.tensor([[1.0, 2.0], [3.0, -4.0]]))) == 2


def test_where_nobody_is_beside_another_nothing_is_mixed() -> None:
    """A model whose batches are of one request is not asked how it would treat two."""
    net = OutputOf(nn.LSTM(8, 4)).eval()
    item = torch.randn(5, 8)
    (answer,) = Running(net, batch_size=1)(item)
    assert torch.allclose(answer, net(item[None])[0])


def test_batch_normalization_in_training_mixes() -> None:
    """A function may do that; a module that is registered is in evaluation mode."""
    net = nn.BatchNorm1d(5).train()
    with pytest.raises(NotABatch, match="batch normalization in training"):
        Running(net.forward)(*torch.randn(3, 5, 8))


@pytest.mark.parametrize("function", [nn.Dropout(0.5).train(), lambda batch: batch + torch.randn_like(batch)])
def test_random_numbers_are_nothing_that_is_mixed(function: Any) -> None:
    """Answers that are others each time say nothing of that."""
    answers = Running(getattr(function, "forward", function))(*torch.ones(4, 100))
    assert [answer.shape for answer in answers] == [(100,)] * 4


@in_beta
def test_rounding_is_nothing_that_is_mixed() -> None:
    """Large batches are computed by other kernels, and quantized ones in the range of the whole batch."""
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        assert len(Running(net.to(kind))(*torch.randn(4, 64, dtype=kind))) == 4
    quantized = torch.ao.quantization.quantize_dynamic(net.float(), {nn.Linear})
    assert len(Running(quantized)(*torch.randn(4, 64))) == 4


@dataclass
class Output:
    logits: Any
    loss: Any = None
    more: Any = ()
    hidden: Any = field(init=False, default=None)


@dataclass(frozen=True, slots=True)
class FrozenOutput:
    logits: Any


class LikeModelOutput(OrderedDict[str, Any]):
    """As the outputs of transformers are: a dictionary whose items are attributes, too."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(parts)
        vars(self).update(parts)


def test_outputs_with_names_are_split_by_them() -> None:
    """A dataclass stays what it is, a mapping of whatever kind becomes a dictionary; None is None for all."""

    def answer(batch: Tensor) -> Any:
        output = Output(batch, more={"states": (batch.T, FrozenOutput(batch * 2))})
        return LikeModelOutput(last=output, none=None, maximum=batch.max(dim=1))

    first, second = Running(answer)(*torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert type(second) is dict
    assert type(second["last"]) is Output
    assert second["last"].logits.tolist() == [3, 4]
    assert (second["last"].loss, second["last"].hidden, second["none"]) == (None, None, None)
    assert second["last"].more["states"][0].tolist() == [3, 4]
    assert second["last"].more["states"][1].logits.tolist() == [6, 8]
    assert [int(each) for each in second["maximum"]] == [4, 1]
    assert first["last"].logits.tolist() == [1, 2]


def test_other_objects_are_no_output() -> None:
    """Of what has no parts that are known nobody can say anything."""
    with pytest.raises(NotABatch, match="the output is an object of type SimpleNamespace"):
        Running(lambda batch: SimpleNamespace(hidden=batch))(torch.ones(2))


def test_a_list_with_an_answer_for_each_is_that() -> None:
    """Of whatever size these are, as boxes of objects in pictures are: it grew as the batch did."""

    def boxes(batch: Tensor) -> Any:
        return [{"boxes": torch.zeros(int(each.sum()), 4), "label": "x"} for each in batch]

    answers = Running(boxes)(*torch.tensor([[1, 2], [3, 4], [0, 0]]))
    assert [len(answer["boxes"]) for answer in answers] == [3, 7, 0]
    kept = Running(lambda batch: {"found": boxes(batch), "all": batch})(*torch.tensor([[1, 2], [3, 4]]))
    assert [len(answer["found"]["boxes"]) for answer in kept] == [3, 7]


def test_a_shape_that_the_data_decides_is_no_batch_from_then_on() -> None:
    """Though it looked like one at first: what is true for one batch is true for all."""

    def kept(batch: Tensor) -> Tensor:
        return batch if batch.max() < 100 else batch[batch[:, 0] < 100]

    running = Running(kept)
    assert len(running(torch.ones(2))) == 1
    with pytest.raises(NotABatch, match=r"the output has shape \(1, 2\) for a batch of 2"):
        running(torch.ones(2), torch.ones(2) * 100)
    with pytest.raises(NotABatch, match="for a batch of 2"):
        running(torch.ones(2))


def test_arrays_are_split_as_tensors_are() -> None:
    """Along whichever dimension is the batch."""
    answers = Running(
        lambda batch: {"a": batch.numpy(), "b": np.moveaxis(batch.numpy(), 0, 1), "c": batch[:, 0].numpy()}
    )(*torch.arange(6.0).reshape(2, 3))
    assert answers[1]["a"].tolist() == answers[1]["b"].tolist() == [3, 4, 5]
    assert answers[1]["c"] == 3


# -- what goes in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.eye(3).to_mkldnn(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.quint8),
        lambda: torch.eye(3).requires_grad_(),
        lambda: nn.Parameter(torch.eye(3)),
        lambda: torch._neg_view(torch.eye(3)),
        lambda: torch.eye(3).to(torch.complex64).conj(),
        lambda: torch.eye(3, device="meta"),
    ],
    ids=["coo", "csr", "mkldnn", "nested", "quantized", "grad", "parameter", "neg", "conj", "meta"],
)
@in_beta
def test_tensors_of_another_kind_fail_no_dense_neighbour(make: Callable[[], Tensor]) -> None:
    """They run alone, or with their like; and so does whoever is beside them, before or behind."""
    dense = torch.eye(3)
    answers = Running(lambda batch: batch * 3)(dense, make(), make(), dense * 2)
    assert torch.equal(answers[0], dense * 3)
    assert torch.equal(answers[3], dense * 6)


def test_sparse_tensors_are_run_together() -> None:
    """Where they can be stacked."""
    calls = []

    def multiply(batch: Tensor) -> Tensor:
        calls.append((batch.layout, len(batch)))
        return torch.stack([each.to_dense() for each in batch])

    running = Running(multiply)
    items = [torch.eye(3).to_sparse() * n for n in (1, 2)]
    for _ in range(2):
        assert [int(answer.sum()) for answer in running(items[0], torch.eye(3), items[1])] == [3, 3, 6]
    assert calls[-2:] == [(torch.sparse_coo, 2), (torch.strided, 1)]


@in_beta
def test_quantized_tensors_of_other_scales_keep_their_numbers() -> None:
    """Stacked they would all get the first one's scale."""
    items = [torch.quantize_per_tensor(torch.ones(2), scale, 0, torch.quint8) for scale in (0.5, 0.01)]
    answers = Running(lambda batch: batch.dequantize())(*items)
    assert [answer.tolist() for answer in answers] == [[1, 1], [1, 1]]


@in_beta
def test_a_tensor_that_cannot_be_in_a_batch_says_so() -> None:
    """With what to do about it."""
    with pytest.raises(NotABatch, match=r'nested cannot be put into a batch.*batching="list"'):
        Running(lambda batch: batch)(torch.nested.nested_tensor([torch.ones(2)]))


# -- what cannot be run in two -----------------------------------------------------------------------------------------


def exported(net: nn.Module, batch: int, **options: Any) -> Any:
    return torch.export.export(net, (torch.zeros(batch, 4),), **options)


def test_a_program_of_a_fixed_batch_of_one_is_run_request_by_request() -> None:
    """As it was exported or traced: nobody else's part can be in what comes out."""
    net = nn.Linear(4, 2)
    flat = nn.Sequential(nn.Flatten(0), nn.Linear(4, 2), nn.Unflatten(0, (1, 2)))
    items = torch.randn(3, 4)
    for program in (exported(net, 1), torch.jit.trace(flat.eval(), torch.zeros(1, 4))):
        answers = Running(program)(*items)
        wanted = net(items) if program.__class__.__name__ == "ExportedProgram" else flat[1](items)
        assert torch.allclose(torch.stack(answers), wanted, atol=1e-6)


def test_requests_that_are_run_one_by_one_fail_one_by_one() -> None:
    """And a fixed batch of one is one in dimension 0, or what comes out is nobody's."""

    def single(batch: Tensor) -> Any:
        if len(batch) > 1:
            raise ValueError("one at a time")
        if batch.sum() < 0:
            raise ArithmeticError("negative")
        return {"a": batch, "b": [batch * 2, None], "label": ["one"]}

    first, second, third = Running(single)(torch.ones(2), -torch.ones(2), torch.ones(2) * 3)
    assert isinstance(second, ArithmeticError)
    assert (first["a"].tolist(), third["b"][0].tolist(), third["label"]) == ([1, 1], [6, 6], "one")
    with pytest.raises(NotABatch, match="no other batch can be run"):
        Running(lambda batch: single(batch)["a"][0])(torch.ones(2))


def test_a_program_of_another_fixed_batch_says_which() -> None:
    """And what to do: requests come one by one."""
    running = Running(exported(nn.Linear(4, 2), 4))
    for count in (1, 4):
        with pytest.raises(NotABatch, match=r"takes batches of exactly 4.*dynamic_shapes"):
            running(*torch.randn(count, 4))


def test_what_is_wrong_with_an_item_is_said_by_the_module_itself() -> None:
    """An error of a request alone is that request's error, and nothing is kept of it."""
    running = Running(nn.Linear(4, 2))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            running(torch.ones(5))
    assert running(torch.ones(4))[0].shape == (2,)


def test_what_is_asked_beside_an_item_is_something_that_an_item_has() -> None:
    """Numbers of words and lengths stay in their range, and where that does not do the same is asked twice."""
    words = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).eval()
    assert Running(words)(torch.tensor([4, 4, 2]))[0].shape == (3, 2)
    assert Running(words)(torch.tensor([4, 4]))[0].shape == (2, 2)

    def picky(batch: Tensor) -> Tensor:
        if not (batch == 7).all():
            raise ValueError("not seven")
        return batch

    assert [int(each) for each in Running(picky)(torch.tensor(7), torch.tensor(7))] == [7, 7]


# -- what a look costs -------------------------------------------------------------------------------------------------


def test_each_form_is_looked_at_once() -> None:
    """With a batch of one and a batch of two; a second request of the form is run as it is."""
    counts: list[int] = []

    def note(batch: Tensor) -> Tensor:
        counts.append(len(batch))
        return batch

    running = Running(note)
    running(torch.ones(2))
    assert counts == [1, 2, 1]
    running(*torch.ones(3, 2))
    assert counts == [1, 2, 1, 3]
    running(torch.ones(3))
    assert counts == [1, 2, 1, 3, 1, 2, 1]


def test_what_was_shown_for_many_shapes_is_believed_for_all() -> None:
    """Requests of ever other shapes are not run three times for ever; what comes out is still counted."""
    counts: list[int] = []

    def note(batch: Tensor) -> Tensor:
        counts.append(len(batch))
        return batch.movedim(0, -1) if batch.shape[1] < 99 else batch.T[:-1]

    running = Running(note)
    for size in range(1, 40):
        assert running(torch.ones(size), torch.ones(size))[0].shape == (size,)
    assert len(counts) < 39 + 3 * 8
    assert running(torch.ones(99))[0].shape == (98,)
    running(torch.ones(2, 2))  # another kind is looked at
    assert counts[-3:] == [1, 2, 1]


def test_what_is_not_the_same_for_all_shapes_is_shown_for_each() -> None:
    """A function may put the batch elsewhere for other shapes."""
    running = Running(lambda batch: batch.T if batch.shape[1] % 2 else batch)
    for size in range(1, 30):
        first, second = running(torch.ones(size), torch.zeros(size))
        assert (first.tolist(), second.tolist()) == ([1] * size, [0] * size)


# -- any module, any batches -------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 8),
    "relu": nn.ReLU,
    "normalization": lambda: nn.LayerNorm(8),
    "convolution": lambda: nn.Conv1d(5, 5, 3, padding=1),
    "batch normalization": lambda: nn.BatchNorm1d(5),
    "gru": lambda: OutputOf(nn.GRU(8, 8, batch_first=True)),
    "transformer": lambda: encoder(batch_first=True),
}


class Ending(nn.Module):
    """Ends in outputs whose batch is in a place that is known here, and to nobody else."""

    def __init__(self, layers: list[str], places: list[int], kind: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(LAYERS[layer]() for layer in layers))
        self.places, self.kind = places, kind

    def forward(self, batch: Tensor) -> Any:
        made = self.layers(batch)
        outputs = [(made + number).movedim(0, place) for number, place in enumerate(self.places)]
        if self.kind == "list":
            return [
                [each.movedim(place, 0)[at] for each, place in zip(outputs, self.places, strict=True)]
                for at in range(len(batch))
            ]
        return {"dict": dict(enumerate(outputs)), "tuple": tuple(outputs)}[self.kind]

    def alone(self, item: Tensor) -> list[Tensor]:
        return [self.layers(item[None])[0] + number for number in range(len(self.places))]


@given(
    layers=st.lists(st.sampled_from(sorted(LAYERS)), max_size=3),
    places=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    kind=st.sampled_from(["dict", "tuple", "list"]),
    batches=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_in_any_batches_each_gets_what_it_would_get_alone(
    layers: list[str], places: list[int], kind: str, batches: list[int], seed: int
) -> None:
    """Whatever the module is made of, wherever it has the batch, and whoever comes together."""
    torch.manual_seed(seed)
    net = Ending(layers, places, kind).eval()
    running = Running(net)
    for count in batches:
        items = torch.randn(count, 5, 8)
        for answer, item in zip(running(*items), items, strict=True):
            parts = answer.values() if isinstance(answer, dict) else answer
            assert all(
                torch.allclose(part, wanted, atol=1e-4) for part, wanted in zip(parts, net.alone(item), strict=True)
            )
