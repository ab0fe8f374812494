"""What a caller asks of a model, checked and made ready to travel to a worker."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torchmgmt.channel import encode
from torchmgmt.errors import InvalidArgument
from torchmgmt.records import WorkerRequest, check_number

__all__ = ["new_request"]


def new_request(
    data: object,
    fields: Mapping[str, Any] | None,
    headers: Mapping[str, str] | None,
    request_id: str,
    timeout: float | None,
) -> WorkerRequest:
    """Return a request for the row ``{"body": data}``, or ``fields``; raise InvalidArgument for what cannot be sent.

    ``timeout`` is in seconds from now, at least 0; None: no limit.
    """
    deadline = None
    if timeout is not None:
        check_number("timeout", timeout, minimum=0, unit="seconds", whole=False)
        deadline = time.monotonic() + timeout
    if fields is not None and not isinstance(fields, Mapping):
        raise InvalidArgument("fields", fields, "a mapping of names to values, or None")
    if headers is not None and not _are_headers(headers):
        raise InvalidArgument("headers", headers, "a mapping of text to text, or None")
    row = {"body": data} if fields is None else dict(fields)
    try:
        encoded = encode(row, frozen=True)
    except Exception as error:  # whatever a __reduce__ raises
        name = "data" if fields is None else "fields"
        raise InvalidArgument(name, row, f"picklable, so that a worker can get it ({error})") from error
    return WorkerRequest(encoded, request_id, dict(headers) if headers else None, deadline, timeout or 0.0)


def _are_headers(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(part, str) for item in value.items() for part in item)
