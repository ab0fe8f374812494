"""The manifest and the configuration: read as the archiver writes them, refused where they cannot be right."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmgmt.archive.manifest import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Manifest,
    read_config,
    read_manifest,
)
from torchmgmt.errors import InvalidArchive

MODEL = {"modelName": "m", "handler": "handler.py", "modelVersion": "1.0"}


def write(folder: Path, raw: Any, name: str = "MAR-INF/MANIFEST.json") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(raw, bytes):
        path.write_bytes(raw)
    else:
        path.write_text(raw if isinstance(raw, str) else json.dumps(raw), "utf-8")
    return folder


def manifest_of(folder: Path, raw: Any) -> Manifest:
    found = read_manifest(write(folder, raw), "m.mar")
    assert found is not None
    return found


def refusal(folder: Path, raw: Any) -> str:
    with pytest.raises(InvalidArchive) as caught:
        manifest_of(folder, raw)
    assert caught.value.source == "m.mar"
    return caught.value.reason


def config_of(folder: Path, text: str | bytes, manifest: Manifest | None = None) -> Any:
    return read_config(write(folder, text, "model-config.yaml"), manifest, "m.mar")


def config_refusal(folder: Path, text: str | bytes) -> str:
    with pytest.raises(InvalidArchive) as caught:
        config_of(folder, text)
    return caught.value.reason


# ---------------------------------------------------------------------------------------- manifest


def test_no_manifest_is_none(tmp_path: Path) -> None:
    """A folder without one is legal; the caller must then say more."""
    assert read_manifest(tmp_path, "m") is None


def test_every_key_is_read(tmp_path: Path) -> None:
    """Each key of the archiver's has its field, and the whole object is kept as found."""
    model = {
        **MODEL,
        "modelFile": "model.py",
        "serializedFile": "w.pt",
        "requirementsFile": "requirements.txt",
        "configFile": "cfg/my.yaml",
        "envelope": "json",
        "extensions": {"a": 1},
    }
    raw = {"runtime": "LSP", "model": model, "archiverVersion": "0.12.0"}
    assert manifest_of(tmp_path, raw) == Manifest(
        model_name="m",
        version="1.0",
        handler="handler.py",
        model_file="model.py",
        serialized_file="w.pt",
        runtime="LSP",
        requirements_file="requirements.txt",
        config_file="cfg/my.yaml",
        envelope="json",
        raw=raw,
    )


def test_what_is_missing_null_or_blank_is_not_said(tmp_path: Path) -> None:
    """The caller may name the model and the handler; version and runtime have defaults."""
    raw = {"model": {"handler": None, "modelName": " ", "modelVersion": ""}}
    assert manifest_of(tmp_path, raw) == Manifest(raw=raw)


@pytest.mark.parametrize(
    "given_runtime, runtime",
    [("python", "python"), ("PYTHON", "python"), ("Python3", "python3"), ("lsp", "LSP")],
)
def test_runtimes_in_any_case(tmp_path: Path, given_runtime: str, runtime: str) -> None:
    """The runtime is told apart without its case, and written in one way."""
    assert manifest_of(tmp_path, {"runtime": given_runtime, "model": MODEL}).runtime == runtime


def test_another_runtime_is_refused(tmp_path: Path) -> None:
    """The message says which there are."""
    reason = refusal(tmp_path, {"runtime": "cobol", "model": MODEL})
    assert "'cobol'" in reason
    assert "python, python3, LSP" in reason


@pytest.mark.parametrize("written", ["1.10", "2", "1e2", "3.0"])
def test_a_version_written_as_a_number_is_kept_as_written(tmp_path: Path, written: str) -> None:
    """1.10 without quotes is version 1.10, as TorchServe takes it, not 1.1."""
    text = '{"model": {"modelName": "m", "modelVersion": %s}}' % written  # noqa: UP031
    assert manifest_of(tmp_path, text).version == written


@pytest.mark.parametrize("key", ["modelName", "modelVersion", "handler", "modelFile", "serializedFile", "configFile"])
@pytest.mark.parametrize("value", [["a"], {"a": 1}, True, False])
def test_a_wrong_type_is_named(tmp_path: Path, key: str, value: object) -> None:
    """The message has the key, what was found, and what it must be."""
    reason = refusal(tmp_path, {"model": {**MODEL, key: value}})
    assert f'"{key}"' in reason
    assert repr(value) in reason
    assert "must be text" in reason


@pytest.mark.parametrize("key", ["handler", "modelFile", "serializedFile", "requirementsFile", "configFile"])
@pytest.mark.parametrize("value", ["../x", "/etc/passwd", "a/../../x", "..\\x", "a\0b", "."])
def test_files_stay_inside_the_folder(tmp_path: Path, key: str, value: str) -> None:
    """A manifest cannot make anybody read, import or run a file from elsewhere."""
    assert f'"{key}"' in refusal(tmp_path, {"model": {**MODEL, key: value}})


@pytest.mark.parametrize("handler", ["handler:fn", "h:f", "sub/handler.py", "image_classifier"])
def test_all_forms_of_handlers_pass(tmp_path: Path, handler: str) -> None:
    """The colon of module:function is no drive letter."""
    assert manifest_of(tmp_path, {"model": {**MODEL, "handler": handler}}).handler == handler


@pytest.mark.parametrize("key", ["modelName", "modelVersion"])
@pytest.mark.parametrize("value", ["a/b", "a\0b"])
def test_labels_fit_into_a_path_of_the_api(tmp_path: Path, key: str, value: str) -> None:
    """A name that no request could name is refused here, where the archive is to blame."""
    assert f'"{key}"' in refusal(tmp_path, {"model": {**MODEL, key: value}})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"model": []}',
        b'{"model": null}',
        b"[" * 100_000,
        b'{"model": {"modelVersion": ' + b"9" * 10_000 + b"}}",
        b'{"model": {"modelVersion": NaN}}',
    ],
    ids=lambda raw: raw[:30],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, raw: bytes) -> None:
    """Broken, empty, endless or of another shape: an error of ours, never one of the parser's."""
    refusal(tmp_path, raw)


def test_a_byte_order_mark_is_fine(tmp_path: Path) -> None:
    """Windows editors write one."""
    raw = b"\xef\xbb\xbf" + json.dumps({"model": MODEL}).encode()
    assert manifest_of(tmp_path, raw).model_name == "m"


def test_a_huge_manifest_is_refused(tmp_path: Path) -> None:
    """No more than the limit is ever read of it."""
    reason = refusal(tmp_path, json.dumps({"model": MODEL}) + " " * MAX_MANIFEST_BYTES)
    assert str(MAX_MANIFEST_BYTES) in reason


@pytest.mark.parametrize("make", ["mkdir", "mkfifo", "link"])
def test_a_manifest_is_a_file(tmp_path: Path, make: str) -> None:
    """A pipe in its place would block for ever; a dangling link is not the same as none."""
    (tmp_path / "MAR-INF").mkdir()
    path = tmp_path / "MAR-INF" / "MANIFEST.json"
    if make == "link":
        path.symlink_to("nowhere")
    else:
        getattr(os, make)(path)
    with pytest.raises(InvalidArchive, match="no file"):
        read_manifest(tmp_path, "m")


@given(
    raw=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["model", "runtime", "modelName", "handler", "modelVersion"]), inner)
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_manifest_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: object) -> None:
    """Nothing but InvalidArchive comes out of any JSON whatever."""
    try:
        found = manifest_of(tmp_path_factory.mktemp("any"), raw)
    except InvalidArchive:
        return
    assert found.version
    assert found.runtime in {"python", "python3", "LSP"}


# ------------------------------------------------------------------------------------------ config


def test_no_config_is_empty(tmp_path: Path) -> None:
    """Without a file there is nothing configured; an empty one says the same."""
    assert read_config(tmp_path, Manifest(), "m") == {}
    assert config_of(tmp_path, "# nothing\n") == {}


def test_the_config_is_found_without_a_manifest(tmp_path: Path) -> None:
    """model-config.yaml counts by its name alone."""
    assert config_of(tmp_path, "minWorkers: 2\nhandler: {a: [1, x]}\n") == {
        "minWorkers": 2,
        "handler": {"a": [1, "x"]},
    }


def test_the_manifest_names_another_config(tmp_path: Path) -> None:
    """Then that file is read, and it must be there."""
    write(tmp_path, "maxWorkers: 7", "my.yaml")
    write(tmp_path, "maxWorkers: 1", "model-config.yaml")
    assert read_config(tmp_path, Manifest(config_file="my.yaml"), "m") == {"maxWorkers": 7}
    with pytest.raises(InvalidArchive, match=r"gone\.yaml is missing"):
        read_config(tmp_path, Manifest(config_file="gone.yaml"), "m")


def test_anchors_and_merges_are_fine(tmp_path: Path) -> None:
    """What people write by hand keeps working."""
    text = "base: &b {x: 1}\nhandler: {<<: *b, y: 2}\nlist: [*b, *b]\n"
    assert config_of(tmp_path, text) == {
        "base": {"x": 1},
        "handler": {"x": 1, "y": 2},
        "list": [{"x": 1}, {"x": 1}],
    }


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch pwned']",
        "a: !!python/name:os.system",
        "!!python/object/new:os._wrap_close {}",
        "a: !mine 1",
    ],
)
def test_tags_run_no_code(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML that asks for Python objects is refused."""
    monkeypatch.chdir(tmp_path)
    assert "not plain YAML" in config_refusal(tmp_path, text)
    assert not (tmp_path / "pwned").exists()


def _laughs(open_: str, close: str) -> str:
    lines = ["a0: &a0 {k: v}"]
    for level in range(1, 12):
        inner = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} {open_}{inner}{close}")
    return "\n".join(lines)


@pytest.mark.parametrize("text", [_laughs("[", "]"), _laughs("{<<: [", "]}")], ids=["list", "merge"])
def test_a_billion_laughs_are_refused_at_once(tmp_path: Path, text: str) -> None:
    """Aliases of aliases are counted as what they stand for, before anything is built of them."""
    assert "aliases" in config_refusal(tmp_path, text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: &a [*a]", "contains itself"),
        ("[1, 2]", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("1: x", "keys are text"),
        ("a: 1\n---\nb: 2", "not plain YAML"),
        ("a: [", "not plain YAML"),
        ("a: 2024-99-99", "not plain YAML"),
        ("? [a]\n: b", "not plain YAML"),
        ("a: " + "[" * 5000, "not plain YAML"),
        ("a: " + "9" * 10_000, "not plain YAML"),
        (b"a: \xff", "not UTF-8"),
        (b"a: \x00", "not plain YAML"),
        ("a: " + "x" * MAX_CONFIG_BYTES, str(MAX_CONFIG_BYTES)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: str | bytes, expected: str) -> None:
    """Each with its reason, none with an exception of the parser's."""
    assert expected in config_refusal(tmp_path, text)
