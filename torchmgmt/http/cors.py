"""Pages of other origins, as far as the settings cors_allowed_origin, _methods and _headers let them call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import falcon
import falcon.asgi
from falcon.middleware import CORSMiddleware

from torchmgmt.settings import Settings

__all__ = ["CORS", "cors_middleware"]

USUAL_HEADERS = ("Authorization", "Content-Type", "X-Request-Id")
"""What a page needs to use this API."""


class CORS(CORSMiddleware[falcon.asgi.Request, falcon.asgi.Response]):
    """Falcon's middleware with what the settings say; an origin is named back, and ``*`` never goes with credentials.

    No answer allows credentials: a key travels in a header that the page sets itself, never by itself as a cookie does.
    """

    def __init__(self, settings: Settings) -> None:
        origins = [origin.rstrip("/") for origin in settings.cors_allowed_origin]
        super().__init__(allow_origins="*" if "*" in origins else origins, expose_headers="x-request-id")
        self._methods = ", ".join(method.upper() for method in settings.cors_allowed_methods)
        self._headers = ", ".join(settings.cors_allowed_headers or USUAL_HEADERS)

    def process_response(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        resource: object,
        req_succeeded: bool,
    ) -> None:
        """Add the headers that let the page read the answer, or send what it asks about."""
        if self.allow_origins != "*":
            # A cache must not give one origin's answer to another.
            resp.append_header("Vary", "Origin")
        is_preflight = req.method == "OPTIONS" and req.get_header("Access-Control-Request-Method") is not None
        if is_preflight and resp.get_header("Allow") is None:
            resp.set_header("Allow", "OPTIONS")  # the API description; Falcon denies a path that does not say
        super().process_response(req, resp, resource, req_succeeded)
        if is_preflight and resp.get_header("Access-Control-Allow-Methods") is not None:
            resp.set_header("Access-Control-Allow-Headers", self._headers)
            if self._methods:
                resp.set_header("Access-Control-Allow-Methods", self._methods)

    def raw_headers(self, headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
        """Return what lets the page read an answer, as ASGI has it; ``headers`` are the request's, names in lower case."""
        origin = headers.get("origin")
        more = [] if self.allow_origins == "*" else [(b"vary", b"Origin")]
        if origin is None or not (self.allow_origins == "*" or origin in self.allow_origins):
            return more
        allowed = "*" if self.allow_origins == "*" else origin
        more.append((b"access-control-allow-origin", allowed.encode("latin-1")))
        return [*more, (b"access-control-expose-headers", b"x-request-id")]

    def preflight_headers(self, headers: Mapping[str, str], methods: Sequence[str]) -> list[tuple[bytes, bytes]]:
        """Return what a page is told that asks before it calls with one of ``methods``; nothing where it may not."""
        is_asked = "access-control-request-method" in headers
        if not is_asked or not any(name == b"access-control-allow-origin" for name, _ in self.raw_headers(headers)):
            return []
        return [
            (b"access-control-allow-methods", (self._methods or ", ".join(methods)).encode()),
            (b"access-control-allow-headers", self._headers.encode()),
            (b"access-control-max-age", b"86400"),
        ]

    async def process_response_async(
        self,
        req: falcon.asgi.Request,
        resp: falcon.asgi.Response,
        resource: object,
        req_succeeded: bool,
    ) -> None:
        """The same on the ASGI side."""
        self.process_response(req, resp, resource, req_succeeded)


def cors_middleware(settings: Settings) -> list[CORS]:
    """Return the middleware that the settings ask for: none where no other origin may call."""
    return [CORS(settings)] if settings.cors_allowed_origin else []
