"""How answers go out: the JSON of a reply or of an error, the same on the WSGI and on the ASGI side."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import falcon
import falcon.asgi
from attrs import field, frozen

from torchmgmt.http.errors import answer_for, is_known, is_kserves, to_json

__all__ = ["Reply", "render_error", "render_error_async", "render_reply"]

logger = logging.getLogger(__name__)

JSON = "application/json"


@frozen
class Reply:
    """What an operation answers when all is well."""

    code: int
    item: Any
    """The body: a JSON-able object, or JSON that is written already."""
    headers: Mapping[str, str] = field(factory=dict)


def render_reply(req: falcon.Request, resp: falcon.Response, reply: Reply) -> None:
    """Write ``reply``; an object that is not written yet also carries the warnings about the request."""
    item = reply.item
    if isinstance(item, dict) and req.context.warnings:
        item = {**item, "warnings": list(req.context.warnings)}
    resp.status = reply.code
    resp.content_type = JSON
    resp.data = item if isinstance(item, bytes) else to_json(item)
    resp.set_headers(dict(reply.headers))


def render_error(req: falcon.Request, resp: falcon.Response, error: Exception, params: dict[str, Any]) -> None:
    """Write the JSON body of ``error``; what nobody foresaw goes to the log with its traceback, not to the caller."""
    request_id = getattr(req.context, "request_id", "")
    answer = answer_for(error)
    if not is_known(error):
        logger.error("%s %r failed (request %s)", req.method, req.path, request_id, exc_info=error)
    elif answer.code >= 500:
        # The rest of it, a worker's traceback, has been logged where it happened.
        line = answer.message.partition("\n")[0]
        logger.warning("%s %r: %s (request %s)", req.method, req.path, line, request_id)
    resp.status = answer.status
    resp.content_type = JSON
    resp.data = answer.body(getattr(req.context, "warnings", None) or (), for_kserve=is_kserves(req.path))
    resp.set_headers(dict(answer.headers))


async def render_error_async(
    req: falcon.asgi.Request,
    resp: falcon.asgi.Response,
    error: Exception,
    params: dict[str, Any],
    **_websocket: Any,
) -> None:
    """The same on the ASGI side."""
    render_error(req, resp, error, params)
