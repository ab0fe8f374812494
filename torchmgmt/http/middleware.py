"""What every request passes: an id and the no-cache headers, the guard of who may call, the check of paths.

The rules are plain functions, so that the WSGI and the ASGI side share them; the classes hang them into Falcon.
"""

from __future__ import annotations

import ipaddress
import re
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import falcon
import falcon.asgi
from attrs import frozen

from torchmgmt.errors import InvalidArgument
from torchmgmt.http.errors import Forbidden, KeyRequired
from torchmgmt.settings import Settings, is_loopback_host

__all__ = [
    "CallerGuard",
    "PathGuard",
    "RequestHeaders",
    "check_caller",
    "request_id_of",
    "response_headers",
]

# Word for word TorchServe's.
NO_CACHE: Mapping[str, str] = {
    "Pragma": "no-cache",
    "Cache-Control": "no-cache; no-store, must-revalidate, private",
    "Expires": "Thu, 01 Jan 1970 00:00:00 UTC",
}
FORWARDED_HEADERS = ("Forwarded", "X-Forwarded-For")
CHANGING_METHODS = frozenset({"POST", "PUT", "DELETE", "PATCH"})
OPEN_TO_ALL = frozenset({("OPTIONS", "/"), ("GET", "/api-description")})

_SANE_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def request_id_of(given: str | None) -> str:
    """Return the caller's request id, or a new one if it sent none that is safe to log and to send back."""
    return given if given and _SANE_REQUEST_ID.fullmatch(given) else str(uuid.uuid4())


def response_headers(request_id: str) -> dict[str, str]:
    """Return the headers that every response has."""
    return {"x-request-id": request_id, **NO_CACHE}


def check_caller(method: str, path: str, headers: Mapping[str, str | None], settings: Settings) -> None:
    """Raise if the request may not be served to whoever sent it.

    ``headers`` has Host, Origin, Forwarded and X-Forwarded-For. Two dangers are met here. A page in a browser on this
    machine can post to a loopback address without asking first (a form needs no preflight): its Origin gives it away. A
    page whose own name was made to resolve to 127.0.0.1 can even read the answer: the Host gives that away.
    """
    host = host_name(headers["Host"])
    origin = headers["Origin"] if method in CHANGING_METHODS else None
    if origin is not None and not _is_own_origin(origin, headers["Host"], host, settings):
        raise Forbidden(f"Origin is {origin!r}: pages of other origins may not change anything here")
    if settings.disable_token_authorization is True or (method, path) in OPEN_TO_ALL:
        return
    forwarded = [name for name in FORWARDED_HEADERS if headers[name] is not None]
    if forwarded or not is_loopback_host(host):
        seen = f"it carries {forwarded[0]}" if forwarded else f"its Host is {headers['Host']!r}"
        raise KeyRequired(
            f"This request does not count as coming from this machine: {seen}. Call it under a loopback name such as"
            " localhost, or start the server with --disable-token-auth to serve every caller"
        )


def host_name(host: str | None) -> str:
    """Return the name or address in a Host header, without port and brackets; empty if it is none."""
    try:
        return urlsplit(f"//{host or ''}").hostname or ""
    except ValueError:
        return ""


def _is_own_origin(origin: str, host_header: str | None, host: str, settings: Settings) -> bool:
    if not host_header or origin.lower() not in {f"{scheme}://{host_header.lower()}" for scheme in ("http", "https")}:
        return False
    # Host and Origin agree for a page whose name was rebound to our address, too; an IP address cannot be rebound.
    own = urlsplit(settings.management_address).hostname
    return is_loopback_host(host) or _is_ip_address(host) or host == own


def _is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


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


@frozen
class CallerGuard:
    """Serves local callers only, unless the settings say otherwise."""

    settings: Settings

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Refuse with 401 or 403 before anything else looks at the request."""
        names = ("Host", "Origin", *FORWARDED_HEADERS)
        check_caller(req.method, req.path, {name: req.get_header(name) for name in names}, self.settings)


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
