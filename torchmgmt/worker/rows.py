"""Makes the row that a handler gets of a body that came over HTTP. Rules: what TorchServe's workers hand to handlers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torchmgmt.channel import Buffer
from torchmgmt.exchange import BodyHead, Form
from torchmgmt.worker.forms import FORM, MULTIPART, form_fields, multipart_fields

if TYPE_CHECKING:
    from torchmgmt.worker.loader import ServedAs

__all__ = ["row_of"]

_V2 = int(Form.V2)


def row_of(head: BodyHead, content: Buffer, served_as: ServedAs) -> dict[str, Any]:
    """Return the row of a body: what its content type says, and the fields of the query as bytearrays.

    Under ``"body"`` JSON is parsed (a bytearray if that fails), ``text/*`` is a str, and everything else a bytearray. A form's
    fields are bytearrays by their names; a file in it is as a body of its content type.

    Raises:
        InputRefused: it is a form, or an inference request (``Form.V2``), that cannot be read.
    """
    form, content_type, query, decodes, json_bytes, _ = head
    if form == _V2:
        # Most workers are never asked that way.
        from torchmgmt.worker.open_inference import read_request

        return read_request(content, json_bytes, served_as)
    kind = content_type.partition(";")[0].strip().lower() if content_type else ""
    row: dict[str, Any] = {name: bytearray(value, "utf-8") for name, value in query} if query else {}
    if kind == FORM:
        row.update(form_fields(content))
    elif kind == MULTIPART:
        row.update(multipart_fields(content, content_type, _decoded if decodes else _as_it_is))
    else:
        row["body"] = _decoded(content, kind) if decodes else bytearray(content)
    return row


def _as_it_is(content: Buffer, _kind: str) -> Any:
    return content if isinstance(content, bytearray) else bytearray(content)


def _decoded(content: Buffer, content_type: str) -> Any:
    kind = content_type.partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            return json.loads(bytes(content))
        if kind.startswith("text/"):
            return bytes(content).decode()
    except (ValueError, RecursionError):  # the handler may know better what it is
        pass
    return _as_it_is(content, kind)
