"""The guard that every other test relies on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import attrs
import pytest

from tests import leaks

pytestmark = pytest.mark.timeout(120)

INNER = """
import os, socket, subprocess, sys, tempfile, threading, time
import pytest

kept = []
SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]
ORPHANING = "import subprocess; subprocess.Popen(['sleep', '61'], start_new_session=True)"


@pytest.fixture(scope="module")
def wider():
    with subprocess.Popen(SLEEPER) as process:
        yield process
        process.kill()


@pytest.fixture(scope="class")
def growing(leak_guard):
    with leak_guard.shared():
        kept.append(threading.Event())
        yield kept[-1]
        kept[-1].set()


@pytest.fixture(scope="class")
def growing_for_ever(leak_guard):
    with leak_guard.shared():
        yield


def test_clean():
    with subprocess.Popen(SLEEPER) as process, tempfile.TemporaryDirectory(prefix="torchmgmt-"):
        process.kill()


def test_thread():
    threading.Thread(target=time.sleep, args=(60,), name="forgotten", daemon=True).start()


def test_thread_that_winds_down():
    threading.Thread(target=time.sleep, args=(0.1,), daemon=True).start()


def test_process():
    kept.append(subprocess.Popen(SLEEPER))


def test_zombie():
    kept.append(subprocess.Popen([sys.executable, "-c", ""]))


def test_orphan():
    subprocess.run([sys.executable, "-c", ORPHANING])


def test_forked():
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)


def test_folder():
    tempfile.mkdtemp(prefix="torchmgmt-")


def test_socket():
    kept.append(socket.socket())


def test_pipe():
    kept.append(os.pipe())


def test_wider_fixture(wider):
    pass


def test_wider_fixture_again(wider):
    assert wider.poll() is None


class TestGrowing:
    def test_growing(self, growing):
        threading.Thread(target=growing.wait, daemon=True).start()

    def test_growing_again(self, growing):
        threading.Thread(target=growing.wait, daemon=True).start()


class TestGrowingForEver:
    def test_growing_for_ever(self, growing_for_ever):
        threading.Thread(target=time.sleep, args=(60,), name="grown", daemon=True).start()


def test_clean_at_the_end():
    pass
"""

LEAKING = {
    "test_thread": "thread 'forgotten'",
    "test_process": "time.sleep(60)",
    "test_zombie": "never waited for",
    "test_orphan": "sleep 61",
    "test_forked": "process",
    "test_folder": "temporary path",
    "test_socket": "socket:",
    "test_pipe": "pipe:",
    "test_growing_for_ever": "a shared fixture left behind:\n  thread 'grown'",
}
CLEAN = (
    "test_clean",
    "test_thread_that_winds_down",
    "test_wider_fixture",
    "test_wider_fixture_again",
    "test_growing",
    "test_growing_again",
    "test_clean_at_the_end",
)


@attrs.frozen
class InnerRun:
    """What a pytest run of `INNER` reported: test -> its failure, None where it has none."""

    failures: dict[str, str | None]


@pytest.fixture(scope="module")
def inner(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> InnerRun:
    folder = tmp_path_factory.mktemp("inner")
    (folder / "test_inner.py").write_text(INNER)
    command = [sys.executable, "-m", "pytest", "-p", "tests.leaks", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, "--rootdir", str(folder), "--junitxml=report.xml", "-q"]
    command += ["-o", "leak_grace_s=0.4"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(repository),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    environment.pop("PYTEST_ADDOPTS", None)
    finished = subprocess.run(
        command,
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    report = folder / "report.xml"
    assert report.exists(), finished.stdout + finished.stderr
    failures: dict[str, str | None] = {}
    for case in ET.parse(report).iter("testcase"):
        troubles = [*case.iter("error"), *case.iter("failure")]
        failures.setdefault(case.attrib["name"], None)
        if troubles:
            failures[case.attrib["name"]] = "\n".join(trouble.text or "" for trouble in troubles)
    return InnerRun(failures)


@pytest.mark.parametrize("name", LEAKING)
def test_a_test_that_leaks_fails_and_the_message_names_what_leaked(inner: InnerRun, name: str) -> None:
    """Whatever a test leaves behind fails that test, by name."""
    failure = inner.failures[name]
    assert failure is not None
    assert LEAKING[name] in failure


@pytest.mark.parametrize("name", CLEAN)
def test_a_test_that_cleans_up_passes(inner: InnerRun, name: str) -> None:
    """What is gone in time, a wider fixture owns, or was left earlier is not blamed on a test."""
    assert inner.failures[name] is None


def test_every_inner_test_is_judged(inner: InnerRun) -> None:
    """The two lists above are complete."""
    assert set(inner.failures) == {*LEAKING, *CLEAN}


def test_leaked_processes_are_killed_after_the_report(inner: InnerRun) -> None:
    """Nothing that a leaking test started outlives the run."""
    del inner
    commands = [
        (entry / "cmdline").read_bytes()
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and leaks.carries(int(entry.name), os.environ[leaks.MARK])
    ]
    assert not [command for command in commands if b"sleep" in command]
