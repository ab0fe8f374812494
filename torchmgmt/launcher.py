"""Helpers that call a running server, as TorchServe's ``ts.launcher`` has them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from torchmgmt.settings import is_loopback_host

__all__ = ["register_model", "register_model_with_params"]

DEFAULT_ADDRESS = "http://localhost:8081"
ADDRESS_VARIABLE = "TORCHMGMT_MANAGEMENT_ADDRESS"
TOKEN_VARIABLE = "TORCHMGMT_TOKEN"
KEY_FILE = "key_file.json"


def register_model(
    model_name: str,
    url: str,
    *,
    management_address: str | None = None,
    token: str | None = None,
    timeout: float | None = None,
) -> requests.Response:
    """Ask a running server to register ``url`` as ``model_name`` with one worker, and wait until it is ready.

    ``management_address`` is such as ``http://localhost:8081``, the default; the environment's
    ``TORCHMGMT_MANAGEMENT_ADDRESS`` changes that. ``token`` is a key for servers that want one; if not given, the
    environment's ``TORCHMGMT_TOKEN``, or the management key of ``key_file.json`` in the working directory, which goes
    to loopback addresses only. ``timeout`` in seconds bounds the wait for each part of the answer; None waits for ever.

    Returns the response, whatever its code; a 405 also warns that the server's model API is off. Raises only what
    :mod:`requests` raises. Blocks; may be called from any thread.
    """
    params = {"model_name": model_name, "url": url, "initial_workers": 1, "synchronous": "true"}
    return _post(params, management_address, token, timeout)


def register_model_with_params(
    params: Mapping[str, Any] | Iterable[tuple[str, Any]],
    *,
    management_address: str | None = None,
    token: str | None = None,
    timeout: float | None = None,
) -> requests.Response:
    """Ask a running server to register a model with ``params``, sent as given in the query string.

    ``params`` are those of ``POST /models``, a dict or pairs. The rest is as for :func:`register_model`.
    """
    return _post(params, management_address, token, timeout)


def _post(
    params: Mapping[str, Any] | Iterable[tuple[str, Any]],
    management_address: str | None,
    token: str | None,
    timeout: float | None,
) -> requests.Response:
    address = management_address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    address = address.rstrip("/")
    is_local = _is_loopback(address)
    key = token or os.environ.get(TOKEN_VARIABLE) or (_key_from_file() if is_local else None)
    response = requests.post(
        f"{address}/models",
        params=params if isinstance(params, Mapping) else list(params),
        headers={"Authorization": f"Bearer {key}"} if key else None,
        timeout=timeout,
        # A proxy cannot reach this machine's loopback, and must not see its key.
        proxies={"http": "", "https": ""} if is_local else None,
    )
    if response.status_code == requests.codes.method_not_allowed:
        warnings.warn(
            f"{address} does not allow registering over HTTP; start the server with --enable-model-api",
            stacklevel=3,  # the caller of the public function
        )
    return response


def _is_loopback(address: str) -> bool:
    try:
        return is_loopback_host(urlsplit(address).hostname or "")
    except ValueError:  # requests will say what is wrong with it
        return False


def _key_from_file() -> str | None:
    """Read the key that a server in this working directory wrote; each time, because it expires."""
    try:
        key = json.loads(Path(KEY_FILE).read_text("utf-8"))["management"]["key"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return key.strip() if isinstance(key, str) else None
