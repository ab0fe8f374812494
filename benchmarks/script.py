"""A Python process that runs a piece of code, says when it is ready, and ends when its stdin is closed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

READY = "ready"
"""The line that the code prints when it could answer its first request; then it reads stdin to the end."""


def start(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start a process that runs ``code``. Does not wait for :data:`READY`; whoever calls this calls :func:`end`."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_ready(process: subprocess.Popen[str]) -> None:
    """Block until ``process`` has said :data:`READY`; raise RuntimeError if it says anything else or ends."""
    said = process.stdout.readline().strip() if process.stdout else ""
    if said != READY:
        raise RuntimeError(f"a script said {said!r} instead of {READY!r}; its exit status: {process.poll()}")


def end(*processes: subprocess.Popen[str]) -> None:
    """Close the stdin of all ``processes``, then wait until they are gone; kill those that stay for 20 s."""
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
    for process in processes:
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def seconds_until_ready(code: str, *arguments: str | Path) -> float:
    """Run ``code`` in a new process and end it; return the seconds from its start until it was ready."""
    started = time.perf_counter()
    process = start(code, *arguments)
    try:
        wait_ready(process)
        return time.perf_counter() - started
    finally:
        end(process)
