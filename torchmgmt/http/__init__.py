"""The Management API over HTTP. Needs the extra: ``pip install 'torchmgmt[http]'``.

:func:`serve` serves a manager beside the program it lives in, :func:`create_app` is the WSGI application behind it, and
``python -m torchmgmt.http`` is a server by itself.
"""

from __future__ import annotations

import sys

try:
    import falcon  # noqa: F401
    import uvicorn  # noqa: F401
    import waitress  # noqa: F401

    import torchmgmt.metrics  # noqa: F401  # which needs prometheus-client
except ImportError as _error:
    _LINE = f"torchmgmt.http needs {_error.name}: pip install 'torchmgmt[http]'"
    # `python -m` imports this package before it runs __main__, and would show a traceback of an ImportError.
    if sys.argv[:1] == ["-m"] and "torchmgmt.http" in sys.orig_argv:
        raise SystemExit(_LINE) from None
    raise ImportError(_LINE, name=_error.name) from _error

from torchmgmt.http.inference import create_inference_app
from torchmgmt.http.management import create_app
from torchmgmt.http.metrics_app import create_metrics_app
from torchmgmt.http.server import serve

__all__ = ["create_app", "create_inference_app", "create_metrics_app", "serve"]
