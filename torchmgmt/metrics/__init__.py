"""Metrics for Prometheus: what models, workers and requests do, as one listener of a manager's events.

Needs the extra ``metrics`` (prometheus-client), which ``http`` includes. The server has a page of them at
``metrics_address``; a program that embeds the library brings them to where its own are::

    from prometheus_client import REGISTRY, start_http_server
    from torchmgmt.metrics import Metrics

    metrics = Metrics(manager, registry=REGISTRY)
    start_http_server(9100)

docs/metrics.md lists them all.
"""

try:
    import prometheus_client  # noqa: F401  # only to say what is missing
except ImportError as _error:
    raise ImportError(
        "torchmgmt.metrics needs prometheus-client: pip install 'torchmgmt[metrics]'", name=_error.name
    ) from None

from torchmgmt.metrics.exporter import Metrics, Page

__all__ = ["Metrics", "Page"]
