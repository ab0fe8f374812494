"""Pretty-printed JSON is, byte for byte, what the standard library writes."""

from __future__ import annotations

import json
from collections import OrderedDict
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from torchmgmt.http.pretty import pretty_json


class Number(IntEnum):
    ONE = 1


class Text(str):
    __slots__ = ()


def library(item: object) -> str:
    return json.dumps(item, indent=2, ensure_ascii=False, default=str)


def nested(depth: int) -> Any:
    return {"in": [nested(depth - 1), depth]} if depth else {"end": []}


@pytest.mark.parametrize(
    "item",
    [
        {},
        [],
        None,
        True,
        "",
        -7,
        10**40,
        1e16,
        0.1,
        float("nan"),
        float("-inf"),
        {"a": {}, "b": [], "c": (), "d": [[], {}], "e": {"f": [1, True, None, 2.5, "x"]}},
        'quotes " \\ slash / tab \t line \n return \r nul \0 é 漢 \u2028 \ud800 \x7f',
        {'key " \n é': 'value "\n"', "": ""},
        {7: "whole", 2.5: "fraction", True: "truth", None: "nothing"},
        {"in": {"side": {1: [2, {"x": {3: 4}}]}}},
        [Path("a\nb"), {"path": Path("x")}, {"set": frozenset([1])}],
        {Text("key"): Text("value"), "number": Number.ONE, "ordered": OrderedDict(a=[1, {"b": 2}])},
        (1, [2, (3, {"a": (4,)})]),
        {"models": [{"modelName": "noop", "modelUrl": "noop.mar"}, {"state": "FAILED", "lastError": "a\nb"}]},
    ],
    ids=repr,
)
def test_what_is_written_is_what_the_library_writes(item: object) -> None:
    assert pretty_json(item) == library(item)


@pytest.mark.parametrize("depth", [1, 3, 5, 9, 10, 11, 40])
def test_it_is_at_any_depth(depth: int) -> None:
    assert pretty_json(nested(depth)) == library(nested(depth))


def test_a_key_that_the_library_refuses_is_refused() -> None:
    with pytest.raises(TypeError, match="keys must be str"):
        pretty_json({"a": {(1, 2): "x"}})
