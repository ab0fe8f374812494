"""The facts that cross boundaries: what they refuse, and how clients of the Management API read them."""

from __future__ import annotations

import json
import math
import pickle
import sys
from datetime import datetime, timezone
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmgmt.checks import check_number, check_text
from torchmgmt.errors import InvalidArgument
from torchmgmt.lifecycle import VersionState, WorkerState
from torchmgmt.records import WIRE_STATUS, CloseReport, ModelInfo, ModelKey, ModelSpec, Scale, WorkerInfo

# The item of CONTRACT.md, "Describe", as it stands there.
CONTRACT_ITEM = json.loads("""
{"modelName": "noop", "modelVersion": "1.0", "modelUrl": "noop.mar", "engine": "Torch", "runtime": "python",
  "minWorkers": 1, "maxWorkers": 1, "batchSize": 1, "maxBatchDelay": 100, "responseTimeout": 120, "startupTimeout": 120,
  "maxRetryTimeoutInSec": 300, "clientTimeoutInMills": 0, "parallelType": "", "parallelLevel": 0, "deviceType": "cpu",
  "continuousBatching": false, "useJobTicket": false, "useVenv": false, "stateful": false, "sequenceMaxIdleMSec": 0,
  "sequenceTimeoutMSec": 0, "maxNumSequence": 0, "maxSequenceJobQueueSize": 0, "loadedAtStartup": false,
  "workers": [{"id": "9000", "startTime": "2026-11-22T23:55:48.901Z", "status": "READY", "memoryUsage": 89247744,
               "pid": 22876, "gpu": false, "gpuUsage": "N/A"}],
  "jobQueueStatus": {"remainingCapacity": 100, "pendingRequests": 0}}
""")

START_TIME = datetime(2026, 11, 22, 23, 55, 48, 901_999, tzinfo=timezone.utc)

WHOLE_NUMBERS = ["batch_size", "max_batch_delay_ms", "job_queue_size"]
NUMBERS = ["response_timeout_s", "startup_timeout_s", "max_retry_timeout_s"]
LEAST = {
    "batch_size": 1,
    "max_batch_delay_ms": 0,
    "job_queue_size": 1,
    "response_timeout_s": 1e-3,
    "startup_timeout_s": 1e-3,
    "max_retry_timeout_s": 0,
}


def spec(**changes: Any) -> ModelSpec:
    given = {"key": ModelKey("noop", "1.0"), "model_dir": "/models/noop", "handler": "handler.py", "url": "noop.mar"}
    return ModelSpec(**{**given, **changes})


def worker(**changes: Any) -> WorkerInfo:
    given = {"id": "9000", "state": WorkerState.READY, "start_time": START_TIME, "pid": 22876}
    return WorkerInfo(**{**given, "memory_bytes": 89247744, **changes})


def info(**changes: Any) -> ModelInfo:
    given = {
        "spec": spec(),
        "state": VersionState.READY,
        "is_default": True,
        "scale": Scale(1, 1),
        "workers": [worker()],
        "queue_capacity": 100,
    }
    return ModelInfo(**{**given, **changes})


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "1", b"1", True, False, [1], 1j, math.nan, math.inf, -math.inf, -1, -0.5])
@pytest.mark.parametrize("field", [*WHOLE_NUMBERS, *NUMBERS])
def test_what_is_no_number_in_range_is_refused_with_its_name_and_what_is_allowed(field: str, given: object):
    """Every number of a spec refuses wrong types (a bool is no number), NaN, infinities and negative ones."""
    with pytest.raises(InvalidArgument) as caught:
        spec(**{field: given})
    assert field.startswith(caught.value.argument)  # the caller's name for it: without the unit
    assert caught.value.given is given
    assert "at least" in caught.value.allowed


@pytest.mark.parametrize("given", [1.0, 1.5])
@pytest.mark.parametrize("field", WHOLE_NUMBERS)
def test_a_whole_number_is_not_a_float(field: str, given: float):
    """Where something is counted, a float is refused even if it has no fraction."""
    with pytest.raises(InvalidArgument, match="whole number"):
        spec(**{field: given})


@pytest.mark.parametrize("field, least", LEAST.items())
def test_the_least_allowed_is_allowed_and_less_is_not(field: str, least: float):
    """Each range starts exactly where the contract says."""
    assert getattr(spec(**{field: least}), field) == least
    with pytest.raises(InvalidArgument):
        spec(**{field: least - (1 if field in WHOLE_NUMBERS else 1e-4)})


@pytest.mark.parametrize("whole", [True, False])
def test_a_number_that_no_float_can_hold_is_refused(whole: bool):
    """Python's integers have no end, but clocks and the wire do: 10**400 is out of range, not an OverflowError later."""
    with pytest.raises(InvalidArgument):
        check_number("timeout", 10**400, minimum=0, whole=whole)
    check_number("timeout", int(sys.float_info.max), minimum=0, whole=whole)


@pytest.mark.parametrize(
    "given, minimum, whole, fine",
    [(0, 0, True, True), (-1, 0, True, False), (0.0, 0, False, True), (-0.0, 0, False, True), (5e-324, 0, False, True)],
)
def test_zero_is_zero_or_more_in_all_its_forms(given: float, minimum: float, whole: bool, fine: bool):
    """The boundary itself belongs to the range."""
    if fine:
        check_number("x", given, minimum=minimum, whole=whole)
    else:
        with pytest.raises(InvalidArgument):
            check_number("x", given, minimum=minimum, whole=whole)


def test_the_error_names_the_unit():
    """Who gets a number wrong learns in what it is counted."""
    with pytest.raises(InvalidArgument, match="milliseconds"):
        check_number("max_batch_delay", "soon", minimum=0, unit="milliseconds")


@given(st.integers(min_value=0, max_value=10**30) | st.floats(min_value=0, allow_infinity=False))
def test_every_finite_number_in_range_is_taken(value: float):
    """Nothing that is in range is refused."""
    check_number("x", value, minimum=0, whole=False)


@pytest.mark.parametrize("given", [None, 1, 1.0, b"noop", ["noop"], "", " ", "\n\t", "a/b", "/", "a\0"])
@pytest.mark.parametrize("field", ["name", "version"])
def test_a_key_is_made_of_text_that_can_stand_in_a_path(field: str, given: object):
    """A name or version that is no text, blank, or holds a slash or a NUL is refused by its name."""
    with pytest.raises(InvalidArgument) as caught:
        ModelKey(**{"name": "noop", "version": "1.0", field: given})
    assert caught.value.argument == {"name": "model_name", "version": "version"}[field]
    assert caught.value.given == given


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_any_other_text_is_a_name(text: str):
    """Unicode, dots, spaces and colons are fine in names and versions."""
    assert ModelKey(text, text).name == text
    check_text("handler", text)


@pytest.mark.parametrize("given", [None, "", " ", "handlers/noop.py", 7])
def test_a_handler_is_a_name_and_not_a_path(given: object):
    """A spec whose handler could not be imported by name is refused."""
    with pytest.raises(InvalidArgument, match="handler is "):
        spec(handler=given)


@pytest.mark.parametrize("low, high", [(0, 0), (0, 1), (1, 1), (3, 7)])
def test_a_scale_is_a_range(low: int, high: int):
    """Any range from zero on is a scale."""
    assert attrs.astuple(Scale(low, high)) == (low, high)


@pytest.mark.parametrize(
    "low, high, argument",
    [
        (-1, 1, "min_worker"),
        (0, -1, "max_worker"),
        (True, 1, "min_worker"),
        (1, True, "max_worker"),
        (1.0, 1, "min_worker"),
        ("1", 1, "min_worker"),
        (2, 1, "max_worker"),
        (1, 0, "max_worker"),
        (0, None, "max_worker"),
    ],
)
def test_what_is_no_range_is_no_scale(low: Any, high: Any, argument: str):
    """Wrong types, negative numbers and a maximum below the minimum are refused by the name of the culprit."""
    with pytest.raises(InvalidArgument) as caught:
        Scale(low, high)
    assert caught.value.argument == argument


def test_facts_do_not_change():
    """A record that was handed out stays what it was."""
    for record in (ModelKey("a", "1"), Scale(1, 1), spec(), worker(), info(), CloseReport(1.0)):
        name = attrs.fields(type(record))[0].name
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(record, name, getattr(record, name))


def test_facts_cross_processes():
    """A spec and an info are the same after pickling."""
    for record in (spec(manifest={"model": {"modelName": "noop"}}), info()):
        assert pickle.loads(pickle.dumps(record)) == record


# -- what clients read -------------------------------------------------------------------------------------------------


def shape(value: object) -> object:
    """The keys and JSON types of ``value``."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value]
    return type(value)


def test_describe_is_the_contract_to_the_letter():
    """The contract's example comes out of to_dict with its values, its order and its types; ours come after."""
    item = json.loads(json.dumps(info().to_dict()))
    assert list(item)[: len(CONTRACT_ITEM)] == list(CONTRACT_ITEM)
    assert {key: item[key] for key in CONTRACT_ITEM} == CONTRACT_ITEM
    assert shape({key: item[key] for key in CONTRACT_ITEM}) == shape(CONTRACT_ITEM)
    assert {key: item[key] for key in set(item) - set(CONTRACT_ITEM)} == {
        "state": "READY",
        "defaultVersion": True,
        "queueTimeoutInMills": 0,
        "shareWeights": "auto",
        "weightsShared": None,
        "weightsSharedReason": "no worker has been started yet",
    }


@given(
    spec=st.builds(
        spec,
        batch_size=st.integers(1, 10**6),
        max_batch_delay_ms=st.integers(0, 10**6),
        response_timeout_s=st.integers(1, 10**6),
        startup_timeout_s=st.integers(1, 10**6),
        max_retry_timeout_s=st.integers(0, 10**6),
        loaded_at_startup=st.booleans(),
    ),
    state=st.sampled_from(VersionState),
    workers=st.lists(
        st.builds(
            worker,
            state=st.sampled_from(WorkerState),
            pid=st.none() | st.integers(1, 2**22),
            memory_bytes=st.integers(0, 2**40),
            start_time=st.datetimes(datetime(1970, 1, 1), timezones=st.just(timezone.utc)),  # noqa: DTZ001 - as st.datetimes wants it
        ),
        max_size=3,
    ),
    capacity=st.integers(1, 1000),
    length=st.integers(0, 1000),
)
def test_describe_has_the_same_shape_whatever_the_values(
    spec: ModelSpec, state: VersionState, workers: list[WorkerInfo], capacity: int, length: int
):
    """Strict clients parse every description: no key missing, no type changed, no negative room in a queue."""
    described = info(spec=spec, state=state, workers=workers, queue_capacity=capacity, queue_length=length).to_dict()
    item = json.loads(json.dumps(described))
    expected = {**CONTRACT_ITEM, "workers": CONTRACT_ITEM["workers"] * len(workers)}
    assert shape({key: item[key] for key in CONTRACT_ITEM}) == shape(expected)
    assert item["jobQueueStatus"]["remainingCapacity"] == max(0, capacity - length)
    for each in item["workers"]:
        assert each["status"] in {"READY", "LOADING", "UNLOADING"}
        assert datetime.strptime(each["startTime"], "%Y-%m-%dT%H:%M:%S.%fZ")  # noqa: DTZ007 - the Z says it
        assert len(each["startTime"]) == len("2026-11-22T23:55:48.901Z")


def test_milliseconds_are_cut_never_rounded_up():
    """A start time is never in the future, and 999 ms are not the next second."""
    last = START_TIME.replace(microsecond=999_999)
    assert worker(start_time=last).to_dict()["startTime"] == "2026-11-22T23:55:48.999Z"
    assert worker(start_time=last.replace(microsecond=0)).to_dict()["startTime"] == "2026-11-22T23:55:48.000Z"


def test_a_worker_without_a_process_is_listed_with_pid_zero():
    """A worker that is only wanted is in the list, with an int where clients parse one."""
    listed = worker(state=WorkerState.WANTED, pid=None, memory_bytes=0).to_dict()
    assert (listed["pid"], listed["memoryUsage"], listed["status"]) == (0, 0, "LOADING")


def test_every_worker_state_has_one_of_the_three_words():
    """WIRE_STATUS is total, and a busy worker is READY to clients."""
    assert set(WIRE_STATUS) == set(WorkerState)
    assert set(WIRE_STATUS.values()) == {"READY", "LOADING", "UNLOADING"}
    assert {state for state, word in WIRE_STATUS.items() if word == "READY"} == {WorkerState.READY, WorkerState.BUSY}


def test_a_fraction_of_a_second_is_written_and_a_whole_one_has_none():
    """120.0 s is written 120, because strict clients parse an int; 0.5 s is written as it is."""
    item = info(spec=spec(response_timeout_s=120.0, startup_timeout_s=0.5)).to_dict()
    assert json.dumps([item["responseTimeout"], item["startupTimeout"]]) == "[120, 0.5]"


def test_an_error_and_metadata_are_there_only_if_there_are_any():
    """A version that is well says nothing of errors; one that failed says why."""
    assert not {"lastError", "customizedMetadata"} & set(info().to_dict())
    item = info(last_error="ValueError: no", customized_metadata={}).to_dict()
    assert item["lastError"] == "ValueError: no"
    assert item["customizedMetadata"] == {}


@pytest.mark.parametrize(
    "report, clean",
    [
        (CloseReport(0.1), True),
        (CloseReport(0.1, stopped_workers=4), True),
        (CloseReport(0.1, killed_pids=(4711,)), False),
        (CloseReport(0.1, failed_requests=1), False),
    ],
)
def test_closing_is_clean_if_nothing_was_killed_and_nobody_failed(report: CloseReport, clean: bool):
    """Stopped workers are no blemish; killed ones and failed requests are."""
    assert report.clean is clean
