"""What every request passes: an id and the no-cache headers, and the check of its path."""

from __future__ import annotations

import itertools
import os
import re
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import falcon
import falcon.asgi

from torchmgmt.errors import InvalidArgument

__all__ = ["PathGuard", "RequestHeaders", "request_id_of", "response_headers"]

# Word for word TorchServe's.
NO_CACHE: Mapping[str, str] = {
    "Pragma": "no-cache",
    "Cache-Control": "no-cache; no-store, must-revalidate, private",
    "Expires": "Thu, 01 Jan 1970 00:00:00 UTC",
}

_SANE_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class _RequestIds:
    """Ids that no other process has: a UUID whose last digits count.

    A UUID for each request would be a system call for each, which hands the interpreter to another thread.
    """

    def __init__(self) -> None:
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)  # the parent goes on with the old ones

    def _begin(self) -> None:
        first = uuid.uuid4()
        self._prefix = str(first)[:24]
        self._numbers = itertools.count(first.node)

    def next(self) -> str:
        """Return another one."""
        return f"{self._prefix}{next(self._numbers) & 0xFFFFFFFFFFFF:012x}"


_ids = _RequestIds()


def request_id_of(given: str | None) -> str:
    """Return the caller's request id, or a new one if it sent none that is safe to log and to send back."""
    return given if given and _SANE_REQUEST_ID.fullmatch(given) else _ids.next()


def response_headers(request_id: str) -> dict[str, str]:
    """Return the headers that every response has."""
    return {"x-request-id": request_id, **NO_CACHE}


class RequestHeaders:
    """Gives each request its id, and each response that id and the no-cache headers."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Note the request's id, and that nothing is known to be odd about it yet."""
        req.context.request_id = request_id_of(req.get_header("x-request-id"))
        req.context.warnings = ()

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        """Set the headers."""
        _set_headers(req, resp)

    async def process_request_async(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """The same on the ASGI side."""
        req.context.request_id = request_id_of(req.get_header("x-request-id"))
        req.context.warnings = ()

    async def process_response_async(
        self,
        req: falcon.asgi.Request,
        resp: falcon.asgi.Response,
        resource: object,
        req_succeeded: bool,
    ) -> None:
        """The same on the ASGI side."""
        _set_headers(req, resp)


def _set_headers(req: falcon.Request, resp: falcon.Response) -> None:
    # Falcon refuses a method named WEBSOCKET before any middleware sees the request.
    request_id = getattr(req.context, "request_id", None) or request_id_of(None)
    resp.set_headers(response_headers(request_id))


class PathGuard:
    """Refuses what the router would misread, and methods that it does not know."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Refuse an encoded slash: WSGI decodes paths, so ``a%2Fb`` would name version ``b`` of model ``a``."""
        raw = req.env.get("REQUEST_URI") or req.env.get("RAW_URI") or ""
        path = str(raw).partition("?")[0]
        if "%2f" in path.lower():
            raise InvalidArgument("path", unquote(path), "one whose names have no '/' in them")

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: Any, params: dict[str, Any]
    ) -> None:
        """Answer a method that HTTP does not know as any other one that is not served; Falcon would say 400."""
        if req.method not in falcon.COMBINED_METHODS:
            served = [m for m in falcon.HTTP_METHODS if hasattr(resource, f"on_{m.lower()}")]
            raise falcon.HTTPMethodNotAllowed(sorted({*served, "OPTIONS"}))
