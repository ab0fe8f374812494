"""Programs that are no interpreter: they are never started again, and work with an interpreter that they name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.handlers import EVAL, write_folder

# As in a frozen program: its path is what starts it, and what is on its module path is of no use to others.
PROGRAM = """
import sys
with open({starts!r}, "a") as file:
    file.write("started\\n")
with open({starts!r}) as file:
    starts = len(file.readlines())
if starts > 3:
    raise SystemExit("it starts itself without end")
python, sys.executable, sys.frozen = sys.executable, {app!r}, True
from torchmgmt import ModelManager
if "named" in sys.argv:
    import multiprocessing
    multiprocessing.set_executable(python)
    sys.path.insert(0, {wrong!r})
with ModelManager() as manager:
    print(manager.register({folder!r}, model_name="m", handler="handler.py").predict("40 + 2"))
"""


@pytest.mark.parametrize("arguments", [[], ["named"]], ids=["refused", "named"])
def test_a_frozen_program_is_started_once(
    tmp_path: Path, repository: Path, light_torch: Path, arguments: list[str]
) -> None:
    """It is told how to name an interpreter, and has its workers from the one that it names."""
    app, starts, main, wrong = (tmp_path / name for name in ("app", "starts", "main.py", "wrong"))
    wrong.mkdir()
    (wrong / "selectors.py").write_text("raise ImportError('a module of the frozen program')\n")
    folder = write_folder(tmp_path / "m", EVAL)
    main.write_text(PROGRAM.format(starts=str(starts), app=str(app), wrong=str(wrong), folder=str(folder)))
    app.write_text(f'#!/bin/sh\nexec {sys.executable} -W error {main} "$@"\n')
    app.chmod(0o755)
    done = subprocess.run(
        [app, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env={**os.environ, "PYTHONPATH": f"{light_torch}{os.pathsep}{repository}"},
    )
    assert starts.read_text() == "started\n"
    if arguments:
        assert (done.stdout, done.stderr) == ("42\n", "")
    else:
        assert "multiprocessing.set_executable('/path/to/python')" in done.stderr
        assert done.returncode == 1
