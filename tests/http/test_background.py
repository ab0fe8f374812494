"""The server in the background: what --start and --stop say, what they leave behind, and how they end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.http.archives import SLOW_TO_LOAD, write_model
from tests.http.conftest import Client
from tests.http.test_program import PORTS, STARTED, environment, run
from torchmgmt.http.pid_file import PidFile
from torchmgmt.http.systemd import notify_systemd


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a server; whatever was started from it is gone at the end."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    pid = PidFile.of_working_directory().running()
    if pid is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            kill(pid)
    PidFile.of_working_directory().path.unlink(missing_ok=True)


def kill(pid: int) -> None:
    server = psutil.Process(pid)
    family = [server, *server.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def wait_for_pid() -> int:
    pause = threading.Event()
    while (pid := PidFile.of_working_directory().running()) is None:
        pause.wait(0.02)
    return pid


def test_it_is_started_and_stopped(folder: Path) -> None:
    """--start returns once it serves, a second one is refused, --stop returns once nothing is left; both say so."""
    write_model(folder / "model_store", "noop")
    started = run("--start", *PORTS, "--models", "all", "--default-workers-per-model", "1", cwd=folder)
    assert (started.returncode, started.stderr) == (0, "")
    assert STARTED in started.stdout.splitlines()
    assert f"Log: {folder / 'logs' / 'torchmgmt.log'}" in started.stdout
    assert STARTED in (folder / "logs" / "torchmgmt.log").read_text()
    (url,) = re.findall(r"Management address: (\S+)", started.stdout)
    assert Client(url).get("/models/noop").json()[0]["workers"][0]["status"] == "READY"
    pid = PidFile.of_working_directory().running()
    assert pid is not None
    assert os.getsid(pid) == pid  # the end of this terminal does not reach it
    server = psutil.Process(pid)
    family = [server, *server.children(recursive=True)]

    again = run("--start", *PORTS, cwd=folder)
    assert again.returncode == 1
    assert f"runs already (process {pid}); --stop ends it" in again.stderr
    assert server.is_running()

    stopped = run("--stop", cwd=folder)
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (0, "Model server stopped\n", "")
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert not PidFile.of_working_directory().path.exists()


def test_stopping_what_does_not_run_is_no_failure(folder: Path) -> None:
    """Scripts stop before they start; what runs from another folder is named and left alone."""
    (folder / "other").mkdir()
    assert run("--start", *PORTS, cwd=folder).returncode == 0
    pid = wait_for_pid()
    stopped = run("--stop", cwd=folder / "other")
    assert stopped.returncode == 0
    assert stopped.stdout.startswith("No server that was started from this folder runs; from ")
    assert f"{folder} (process {pid})" in stopped.stdout
    assert PidFile.of_working_directory().running() == pid
    assert run("--stop", cwd=folder).returncode == 0


def test_one_that_was_killed_stands_in_nobodys_way(folder: Path) -> None:
    """A file that a dead server left behind names nobody, whoever has its number now."""
    assert run("--start", *PORTS, cwd=folder).returncode == 0
    kill(wait_for_pid())
    assert PidFile.of_working_directory().path.exists()
    PidFile.of_working_directory().path.write_text(f"{os.getpid()}\n")
    assert "No server that was started from this folder runs" in run("--stop", cwd=folder).stdout
    assert run("--start", *PORTS, cwd=folder).returncode == 0
    assert run("--stop", cwd=folder).stdout == "Model server stopped\n"


def test_one_that_cannot_serve_says_why_where_it_was_started(folder: Path) -> None:
    """An occupied address and a missing store: the reason on stderr, the code of the foreground, nothing left."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        started = run("--start", *PORTS, "--management-address", url, cwd=folder)
    assert started.returncode == 1
    assert started.stderr == f"torchmgmt: error: Cannot listen at {url}: Address already in use\n"
    started = run("--start", *PORTS, "--model-store", "nowhere", cwd=folder)
    assert started.returncode == 2
    assert started.stderr == "torchmgmt: error: model_store is 'nowhere', but must be a folder that exists\n"
    (folder / "logs" / "torchmgmt.log").unlink()
    (folder / "logs").rmdir()
    (folder / "logs").touch()
    started = run("--start", *PORTS, cwd=folder)
    assert (started.returncode, "The log cannot be written" in started.stderr) == (1, True)
    assert PidFile.of_working_directory().running() is None


@pytest.fixture
def starter(folder: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """A --start that waits for a model which takes a minute to load."""
    write_model(folder / "model_store", "slow", SLOW_TO_LOAD)
    command = [sys.executable, "-m", "torchmgmt.http", "--start", *PORTS, "--models", "all"]
    with contextlib.ExitStack() as stack:

        def start() -> subprocess.Popen[str]:
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process: subprocess.Popen[str] = subprocess.Popen(command, cwd=folder, env=environment(), **options)  # type: ignore[call-overload]
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def test_one_that_dies_while_it_starts_is_a_failure(starter: Callable[[], subprocess.Popen[str]]) -> None:
    """Nobody waits for a server that was killed; what is said names its code and its log."""
    process = starter()
    kill(wait_for_pid())
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert re.search(r"The server ended with code -9 before it served; \S+/logs/torchmgmt.log may say why", errors)


def test_ctrl_c_while_it_starts_ends_the_server(starter: Callable[[], subprocess.Popen[str]]) -> None:
    """Code 130, and no server that nobody knows of."""
    process = starter()
    server = psutil.Process(wait_for_pid())
    assert process.stdout is not None
    process.stdout.readline()  # from here on it waits for the server
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=50)
    assert (process.returncode, "the server was ended" in errors) == (130, True)
    assert not server.is_running()


def test_start_in_the_foreground_stays_and_can_be_stopped(folder: Path) -> None:
    """--start --foreground is what --stop ends, too; its exit code is that of SIGTERM."""
    command = [sys.executable, "-m", "torchmgmt.http", "--start", "--foreground", *PORTS]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None
            assert any(line == STARTED + "\n" for line in process.stdout)
            assert PidFile.of_working_directory().running() == process.pid
            # Ended by a thread: it is this process's child, and --stop returns once it is waited for.
            reaper = threading.Thread(target=process.wait)
            reaper.start()
            assert run("--stop", cwd=folder).stdout == "Model server stopped\n"
            reaper.join()
            assert process.returncode == 0
        finally:
            process.kill()


def test_the_file_of_another_user_or_a_link_is_not_believed(folder: Path) -> None:
    """Everybody may write to the folder for temporary files; nobody can have another's process ended that way."""
    pid_file = PidFile.of_working_directory()
    (folder / "elsewhere").write_text(f"{os.getpid()}\n")
    pid_file.path.symlink_to(folder / "elsewhere")
    stopped = run("--stop", cwd=folder)
    assert (stopped.returncode, stopped.stderr.startswith("torchmgmt: error: The server cannot be ended: ")) == (
        1,
        True,
    )
    assert run("--start", *PORTS, cwd=folder).returncode == 1
    assert (folder / "elsewhere").read_text() == f"{os.getpid()}\n"
    (folder / "other").mkdir()
    assert run("--stop", cwd=folder / "other").returncode == 0
    pid_file.path.unlink()


def test_only_one_holds_the_file(folder: Path) -> None:
    """While it is held, a second holder is refused; afterwards the file is gone."""
    pid_file = PidFile.of_working_directory()
    assert pid_file.running() is None
    with pid_file.held():
        assert pid_file.running() == os.getpid()
        with pytest.raises(OSError, match="runs already"), pid_file.held():
            pytest.fail("held twice")
        assert pid_file.running() == os.getpid()
    assert pid_file.running() is None
    assert not pid_file.path.exists()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_of_the_start_and_the_end(folder: Path, abstract: bool) -> None:
    """READY=1 comes after all is loaded, STOPPING=1 before anything ends; by both kinds of addresses."""
    address = f"@torchmgmt-test-{os.getpid()}" if abstract else os.path.relpath(folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(30)
        sock.bind(address.replace("@", "\0"))
        command = [sys.executable, "-m", "torchmgmt.http", *PORTS]
        variables = {**environment(), "NOTIFY_SOCKET": address if abstract else str(folder / address)}
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, env=variables) as process:
            try:
                assert sock.recv(100) == b"READY=1"
                assert process.stdout is not None
                assert STARTED.encode() + b"\n" in process.stdout
                process.terminate()
                assert sock.recv(100) == b"STOPPING=1"
                assert process.wait(30) == 0
            finally:
                process.kill()


@pytest.mark.parametrize("address", [None, "", "vsock:1:2", "/nowhere/at/all"])
def test_without_systemd_nothing_is_told(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    """No socket, one of another kind, or one that nobody listens at, stop nothing."""
    if address is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify_systemd("READY=1")
