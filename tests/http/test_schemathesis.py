"""schemathesis, told nothing but the API description, finds nothing wrong with what serves it.

All its checks run: no 5xx, the codes, headers, content types and bodies that are described and no other, wrong parameters
refused, right ones accepted, methods that are not described refused, what was made is there and what was deleted is gone.
It goes through the operations one by one and along the links of the description. What the contract says and OpenAPI cannot
is in schemathesis_hooks.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest

from tests.http.fakes import KeepingManager, info_of
from torchmgmt.http import operations as ops
from torchmgmt.http import serve
from torchmgmt.http.server import bind, start_inference
from torchmgmt.settings import Address, Settings

HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
# Those that are about the description; the others guess from the codes of one phase, where 404 and 409 are right.
CONFIG = """
[warnings]
fail-on = ["missing_deserializer", "unsupported_regex", "unused_openapi_auth"]
"""


pytestmark = pytest.mark.timeout(180)  # it takes a tenth of that, on a machine that does nothing else


@pytest.fixture
def manager() -> KeepingManager:
    second = attrs.evolve(info_of("other", "2.0"), is_default=False)
    return KeepingManager(info_of("noop", workers=1), info_of("other"), second)


@pytest.fixture
def look_at(tmp_path):
    """Have schemathesis look at the API at an address; return what it printed, which says that it found nothing."""
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)

    def look(url: str, *more: str, examples: int) -> str:
        url_of_description = f"{url}/api-description"
        options = ["--checks=all", "--continue-on-failure", "--generation-deterministic", f"--max-examples={examples}"]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "schemathesis.cli",
                f"--config-file={config}",
                "run",
                *options,
                *more,
                url_of_description,
            ],
            env={**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS), "PYTHONIOENCODING": "utf-8"},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            timeout=170,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return look


def assert_tested(printed: str, operations: Sequence[ops.Operation]) -> None:
    # schemathesis calls OPTIONS a matter of the web framework; test_openapi.py looks at the one that we describe.
    count = sum(operation.method != "OPTIONS" for operation in operations)
    assert re.search(rf"Tested: {count}\b", printed), printed


def test_the_management_api_is_as_described(manager, look_at):
    """Whatever is sent, each operation answers as the description says; and each did what it is for."""
    with serve(manager) as server:
        printed = look_at(server.url, examples=10)
    assert_tested(printed, ops.MANAGEMENT)
    assert re.search(r"API Links: +[1-9]", printed), printed
    assert all(manager.done[name] for name in ("register", "models", "describe", "scale", "set_default", "unregister"))


def test_the_inference_address_is_as_described(manager, look_at):
    """The same holds there."""
    server = start_inference(manager, bind(Address("http", "127.0.0.1", 0)))
    try:
        printed = look_at(server.url, examples=5)
    finally:
        server.close()
    assert_tested(printed, ops.INFERENCE)


def test_keys_are_needed_where_the_description_says_so(manager, look_at, tmp_path, monkeypatch):
    """With the key all is as above; without it, or with a wrong one, each operation that asks for it refuses."""
    monkeypatch.chdir(tmp_path)  # for the key file
    key = "k" * 40
    monkeypatch.setenv("TORCHMGMT_MANAGEMENT_KEY", key)
    settings = Settings(enable_model_api=True, disable_token_authorization=False)
    with serve(manager, settings=settings) as server:
        printed = look_at(server.url, f"--header=Authorization: Bearer {key}", "--phases=examples,fuzzing", examples=3)
    assert_tested(printed, ops.MANAGEMENT)
    assert manager.done["describe"]
