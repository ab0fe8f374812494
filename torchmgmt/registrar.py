"""Brings model versions into a catalogue and out of it again: opened, added, waited for, withdrawn, restored."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from attrs import evolve

from torchmgmt.announcer import Announcer
from torchmgmt.backends.backend_set import BackendSet
from torchmgmt.catalogue import Catalogue
from torchmgmt.errors import AlreadyRegistered, ManagerClosed
from torchmgmt.events import DefaultVersionSet, ModelRegistered, ModelUnregistered
from torchmgmt.failed_loads import Certainty, failed_load
from torchmgmt.management_call import check_wanted, still_wanted, when_abandoned
from torchmgmt.pool import FIRST_WORKER_ID
from torchmgmt.records import CloseReport, ModelKey, ModelSpec, Scale
from torchmgmt.registration import Wishes, open_source, scale_of, shown, spec_of
from torchmgmt.restoring import RESTORED_AT_ONCE, check_is_same, failed_restore, in_parallel, stored_of, wishes_of
from torchmgmt.served import ServedVersion, new_served
from torchmgmt.settings import Settings
from torchmgmt.state import StoredVersion

if TYPE_CHECKING:
    from torchmgmt.archive import ModelFolder, ModelSources

__all__ = ["Registrar"]

log = logging.getLogger(__name__)


class Registrar:
    """Registers, restores and unregisters the versions of one manager. Thread-safe; every method blocks.

    Args:
        catalogue: where they are kept.
        sources: where they come from.
        backends: what runs their workers.
        announcer: told what happens.
        settings: the defaults for what neither a call nor an archive says.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        sources: ModelSources,
        backends: BackendSet,
        announcer: Announcer,
        settings: Settings,
    ) -> None:
        self._catalogue = catalogue
        self._sources = sources
        self._backends = backends
        self._announcer = announcer
        self._settings = settings
        self._worker_ids = itertools.count(FIRST_WORKER_ID)

    def register(self, url: object, wishes: Wishes, stored: StoredVersion | None = None) -> ServedVersion:
        """Register a version, as ``stored`` if it was before; remember what failed if it was to be there from the start.

        Raises as :meth:`torchmgmt.ModelManager.register` does; then nothing is left over.
        """
        self._warm_for(wishes)
        spec: ModelSpec | None = None
        try:
            with contextlib.ExitStack() as undo:
                folder = undo.enter_context(open_source(self._sources, url, wishes))
                if stored is None:
                    scale = scale_of(folder, wishes, self._settings)
                    stored = stored_of(folder, wishes, scale, self._sources.model_store)
                else:
                    folder = evolve(folder, url=stored.url)
                    check_is_same(folder, wishes, stored)
                spec = spec_of(folder, wishes, self._settings)
                if spec.live is not None:
                    spec.live.prepare(spec.backend, isolates_errors=spec.isolate_errors)
                check_wanted()
                served = self._add(spec, folder, stored.scale)
                undo.pop_all()  # from here on the version owns the folder
            self._start(served, stored.scale, wishes)
        except (AlreadyRegistered, ManagerClosed):
            raise
        except Exception as error:
            if wishes.loaded_at_startup:
                self._remember(shown(url), error, spec, wishes)
            raise
        if self._catalogue.keep(served, evolve(stored, digest=folder.digest), shown(url)):
            self._announcer.tell(DefaultVersionSet(spec.key))
        return served

    def take_back(self, served: ServedVersion) -> None:
        """Undo a registration that has succeeded, of whose version nobody was told: its caller was interrupted."""
        self._withdraw(served, is_kept=True)

    def restore(self) -> tuple[ModelKey, ...]:
        """Register what shall be there and is not; return what that is. What fails is remembered and stops no other."""
        state, missing = self._catalogue.missing()
        defaults = {ModelKey(model.name, model.default) for model in state.models}
        is_wanted = still_wanted()
        # A request that names no version must not meet another one for the only reason that it was ready earlier.
        for is_default in (True, False):
            turn = [each for each in missing if (each.key in defaults) is is_default]
            in_parallel(functools.partial(self._bring_back, is_wanted), turn, limit=RESTORED_AT_ONCE)
        return self._catalogue.arrange([model.name for model in state.models], [each.key for each in missing])

    def unregister(self, name: str, version: str | None, timeout: float) -> CloseReport:
        """Remove a version (the default one unless given), or forget one that failed; see ``ModelManager.unregister``."""
        forgotten = self._catalogue.forget_failed(name, version)
        for key in forgotten:
            self._announcer.tell(ModelUnregistered(key))
        if forgotten:
            return CloseReport(0.0)
        with self._catalogue.removing(name, version) as served:
            self._announcer.tell(ModelUnregistered(served.spec.key))
            return served.close(timeout)

    def _warm_for(self, wishes: Wishes) -> None:
        """Have torch imported while the source is unpacked, if there are going to be worker processes."""
        if _workers_at_first(wishes) and wishes.backend != "thread":
            with contextlib.suppress(OSError):  # the start of the first worker meets it again, and tells of it
                self._backends.warm()

    def _add(self, spec: ModelSpec, folder: ModelFolder, scale: Scale) -> ServedVersion:
        backend = self._backends.get(spec.backend)
        served = new_served(spec, folder, backend=backend, worker_ids=self._worker_ids, announcer=self._announcer)
        is_default = self._catalogue.add(served)
        self._announcer.tell(ModelRegistered(spec.key))
        if is_default:
            self._announcer.tell(DefaultVersionSet(spec.key))
        return served

    def _start(self, served: ServedVersion, scale: Scale, wishes: Wishes) -> None:
        """Start a new version's workers, and wait for them if that is wished; if that fails, leave nothing registered."""
        try:
            with when_abandoned(served.pool.retire_soon), self._catalogue.gone_is_not_found(served):
                if scale.max_workers:
                    served.pool.scale(scale)
                if wishes.synchronous:
                    served.pool.wait_ready()
        except BaseException:
            self._withdraw(served, is_kept=False)
            check_wanted()  # if it is not, that is why
            raise

    def _withdraw(self, served: ServedVersion, *, is_kept: bool) -> None:
        key = served.spec.key
        with self._catalogue.withdrawing(served, is_kept=is_kept) as withdrawal:
            if withdrawal.was_there:
                self._announcer.tell(ModelUnregistered(key))
            if withdrawal.new_default is not None:
                self._announcer.tell(DefaultVersionSet(ModelKey(key.name, withdrawal.new_default)))
            served.close(0)

    def _remember(self, url: str, error: Exception, spec: ModelSpec | None, wishes: Wishes) -> None:
        name, version = wishes.model_name, wishes.version
        info = failed_load(url, error, spec=spec, name=name, version=version, workers=_workers_at_first(wishes))
        certainty = Certainty.KEY if spec else Certainty.NAME if name else Certainty.NOTHING
        self._catalogue.add_failed(info, certainty, item=f"{name}={url}" if name else url)

    def _bring_back(self, is_wanted: Callable[[], bool], stored: StoredVersion) -> None:
        """Restore a version and wait for its workers; what goes wrong is remembered and logged, and stops no other."""
        if not is_wanted():
            return
        try:
            self.register(stored.place or stored.url, wishes_of(stored), stored)
        except AlreadyRegistered:
            log.info("%s is not restored: it has been registered meanwhile", stored.key)
        except ManagerClosed:
            raise
        except Exception as error:
            log.error("%s could not be restored: %s", stored.key, str(error).partition("\n")[0])
            self._catalogue.add_failed(failed_restore(stored, error), Certainty.KEY)


def _workers_at_first(wishes: Wishes) -> int:
    return wishes.default_workers if wishes.initial_workers is None else wishes.initial_workers
