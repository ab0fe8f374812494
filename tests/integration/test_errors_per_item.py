"""Errors per item, through a manager: who fails, who is answered, and what is run again, for workers of both kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from tests.handlers import ECHO, EVAL, PATIENCE_S, TOOLS, Deployer, Gate, lines_of, write_manifest
from torchmgmt import Model, ModelManager, ProcessBackend, Settings
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.errors import DeadlineExceeded, HandlerFailed, WorkerDied, WorkerStartFailed

REFUSING = """
from torchmgmt.handlers.inputs import InputRefused
def handle(data, context):
    refused = [index for index, row in enumerate(data or ()) if row["body"] < 0]
    if refused:
        raise InputRefused("less than nothing", 422, refused)
    return data and [(row["body"], len(data), context.get_request_id(at)) for at, row in enumerate(data)]
"""
"""Refuses negative numbers; answers with the number, the size of the batch, and the request's id."""

FAILING_LATE = (
    TOOLS
    + """
def handle(data, context):
    for row in data or ():
        note({ran!r}, row["body"])
    if data and len(data) > 1:
        wait_for({gate!r})
        raise ValueError
    return data and [row["body"] for row in data]
"""
)
"""Writes down what it runs, and raises for several at once, but only when the gate is open."""

CONFIGS = {"silent": "", "refusing": "isolateErrors: false\n"}


@attrs.frozen
class Served:
    """A model whose worker begins only when asked to, and so with all that waits by then as one batch."""

    model: Model
    gate: Gate

    def submit(self, *bodies: object) -> list[AnswerFuture]:
        futures = [self.model.submit(body) for body in bodies]
        self.gate.open()
        return futures

    def ask(self, *bodies: object) -> list[Any]:
        """Return for each of ``bodies``, sent as one batch, its answer or the error."""
        return [future.exception(PATIENCE_S) or future.result(PATIENCE_S) for future in self.submit(*bodies)]


@attrs.define
class Server:
    """Registers the source of a handler for batches of up to three."""

    deploy: Deployer
    options: Mapping[str, Any]
    gates: list[Gate] = attrs.field(factory=list)

    def __call__(self, source: str, **options: Any) -> Served:
        gate = Gate(self.deploy.root / f"begin{len(self.gates)}")
        self.gates.append(gate)
        source = f"{TOOLS}\nwait_for({gate.path!r})\n{source}"
        model = self.deploy(source, batch_size=3, initial_workers=1, synchronous=False, **self.options, **options)
        return Served(model, gate)


@pytest.fixture(params=["process", "thread"])
def serve(request: pytest.FixtureRequest, deploy: Deployer) -> Iterator[Server]:
    """Registers handlers on either backend."""
    server = Server(deploy, {"backend": request.param})
    yield server
    for gate in server.gates:
        gate.open()


@pytest.fixture(params=["process", "thread"])
def backend_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def failed(outcomes: Sequence[Any]) -> list[int]:
    return [index for index, outcome in enumerate(outcomes) if isinstance(outcome, HandlerFailed)]


def test_a_returned_exception_is_that_requests_error(serve: Server) -> None:
    """An exception in place of an answer fails its request with its class, text and code, and no other one."""
    source = "from torchmgmt.handlers.inputs import InputRefused\n" + EVAL
    outcomes = serve(source).ask("1", "InputRefused('too much', 413)", "3")
    assert (outcomes[0], outcomes[2], failed(outcomes)) == (1, 3, [1])
    error = outcomes[1]
    assert (error.error_type, error.error_code) == ("torchmgmt.handlers.inputs.InputRefused", 413)
    assert error.reason.endswith(": too much")


def test_an_exception_class_of_the_handlers_own_may_be_returned(serve: Server) -> None:
    """The program need not know its class, which is called alike with either backend."""
    outcomes = serve("class Mine(Exception):\n    pass\n" + EVAL).ask("1", "Mine('no')", "3")
    assert failed(outcomes) == [1]
    assert (outcomes[1].error_type, outcomes[1].reason) == ("handler.Mine", "handler.Mine: no")


def test_who_is_named_fails_and_the_others_are_answered(serve: Server) -> None:
    """An error that names positions fails these; the others are run again, with their own ids, and need ask nothing."""
    model = serve(REFUSING)
    outcomes = model.ask(1, -1, 3)
    assert failed(outcomes) == [1]
    assert outcomes[1].error_code == 422
    assert "in handle" in outcomes[1].traceback
    assert [outcome[:2] for outcome in (outcomes[0], outcomes[2])] == [(1, 2), (3, 2)]
    assert outcomes[0][2] != outcomes[2][2]
    assert failed(model.ask(1, 2, 3)) == []


class Doubling(torch.nn.Module):
    """What the shipped handler runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_a_shipped_handler_answers_the_good_ones(serve: Server, tmp_path: Path) -> None:
    """Bad input fails its own request with its own reason; what else was in the batch is answered."""
    folder = tmp_path / "model1"  # which is what the deployer calls it
    folder.mkdir()
    torch.jit.script(Doubling()).save(str(folder / "model.pt"))
    write_manifest(folder, modelName="m", modelVersion="1.0", handler="handler.py", serializedFile="model.pt")
    source = "from torchmgmt.handlers.tensor_handler import TensorHandler\nclass Mine(TensorHandler):\n    pass\n"
    outcomes = serve(source).ask([1.0, 2.0], "words", {"nothing": 1})
    assert (outcomes[0], failed(outcomes)) == ([2.0, 4.0], [1, 2])
    assert "text is not what this model takes" in outcomes[1].reason
    assert "none of the fields" in outcomes[2].reason
    assert outcomes[1].error_code == outcomes[2].error_code == 400


def test_a_batch_that_raised_fails_whole_unless_told_otherwise(serve: Server) -> None:
    """Without isolate_errors an error that names nobody is everybody's."""
    assert failed(serve(EVAL).ask("1", "1 / 0", "3")) == [0, 1, 2]


@pytest.mark.parametrize("bad", ["1 / 0", "fail(MemoryError())", "fail(__import__('torch').OutOfMemoryError('x'))"])
def test_an_isolated_batch_fails_for_the_bad_request_only(serve: Server, bad: str) -> None:
    """With isolate_errors a batch that raised or ran out of memory is run again, each request alone."""
    outcomes = serve(EVAL, isolate_errors=True).ask("1", bad, "len(data)")
    assert (outcomes[0], outcomes[2], failed(outcomes)) == (1, 1, [1])
    assert outcomes[1].out_of_memory is ("Memory" in bad)


def test_a_wrong_number_of_answers_names_both_and_can_be_isolated(serve: Server) -> None:
    """Who is left out by the handler is known only when each request is run alone; the numbers are those of the run."""
    source = "def handle(data, context):\n    return data and [row['body'] for row in data if row['body'] != 'skip']\n"
    for error in serve(source).ask("a", "skip", "c"):
        assert "returned 2 answers for a batch of 3 requests" in error.reason
    outcomes = serve(source, isolate_errors=True, model_name="isolated").ask("a", "skip", "c")
    assert (outcomes[0], outcomes[2], failed(outcomes)) == ("a", "c", [1])
    assert "returned 0 answers for a batch of 1 requests" in outcomes[1].reason


def test_an_archive_may_ask_for_it(serve: Server) -> None:
    """isolateErrors in model-config.yaml does what the argument does; the argument counts more."""
    config = "isolateErrors: true\n"
    assert failed(serve(EVAL, config=config).ask("1", "1 / 0", "3")) == [1]
    told = serve(EVAL, config=config, isolate_errors=False, model_name="told")
    assert failed(told.ask("1", "1 / 0", "3")) == [0, 1, 2]


def test_the_settings_may_ask_for_it(backend: ProcessBackend, tmp_path: Path) -> None:
    """The setting isolate_errors holds for models of which neither the call nor the archive says otherwise."""
    with ModelManager(backend=backend, settings=Settings(isolate_errors=True)) as manager:
        deploy = Deployer(tmp_path, manager, options={"initial_workers": 0})
        specs = [deploy(ECHO, model_name=name, config=config).describe().spec for name, config in CONFIGS.items()]
    assert [spec.isolate_errors for spec in specs] == [True, False]


def test_what_is_past_its_deadline_is_not_run_again(serve: Server, gate: Gate, tmp_path: Path) -> None:
    """A request whose deadline passes while its batch fails is told so, and not run alone; the others are."""
    ran = tmp_path / "ran"
    served = serve(FAILING_LATE.format(ran=str(ran), gate=gate.path), isolate_errors=True)
    late = served.model.submit("late", timeout=1)
    others = served.submit("a", "b")
    assert isinstance(late.exception(PATIENCE_S), DeadlineExceeded)
    gate.open()
    assert [each.result(PATIENCE_S) for each in others] == ["a", "b"]
    assert lines_of(ran).count("late") <= 1  # never, where this machine is so slow that the batch began without it
    assert [lines_of(ran).count(body) for body in ("a", "b")] == [2, 2]


# -- errors that are no Exception --------------------------------------------------------------------------------------

PANICKY = (
    """
import asyncio
class PanicException(BaseException):
    '''As pyo3 raises it, where a library in Rust panics.'''
def raising(error):
    raise error
    yield
"""
    + EVAL
)
NO_EXCEPTIONS = ["PanicException('index out of bounds')", "asyncio.CancelledError('too late')", "GeneratorExit('gone')"]


@pytest.mark.parametrize("error", NO_EXCEPTIONS)
def test_what_is_no_exception_is_the_requests_error_all_the_same(serve: Server, error: str) -> None:
    """A BaseException of a handler is told to its batch with its class, text and traceback, and the worker serves on."""
    served = serve(PANICKY)
    (outcome,) = served.ask(f"fail({error})")
    (worker,) = served.model.describe().workers
    assert isinstance(outcome, HandlerFailed)
    kind, _, text = error.partition("(")
    assert outcome.error_type.rpartition(".")[2] == kind.removeprefix("asyncio.")
    assert text.strip("')") in outcome.reason
    assert "raise error" in outcome.traceback
    assert served.ask("6 * 7") == [42]
    assert [each.id for each in served.model.describe().workers] == [worker.id]


@pytest.mark.parametrize("body", ["{}", "raising({})"], ids=["returned", "yielded"])
def test_of_one_item_it_fails_that_alone(serve: Server, body: str) -> None:
    """A BaseException in the place of an answer, or of a generator for one, fails its request and no other one."""
    outcomes = serve(PANICKY).ask("1", body.format("PanicException('no')"), "3")
    assert (outcomes[0], outcomes[2], failed(outcomes)) == (1, 3, [1])


@pytest.mark.parametrize("error", NO_EXCEPTIONS)
def test_errors_that_are_no_exception_are_isolated(serve: Server, error: str) -> None:
    """With isolate_errors a batch that ended in a BaseException is run again, and who raises it fails alone."""
    outcomes = serve(PANICKY, isolate_errors=True).ask("1", f"fail({error})", "3")
    assert (outcomes[0], outcomes[2], failed(outcomes)) == (1, 3, [1])


def test_an_error_that_is_no_exception_may_name_requests(serve: Server) -> None:
    """``indexes`` of a BaseException count as those of any other error do."""
    naming = "fail(setattr(PanicException, 'indexes', (1,)) or PanicException('this one')) if len(data) > 2 else 2"
    outcomes = serve(PANICKY).ask("1", naming, "3")
    assert (outcomes[0], outcomes[2], failed(outcomes)) == (1, 3, [1])


def test_stacked_groups_fail_apart_whatever_they_raise(serve: Server) -> None:
    """A group of a function of tensors that ends in a BaseException fails no other group."""
    backend = serve.options["backend"]

    def doubled(batch: torch.Tensor) -> torch.Tensor:
        if batch.shape[1] == 2:
            raise GeneratorExit("two")
        return batch * 2

    manager = serve.deploy.manager
    model = manager.register(
        doubled, model_name="fn", batching="stack", batch_size=2, max_batch_delay=500, backend=backend
    )
    good, bad = model.submit(torch.ones(3)), model.submit(torch.ones(2))
    assert good.result(PATIENCE_S).tolist() == [2, 2, 2]
    assert isinstance(bad.exception(PATIENCE_S), HandlerFailed)


@pytest.mark.parametrize("stage", ["initialize", "begin", "warm-up"])
def test_loading_that_ends_in_no_exception_is_a_failed_start(deploy: Deployer, backend_name: str, stage: str) -> None:
    """A BaseException while a worker starts says so with its traceback; it is no death of a worker."""
    source = f"""
class Panic(BaseException):
    pass
class H:
    def initialize(self, context):
        if {stage == "initialize"}: raise Panic("in {stage}")
    def begin(self):
        if {stage == "begin"}: raise Panic("in {stage}")
    def handle(self, data, context):
        if {stage == "warm-up"}: raise Panic("in {stage}")
        return data
"""
    with pytest.raises(WorkerStartFailed, match=f"Panic.*in {stage}") as caught:
        deploy(source, config="warmup: [{body: 1}]\nmaxRetryTimeoutInSec: 0\n", backend=backend_name)
    assert "raise Panic" in caught.value.traceback


def test_a_description_that_ends_in_no_exception_is_an_error_of_the_description(serve: Server) -> None:
    """A BaseException of describe_handle is told to who asked for the description; the worker serves on."""
    source = """
class Panic(BaseException):
    pass
class H:
    def initialize(self, context): pass
    def handle(self, data, context): return [row["body"] for row in data]
    def describe_handle(self): raise Panic("not now")
"""
    served = serve(source)
    served.gate.open()
    with pytest.raises(HandlerFailed, match="not now"):
        served.model.describe(customized=True)
    assert served.ask("x") == ["x"]


@pytest.mark.parametrize("error", ["SystemExit(3)", "KeyboardInterrupt()"])
def test_what_asks_for_an_end_still_ends_the_worker(serve: Server, error: str) -> None:
    """SystemExit and KeyboardInterrupt are no errors of a request: the worker ends, and another one takes its place."""
    served = serve(PANICKY)
    (outcome,) = served.ask(f"fail({error})")
    assert isinstance(outcome, WorkerDied)
    assert served.model.predict("6 * 7", timeout=PATIENCE_S) == 42
