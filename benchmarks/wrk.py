"""wrk, the load generator: run against an address, and its report read."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from benchmarks.measure import Missing

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_TIMEOUT_S = 120
_LUA = """\
wrk.method = "POST"
wrk.headers["Content-Type"] = "{content_type}"
local sizes, requests, sent = {{{sizes}}}, {{}}, 0
function init(args)
  for place, size in ipairs(sizes) do
    requests[place] = wrk.format(nil, nil, nil, size > 0 and string.rep("x", size) or {body})
  end
end
function request()
  sent = sent + 1
  if {is_numbered} then
    wrk.headers["X-Request-Id"] = tostring(sent)
    return wrk.format(nil, nil, nil, {body})
  end
  return requests[sent % #requests + 1]
end
"""


@frozen
class Load:
    """What wrk reports of a run."""

    requests: int
    rate: float
    """Answers a second."""
    p50_s: float
    p99_s: float
    errors: int
    """Answers that were no 2xx or 3xx, and connections that broke or were not made, and time-outs."""


@frozen
class Requests:
    """What is sent with each POST: one body, or bodies of these sizes in turn."""

    body: str = '{"x": 1}'
    sizes: tuple[int, ...] = (0,)
    content_type: str = "application/json"
    is_numbered: bool = False
    """Whether each has a number in its head (X-Request-Id), so that no two heads are the same; with ``body`` only."""

    @classmethod
    def of_sizes(cls, *sizes: int) -> Requests:
        """Return raw bodies of so many bytes (at least 1)."""
        return cls("", sizes, "application/octet-stream")

    def script(self) -> str:
        """Return it as a script for wrk."""
        sizes = ", ".join(map(str, self.sizes))
        return _LUA.format(
            content_type=self.content_type,
            sizes=sizes,
            body=f"[==[{self.body}]==]",
            is_numbered=str(self.is_numbered).lower(),
        )


def run(url: str, connections: int, seconds: int, requests: Requests | None = None) -> Load:
    """Keep so many connections busy for so long (at least 1 s). Blocks.

    Raises Missing if wrk is not there, if it fails, if nothing was answered, or if any answer was an error: what errors
    measure is something else.
    """
    with _script(requests or Requests()) as script:
        done = subprocess.run(
            _command(url, connections, seconds, script),
            capture_output=True, text=True, timeout=seconds + _TIMEOUT_S, check=False,
        )  # fmt: skip
    if done.returncode:
        raise Missing(f"wrk failed: {done.stderr.strip() or done.stdout.strip()}")
    load = parse(done.stdout)
    if load.errors:
        raise Missing(f"{load.errors} of {load.requests} answers from {url} were errors")
    if not load.requests:
        raise Missing(f"nothing was answered within {seconds} s by {url}")
    return load


@contextmanager
def flood(url: str, connections: int, requests: Requests | None = None) -> Iterator[None]:
    """Keep so many connections busy while the block runs; what is answered does not matter. Raises Missing without wrk."""
    with _script(requests or Requests()) as script:
        command = _command(url, connections, 3600, script)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.kill()
            process.wait()


def parse(text: str) -> Load:
    """Read the report of ``wrk --latency``; raise ValueError, with the report, if it is none."""
    counted = re.search(r"^ *(\d+) requests in ", text, re.MULTILINE)
    rate = re.search(r"^Requests/sec: +([\d.]+)$", text, re.MULTILINE)
    if counted is None or rate is None:
        raise ValueError(f"not a report of wrk --latency: {text!r}")
    refused = re.search(r"^ *Non-2xx or 3xx responses: (\d+)$", text, re.MULTILINE)
    broken = re.search(r"^ *Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)$", text, re.MULTILINE)
    errors = [each for match in (refused, broken) if match for each in match.groups()]
    return Load(
        int(counted[1]), float(rate[1]), _percentile(text, 50), _percentile(text, 99), sum(map(int, errors))
    )  # fmt: skip


def _percentile(text: str, percent: int) -> float:
    found = re.search(rf"^ *{percent}% +([\d.]+)(us|ms|s|m|h) *$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"no {percent}% in the report of wrk --latency: {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def _command(url: str, connections: int, seconds: int, script: Path) -> list[str]:
    program = shutil.which("wrk")
    if program is None:
        raise Missing("wrk is not installed: apt-get install wrk, or https://github.com/wg/wrk")
    # One thread: it can send ten times what the servers here can answer, and leaves them the other core.
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", f"{_TIMEOUT_S}s"]
    return [program, *options, "-s", str(script), url]


@contextmanager
def _script(requests: Requests) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as folder:
        file = Path(folder, "requests.lua")
        file.write_text(requests.script(), encoding="utf-8")
        yield file
