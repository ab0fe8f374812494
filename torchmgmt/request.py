"""What a caller asks of a model, checked and made ready to travel to a worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchmgmt.checks import plain
from torchmgmt.encoding import encode_with_code
from torchmgmt.errors import InvalidArgument
from torchmgmt.exchange import Encoded, HttpBody, WorkerRequest

__all__ = ["new_request"]

_TEXT = frozenset({str})


def new_request(
    data: object,
    fields: Mapping[str, Any] | None,
    headers: Mapping[str, str] | None,
    request_id: str,
) -> WorkerRequest:
    """Return a request for the row ``{"body": data}``, or ``fields``; raise InvalidArgument for what cannot be sent.

    Of an :class:`~torchmgmt.exchange.HttpBody` nothing is made here: the worker does that.
    """
    if not isinstance(request_id, str):
        raise InvalidArgument("request_id", request_id, "text, or None for a new one")
    if fields is not None and not isinstance(fields, Mapping):
        raise InvalidArgument("fields", fields, "a mapping of names to values, or None")
    if headers is not None and not _are_headers(headers):
        raise InvalidArgument("headers", headers, "a mapping of text to text, or None")
    if type(request_id) is not str:
        request_id = plain(request_id)
    own_headers = _plain_headers(headers) if headers else None
    if type(data) is HttpBody and fields is None:
        return WorkerRequest(Encoded([data.content]), request_id, own_headers, body=data.head())
    row = {"body": data} if fields is None else dict(fields)
    try:
        encoded, code = encode_with_code(row, frozen=True)
    except Exception as error:  # whatever a __reduce__ raises
        name = "data" if fields is None else "fields"
        raise InvalidArgument(name, row, f"picklable, so that a worker can get it ({error})") from error
    return WorkerRequest(encoded, request_id, own_headers, code=code)


def _plain_headers(headers: Mapping[str, str]) -> dict[str, str]:
    own = dict(headers)
    if _TEXT.issuperset(map(type, own)) and _TEXT.issuperset(map(type, own.values())):
        return own
    return {plain(name): plain(value) for name, value in own.items()}


def _are_headers(value: object) -> bool:
    # Joining them looks at each as quickly as can be: this is asked for each request, and over HTTP there are many headers.
    if type(value) is not dict and not isinstance(value, Mapping):  # which takes longer to ask
        return False
    try:
        "".join(value)
        "".join(value.values())
    except TypeError:
        return False
    return True
