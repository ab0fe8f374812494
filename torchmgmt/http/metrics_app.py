"""The metrics address as an ASGI application: one page, for whoever asks."""

from __future__ import annotations

import asyncio
from typing import Any

import falcon
import falcon.asgi
from attrs import frozen

from torchmgmt.http.access_log import AccessLog
from torchmgmt.http.middleware import RequestHeaders
from torchmgmt.http.render import render_error_async
from torchmgmt.metrics import Metrics, Page

__all__ = ["create_metrics_app"]


def create_metrics_app(metrics: Metrics) -> falcon.asgi.App[falcon.asgi.Request, falcon.asgi.Response]:
    """Return the page ``/metrics`` of ``metrics`` as an ASGI application. It needs no key; see docs/metrics.md.

    ``?name[]=NAME``, as often as wanted, shows these metrics alone; one that there is not is no error.
    """
    middleware: list[Any] = [AccessLog(), RequestHeaders()]
    app = falcon.asgi.App(middleware=middleware)
    app.req_options.strip_url_path_trailing_slash = True
    app.req_options.auto_parse_qs_csv = False
    app.add_error_handler(Exception, render_error_async)
    app.add_error_handler(falcon.HTTPError, render_error_async)
    app.add_route("/metrics", _MetricsPage(metrics))
    return app


@frozen
class _MetricsPage:
    """GET /metrics."""

    metrics: Metrics

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answer with all metrics, or with those that are named."""
        page = Page(req.get_header("Accept") or "")
        parts = []
        for part in page.parts(self.metrics.registry, req.get_param_as_list("name[]") or ()):
            parts.append(part)
            await asyncio.sleep(0)  # this event loop may serve predictions, too
        resp.content_type = page.content_type
        resp.data = b"".join(parts)
