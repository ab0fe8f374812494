"""The bare loop: one process that runs the same handler on one batch after the other, and does nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.script import READY, end, start, wait_ready

# What a worker does with each request and with each answer is done here, too: unpickling and pickling. So is what it does
# for itself: the collector does not look again and again at the 176,000 objects that torch's import and the model leave, and
# what the layers need for one batch is kept for the next.
_LOOP = f"""
import gc, importlib.util, json, pathlib, pickle, sys, time
import torch, yaml
from torchmgmt.allocator import keep_freed_memory
from torchmgmt.compat import install_ts

folder, file, handler_class, item, batch_size, tuned = sys.argv[1:]
install_ts()
sys.path.insert(0, folder)
spec = importlib.util.spec_from_file_location("handler", pathlib.Path(folder, file))
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from ts.context import Context
manifest = json.loads(pathlib.Path(folder, "MAR-INF", "MANIFEST.json").read_text())
named = manifest["model"].get("configFile")
config = yaml.safe_load(pathlib.Path(folder, named).read_text()) if named else None
context = Context("m", folder, manifest, int(batch_size), None, "0", model_yaml_config=config)
context.begin_batch([str(number) for number in range(int(batch_size))], [{{}}] * int(batch_size))
handler = getattr(module, handler_class)()
handler.initialize(context)
requests = [pickle.dumps({{"body": pathlib.Path(item).read_bytes()}}, protocol=5)] * int(batch_size)

def run_batch():
    answers = handler.handle([pickle.loads(request) for request in requests], context)
    return [pickle.dumps(answer, protocol=5) for answer in answers]

run_batch()
if tuned == "True":
    gc.collect()
    gc.freeze()
    keep_freed_memory()
print({READY!r}, flush=True)
for line in sys.stdin:
    batches, started = 0, time.perf_counter()
    until = started + float(line)
    while (now := time.perf_counter()) < until:
        run_batch()
        batches += 1
    print(batches * len(requests) / (now - started), flush=True)
"""


class BareLoop:
    """A process that answers batches of a handler in a loop, on demand. Use it in a ``with`` block.

    Args:
        handler: the handler's file, in the folder of its model.
        handler_class: the class in it.
        item: a file with the body that each request of a batch has.
        batch_size: the requests of a batch.
        is_tuned: whether it does for itself, once the model is loaded, what a worker does: ``gc.freeze()`` and
            :func:`torchmgmt.allocator.keep_freed_memory`. A plain script does neither.
    """

    def __init__(
        self, handler: Path, handler_class: str, item: Path, *, batch_size: int, is_tuned: bool = True
    ) -> None:
        self._arguments = (handler.parent, handler.name, handler_class, item, str(batch_size), str(is_tuned))

    def __enter__(self) -> BareLoop:
        self._process: subprocess.Popen[str] = start(_LOOP, *self._arguments)
        try:
            wait_ready(self._process)
        except BaseException:
            end(self._process)
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        end(self._process)

    def rate(self, seconds: float) -> float:
        """Run for so long; return the answers a second. Blocks until then."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the bare loop has no pipes")
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())
