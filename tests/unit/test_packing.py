"""Packing: archives that torchmgmt and TorchServe's tools read, the same bytes from the same files, nothing half written."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from torchmgmt.archive import ModelSources, inspect, pack, verify
from torchmgmt.archive.__main__ import main
from torchmgmt.errors import InvalidArchive, InvalidArgument, SourceNotFound


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    (folder / "data" / "deep").mkdir(parents=True)
    (folder / "handler.py").write_text("def handle(data, context): return data")
    (folder / "weights.pt").write_bytes(os.urandom(2000))
    (folder / "model.py").write_text("class Net: pass")
    (folder / "model-config.yaml").write_text("minWorkers: 2\n")
    (folder / "requirements.txt").write_text("numpy\n")
    (folder / "data" / "labels.json").write_text('["cat"]')
    (folder / "data" / "deep" / "more.txt").write_text("more")
    return folder


def pack_all(files: Path, destination: Path, **more: Any) -> Any:
    given = {
        "model_name": "net",
        "version": "2.0",
        "handler": f"{files / 'handler.py'}:handle",
        "serialized_file": files / "weights.pt",
        "model_file": files / "model.py",
        "config_file": files / "model-config.yaml",
        "requirements_file": files / "requirements.txt",
        "extra_files": [files / "data"],
        **more,
    }
    return pack(destination, **given)


def test_what_is_packed_is_what_is_opened(files, tmp_path):
    """Every file is in it, folders with their names, and the manifest names the parts."""
    packed = pack_all(files, tmp_path / "net.mar")
    sources = ModelSources(None)
    with sources.open(packed.path) as folder:
        assert (folder.manifest.model_name, folder.manifest.version) == ("net", "2.0")
        assert folder.manifest.handler == "handler.py:handle"
        assert folder.manifest.serialized_file == "weights.pt"
        assert folder.config == {"minWorkers": 2}
        assert folder.digest == packed.sha256
        for name in ("handler.py", "weights.pt", "model.py", "data/labels.json", "data/deep/more.txt"):
            assert (folder.path / name).read_bytes() == (files / name).read_bytes()
    sources.close()


def test_the_same_files_give_the_same_bytes(files, tmp_path):
    """Neither the time, nor the mode of the files, nor the order in which they are named counts."""
    first = pack_all(files, tmp_path / "a.mar", extra_files=[files / "data", files / "model-config.yaml"])
    for file in files.rglob("*"):
        os.utime(file, (1, 1))
    (files / "handler.py").chmod(0o700)
    second = pack_all(files, tmp_path / "b.mar", extra_files=[files / "model-config.yaml", files / "data"])
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.sha256 == second.sha256 == hashlib.sha256(first.path.read_bytes()).hexdigest()


def test_its_manifest_has_the_form_of_torch_model_archivers(files, tmp_path):
    """What the real one writes into a manifest, ours has, too."""
    packed = pack_all(files, tmp_path / "net.mar")
    with zipfile.ZipFile(packed.path) as archive:
        assert archive.testzip() is None
        manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))
    assert manifest["runtime"] == "python"
    assert manifest["model"]["serializedFile"] == "weights.pt"
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name=net", "--version=2.0"]
    command += [f"--handler={files / 'handler.py'}", f"--export-path={tmp_path}", "--force"]
    subprocess.run(command, check=True, capture_output=True, timeout=50)
    theirs = inspect(packed.path).manifest
    assert theirs is not None
    assert set(theirs.raw) <= set(manifest)
    assert set(theirs.raw["model"]) <= set(manifest["model"])


def test_names_may_be_chosen(files, tmp_path):
    """A mapping says what a file or folder is called in the archive."""
    extra = {"assets/classes.json": files / "data" / "labels.json", "tree": files / "data"}
    packed = pack_all(files, tmp_path / "net.mar", extra_files=extra)
    assert {"assets/classes.json", "tree/deep/more.txt"} <= set(packed.files)


@pytest.mark.parametrize(
    "change, argument",
    [
        ({"model_name": ""}, "model_name"),
        ({"model_name": "a/b"}, "model_name"),
        ({"version": " "}, "version"),
        ({"handler": "nowhere.py"}, "handler"),
        ({"serialized_file": "nowhere.pt"}, "serialized_file"),
        ({"extra_files": ["nowhere"]}, "extra_files"),
        ({"extra_files": "data"}, "extra_files"),
        ({"extra_files": {"../out": __file__}}, "extra_files"),
        ({"extra_files": {"handler.py": __file__}}, "extra_files"),
        ({"extra_files": {"MAR-INF/MANIFEST.json": __file__}}, "extra_files"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(files, tmp_path, change, argument):
    """The error names the argument, and nothing is written."""
    with pytest.raises(InvalidArgument) as caught:
        pack_all(files, tmp_path / "net.mar", **change)
    assert caught.value.argument == argument
    assert [each.name for each in tmp_path.iterdir()] == ["files"]


def test_an_archive_needs_a_folder_to_be_in(files, tmp_path):
    """A folder that does not exist is not made, and named."""
    with pytest.raises(InvalidArgument, match=r"none/net\.mar.*a folder that exists"):
        pack_all(files, tmp_path / "none" / "net.mar")


def test_what_would_be_refused_later_is_refused_now(files, tmp_path):
    """A configuration that cannot be read: nothing is left of the archive."""
    (files / "model-config.yaml").write_text("a: !!python/object:os.system {}")
    with pytest.raises(InvalidArchive):
        pack_all(files, tmp_path / "net.mar")
    assert [each.name for each in tmp_path.iterdir()] == ["files"]


def test_a_file_that_exists_is_replaced_only_when_asked(files, tmp_path):
    """And then at once, whole."""
    first = pack_all(files, tmp_path / "net.mar")
    with pytest.raises(InvalidArgument, match="overwrite"):
        pack_all(files, tmp_path / "net.mar")
    second = pack_all(files, tmp_path / "net.mar", version="3.0", overwrite=True)
    assert first.sha256 != second.sha256
    assert verify(tmp_path / "net.mar").manifest.version == "3.0"


def test_problems_are_shown_and_refused(tmp_path):
    """inspect says what is missing; verify refuses for it."""
    path = tmp_path / "bad.mar"
    with zipfile.ZipFile(path, "w") as archive:
        manifest = {"runtime": "python", "model": {"modelName": "a", "handler": "h.py", "serializedFile": "w.pt"}}
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
    found = inspect(path)
    assert [problem for problem in found.problems if "h.py" in problem]
    assert [problem for problem in found.problems if "w.pt" in problem]
    with pytest.raises(InvalidArchive, match=r"w\.pt"):
        verify(path)
    with pytest.raises(SourceNotFound):
        inspect(tmp_path / "nowhere.mar")


def test_the_command_packs_shows_and_verifies(files, tmp_path, capsys):
    """Exit code 0, and 1 or 2 with one line that says why."""
    archive = str(tmp_path / "net.mar")
    arguments = ["pack", archive, "--model-name", "net", "--handler", str(files / "handler.py")]
    assert main([*arguments, "--extra-files", str(files / "data")]) == 0
    assert "sha256=" in capsys.readouterr().out
    assert main(["inspect", archive]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["model"]["modelName"] == "net"
    assert main(["verify", archive]) == 0
    assert main(arguments) == 2
    Path(archive).write_bytes(b"no archive")
    assert main(["verify", archive]) == 1
    assert capsys.readouterr().err.count("torchmgmt: error:") == 2


def test_it_runs_as_a_module():
    """python -m torchmgmt.archive."""
    command = [sys.executable, "-m", "torchmgmt.archive", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0
    assert "verify" in done.stdout
