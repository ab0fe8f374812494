"""Keys: their file, how long they count, what makes new ones, and that none is ever seen where it does not belong."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tests.http.conftest import Client
from tests.http.fakes import FakeManager, info_of
from tests.http.test_program import Program
from torchmgmt import register_model
from torchmgmt.errors import InvalidArgument
from torchmgmt.http import serve
from torchmgmt.http.errors import BadRequest
from torchmgmt.http.tokens import KEY_FILE, KeyName, Keys, Verdict, fixed_keys, forget_environment, keys_for
from torchmgmt.settings import Address, Settings

WITH_KEYS = Settings(disable_token_authorization=False, enable_model_api=True)
LOOPBACK = Address("http", "127.0.0.1", 8081)
NETWORK = Address("http", "0.0.0.0", 8081)
MANAGEMENT, INFERENCE, API = KeyName.MANAGEMENT, KeyName.INFERENCE, KeyName.API


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, and no keys in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in KeyName:
        for prefix in ("TORCHMGMT", "TS"):
            monkeypatch.delenv(f"{prefix}_{name.value.upper()}_KEY", raising=False)
    return tmp_path


@pytest.fixture
def keys() -> Iterator[Keys]:
    with keys_for(WITH_KEYS, [LOOPBACK], environ={}) as keys:
        yield keys


@pytest.fixture
def client() -> Iterator[Client]:
    with serve(FakeManager(info_of("noop", workers=1), settings=WITH_KEYS)) as server:
        yield Client(server.url)


def in_file(name: KeyName) -> str:
    return json.loads(Path(KEY_FILE).read_text())[name.value]["key"]


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_key_file_has_torchserves_form(keys, folder):
    """Three keys; two say when they expire, in UTC; only the owner may read them; nothing else is left beside it."""
    items = json.loads((folder / KEY_FILE).read_text())
    assert {name: set(item) for name, item in items.items()} == {
        "management": {"key", "expiration time"},
        "inference": {"key", "expiration time"},
        "API": {"key"},
    }
    assert len({item["key"] for item in items.values()}) == 3
    expires = datetime.fromisoformat(items["management"]["expiration time"].replace("Z", "+00:00"))
    assert timedelta(minutes=59) < expires - datetime.now(timezone.utc) <= timedelta(minutes=60)
    assert stat.S_IMODE((folder / KEY_FILE).stat().st_mode) == 0o600
    assert names_in(folder) == [KEY_FILE]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_nobody_else_may_read_the_key_file_whatever_the_umask(mask):
    """The mode is 600 from the first moment."""
    before = os.umask(mask)
    try:
        with keys_for(WITH_KEYS, [LOOPBACK], environ={}):
            assert stat.S_IMODE(Path(KEY_FILE).stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_the_key_file_goes_with_the_server(folder):
    """It is there while the server serves, and not after, also when the working directory has changed since."""
    with serve(FakeManager(settings=WITH_KEYS)):
        assert (folder / KEY_FILE).exists()
        os.chdir("/")
    assert names_in(folder) == []


def test_the_key_file_of_another_server_is_left_alone(keys, folder, caplog):
    """Who started later owns the file; the first one to end does not take it away."""
    with keys_for(WITH_KEYS, [LOOPBACK], environ={}) as later:
        assert "was there already" in caplog.text
        keys.close()
        assert later.judge(MANAGEMENT, f"Bearer {in_file(MANAGEMENT)}") is Verdict.VALID
    assert not (folder / KEY_FILE).exists()


def test_a_link_in_place_of_the_key_file_is_not_followed(folder):
    """The keys go to no other file than this one."""
    (folder / "target").write_text("mine")
    (folder / KEY_FILE).symlink_to("target")
    with keys_for(WITH_KEYS, [LOOPBACK], environ={}):
        assert not (folder / KEY_FILE).is_symlink()
    assert (folder / "target").read_text() == "mine"


def test_a_folder_that_takes_no_file_is_an_error_that_says_what_to_do(folder):
    """The server does not start with keys that nobody can read."""
    with pytest.raises(OSError, match=r"Cannot write .*key_file\.json.*_KEY"):
        keys_for(WITH_KEYS, [LOOPBACK], environ={}, folder=folder / "missing")


def test_a_key_that_cannot_be_written_does_not_count(keys, folder):
    """A renewal that fails leaves the key that is in the file."""
    before = in_file(MANAGEMENT)
    keys.path = folder / "missing" / KEY_FILE
    with pytest.raises(OSError, match="Cannot write"):
        keys.renew(MANAGEMENT)
    assert keys.judge(MANAGEMENT, f"Bearer {before}") is Verdict.VALID
    keys.path = folder / KEY_FILE


@pytest.mark.parametrize(
    "settings, address, expected",
    [
        (Settings(), LOOPBACK, False),
        (Settings(), NETWORK, True),
        (WITH_KEYS, LOOPBACK, True),
        (Settings(contract="torchserve-0.12"), LOOPBACK, True),
        (Settings(contract="torchserve-0.12", disable_token_authorization=True), LOOPBACK, False),
        (Settings(disable_token_authorization=True), NETWORK, False),
    ],
)
def test_keys_are_made_where_they_are_needed(settings, address, expected, folder):
    """Nothing is written where nobody needs a key; one address that needs one is enough."""
    with keys_for(settings, [LOOPBACK, address], environ={}) as keys:
        assert bool(keys) is (folder / KEY_FILE).exists() is expected


# --- what counts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_is_in_any_case(keys, scheme):
    """And blanks around the key are not part of it."""
    assert keys.judge(MANAGEMENT, f" {scheme}  {in_file(MANAGEMENT)} ") is Verdict.VALID


@pytest.mark.parametrize(
    "authorization, verdict",
    [
        (None, Verdict.MISSING),
        ("", Verdict.MALFORMED),
        ("Bearer", Verdict.MALFORMED),
        ("Bearer ", Verdict.MALFORMED),
        ("Basic {key}", Verdict.MALFORMED),
        ("{key}", Verdict.MALFORMED),
        ("Bearer {key}x", Verdict.WRONG),
        ("Bearer x", Verdict.WRONG),
        ("Bearer {key} {key}", Verdict.WRONG),
        ("Bearer \xfcml\xe4ut", Verdict.WRONG),
        ("Bearer \udcff", Verdict.WRONG),
    ],
)
def test_anything_but_the_key_is_refused(keys, authorization, verdict):
    """Any header at all has a verdict, and only the key itself is valid."""
    given = authorization and authorization.format(key=in_file(MANAGEMENT))
    assert keys.judge(MANAGEMENT, given) is verdict


def test_each_key_opens_one_thing(keys):
    """The API key makes keys and opens nothing else."""
    for wanted in KeyName:
        for sent in KeyName:
            expected = Verdict.VALID if wanted is sent else Verdict.WRONG
            assert keys.judge(wanted, f"Bearer {in_file(sent)}") is expected


def test_keys_expire_but_the_api_key_does_not(folder):
    """token_expiration_min after it was made, a key counts no more."""
    now = datetime(2026, 11, 23, tzinfo=timezone.utc)
    with Keys(lifetime=timedelta(minutes=2), path=folder / KEY_FILE, now=lambda: now) as keys:
        keys.fill()
        sent = {name: f"Bearer {in_file(name)}" for name in KeyName}
        now += timedelta(minutes=2, microseconds=-1)
        assert [keys.judge(name, sent[name]) for name in KeyName] == [Verdict.VALID] * 3
        now += timedelta(microseconds=1)
        assert [keys.judge(name, sent[name]) for name in (MANAGEMENT, INFERENCE)] == [Verdict.EXPIRED] * 2
        assert keys.judge(API, sent[API]) is Verdict.VALID
        assert keys.judge(MANAGEMENT, "Bearer x") is Verdict.WRONG
        keys.renew(MANAGEMENT)
        assert keys.judge(MANAGEMENT, f"Bearer {in_file(MANAGEMENT)}") is Verdict.VALID


# --- from the environment -------------------------------------------------------------------------------------------


def test_the_environment_fixes_keys(folder):
    """TORCHMGMT_ wins over TS_; what is fixed never expires, is in no file, and is not made anew."""
    environ = {
        "TS_MANAGEMENT_KEY": "ts-management",
        "TORCHMGMT_MANAGEMENT_KEY": "ours-management",
        "TS_API_KEY": "ts-api-key",
    }
    with keys_for(WITH_KEYS, [LOOPBACK], environ=environ) as keys:
        assert keys.judge(MANAGEMENT, "Bearer ours-management") is Verdict.VALID
        assert keys.judge(API, "Bearer ts-api-key") is Verdict.VALID
        assert set(json.loads((folder / KEY_FILE).read_text())) == {"inference"}
        with pytest.raises(BadRequest, match="fixed by the environment"):
            keys.renew(MANAGEMENT)
        assert keys.renew(INFERENCE).text == in_file(INFERENCE)


def test_the_api_key_of_the_environment_makes_keys_where_none_is_needed(serving, monkeypatch):
    """They count as long as the settings say, and stand in the answer alone: no file was asked for."""
    monkeypatch.setenv("TS_API_KEY", "the-api-key")
    settings = Settings(token_expiration_min=5)
    client = serving(FakeManager(), settings=settings)
    made = client.get("/token?type=management", headers=bearer("the-api-key")).json()["management"]
    expires = datetime.fromisoformat(made["expiration time"].replace("Z", "+00:00"))
    assert expires - datetime.now(timezone.utc) <= timedelta(minutes=5)
    elsewhere = {"Host": "models.example", **bearer(made["key"])}
    assert client.get("/models", headers=elsewhere).status_code == 200
    assert names_in(Path()) == []


def test_with_all_keys_fixed_there_is_no_file(folder):
    """Secrets that the operator keeps elsewhere are not copied to the disk."""
    environ = {f"TORCHMGMT_{name.name}_KEY": f"the-{name.value}-key" for name in KeyName}
    with keys_for(WITH_KEYS, [LOOPBACK], environ=environ):
        assert names_in(folder) == []


@pytest.mark.parametrize("text", ["short", "with a blank in it", "with\ttab-in-it", "ümläüts-everywhere", "x" * 1025])
def test_an_unfit_key_is_refused_without_being_shown(text):
    """A key that is easily guessed or that no header carries is an error; its text is not in it."""
    with pytest.raises(InvalidArgument, match="TS_API_KEY") as caught:
        fixed_keys({"TS_API_KEY": text})
    assert text not in str(caught.value)


def test_the_environment_can_be_forgotten():
    """What is started afterwards, workers above all, does not inherit the keys."""
    environ = {"TS_API_KEY": "x" * 8, "TORCHMGMT_INFERENCE_KEY": "x" * 8, "TORCHMGMT_TOKEN": "mine"}
    forget_environment(environ)
    assert environ == {"TORCHMGMT_TOKEN": "mine"}


# --- over HTTP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers, says",
    [({}, "needs the management key"), (bearer("x"), "not the management key"), ({"Authorization": "x"}, "Bearer KEY")],
)
def test_a_request_without_the_key_is_401(client, headers, says):
    """The challenge says how to send a key, and the message what is wrong with the one that came."""
    response = client.get("/models", headers=headers)
    assert response.status_code == 401
    assert response.json()["type"] == "InvalidKeyException"
    assert says in response.json()["message"]
    assert response.headers["WWW-Authenticate"].startswith('Bearer realm="torchmgmt"')
    assert ("invalid_token" in response.headers["WWW-Authenticate"]) is bool(headers)


@pytest.mark.parametrize("kind", ["management", "inference"])
def test_the_api_key_makes_a_new_key(client, kind):
    """The answer and the file have it; the old one is wrong from then on, the others stay."""
    before = {name: in_file(name) for name in KeyName}
    response = client.get("/token", params={"type": kind}, headers=bearer(before[API]))
    assert response.status_code == 200
    assert response.json() == {kind: json.loads(Path(KEY_FILE).read_text())[kind]}
    assert {name.value for name in KeyName if in_file(name) != before[name]} == {kind}
    changed = kind == "management"
    assert client.get("/models", headers=bearer(before[MANAGEMENT])).status_code == (401 if changed else 200)
    assert client.get("/models", headers=bearer(in_file(MANAGEMENT))).status_code == 200


@pytest.mark.parametrize(
    "path, sent, code",
    [
        ("/token?type=management", MANAGEMENT, 401),
        ("/token?type=management", INFERENCE, 401),
        ("/token?type=management", None, 401),
        ("/token", API, 400),
        ("/token?type=", API, 400),
        ("/token?type=API", API, 400),
        ("/tokens", API, 401),
        ("/x/token", API, 401),
        ("/models/token", API, 401),
        ("/models?x=/token", API, 401),
        ("/models?x=/token", MANAGEMENT, 200),
    ],
)
def test_only_the_api_key_and_only_at_this_path(client, path, sent, code):
    """TorchServe took any request with /token anywhere in it for this one."""
    before = Path(KEY_FILE).read_text()
    headers = bearer(in_file(sent)) if sent else {}
    assert client.get(path, headers=headers).status_code == code
    assert Path(KEY_FILE).read_text() == before


def test_without_keys_there_is_no_token_to_make(serving):
    """Token authorization that is off is a 404 that says how to turn it on."""
    response = serving(FakeManager()).get("/token", params={"type": "management"})
    assert (response.status_code, response.json()["type"]) == (404, "ResourceNotFoundException")
    assert "--enable-token-auth" in response.json()["message"]


def test_the_helpers_find_the_key_by_themselves(client, monkeypatch):
    """The key file in the working directory is read for each call, so a renewed key is no obstacle."""
    address = {"management_address": client.url}
    assert register_model("noop", "noop.mar", **address).status_code == 200
    client.get("/token", params={"type": "management"}, headers=bearer(in_file(API)))
    assert register_model("noop", "noop.mar", **address).status_code == 200
    assert register_model("noop", "noop.mar", token="wrong", **address).status_code == 401
    monkeypatch.setenv("TORCHMGMT_TOKEN", in_file(MANAGEMENT))
    Path(KEY_FILE).unlink()
    assert register_model("noop", "noop.mar", **address).status_code == 200


def test_no_key_is_ever_seen(caplog):
    """Neither the whole log at its finest level nor any answer but the new key's own has a key, right or wrong, in it."""
    caplog.set_level(logging.DEBUG)
    answers: list[str] = []
    with serve(FakeManager(info_of("noop", workers=1), settings=WITH_KEYS)) as server:
        client = Client(server.url)
        keys = [in_file(name) for name in KeyName] + ["a-wrong-key-that-somebody-sent"]
        for key in keys:
            for method, path in (
                ("GET", "/models"),
                ("GET", "/models/noop/all"),
                ("GET", f"/models?token={key}&access_key={key}&limit=x"),
                ("POST", f"/models?url=https%3A%2F%2Fme%3A{key}%40example.org%2Fa.mar%3Fsig%3D{key}&runtime=cobol"),
                ("DELETE", "/models/nope"),
                ("GET", "/token?type=wrong"),
                ("OPTIONS", "/"),
                ("PATCH", "/models"),
            ):
                answers.append(client(method, path, headers=bearer(key)).text)
            answers.append(client.raw(f"GET /models HTTP/1.0\r\nAuthorization: {key}\r\n\r\n".encode()).decode())
        renewed = client.get("/token?type=management", headers=bearer(in_file(API))).json()["management"]["key"]
        answers.append(client.get("/models", headers=bearer(renewed)).text)
    ours = [record for record in caplog.records if not record.name.startswith("urllib3")]  # the client's own
    assert len(ours) >= 4 * 9  # the access log at least
    everything = "".join(answers) + "".join(str(vars(record)) for record in ours)
    assert [key for key in [*keys, renewed] if key in everything] == []


def test_the_program_makes_the_keys_and_takes_them_away(folder, monkeypatch):
    """Its own log and output have none of them; the inference address and health are served by the same rule."""
    monkeypatch.setenv("TORCHMGMT_INFERENCE_KEY", "inference-key-of-the-operator")
    program = Program(("--enable-token-auth", "--log-level", "DEBUG"), folder)
    try:
        program.wait_for("Model server started")
        client = program.client()
        keys = [in_file(name) for name in (MANAGEMENT, API)] + ["inference-key-of-the-operator"]
        assert client.get("/models").status_code == 401
        assert client.get("/models", headers=bearer(keys[0])).status_code == 200
        assert client.get("/token?type=inference", headers=bearer(keys[1])).status_code == 400
        assert program.client("Inference").get("/ping").status_code == 200
        assert program.client("Inference").get("/nope").status_code == 401
        assert program.client("Inference").get("/nope", headers=bearer(keys[2])).status_code == 404
        assert program.end() == 0
    finally:
        program.process.kill()
        program.process.wait()
        program.process.stdout.close()
    log = program.log.read_text() + "\n".join(program.lines)
    assert "needs a key (callers on this machine, too)" in log
    assert '"GET /models HTTP/1.1" 401' in log
    assert [key for key in keys if key in log] == []
    assert not (folder / KEY_FILE).exists()


def test_keys_hide_themselves(keys):
    """Whoever prints or logs the object shows no key."""
    shown = repr(keys) + repr(keys.renew(INFERENCE))
    assert [name for name in KeyName if in_file(name) in shown] == []
