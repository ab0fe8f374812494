"""TLS of ``https://`` addresses: the certificate and its key, read and checked before anything is started."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from pathlib import Path

from torchmgmt.errors import InvalidArgument

__all__ = ["tls_context"]

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----")
_KEY = re.compile(rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----")
_ENCRYPTED = re.compile(rb"-----BEGIN ENCRYPTED PRIVATE KEY-----|^Proc-Type: *4, *ENCRYPTED", re.MULTILINE)

A_CERTIFICATE = "a PEM file with the certificate and those between it and its root (-----BEGIN CERTIFICATE-----)"
A_KEY = "a PEM file with the certificate's private key, without a passphrase (-----BEGIN PRIVATE KEY-----)"


def tls_context(certificate_file: Path | None, private_key_file: Path | None) -> ssl.SSLContext:
    """Return what a server needs for TLS 1.2 and newer with this certificate.

    Both are PEM files; one file may hold both and be given twice. Raises
    :class:`~torchmgmt.errors.InvalidArgument`, which names the setting, the file and what is wrong with it.
    """
    certificate_path, certificate = _read("certificate_file", certificate_file, A_CERTIFICATE, _CERTIFICATE)
    key_path, key = _read("private_key_file", private_key_file, A_KEY, _KEY)
    if _ENCRYPTED.search(key):
        allowed = f"{A_KEY}; `openssl pkey -in FILE -out NEW_FILE` takes the passphrase off"
        raise InvalidArgument("private_key_file", str(key_path), allowed)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # OpenSSL before 3 lets a client ask for it without end
    context.set_alpn_protocols(["http/1.1"])
    try:
        # The password, so that OpenSSL can in no case ask for one on the terminal.
        context.load_cert_chain(certificate_path, key_path, password="")
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise _refusal(error, certificate, certificate_path, key_path) from None
    return context


def _read(setting: str, path: Path | None, allowed: str, looks_right: re.Pattern[bytes]) -> tuple[Path, bytes]:
    if path is None:
        raise InvalidArgument(setting, None, f"{allowed}: an https:// address needs it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidArgument(setting, str(path), f"{allowed} that can be read: {error.strerror or error}") from None
    if not looks_right.search(content):
        raise InvalidArgument(setting, str(path), f"{allowed}; there is none in it")
    return path, content


def _refusal(error: Exception, certificate: bytes, certificate_file: Path, private_key_file: Path) -> InvalidArgument:
    if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
        allowed = f"the key of the first certificate in {certificate_file}; it belongs to another one"
        return InvalidArgument("private_key_file", str(private_key_file), allowed)
    why = getattr(error, "reason", None) or str(error)
    if _fails(
        lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(
            cadata=certificate.decode("ascii", "ignore")
        )
    ):
        return InvalidArgument("certificate_file", str(certificate_file), f"{A_CERTIFICATE}; OpenSSL says: {why}")
    return InvalidArgument("private_key_file", str(private_key_file), f"{A_KEY}; OpenSSL says: {why}")


def _fails(load: Callable[[], None]) -> bool:
    try:
        load()
    except (ssl.SSLError, ValueError):
        return True
    return False
