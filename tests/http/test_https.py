"""https:// addresses: the same API over TLS, and certificates that are refused before anything serves."""

from __future__ import annotations

import ssl
import threading
from pathlib import Path

import pytest
import requests
import trustme

from tests.http.fakes import FakeManager, info_of
from torchmgmt.errors import InvalidArgument
from torchmgmt.http import serve
from torchmgmt.http.addresses import Addresses
from torchmgmt.http.server import start_servers
from torchmgmt.http.tls import tls_context
from torchmgmt.http.tokens import Keys
from torchmgmt.settings import Settings


class Files:
    """A certificate for localhost, its key, and the authority that a client trusts, as files."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        made = authority.issue_cert("localhost", "127.0.0.1")
        self.folder = folder
        self.certificate, self.key, self.authority = folder / "cert.pem", folder / "key.pem", str(folder / "ca.pem")
        self.certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        made.private_key_pem.write_to_path(self.key)
        authority.cert_pem.write_to_path(self.authority)

    def write(self, name: str, content: bytes) -> Path:
        (self.folder / name).write_bytes(content)
        return self.folder / name


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


def test_the_management_api_is_served_over_tls(files, manager):
    """A client that verifies the certificate gets the same answers as without TLS, errors included."""
    settings = Settings(max_request_size=1000, enable_model_api=True)
    given = {"certificate_file": files.certificate, "private_key_file": str(files.key)}
    with serve(manager, settings=settings, **given) as server:
        assert server.url.startswith("https://127.0.0.1:")
        with requests.Session() as session:
            session.verify, session.trust_env = files.authority, False
            assert session.get(f"{server.url}/models/noop", timeout=30).json()[0]["modelName"] == "noop"
            assert session.post(f"{server.url}/models?url=a.mar", timeout=30).status_code == 202
            refused = session.get(f"{server.url}/models/nope", timeout=30)
            assert (refused.status_code, refused.json()["type"]) == (404, "ModelNotFoundException")
            assert refused.headers["x-request-id"]
            assert session.get(f"{server.url}/models/a%2Fb", timeout=30).status_code == 400
            assert session.post(f"{server.url}/models", data=b"x" * 2000, timeout=30).status_code == 413


def test_a_client_that_trusts_another_authority_is_not_served(files):
    """The certificate is the one of the setting."""
    with serve(FakeManager(), certificate_file=files.certificate, private_key_file=files.key) as server:
        with pytest.raises(requests.exceptions.SSLError):
            requests.get(f"{server.url}/models", timeout=30)
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http{server.url[5:]}/models", timeout=30)


def test_old_versions_of_tls_are_refused(files):
    """TLS 1.2 is the oldest."""
    assert tls_context(files.certificate, files.key).minimum_version is ssl.TLSVersion.TLSv1_2


def test_one_port_serves_all_over_tls(files, manager):
    """Equal https addresses: health and management on one port, by one certificate."""
    with Addresses.bind(Settings(management_address="http://127.0.0.1:0")) as free:
        port = next(iter(free)).port
    address = f"https://127.0.0.1:{port}"
    settings = Settings(
        management_address=address,
        inference_address=address,
        certificate_file=files.certificate,
        private_key_file=files.key,
    )
    with Addresses.bind(settings) as addresses:
        servers = start_servers(manager, addresses, settings, Keys())
        try:
            for path in ("/ping", "/models"):
                assert requests.get(address + path, verify=files.authority, timeout=30).status_code == 200
        finally:
            assert servers.close(10)


@pytest.mark.parametrize("setting", ["certificate_file", "private_key_file"])
@pytest.mark.parametrize(
    "make, says",
    [
        (lambda files: None, "an https:// address needs it"),
        (lambda files: files.folder / "nowhere.pem", "No such file"),
        (lambda files: files.folder, "directory"),
        (lambda files: files.write("empty.pem", b""), "there is none in it"),
        (lambda files: files.write("other.pem", b"-----BEGIN NOTHING-----"), "there is none in it"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_by_its_setting(files, setting, make, says):
    """The error names the setting, the file and what is wrong."""
    given = {"certificate_file": files.certificate, "private_key_file": files.key, setting: make(files)}
    with pytest.raises(InvalidArgument) as caught:
        tls_context(**given)
    assert caught.value.argument == setting
    assert says in str(caught.value)


def test_a_damaged_certificate_is_refused(files):
    """What stands between the lines is looked at, too."""
    damaged = files.write("damaged.pem", b"-----BEGIN CERTIFICATE-----\nbm90aGluZw==\n-----END CERTIFICATE-----\n")
    with pytest.raises(InvalidArgument) as caught:
        tls_context(damaged, files.key)
    assert caught.value.argument == "certificate_file"


def test_the_key_of_another_certificate_is_refused(files, tmp_path):
    """The error says that the two do not belong together."""
    other = Files(tmp_path)
    with pytest.raises(InvalidArgument, match="it belongs to another one") as caught:
        tls_context(files.certificate, other.key)
    assert caught.value.argument == "private_key_file"


def test_an_encrypted_key_is_refused_with_the_way_out(files):
    """Nobody is asked for a passphrase on a terminal that is not there."""
    encrypted = files.write(
        "locked.pem", b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----"
    )
    with pytest.raises(InvalidArgument, match="takes the passphrase off"):
        tls_context(files.certificate, encrypted)


def test_nothing_is_bound_when_the_certificate_is_refused(files):
    """The port is free again."""
    settings = Settings(inference_address="https://127.0.0.1:0", certificate_file=files.certificate)
    with pytest.raises(InvalidArgument, match="private_key_file"):
        Addresses.bind(settings)


def test_closing_finishes_a_call_that_waits(files):
    """Over TLS, too, a registration in flight gets its answer, and a thread that waits holds up no other call."""
    manager = FakeManager(info_of("noop"))
    manager.gate.clear()
    answers = []
    with serve(manager, certificate_file=files.certificate, private_key_file=files.key) as server:
        url = f"{server.url}/models"
        call = threading.Thread(
            target=lambda: answers.append(requests.post(f"{url}?url=a", verify=files.authority, timeout=30))
        )
        call.start()
        assert manager.entered.acquire(timeout=30)
        assert requests.get(url, verify=files.authority, timeout=30).status_code == 200
        threading.Timer(0.2, manager.gate.set).start()
    call.join()
    assert answers[0].status_code == 202
