"""The helpers that call a running server: what they send where. No server is needed for that."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import requests

from torchmgmt import launcher


class Recorder:
    """Stands in for requests.post."""

    def __init__(self) -> None:
        self.code = 200
        self.url = ""
        self.sent: dict[str, Any] = {}

    def __call__(self, url: str, **sent: Any) -> requests.Response:
        self.url, self.sent = url, sent
        response = requests.Response()
        response.status_code = self.code
        return response


@pytest.fixture
def post(monkeypatch, tmp_path) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(launcher.requests, "post", recorder)
    monkeypatch.chdir(tmp_path)
    for name in (launcher.ADDRESS_VARIABLE, launcher.TOKEN_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return recorder


def write_key(path, key: object) -> None:
    path.write_text(json.dumps({"management": {"key": key, "expiration time": "2026-11-23T00:00:00Z"}}))


def test_register_model_asks_for_one_worker_and_waits(post):
    """register_model posts name, url, one worker and synchronous to the usual address."""
    response = launcher.register_model("noop", "noop.mar")
    assert response.status_code == 200
    assert post.url == "http://localhost:8081/models"
    expected = {
        "model_name": "noop",
        "url": "noop.mar",
        "initial_workers": 1,
        "synchronous": "true",
    }
    assert post.sent["params"] == expected
    assert post.sent["headers"] is None


@pytest.mark.parametrize("params", [{"url": "a.mar", "batch_size": 4}, [("url", "a.mar"), ("x", "1")]])
def test_params_go_as_given(post, params):
    """register_model_with_params adds nothing and drops nothing."""
    launcher.register_model_with_params(params)
    assert post.sent["params"] == params


def test_the_address_of_the_call_wins_over_the_environment(post, monkeypatch):
    """Call, then environment, then default."""
    monkeypatch.setenv(launcher.ADDRESS_VARIABLE, "http://127.0.0.1:1/")
    launcher.register_model("a", "b")
    assert post.url == "http://127.0.0.1:1/models"
    launcher.register_model("a", "b", management_address="http://[::1]:2", timeout=3)
    assert post.url == "http://[::1]:2/models"
    assert post.sent["timeout"] == 3


def test_the_token_of_the_call_wins_over_environment_and_key_file(post, monkeypatch, tmp_path):
    """Call, then environment, then key_file.json."""
    write_key(tmp_path / "key_file.json", "from-file")
    launcher.register_model("a", "b")
    assert post.sent["headers"] == {"Authorization": "Bearer from-file"}
    monkeypatch.setenv(launcher.TOKEN_VARIABLE, "from-environment")
    launcher.register_model("a", "b")
    assert post.sent["headers"] == {"Authorization": "Bearer from-environment"}
    launcher.register_model("a", "b", token="from-call")
    assert post.sent["headers"] == {"Authorization": "Bearer from-call"}


def test_the_key_file_is_read_again_each_time(post, tmp_path):
    """A key that was renewed since the last call is the one that is sent."""
    for key in ("one", "two"):
        write_key(tmp_path / "key_file.json", key)
        launcher.register_model("a", "b")
        assert post.sent["headers"] == {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("address", ["http://example.org:8081", "http://10.0.0.1", "nonsense", "http://[x"])
def test_the_key_file_goes_to_loopback_only(post, tmp_path, address):
    """A key found in a file is never sent to another machine."""
    write_key(tmp_path / "key_file.json", "secret")
    launcher.register_model("a", "b", management_address=address)
    assert post.sent["headers"] is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"management": 1}', '{"management": {"key": 1}}', "\xff"])
def test_a_broken_key_file_is_no_key(post, tmp_path, text):
    """A key file that cannot be used raises nothing: only requests may raise."""
    (tmp_path / "key_file.json").write_text(text, "latin-1")
    launcher.register_model("a", "b")
    assert post.sent["headers"] is None


def test_a_loopback_address_bypasses_proxies(post):
    """A proxy could not reach it, and would see the key."""
    launcher.register_model("a", "b")
    assert post.sent["proxies"] == {"http": "", "https": ""}
    launcher.register_model("a", "b", management_address="http://example.org")
    assert post.sent["proxies"] is None


@pytest.mark.parametrize("helper", [launcher.register_model, launcher.register_model_with_params])
def test_a_405_warns_where_the_caller_is(post, helper):
    """A 405 names the flag, at the caller's line, and the response is returned all the same."""
    post.code = 405
    arguments = ("a", "b") if helper is launcher.register_model else ({},)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert helper(*arguments).status_code == 405
    (warning,) = caught
    assert "--enable-model-api" in str(warning.message)
    assert warning.filename == __file__
