"""Reading parameters: declared ones are checked, unknown ones warned about, in query and body alike."""

from __future__ import annotations

import json
import re
from urllib.parse import urlencode

import pytest
from falcon.testing import create_environ
from hypothesis import given
from hypothesis import strategies as st
from openapi_schema_validator import OAS30ReadValidator

from torchmgmt.errors import InvalidArgument
from torchmgmt.http import operations as ops
from torchmgmt.http.errors import BadRequest
from torchmgmt.http.management import create_app
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
NAME = Parameter("model_name", Kind.TEXT, "", forbidden="/\0")
TIME = Parameter("timeout", Kind.WHOLE, "", minimum=-1, unit="seconds")
RUNTIME, S3 = (one for one in ops.REGISTER_PARAMETERS if one.choices)
DECLARED = [
    *dict.fromkeys(one for operation in ops.MANAGEMENT + ops.INFERENCE for one in operation.parameters),
    COUNT,
    NAME,
    TIME,
]


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
        (COUNT, "007", 7),
        (TIME, "-1", -1),
        (COUNT, str(2**31 - 1), 2**31 - 1),
        (TRUTH, "true", True),
        (TRUTH, "FALSE", False),
        (TRUTH, "1", True),
        (TRUTH, 0, False),
        (TRUTH, True, True),
        (TRUTH, "tRuE", True),
        (TEXT, "a b/ü", "a b/ü"),
        (TEXT, " 0 ", " 0 "),
        (RUNTIME, " Python3 ", "python3"),
        (RUNTIME, "lsp", "LSP"),
        (S3, "0", False),
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
        (COUNT, "\uff11"),
        (COUNT, "\t1"),
        (COUNT, "1\n"),
        (COUNT, "\xa01"),
        (COUNT, "1_000"),
        (COUNT, "0x10"),
        (COUNT, "+-1"),
        (COUNT, " "),
        (COUNT, "NaN"),
        (COUNT, "abc"),
        (COUNT, -(2**70)),
        (COUNT, str(2**31)),
        (COUNT, "9" * 5000),
        (COUNT, 1.0),
        (COUNT, True),
        (COUNT, [1]),
        (COUNT, float("inf")),
        (TRUTH, "yes"),
        (TRUTH, "on"),
        (TRUTH, "01"),
        (TRUTH, " "),
        (TRUTH, 1.0),
        (TRUTH, 2),
        (TRUTH, {}),
        (TEXT, 1),
        (TEXT, ["a"]),
        (TEXT, True),
        (TEXT, " \t\xa0"),
        (TEXT, "a\0"),
        (TEXT, "\ud800"),
        (NAME, "a/b"),
    ],
)
def test_a_wrong_value_is_refused_by_name(parameter, given):
    """A known parameter with a wrong value names itself, what was given and what is allowed."""
    with pytest.raises(InvalidArgument) as caught:
        value_of(parameter, given)
    assert caught.value.argument == parameter.name
    assert caught.value.allowed == parameter.allowed


@pytest.mark.parametrize(
    "parameter, given, message",
    [
        (TIME, "-2", "timeout is '-2', but must be a whole number of seconds from -1 to 2147483647"),
        (COUNT, "x", "batch_size is 'x', but must be a whole number from 1 to 2147483647"),
        (TRUTH, "ja", "synchronous is 'ja', but must be true or false"),
        (NAME, "a/b", "model_name is 'a/b', but must be text that is not blank and has no '/' or '\\x00' in it"),
        (RUNTIME, "cobol", "Invalid RuntimeType value: cobol"),
        (S3, "TRUE", "s3_sse_kms is TRUE, but this server has no support for S3"),
    ],
)
def test_a_refusal_says_what_was_given_and_what_is_allowed(parameter, given, message):
    """In TorchServe's words where clients know them."""
    with pytest.raises((InvalidArgument, BadRequest)) as caught:
        value_of(parameter, given)
    assert str(caught.value) == message


def is_legal(parameter: Parameter, value: object) -> bool:
    return OAS30ReadValidator(parameter.schema).is_valid(value)


def values_of_schema(parameter: Parameter) -> st.SearchStrategy:
    """Values that the parameter's schema allows."""
    schema = parameter.schema
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if parameter.kind is Kind.WHOLE:
        return st.integers(schema["minimum"], schema["maximum"])
    if parameter.kind is Kind.TRUTH:
        return st.booleans()
    return st.text(st.characters(codec="utf-8")).filter(lambda text: re.search(schema["pattern"], text))


@given(st.data())
def test_what_the_schema_allows_is_read(data):
    """Whatever a client sends by the description is accepted, as JSON and as text alike, and means itself."""
    parameter = data.draw(st.sampled_from(DECLARED))
    value = data.draw(values_of_schema(parameter))
    assert is_legal(parameter, value)
    assert value_of(parameter, value) == value
    assert value_of(parameter, str(value)) == value
    sent = pairs_of_query(urlencode({parameter.name: value}))
    assert read_parameters([parameter], sent)[0][parameter.name] == value


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    st.sampled_from(DECLARED), ANY_JSON | st.integers(-2, 2) | st.integers().map(str) | st.sampled_from(["1", "tRUE"])
)
def test_what_is_read_is_what_the_schema_allows(parameter, raw):
    """Nothing else passes: the value that comes of it is always one that the description allows."""
    try:
        value = value_of(parameter, raw)
    except (InvalidArgument, BadRequest):
        assert not is_legal(parameter, raw) or raw == ""
    else:
        assert value == parameter.default if raw in ("", None) else is_legal(parameter, value)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=3))
def test_schema_and_reader_agree_on_what_is_blank(text):
    """The pattern in the description and the check of the reader are one rule, for every character there is."""
    for parameter in (TEXT, NAME):
        try:
            accepted = value_of(parameter, text) == text
        except InvalidArgument:
            accepted = False
        assert accepted == is_legal(parameter, text)


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
        ("application/json", b'{"batch_size": NaN}'),
        ("application/json", b'{"batch_size": -Infinity}'),
        ("application/json", b'{"batch_size": ' + b"9" * 5000 + b"}"),
        ("application/json", b'{"a": 1} {"b": 2}'),
        ("application/json", b"[" * 100_000),
        ("text/plain", b"url=a.mar"),
        ("multipart/form-data; boundary=x", b"--x--"),
        ("application/x-www-form-urlencoded", b"\xff"),
        ("application/x-www-form-urlencoded", b"url=%FF"),
        ("application/x-www-form-urlencoded", b"&".join(b"a=%d" % n for n in range(2000))),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(content_type, body):
    """A body is understood or refused, never ignored."""
    with pytest.raises(BadRequest):
        pairs_of_body(content_type, body)


def test_a_json_object_that_repeats_a_name_contradicts_itself():
    """Of two values of one name none is dropped without a word."""
    pairs = pairs_of_body("application/json", b'{"batch_size": 1, "batch_size": 2}')
    _, refusal = read_parameters([COUNT], [], pairs)
    assert str(refusal) == "batch_size is given twice in the body with different values: 1 and 2"


@pytest.mark.parametrize("query", ["%ff", "model_name=%c3", b"a=\xff"])
def test_a_query_that_is_not_utf8_is_refused(query):
    """No character is replaced by another without a word."""
    with pytest.raises(BadRequest, match="not UTF-8"):
        pairs_of_query(query)


@pytest.mark.parametrize("raw", ["ü".encode(), b"%C3%BC"])
def test_a_query_means_the_same_encoded_and_raw(manager, raw):
    """Under a WSGI server that lets raw bytes through (waitress does not), they are UTF-8, too."""
    environ = create_environ("/models", method="POST", host="localhost")
    environ["QUERY_STRING"] = "url=a.mar&model_name=" + raw.decode("latin-1")
    statuses: list[str] = []
    list(create_app(manager)(environ, lambda status, headers, exc_info=None: statuses.append(status)))
    assert statuses[0].startswith("202")
    assert manager.calls[0][2]["model_name"] == "ü"


def test_an_empty_body_gives_nothing():
    """Without a body the content type does not matter."""
    assert list(pairs_of_body("text/plain", b" \n")) == []


@given(st.text() | st.binary())
def test_any_query_is_read_or_refused(query):
    """No query string fails in another way."""
    try:
        read_parameters(ops.REGISTER.parameters, pairs_of_query(query))
    except BadRequest:
        pass


@given(ANY_JSON)
def test_any_json_is_read_or_refused(item):
    """No JSON value fails in another way."""
    try:
        pairs = pairs_of_body("application/json", json.dumps({"batch_size": item, "url": item}).encode())
        read_parameters(ops.REGISTER.parameters, [], pairs)
        pairs_of_body("application/json", json.dumps(item).encode())
    except BadRequest:
        pass
