"""Reading parameters: declared ones are checked, unknown ones warned about, in query and body alike."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmgmt.errors import InvalidArgument
from torchmgmt.http import operations as ops
from torchmgmt.http.errors import BadRequest
from torchmgmt.http.parameters import (
    Kind,
    Parameter,
    pairs_of_body,
    pairs_of_query,
    read_parameters,
)

COUNT = Parameter("batch_size", Kind.WHOLE, "", minimum=1)
TRUTH = Parameter("synchronous", Kind.TRUTH, "", default=False)
TEXT = Parameter("url", Kind.TEXT, "")


def value_of(parameter: Parameter, given: object) -> object:
    values, refusal = read_parameters([parameter], [(parameter.name, given)])
    if refusal is not None:
        raise refusal
    return values[parameter.name]


@pytest.mark.parametrize(
    "parameter, given, value",
    [
        (COUNT, "7", 7),
        (COUNT, " +7 ", 7),
        (COUNT, 7, 7),
        (COUNT, str(2**31 - 1), 2**31 - 1),
        (TRUTH, "true", True),
        (TRUTH, "FALSE", False),
        (TRUTH, "1", True),
        (TRUTH, 0, False),
        (TRUTH, True, True),
        (TEXT, "a b/ü", "a b/ü"),
    ],
)
def test_a_right_value_is_read(parameter, given, value):
    """Text from a query and values from JSON mean the same."""
    assert value_of(parameter, given) == value


@pytest.mark.parametrize(
    "parameter, given",
    [
        (COUNT, "0"),
        (COUNT, "-1"),
        (COUNT, "1.0"),
        (COUNT, "1e3"),
        (COUNT, "٣"),
        (COUNT, "abc"),
        (COUNT, str(2**31)),
        (COUNT, "9" * 5000),
        (COUNT, 1.0),
        (COUNT, True),
        (COUNT, [1]),
        (TRUTH, "yes"),
        (TRUTH, 2),
        (TRUTH, {}),
        (TEXT, 1),
        (TEXT, ["a"]),
    ],
)
def test_a_wrong_value_is_refused_by_name(parameter, given):
    """A known parameter with a wrong value names itself, what was given and what is allowed."""
    with pytest.raises(InvalidArgument) as caught:
        value_of(parameter, given)
    assert caught.value.argument == parameter.name
    assert caught.value.allowed == parameter.allowed


@pytest.mark.parametrize("nothing", ["", None])
def test_an_empty_value_means_not_given(nothing):
    """`batch_size=` and a JSON null leave the default."""
    assert value_of(TRUTH, nothing) is False
    assert value_of(COUNT, nothing) is None


def test_a_missing_required_parameter_is_named():
    """The message is TorchServe's."""
    _, refusal = read_parameters(ops.REGISTER.parameters, [("url", "")])
    assert str(refusal) == "Parameter url is required."


def test_the_same_value_twice_is_no_conflict():
    """A client that repeats itself contradicts nobody."""
    values, refusal = read_parameters([COUNT], [("batch_size", "2")], [("batch_size", 2)])
    assert (values["batch_size"], refusal) == (2, None)


@pytest.mark.parametrize(
    "query, body, where",
    [
        ([("batch_size", "2")], [("batch_size", 4)], "in the query and in the body"),
        ([("batch_size", "2"), ("batch_size", "4")], [], "twice in the query"),
    ],
)
def test_two_values_of_one_parameter_are_refused(query, body, where):
    """A parameter with two different values is refused, whichever places they stand in."""
    _, refusal = read_parameters([COUNT], query, body)
    assert isinstance(refusal, BadRequest)
    assert where in str(refusal)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("batchSize", "batch_size"),
        ("BATCH-SIZE", "batch_size"),
        ("batchsize", "batch_size"),
        ("uri", "url"),
    ],
)
def test_a_misspelt_name_is_recognised(name, meant):
    """An unknown parameter that looks like a known one says which."""
    values, _ = read_parameters([COUNT, TEXT], [(name, "1")])
    assert values.warnings == [f"unknown parameter {name!r}: did you mean {meant!r}?"]


def test_warnings_are_bounded():
    """Ten thousand unknown names make no answer of ten thousand lines."""
    values, refusal = read_parameters([COUNT], [(f"{n}" * 500, "") for n in range(10_000)])
    assert refusal is None
    assert len(values.warnings) == 11
    assert all(len(warning) < 200 for warning in values.warnings)
    assert values.warnings[-1] == "and 9990 more unknown parameters"


def test_a_refusal_comes_with_the_warnings():
    """A misspelt name is often why another one is missing."""
    values, refusal = read_parameters(ops.REGISTER.parameters, [("uri", "a.mar")])
    assert refusal is not None
    assert values.warnings == ["unknown parameter 'uri': did you mean 'url'?"]


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", None, "a/b+json"])
def test_a_json_body_gives_its_members(content_type):
    """JSON is meant where the content type says so, and where none is sent."""
    assert list(pairs_of_body(content_type, b'{"url": "a", "batch_size": 2}')) == [
        ("url", "a"),
        ("batch_size", 2),
    ]


def test_a_form_body_gives_its_fields():
    """A form is read as a query string is."""
    pairs = pairs_of_body("application/x-www-form-urlencoded", b"url=a%20b&model_name=%C3%BC+1")
    assert list(pairs) == [("url", "a b"), ("model_name", "ü 1")]


@pytest.mark.parametrize(
    "content_type, body",
    [
        ("application/json", b"{"),
        ("application/json", b"[]"),
        ("application/json", b"1"),
        ("application/json", b"\xff"),
        ("application/json", b"[" * 100_000),
        ("text/plain", b"url=a.mar"),
        ("multipart/form-data; boundary=x", b"--x--"),
        ("application/x-www-form-urlencoded", b"\xff"),
        ("application/x-www-form-urlencoded", b"&".join(b"a=%d" % n for n in range(2000))),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(content_type, body):
    """A body is understood or refused, never ignored."""
    with pytest.raises(BadRequest):
        pairs_of_body(content_type, body)


def test_an_empty_body_gives_nothing():
    """Without a body the content type does not matter."""
    assert list(pairs_of_body("text/plain", b" \n")) == []


@given(st.text())
def test_any_query_is_read_or_refused(text):
    """No query string fails in another way."""
    try:
        read_parameters(ops.REGISTER.parameters, pairs_of_query(text))
    except BadRequest:
        pass


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_json_is_read_or_refused(item):
    """No JSON value fails in another way."""
    try:
        pairs = pairs_of_body("application/json", json.dumps({"batch_size": item, "url": item}).encode())
        read_parameters(ops.REGISTER.parameters, [], pairs)
        pairs_of_body("application/json", json.dumps(item).encode())
    except BadRequest:
        pass
