"""The fields of bodies that came as a form: form-encoded, or multipart. Rules: what TorchServe's workers hand to handlers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from torchmgmt.channel import Buffer
from torchmgmt.handlers.inputs import InputRefused

__all__ = ["FORM", "MULTIPART", "form_fields", "multipart_fields"]

FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"
MOST_FIELDS = 1000


def form_fields(content: Buffer) -> dict[str, Any]:
    """Return the fields of a form-encoded body, each as a bytearray; of two with one name the last.

    Raises:
        InputRefused: there are more than 1000.
    """
    try:
        pairs = parse_qsl(bytes(content).decode("latin-1"), keep_blank_values=True, max_num_fields=MOST_FIELDS)
    except ValueError:
        raise InputRefused(f"the form has more than {MOST_FIELDS} fields") from None
    # Percent-encoding is undone as UTF-8, what was not encoded is what it was.
    return {name: bytearray(value, "utf-8", "surrogateescape") for name, value in pairs}


def multipart_fields(content: Buffer, content_type: str, read: Callable[[bytearray, str], Any]) -> dict[str, Any]:
    """Return the parts of a multipart body by their names; of two with one name the last.

    ``read`` makes the value of a part that is a file, of its bytes and content type; other parts are bytearrays.

    Raises:
        InputRefused: it is no multipart body, has a part without a name, or more than 1000 parts.
    """
    # Most workers never see a form.
    from python_multipart import MultipartParser
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import parse_options_header

    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InputRefused(f"Content-Type is {content_type!r}, but that of a multipart body must name its boundary")
    parts = _Parts(parse_options_header, read)
    parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]  # a TypedDict, all of whose keys exist
    try:
        parser.write(bytes(content))
        parser.finalize()
    except FormParserError as error:
        raise InputRefused(f"the body is not valid multipart/form-data: {error}") from None
    if not parts.is_whole:
        raise InputRefused("the body is not valid multipart/form-data: it ends before its last boundary")
    return parts.fields


class _Parts:
    """Collects what the parser finds."""

    def __init__(
        self, parse_options: Callable[[bytes], tuple[bytes, dict[bytes, bytes]]], read: Callable[[bytearray, str], Any]
    ) -> None:
        self.fields: dict[str, Any] = {}
        self.is_whole = False
        self._parse_options = parse_options
        self._read = read
        self._count = 0
        self._begin()

    def callbacks(self) -> dict[str, Callable[..., None]]:
        """Return what the parser is to call."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_name,
            "on_header_value": self._on_value,
            "on_header_end": self._end_header,
            "on_part_data": self._on_data,
            "on_part_end": self._end,
            "on_end": self._end_all,
        }

    def _begin(self) -> None:
        self._data = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = b""

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._data += memoryview(data)[start:end]

    def _end(self) -> None:
        self._count += 1
        if self._count > MOST_FIELDS:
            raise InputRefused(f"the form has more than {MOST_FIELDS} fields")
        _, options = self._parse_options(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name")
        if name is None:
            raise InputRefused(f"part {self._count} of the multipart body has no name in its Content-Disposition")
        content_type = self._headers.get(b"content-type", b"").decode("latin-1")
        is_file = b"filename" in options
        self.fields[name.decode("utf-8", "replace")] = self._read(self._data, content_type) if is_file else self._data

    def _end_all(self) -> None:
        self.is_whole = True
