"""What shipped handlers share: rows read one by one, options that are checked, answers with names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.shipped import one_thread
from torchmgmt.handlers.inputs import InputRefused, decode_base64, payload_of, read_each, stacked
from torchmgmt.handlers.optional import needed
from torchmgmt.handlers.options import Options
from torchmgmt.handlers.outputs import label_of, labelled, main_tensor, row_of

__all__ = ["one_thread"]


def even(row: Any) -> int:
    if row % 2:
        raise InputRefused(f"{row} is odd", error_code=413 if row == 5 else 400)
    return row // 2


def test_all_rows_that_are_refused_are_named() -> None:
    """With their positions as numbers, and the code and the reason of the first."""
    assert read_each([2, 4], even) == [1, 2]
    with pytest.raises(InputRefused, match=r"request 1 of a batch of 4.*5 is odd.*also refused: 3") as raised:
        read_each([2, 5, 4, 7], even)
    assert (raised.value.indexes, raised.value.error_code) == ((1, 3), 413)


def test_a_batch_of_one_is_not_talked_about() -> None:
    """Who sent one request hears of no batch."""
    with pytest.raises(InputRefused, match=r"^3 is odd$") as raised:
        read_each([3], even)
    assert raised.value.indexes == (0,)


@pytest.mark.parametrize(
    "row",
    [{"data": 5}, {"body": 5}, {"body": {"data": 5}}, {"image": 5}, {"body": {"image": 5}}, {"data": 5, "body": 6}, 5],
)
def test_what_was_sent_is_found(row: Any) -> None:
    """In data or body, in a field of the handler's, one JSON object deep, or by itself."""
    assert payload_of(row, "image") == 5


@pytest.mark.parametrize("row", [{}, {"picture": 5}, {"body": {}}, {"body": None}])
def test_a_request_without_a_field_to_read_is_told_which(row: Any) -> None:
    """The fields that would do, and those that are there."""
    with pytest.raises(InputRefused, match="data, body"):
        payload_of(row)


@pytest.mark.parametrize("text", ["aGk=", "data:image/png;base64,aGk=", "aG\nk=\n"])
def test_base64_is_read_as_people_send_it(text: str) -> None:
    """Broken into lines, or as a data URI."""
    assert decode_base64(text) == b"hi"


@pytest.mark.parametrize("text", ["a", "häää", "a$b=", "http://example.com/cat.png"])
def test_text_that_is_no_base64_is_refused(text: str) -> None:
    """Nothing is left out of it silently."""
    with pytest.raises(InputRefused, match="base64"):
        decode_base64(text)


def test_rows_of_one_shape_are_one_tensor() -> None:
    """Others stay a list."""
    device = torch.device("cpu")
    one = stacked([torch.zeros(2), torch.ones(2)], device)
    assert isinstance(one, torch.Tensor)
    assert one.tolist() == [[0, 0], [1, 1]]
    assert isinstance(stacked([torch.zeros(2), torch.zeros(3)], device), list)
    assert isinstance(stacked([torch.zeros(2), torch.zeros(2, dtype=torch.int64)], device), list)


@pytest.mark.parametrize(
    "mapping, label",
    [
        (None, "1"),
        (["cat", "dog"], "dog"),
        ({"0": "cat", "1": "dog"}, "dog"),
        ({"1": ["n01", "dog"]}, "dog"),
        ({"object_type_names": ["cat", "dog"]}, "dog"),
        (["cat"], "1"),
        ({"0": "cat"}, "1"),
    ],
)
def test_every_shape_of_index_to_name_gives_names(mapping: Any, label: str) -> None:
    """A class without a name keeps its number."""
    assert label_of(mapping, 1) == label


def test_of_two_classes_with_one_name_the_first_counts() -> None:
    """ImageNet has two cranes; the more probable one comes first."""
    assert labelled([0.7, 0.2, 0.1], ["crane", "cat", "crane"], [2, 1, 0]) == {"crane": 0.7, "cat": 0.2}


class Output:
    def __init__(self, logits: Any) -> None:
        self.logits = logits


TENSOR = torch.zeros(2, 3)


@pytest.mark.parametrize("output", [TENSOR, (TENSOR, 1), {"out": TENSOR, "aux": 1}, {"logits": TENSOR}, Output(TENSOR)])
def test_the_tensor_that_counts_is_found(output: Any) -> None:
    """In whatever a network in the field returns."""
    assert main_tensor(output) is TENSOR


@pytest.mark.parametrize("output", [None, 5, {}, {"boxes": TENSOR}, (), Output(None), "text"])
def test_an_output_without_a_tensor_is_told(output: Any) -> None:
    """With what the model did return."""
    with pytest.raises(TypeError, match="the model returned"):
        main_tensor(output)


def test_an_output_is_split_along_its_first_dimension() -> None:
    """Containers stay; a tensor of another length is an error that says both."""
    row = row_of({"a": torch.arange(2), "b": (torch.arange(2), [torch.arange(2)])}, 1, 2)
    assert row == {"a": 1, "b": [1, [1]]}
    with pytest.raises(TypeError, match=r"\[3\] for a batch of 2"):
        row_of([torch.arange(3)], 0, 2)
    with pytest.raises(TypeError, match=r"shape \[\] for a batch"):
        row_of(torch.tensor(1.0), 0, 1)
    with pytest.raises(TypeError, match="str"):
        row_of(["x"], 0, 1)


def test_a_missing_package_is_named() -> None:
    """Who needs it, and what to install."""
    with pytest.raises(ImportError, match=r"explaining needs no-such, but .*pip install 'no-such'"):
        needed("no_such_package", "no-such", "explaining")


@pytest.mark.parametrize("section", [[], "topk", 5])
def test_a_handler_section_that_is_none_is_refused(section: Any) -> None:
    """It must be keys and values."""
    with pytest.raises(ValueError, match="must be a section"):
        Options.of({"handler": section})


@pytest.mark.parametrize("config", [{}, {"handler": None}, {"handler": {"mine": [1]}}])
def test_keys_of_the_users_own_are_left_alone(config: Any) -> None:
    """Defaults hold where a key is not there."""
    options = Options.of(config)
    assert options.count("topk", 5) == 5
    assert options.choice("answer", "list", ("list",)) == "list"
    assert options.share("threshold", 0.5) == 0.5
    assert options.flag("exif_orientation", True)
    assert options.sizes("input_shape") is None


@pytest.mark.parametrize("value", [0, -1, 1.5, "5", True, None, []])
def test_a_count_is_a_whole_number_of_at_least_one(value: Any) -> None:
    """Anything else is an error with the key and the value."""
    with pytest.raises(ValueError, match=r"handler\.topk in model-config\.yaml must be a whole number"):
        Options({"topk": value}).count("topk", 5)


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.5", None, float("nan"), True])
def test_a_share_is_a_number_from_0_to_1(value: Any) -> None:
    """Anything else is an error with the key and the value."""
    with pytest.raises(ValueError, match=r"handler\.threshold.*from 0 to 1"):
        Options({"threshold": value}).share("threshold", 0.5)


@pytest.mark.parametrize("value", [0, [0], [-1, -1], [1.5], ["a"], "3", [True]])
def test_sizes_are_whole_numbers_with_one_left_open(value: Any) -> None:
    """Anything else is an error with the key and the value."""
    with pytest.raises(ValueError, match=r"handler\.input_shape"):
        Options({"input_shape": value}).sizes("input_shape")


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_flag_is_true_or_false(value: Any) -> None:
    """Anything else is an error with the key and the value."""
    with pytest.raises(ValueError, match="true or false"):
        Options({"exif_orientation": value}).flag("exif_orientation", False)
