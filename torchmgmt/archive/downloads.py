"""Downloads: one URL is fetched once at a time, and again only if what it leads to has changed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from attrs import define, field

from torchmgmt.archive.allowed import Rules
from torchmgmt.archive.cache import Lease, UnpackedArchives
from torchmgmt.archive.transfer import DownloadLimits, Transfer, Validators
from torchmgmt.archive.url_memory import Record, UrlMemory
from torchmgmt.archive.urls import Source
from torchmgmt.errors import DownloadFailed, InvalidArchive, SourceNotFound
from torchmgmt.events import Listener

__all__ = ["Downloads"]


@define(eq=False)
class _Turn:
    """Who fetches one URL. ``users`` is guarded by the owner's lock."""

    users: int = 0
    lock: threading.Lock = field(factory=threading.Lock)


class Downloads:
    """Fetches archives and hands them on to be unpacked. Thread-safe.

    Args:
        unpacked: where archives are unpacked; this is open for as long as that is.
        memory: what is remembered of URLs.
        limits: of one download.
        listener: is told of progress, on the thread that downloads.
    """

    def __init__(
        self, unpacked: UnpackedArchives, memory: UrlMemory, limits: DownloadLimits, listener: Listener
    ) -> None:
        self._unpacked = unpacked
        self._memory = memory
        self._limits = limits
        self._listener = listener
        self._lock = threading.Lock()
        # guarded by _lock
        self._turns: dict[str, _Turn] = {}
        self._running: set[Transfer] = set()

    def open(self, source: Source, rules: Rules | None) -> Lease:
        """Return a lease on the unpacked content of what ``source`` leads to.

        Blocks while it is fetched and unpacked, or while another thread or program does that. ``rules`` are those of the
        caller, None: no rules. Raises as :meth:`torchmgmt.archive.ModelSources.open`; nothing is left on the disk then.
        """
        key = _key(source, rules)
        before = self._memory.read(key)
        with self._turn(key) as waited:
            known = self._memory.read(key)
            if known is not None and source.sha256 not in {None, known.digest}:
                known = None  # the server may have what is asked for by now
            lease = self._at_hand(known)
            # Whoever we waited for has just fetched it; and a digest that was asked for can only be that content's.
            if lease is not None and known is not None and ((waited and known != before) or source.sha256):
                return lease
            try:
                fetched = self._fetch(key, source, rules, known if lease else None)
            except BaseException:
                if lease is not None:
                    lease.release()
                raise
            if fetched is None:
                return cast("Lease", lease)  # unchanged is only what is at hand
            if lease is not None:
                lease.release()
            return fetched

    def end_all(self) -> None:
        """Have every download end at once, with ManagerClosed; to be called once the archives are closed."""
        with self._lock:
            running = list(self._running)
        for transfer in running:
            transfer.end("it was given up")

    @contextmanager
    def _turn(self, key: str) -> Iterator[bool]:
        """Keep others from this URL inside the block; the value is whether somebody was waited for."""
        with self._lock:
            turn = self._turns.setdefault(key, _Turn())
            turn.users += 1
            waited = turn.users > 1
        try:
            with turn.lock, self._memory.turn(key) as waited_for_program:
                self._unpacked.check_open()
                yield waited or waited_for_program
        finally:
            with self._lock:
                turn.users -= 1
                if not turn.users:
                    del self._turns[key]

    def _at_hand(self, known: Record | None) -> Lease | None:
        """Return a lease on the content that a URL had, if it is unpacked somewhere or its archive was kept."""
        if known is None:
            return None
        lease = self._unpacked.acquire_known(known.digest)
        path = self._memory.kept(known.digest) if lease is None else None
        if path is None:
            return lease
        try:
            return self._unpacked.acquire(path, str(path), wanted=known.digest)
        except (SourceNotFound, InvalidArchive):  # removed in this moment, or damaged since it was put there
            path.unlink(missing_ok=True)
            return None

    def _fetch(self, key: str, source: Source, rules: Rules | None, known: Record | None) -> Lease | None:
        """Fetch, check and unpack what is new; None if it is still what is ``known``."""
        with self._memory.partial(key) as path:
            validators = known.validators if known else None
            found = self._transfer(path, source, rules, validators)
            if found is None and known is not None:
                self._memory.write(key, Record(known.digest, known.validators))
                return None
            digest, validators = cast("tuple[str, Validators]", found)
            lease = self._unpacked.acquire(path, source.shown, digest=digest)
            try:
                self._memory.keep(digest, path)
                self._memory.write(key, Record(digest, validators))
            except BaseException:
                lease.release()
                raise
            return lease

    def _transfer(
        self, path: Path, source: Source, rules: Rules | None, known: Validators | None
    ) -> tuple[str, Validators] | None:
        if source.scheme in {"http", "https"}:
            from torchmgmt.archive.download import fetch_http as fetch
        else:
            from torchmgmt.archive.remote import fetch_remote as fetch

        with self._running_transfer(source) as transfer, path.open("xb") as file:
            found = fetch(transfer, file, rules, known)
            if found is not None and source.sha256 not in {None, found[0]}:
                raise transfer.failed(f"its SHA-256 is {found[0]}, but #sha256={source.sha256} was asked for")
            if found is not None:
                transfer.tell_end()
            return found

    @contextmanager
    def _running_transfer(self, source: Source) -> Iterator[Transfer]:
        transfer = Transfer(source, self._limits, self._listener)
        with self._lock:
            self._running.add(transfer)
        try:
            self._unpacked.check_open()  # after it was added, so that end_all finds it or this does
            with transfer:
                yield transfer
        except DownloadFailed:
            self._unpacked.check_open()  # then that is why
            raise
        finally:
            with self._lock:
                self._running.discard(transfer)


def _key(source: Source, rules: Rules | None) -> str:
    """Return what stands for a URL. Not the URL, which may hold a password; and what one caller may fetch, another may not."""
    policy = None if rules is None else (rules.may_fetch, [each.pattern for each in rules.patterns or ()])
    return hashlib.sha256(repr((source.place, policy, rules is None or rules.patterns is None)).encode()).hexdigest()
