"""The parameters of the Management API: declared once, read from the query and the body, checked, described.

Each :class:`Parameter` says its kind, range and meaning; reading, the error messages and the API description derive from
it. A wrong value of a known parameter is an error; an unknown parameter is a warning, because clients send some.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any
from urllib.parse import parse_qsl

from attrs import frozen

from torchmgmt.errors import InvalidArgument
from torchmgmt.http.errors import BadRequest

__all__ = ["Kind", "Parameter", "Values", "pairs_of_body", "pairs_of_query", "read_parameters"]

LARGEST = 2**31 - 1  # TorchServe's clients and servers hold these numbers in an int of Java
MOST_PARAMETERS = 1000
MOST_WARNINGS = 10
LONGEST_NAME_SHOWN = 60

# ASCII digits only, and no exponent: 1e3 and the digits of other scripts are more likely a mistake than meant. Spaces
# around them are let through, because that is what the plus of `+7` means in a query.
_WHOLE = re.compile(r" *([+-]?[0-9]{1,19}) *", re.ASCII)
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
# What str.strip() takes for blank, as JSON schema's regular expressions (ECMA 262) write it.
_BLANK = r"\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

Pairs = Sequence[tuple[str, object]]
"""Parameters as they came: text from a query or form, whatever JSON has from a JSON body."""


class Kind(Enum):
    """What a parameter's value is."""

    TEXT = "string"
    WHOLE = "integer"
    TRUTH = "boolean"


@frozen
class Parameter:
    """One parameter of one or more operations: what it is called and means, and which values it may have."""

    name: str
    kind: Kind
    help: str
    default: object = None
    """What stands in for it when it is not given; None if that is decided elsewhere."""
    minimum: int = -LARGEST
    """The least of a whole number; the greatest is :data:`LARGEST`."""
    unit: str = ""
    """What a whole number counts, in the plural: seconds, milliseconds."""
    forbidden: str = "\0"
    """The characters that a text must not have."""
    choices: Sequence[Any] = ()
    """The values that it may have, if not all of its kind; text matches one of them in any case."""
    refusal: str = ""
    """What to say to a value that is none of the choices, where clients know the words; ``{}`` is what was given."""
    required: bool = False
    example: object = None

    @property
    def allowed(self) -> str:
        """What its value may be, in words."""
        if self.choices:
            return " or ".join(_in_json(choice) for choice in self.choices)
        if self.kind is Kind.TRUTH:
            return "true or false"
        if self.kind is Kind.TEXT:
            return f"text that is not blank and has no {' or '.join(map(repr, self.forbidden))} in it"
        counted = f" of {self.unit}" if self.unit else ""
        return f"a whole number{counted} from {self.minimum} to {LARGEST}"

    @property
    def schema(self) -> dict[str, Any]:
        """Its JSON schema: what a client should send. :meth:`read` takes a little more, see there."""
        schema: dict[str, Any] = {"type": self.kind.value}
        if self.choices:
            schema["enum"] = list(self.choices)
        elif self.kind is Kind.WHOLE:
            schema.update(format="int32", minimum=self.minimum, maximum=LARGEST)
        elif self.kind is Kind.TEXT:
            any_number = f"[^{_escaped(self.forbidden)}]*"
            schema["pattern"] = f"^{any_number}[^{_escaped(self.forbidden)}{_BLANK}]{any_number}$"
        if self.default is not None:
            schema["default"] = self.default
        if self.example is not None:
            schema["example"] = self.example
        return schema

    @property
    def description(self) -> str:
        """What it means, with its unit."""
        return f"{self.help} In {self.unit}." if self.unit else self.help

    def read(self, given: object) -> Any:
        """Return the value of what was ``given``: text from a query or form, or a value from JSON.

        Beside what :attr:`schema` says, a whole number or a truth value may stand in a JSON body as text, too, and a
        truth value is true, false, 1 or 0, in any case.

        Raises:
            InvalidArgument: it is of another kind or out of range; names the parameter, what was given and what is allowed.
            BadRequest: it is none of the choices, and :attr:`refusal` has the words for that.
        """
        value = self._choose(given) if self.choices else _READERS[self.kind](given)
        if value is None or not self._is_legal(value):
            if self.refusal:
                raise BadRequest(self.refusal.format(given))
            raise InvalidArgument(self.name, given, self.allowed)
        return value

    def _choose(self, given: object) -> object:
        value = _READERS[self.kind](given)
        wanted = value.strip(" ").casefold() if isinstance(value, str) else value
        fitting = (one for one in self.choices if wanted == (one.casefold() if isinstance(one, str) else one))
        return next(fitting, None)

    def _is_legal(self, value: Any) -> bool:
        if self.kind is Kind.WHOLE:
            return bool(self.minimum <= value <= LARGEST)
        if self.kind is Kind.TEXT:
            return bool(value.strip()) and not any(char in value for char in self.forbidden)
        return True


def _read_text(given: object) -> str | None:
    # Half a surrogate pair, which JSON can bring, is no text: nothing could be named by it.
    return given if isinstance(given, str) and not _SURROGATE.search(given) else None


def _read_whole(given: object) -> int | None:
    if isinstance(given, str):
        found = _WHOLE.fullmatch(given)
        return int(found[1]) if found else None
    return given if isinstance(given, int) and not isinstance(given, bool) else None


def _read_truth(given: object) -> bool | None:
    if isinstance(given, bool):
        return given
    # A JSON body may say 1 or 0 as numbers.
    return _TRUTH.get(str(given).strip(" ").lower()) if isinstance(given, (str, int)) else None


_SURROGATE = re.compile("[\ud800-\udfff]")
_READERS: Mapping[Kind, Callable[[object], object]] = {
    Kind.TEXT: _read_text,
    Kind.WHOLE: _read_whole,
    Kind.TRUTH: _read_truth,
}


def _escaped(characters: str) -> str:
    return "".join(rf"\u{ord(char):04x}" for char in characters)


def _in_json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@frozen
class Values:
    """What a request said: checked values by name, defaults filled in, and what to tell its author."""

    by_name: Mapping[str, Any]
    warnings: Sequence[str] = ()
    has_key: bool = False
    """Whether a valid key came with the request."""

    def __getitem__(self, name: str) -> Any:
        """The value of a declared parameter; None if it was not given and has no default."""
        return self.by_name[name]


def read_parameters(
    declared: Iterable[Parameter], query: Pairs, body: Pairs = ()
) -> tuple[Values, BadRequest | InvalidArgument | None]:
    """Return the values and, if one is wrong or missing, why the request must be refused.

    The two come together because a refusal, too, carries the warnings: a misspelt name is often its reason.
    """
    table = {parameter.name: parameter for parameter in declared}
    given = [(place, name, value) for place, pairs in (("query", query), ("body", body)) for name, value in pairs]
    warnings = _warnings((name for _, name, _ in given if name not in table), table)
    values = {name: parameter.default for name, parameter in table.items()}
    try:
        values.update(_read_given(table, given))
        for parameter in table.values():
            if parameter.required and values[parameter.name] is None:
                raise BadRequest(f"Parameter {parameter.name} is required.")
    except (BadRequest, InvalidArgument) as refusal:
        return Values(values, warnings), refusal
    return Values(values, warnings), None


def _read_given(table: Mapping[str, Parameter], given: Sequence[tuple[str, str, object]]) -> dict[str, Any]:
    read: dict[str, tuple[str, Any]] = {}
    for place, name, raw in given:
        if name not in table or raw is None or raw == "":  # empty means not given
            continue
        value = table[name].read(raw)
        before = read.setdefault(name, (place, value))
        if before[1] != value:
            where = f"twice in the {place}" if before[0] == place else "in the query and in the body"
            raise BadRequest(f"{name} is given {where} with different values: {before[1]!r} and {value!r}")
    return {name: value for name, (_, value) in read.items()}


def _warnings(unknown: Iterable[str], table: Mapping[str, Parameter]) -> list[str]:
    names = list(dict.fromkeys(unknown))
    warnings = [_unknown(name, table) for name in names[:MOST_WARNINGS]]
    if len(names) > MOST_WARNINGS:
        warnings.append(f"and {len(names) - MOST_WARNINGS} more unknown parameters")
    return warnings


def _unknown(name: str, table: Mapping[str, Parameter]) -> str:
    shown = name if len(name) <= LONGEST_NAME_SHOWN else name[:LONGEST_NAME_SHOWN] + "..."
    flat = {known.replace("_", ""): known for known in table}
    flattened = re.sub("[-_.]", "", shown).lower()  # batchSize, batch-size
    meant = difflib.get_close_matches(flattened, flat, n=1)
    return f"unknown parameter {shown!r}" + (f": did you mean {flat[meant[0]]!r}?" if meant else "")


def pairs_of_query(query: bytes | str) -> Pairs:
    """Return the parameters of a query string or of a form-encoded body.

    Raises:
        BadRequest: there are too many, or they or what their percent-encoding stands for are not UTF-8.
    """
    text = query if isinstance(query, str) else _decode(query)
    if text.count("&") >= MOST_PARAMETERS:
        raise BadRequest(f"There are more than {MOST_PARAMETERS} parameters")
    try:
        return parse_qsl(text, keep_blank_values=True, errors="strict")
    except UnicodeDecodeError as error:
        raise BadRequest(f"The parameters are not UTF-8: {error}") from None


def pairs_of_body(content_type: str | None, body: bytes) -> Pairs:
    """Return the parameters of a request's body: a JSON object or a form. An empty body has none."""
    if not body.strip():
        return ()
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type == "application/x-www-form-urlencoded":
        return pairs_of_query(body)
    # Without a content type JSON is meant: what else could a client have put together by hand?
    if media_type in {"", "application/json"} or media_type.endswith("+json"):
        return _pairs_of_json(_decode(body))
    raise BadRequest(
        f"Content-Type is {media_type!r}, but a body must be application/json or"
        " application/x-www-form-urlencoded; parameters may also stand in the query string"
    )


def _decode(sent: bytes) -> str:
    try:
        return sent.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequest(f"The parameters are not UTF-8: {error}") from None


def _pairs_of_json(text: str) -> Pairs:
    try:
        # Pairs, not a dict: of a name given twice one would win without a word.
        pairs = json.loads(text, object_pairs_hook=_JSONObject, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The body is not valid JSON: {error}") from None
    if not isinstance(pairs, _JSONObject):
        raise BadRequest("The body must be a JSON object of parameters")
    return pairs


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


class _JSONObject(list[tuple[str, object]]):
    """The members of a JSON object, in order, none dropped."""
