"""The workers of one model version: started, handed batches, watched and let go by one owner, the backend's dispatcher.

``worker_pool`` has the public API and is told what workers do. What it decides is split by subject: which batch goes to whom
(``dispatch``), which workers there shall be (``supervisor``, by the policy in ``autoscaling``), what requests are answered
(``results``), and what all of that makes of the version (``version``). ``workers`` and ``jobs`` hold what there is;
``actions`` is what was decided and is yet to be done.
"""

from torchmgmt.pool.starter import FIRST_WORKER_ID
from torchmgmt.pool.worker_pool import WorkerPool

__all__ = ["FIRST_WORKER_ID", "WorkerPool"]
