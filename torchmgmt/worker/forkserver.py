"""The torch-only process: imports torch once, then forks a template or a worker for each FORK frame."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from torchmgmt.channel import Frame, Kind, send
from torchmgmt.interpreter import STARTED
from torchmgmt.records import TemplateJob, WorkerJob
from torchmgmt.system_calls import become_subreaper, set_death_signal
from torchmgmt.worker.forking import Body, Forker
from torchmgmt.worker.main import WorkerProcess
from torchmgmt.worker.modules import ImportedModules
from torchmgmt.worker.template import TemplateProcess

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Run the torch-only process.

    Its arguments: the descriptors of the control socket and of the parent's pidfd, sys.path, and what
    :func:`torchmgmt.worker.beginning.begin` needs to know.
    """
    os.environ.pop(STARTED, None)
    logging.basicConfig(format="<4>%(name)s: %(message)s")
    control, root_pidfd = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    torch.set_num_threads(1)
    become_subreaper()
    if "numpy" in sys.modules:  # torch has imported it; how models use its generators can be watched from the first
        importlib.import_module("numpy.random")
    modules = ImportedModules()
    # A collection in a worker would otherwise touch, and so copy, every page of what was imported here. What is garbage of
    # it stays: to find it costs 0.1 s of every first start, and gains less than a megabyte.
    gc.freeze()
    gc.enable()

    def body_of(job: WorkerJob | TemplateJob, fds: Sequence[int]) -> Body:
        if isinstance(job, TemplateJob):
            return TemplateProcess(job, fds, root_pidfd, forker.environment, modules)
        return WorkerProcess(job, fds, root_pidfd, forker.environment, modules)

    forker = Forker(control, root_pidfd, body_of)
    set_death_signal(0)  # from here on it looks itself whether the embedding process is there
    try:
        send(control, Frame(Kind.READY))
        forker.run()
    except OSError:
        # The embedding process went away while it was being told something.
        log.debug("The embedding process is gone", exc_info=True)
    # Taking torch down again in good order takes longer than all the rest of closing a manager, and is for nothing.
    os._exit(0)
