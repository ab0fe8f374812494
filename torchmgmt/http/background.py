"""Starting a server in the background, and ending it: ``--start`` and ``--stop``."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import psutil

from torchmgmt.http.console import FROM_ERROR, STARTED, Console
from torchmgmt.http.pid_file import PidFile
from torchmgmt.interpreter import interpreter

__all__ = ["start_in_background", "stop_in_background"]

MODULE = "torchmgmt.http.in_background"
LOG_NAME = "torchmgmt.log"
STOP_TIMEOUT_S = 40.0
"""Above what a server gives its requests and workers before it ends by force."""
INTERRUPTED = 130


def start_in_background(arguments: Sequence[str], console: Console) -> int:
    """Start a server with these arguments; return 0 once it serves, or its exit code once it has failed.

    Blocks until then. What the server says at its start, or why it fails, is said here, too.
    """
    try:
        python = interpreter()
    except OSError as error:
        return console.fail(f"The server cannot be started: {error}", 1)
    try:
        log = _open_log()
    except OSError as error:
        return console.fail(f"The log cannot be written: {error}", 1)
    with log:
        reader, writer = os.pipe()
        command = [python, "-m", MODULE, str(writer), *arguments]
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                start_new_session=True,  # so that neither Ctrl-C nor the end of this terminal reaches it
            )
        finally:
            os.close(writer)
    try:
        return _wait(child, reader, console, Path(log.name))
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        return console.fail("Interrupted; the server was ended", INTERRUPTED)


def stop_in_background(console: Console) -> int:
    """End the server that was started from this folder, and return once it is gone: 0, or 1 if it does not go."""
    pid = None
    try:
        pid_file = PidFile.of_working_directory()
        pid = pid_file.running()
        process = psutil.Process(pid) if pid is not None else None
        if process is None or pid_file.running() != pid:  # asked again: from here on, psutil knows a number used anew
            console.say("No server that was started from this folder runs" + _elsewhere())
            return 0
        process.terminate()
        process.wait(STOP_TIMEOUT_S)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        return console.fail(f"The server (process {pid}) did not end within {STOP_TIMEOUT_S:g} s", 1)
    except (OSError, psutil.Error) as error:
        return console.fail(f"The server cannot be ended: {error}", 1)
    console.say("Model server stopped")
    return 0


def _elsewhere() -> str:
    """Name the servers of other folders: TorchServe has one for all, which --stop ends from anywhere."""
    found = []
    for pid_file in PidFile.of_user():
        with contextlib.suppress(OSError, psutil.Error):  # somebody else's file of that name; one that ends meanwhile
            pid = pid_file.running()
            if pid is not None:
                found.append(f"{psutil.Process(pid).cwd()} (process {pid})")
    return f"; from {', '.join(found)} one does: --stop ends it from there" if found else ""


def _open_log() -> BinaryIO:
    """Open the log where TorchServe has its own: below logs/, or where the environment's LOG_LOCATION says."""
    folder = Path(os.environ.get("LOG_LOCATION") or "logs")
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / LOG_NAME).open("ab")


def _wait(child: subprocess.Popen[bytes], reader: int, console: Console, log: Path) -> int:
    has_started = has_said_why = False
    with open(reader, encoding="utf-8", errors="surrogateescape") as lines:
        for line in map(str.rstrip, lines):
            if line.startswith(FROM_ERROR):
                has_said_why = True
                sys.stderr.write(line.removeprefix(FROM_ERROR) + "\n")
            else:
                has_started = has_started or line == STARTED
                console.say(line)
    if has_started:
        console.say(f"Log: {log.resolve()}")
        return 0
    code = child.wait()
    if not has_said_why:
        console.fail(f"The server ended with code {code} before it served; {log.resolve()} may say why", 1)
    return code if code > 0 else 1
