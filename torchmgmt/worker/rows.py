"""Makes the row that a handler gets of a body that came over HTTP. Rules: what TorchServe's workers hand to handlers."""

from __future__ import annotations

import json
from typing import Any

from torchmgmt.channel import Buffer
from torchmgmt.exchange import BodyHead

__all__ = ["row_of"]


def row_of(head: BodyHead, content: Buffer) -> dict[str, Any]:
    """Return the row of a body: what its content type says, under ``"body"``, with the fields of the query.

    JSON is parsed (bytes if that fails), ``text/*`` is a str, and everything else a bytearray.
    """
    _form, content_type, query, decodes = head
    row: dict[str, Any] = {name: value.encode() for name, value in query}
    if len(content) or not row:
        row["body"] = _value(content, content_type.partition(";")[0].strip().lower() if decodes else "")
    return row


def _value(content: Buffer, kind: str) -> Any:
    if kind == "application/json":
        data = bytes(content)
        try:
            return json.loads(data)
        except ValueError:
            return data
    if kind.startswith("text/"):
        return bytes(content).decode("utf-8", "replace")
    return bytearray(content)
