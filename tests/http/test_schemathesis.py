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
from collections import Counter
from pathlib import Path

import attrs
import pytest

from tests.http.fakes import KeepingManager, info_of
from torchmgmt.http import operations as ops
from torchmgmt.http import serve
from torchmgmt.http.server import bind, start_inference
from torchmgmt.settings import Address

pytestmark = pytest.mark.timeout(120)  # it takes 15 s, alone

HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
CONFIG = ""  # not the one of whoever runs the tests


@pytest.fixture
def manager() -> KeepingManager:
    second = attrs.evolve(info_of("noop", "2.0"), is_default=False)
    return KeepingManager(info_of("noop", workers=1), second, info_of("other"))


@pytest.fixture
def look_at(tmp_path):
    """Have schemathesis look at the API at an address; return what it printed, which says that it found nothing."""
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)

    def look(url: str, examples: int) -> str:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", f"--config-file={config}", "run", f"{url}/api-description"),
                *("--checks=all", "--continue-on-failure", f"--max-examples={examples}"),
                *("--generation-deterministic", "--no-color", "--request-timeout=20"),
            ],
            env={**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS), "PYTHONIOENCODING": "utf-8"},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return look


def count_of(operations) -> int:
    """How many of them schemathesis tests: it leaves out OPTIONS, which most APIs do not describe."""
    return sum(operation.method != "OPTIONS" for operation in operations)


def test_the_management_api_is_as_described(manager, look_at):
    """Whatever is sent, each operation answers as the description says; and each does what it is for, many times."""
    with serve(manager) as server:
        printed = look_at(server.url, examples=30)
    assert re.search(rf"Tested: {count_of(ops.MANAGEMENT)}\b", printed), printed
    assert re.search(r"API Links: +[1-9]", printed), printed
    calls = Counter(name for name, _, _ in manager.calls)
    assert all(calls[name] >= 5 for name in ("register", "models", "describe", "scale", "set_default", "unregister"))


def test_the_inference_address_is_as_described(manager, look_at):
    """The same holds there."""
    server = start_inference(manager, bind(Address("http", "127.0.0.1", 0)))
    try:
        printed = look_at(server.url, examples=30)
    finally:
        server.close()
    assert re.search(rf"Tested: {count_of(ops.INFERENCE)}\b", printed), printed
