"""Fetching an archive from what fsspec has a file system for: ``s3://``, ``gs://``, ``hf://``, ``memory://``, ..."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import IO, Any

from torchmgmt.archive.allowed import Rules, not_allowed
from torchmgmt.archive.transfer import Transfer, Validators
from torchmgmt.redaction import redacted

__all__ = ["fetch_remote"]

CHUNK_BYTES = 1 << 20
# What file systems call a name for the content itself. A size or a time is none: two contents may have both in common.
_VALIDATORS = ("ETag", "etag", "e_tag", "md5Hash", "content_md5", "generation", "VersionId", "version_id", "blob_id")


def fetch_remote(
    transfer: Transfer, into: IO[bytes], rules: Rules | None, known: Validators | None
) -> tuple[str, Validators] | None:
    """Fetch ``transfer.source`` into ``into``; return its SHA-256 and what its store calls this content.

    Blocks: the transfer's time limit is looked at between chunks, how long one may take is the file system's matter, as
    are credentials. ``known`` is what the store called the content at hand; None is returned if it is still that.

    Raises:
        SourceNotAllowed: no pattern of ``rules`` allows it; None allows all.
        DownloadFailed: fsspec, or what it needs for this scheme, is not installed, or anything else fails.
        OSError: the disk is full or fails.
    """
    source = transfer.source
    if rules is not None:
        if "::" in source.place:  # fsspec's way to have one file system fetch from another, which no pattern would see
            raise not_allowed(source.shown, "a URL inside of another is not fetched")
        rules.check_url(_without_user(source.place), source.shown)
    system, path = _file_system(transfer)
    facts = _asking(transfer, lambda: system.info(path))
    if facts.get("type") == "directory":
        raise transfer.failed("it is a folder; only archives are fetched")
    now = _validators(facts)
    if known and known == now:
        return None
    size = facts.get("size")
    chunks = _chunks(transfer, system, path)
    return transfer.store(chunks, into, size if isinstance(size, int) else None), now


def _without_user(url: str) -> str:
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def _file_system(transfer: Transfer) -> tuple[Any, str]:
    scheme = transfer.source.scheme
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError:
        raise transfer.failed(f"{scheme}:// needs fsspec; pip install torchmgmt[remote]") from None
    try:
        found: tuple[Any, str] = url_to_fs(transfer.source.place)
    except ImportError as error:  # says which package to install
        raise transfer.failed(f"{scheme}:// needs a package that is not installed: {_text(error)}") from None
    except ValueError as error:
        raise transfer.failed(f"fsspec cannot open {scheme}://: {_text(error)}") from None
    except Exception as error:  # a file system may raise anything
        raise _failure(transfer, error) from None
    return found


def _asking(transfer: Transfer, ask: Any) -> Mapping[str, Any]:
    transfer.check()
    try:
        facts: Mapping[str, Any] = ask()
    except FileNotFoundError:
        raise transfer.failed("nothing is there") from None
    except Exception as error:
        raise _failure(transfer, error) from None
    return facts


def _chunks(transfer: Transfer, system: Any, path: str) -> Iterator[bytes]:
    """Yield the content; errors of the file system are told from those of whoever writes it."""
    try:
        with system.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except Exception as error:
        raise _failure(transfer, error) from None


def _validators(facts: Mapping[str, Any]) -> Validators:
    found = [f"{key}={facts[key]}" for key in _VALIDATORS if facts.get(key)]
    return Validators(other=" ".join(found))


def _failure(transfer: Transfer, error: Exception) -> Exception:
    transfer.check()
    return transfer.failed(_text(error))


def _text(error: Exception) -> str:
    return redacted(str(error)) or type(error).__name__
