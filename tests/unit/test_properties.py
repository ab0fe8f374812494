"""Java's properties files as TorchServe writes them: every text is read, or refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmgmt.errors import InvalidArgument, InvalidSetting
from torchmgmt.properties import parse_properties, read_properties

TORCHSERVES = r"""
# a comment
   ! another \
inference_address=http://0.0.0.0:8080
management_address = http://0.0.0.0:8081
job_queue_size:10
number_of_gpu 2
models={\
  "noop": {\
    "1.0": {\
        "minWorkers": 1\
    }\
  }\
}
model_store=C:\\models\ttab
empty=
unicode=\u00e9\uD83D\uDE00 é
key\ with\:odd\=signs = value = with : signs
last=1\
"""


def parsed(text: str, **variables: str) -> dict[str, str]:
    return {entry.key: entry.text for entry in parse_properties(text, "f", variables)}


def test_a_file_as_torchserves_users_have_it():
    """Comments, the three separators, continuation lines and escapes mean what they mean in Java."""
    assert parsed(TORCHSERVES) == {
        "inference_address": "http://0.0.0.0:8080",
        "management_address": "http://0.0.0.0:8081",
        "job_queue_size": "10",
        "number_of_gpu": "2",
        "models": '{"noop": {"1.0": {"minWorkers": 1}}}',
        "model_store": "C:\\models\ttab",
        "empty": "",
        "unicode": "é😀 é",
        "key with:odd=signs": "value = with : signs",
        "last": "1",
    }


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_an_entry_knows_the_line_in_which_it_begins(end):
    """Lines are counted as an editor shows them, continued ones and comments included."""
    text = end.join(["# one", "a=1", "", "b={\\", "  2\\", "}", "c=3"])
    lines = {entry.key: entry.line for entry in parse_properties(text, "f", {})}
    assert lines == {"a": 2, "b": 4, "c": 7}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_a_file_may_be_utf_8_or_latin_1(tmp_path, encoding):
    """Java reads Latin-1, editors write UTF-8, some with a mark at the beginning."""
    path = tmp_path / "config.properties"
    path.write_bytes("größe=é".encode(encoding))
    (entry,) = read_properties(path, {})
    assert (entry.key, entry.text) == ("größe", "é")


def test_variables_are_replaced():
    """$$NAME$$ is the environment's, anywhere in a value and more than once; in a key it stays."""
    assert parsed("a=x$$ONE$$y$$TWO$$\n$$ONE$$=1", ONE="1", TWO="$$ONE$$") == {"a": "x1y$$ONE$$", "$$ONE$$": "1"}
    assert parsed("price=5$ or $$5", ONE="1") == {"price": "5$ or $$5"}


@pytest.mark.parametrize(
    "text, line, expected",
    [
        ("a=1\nstore=$$NOWHERE$$/x", 2, "NOWHERE is not"),
        ("a=1\n\n# x\nb=\\u12", 4, "four hexadecimal digits"),
        ("a=\\ud800", 1, "half a pair"),
        ("a\\udc00=1", 1, "half a pair"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(text, line, expected):
    """A variable that is not set, and a broken escape, name file and line."""
    with pytest.raises(InvalidSetting) as caught:
        parsed(text)
    assert str(caught.value).startswith(f"f, line {line}: ")
    assert expected in str(caught.value)


def test_a_file_that_is_not_there_is_an_invalid_argument(tmp_path):
    """A missing file, a folder and an impossible name say why they cannot be read."""
    for path, why in ((tmp_path / "x", "No such file"), (tmp_path, "directory"), (Path("a\0b"), "null")):
        with pytest.raises(InvalidArgument, match=why):
            read_properties(path, {})


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ENTRIES = st.lists(st.tuples(WORDS.filter(bool), WORDS), max_size=6)
JUNK = st.sampled_from(["", "\n", "# note\n", " ! note \\\n", "\t\f\n"])


@st.composite
def files(draw):
    """Entries, and a file that a writer of ours made of them in one of the many ways in which that can be done."""
    entries, text = draw(ENTRIES), ""
    for key, value in entries:
        separator = draw(st.sampled_from(["=", ":", " = ", "\t", " : "]))
        text += draw(JUNK) + draw(escaped(key)) + separator + draw(escaped(value)) + draw(st.sampled_from("\n\r"))
    return entries, text


@st.composite
def escaped(draw, text):
    """The text with all that means something escaped, other characters sometimes, and some lines broken."""
    written = ""
    for char in text:
        # Between two characters only: the blanks that begin a continuation are none of the text, a separator included.
        if written and draw(st.integers(0, 9)) == 0:
            written += "\\\n" + draw(st.sampled_from(["", " ", "\t  "]))
        if char in " =:#!\\\t\f":
            written += "\\" + {"\t": "t", "\f": "f"}.get(char, char)
        elif char in "\r\n" or draw(st.integers(0, 9)) == 0:
            units = char.encode("utf-16-be")
            written += "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
        else:
            written += char
    return written


@given(files())
def test_what_is_written_is_read_again(written):
    """However an entry is escaped, separated and broken into lines, its key and value come back, in their order."""
    entries, text = written
    environment = _EveryVariable()
    assert [(entry.key, entry.text) for entry in parse_properties(text, "f", environment)] == entries


class _EveryVariable(dict[str, str]):
    """An environment in which $$NAME$$ stands for itself."""

    def __missing__(self, name: str) -> str:
        return f"$${name}$$"


@given(st.text(st.sampled_from("ab=: \t\f\\\n\r#!u0dD8$é\U0001f600")) | st.text())
def test_any_text_is_read_or_refused(text):
    """No text makes it fail in another way, or count lines that are not there."""
    lines = text.count("\n") + text.count("\r") + 1
    try:
        entries = list(parse_properties(text, "f", {}))
    except InvalidSetting:
        return
    assert all(1 <= entry.line <= lines for entry in entries)


@given(st.binary())
def test_any_file_is_read_or_refused(tmp_path_factory, content):
    """Neither do bytes that are no text."""
    path = tmp_path_factory.getbasetemp() / "any.properties"
    path.write_bytes(content)
    try:
        read_properties(path, {})
    except InvalidSetting:
        pass
