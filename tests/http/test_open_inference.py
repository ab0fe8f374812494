"""The Open Inference Protocol, version 2, as Triton's own client speaks it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.http.archives import write_model
from tests.http.conftest import Client
from tests.http.test_openapi import check_schema
from torchmgmt import ModelManager
from torchmgmt.http import serve
from torchmgmt.settings import Settings

SAME = "def handle(data, context):\n    return data and [dict(row) for row in data]\n"
NAMED = (
    "def handle(data, context):\n"
    "    return data and [{name: value for name, value in row.items() if name != 'body'} for row in data]\n"
)
TYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
triton.InferenceServerClient("localhost").close()  # gevent keeps what the first client of a process opens


@pytest.fixture
def connect() -> Iterator:
    clients = []

    def connect(client: Client) -> triton.InferenceServerClient:
        clients.append(triton.InferenceServerClient(client.url.removeprefix("http://")))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def same(predicting, connect) -> triton.InferenceServerClient:
    """A model that answers with its inputs."""
    return connect(predicting(NAMED).client)


def test_workers_that_are_threads_speak_it_too(predicting, connect):
    """What reads and writes it is the same."""
    client = connect(predicting(NAMED, backend="thread").client)
    array = np.arange(3, dtype=np.float32)
    assert client.infer("model", [given("x", array, "FP32")]).as_numpy("x").tolist() == [0, 1, 2]


def given(name: str, array: np.ndarray, datatype: str, *, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def wanted(*names: str, binary: bool = True) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("datatype", TYPES)
def test_tensors_come_back_as_they_went(same, datatype, binary):
    """Of each type and of any shape, as binary data and as JSON."""
    for shape in ((2, 3), (4,), (1, 1, 2), (0,)):
        array = np.arange(math.prod(shape)).reshape(shape).astype(TYPES[datatype])
        if not binary and datatype == "FP16":
            continue  # this client sends none as JSON
        answer = same.infer("model", [given("x", array, datatype, binary=binary)], outputs=wanted("x", binary=binary))
        assert np.array_equal(answer.as_numpy("x"), array)
        assert answer.get_output("x")["datatype"] == datatype


def test_bytes_come_back_as_they_went(same):
    """Elements of any length; those that are no text cannot go as JSON."""
    array = np.array([b"", b"\xff\x00", "käse".encode()], dtype=object)
    answer = same.infer("model", [given("x", array, "BYTES")])
    assert answer.as_numpy("x").tolist() == array.tolist()
    with pytest.raises(InferenceServerException, match="ask for it as binary data"):
        same.infer("model", [given("x", array, "BYTES")], outputs=wanted("x", binary=False))
    text = np.array(["a", "ä"], dtype=object)
    answer = same.infer("model", [given("x", text, "BYTES", binary=False)], outputs=wanted("x", binary=False))
    assert answer.get_response()["outputs"][0]["data"] == ["a", "ä"]


def test_bfloat16_comes_back_as_it_went(same):
    """numpy has no such type, so the bytes are compared."""
    tensor = triton.InferInput("x", [2], "BF16")
    tensor._raw_data = b"\x80\x3f\x00\x40"
    tensor._parameters["binary_data_size"] = 4
    answer = same.infer("model", [tensor])
    assert answer.get_output("x")["datatype"] == "BF16"
    assert answer.as_numpy("x").astype(float).tolist() == [1.0, 2.0]


def test_only_what_was_asked_for_comes_in_that_order(same):
    """The rest is left out; what is not there is named, with what there is."""
    inputs = [given(name, np.zeros(1, np.float32), "FP32") for name in "abc"]
    answer = same.infer("model", inputs, outputs=wanted("c", "a"), request_id="mine")
    assert [output["name"] for output in answer.get_response()["outputs"]] == ["c", "a"]
    assert answer.get_response()["id"] == "mine"
    assert answer.get_response()["model_version"] == "1.0"
    with pytest.raises(InferenceServerException, match="there is no output 'z'; the model gives 'a', 'b', 'c'"):
        same.infer("model", inputs, outputs=wanted("z"))


def test_infinities_go_as_binary_data_only(same):
    """JSON has none."""
    array = np.array([math.nan, math.inf], np.float32)
    assert np.isnan(same.infer("model", [given("x", array, "FP32")]).as_numpy("x")[0])
    with pytest.raises(InferenceServerException, match="has NaN or an infinity in it"):
        same.infer("model", [given("x", array, "FP32")], outputs=wanted("x", binary=False))


def test_the_row_of_a_handler_has_a_field_for_each_input(predicting, connect):
    """The only one is its body, too; parameters of the request's own are there, the protocol's are not."""
    code = "def handle(data, context):\n    return data and [repr(sorted((k, type(v).__name__) for k, v in row.items())) for row in data]\n"
    client = connect(predicting(code).client)
    one = client.infer("model", [given("x", np.zeros(1, np.float32), "FP32")], parameters={"top": 3})
    assert eval(one.as_numpy("output-0")[0]) == [("body", "Tensor"), ("parameters", "dict"), ("x", "Tensor")]
    inputs = [given("x", np.zeros(1, np.float32), "FP32"), given("y", np.array([b"a"], object), "BYTES")]
    assert eval(client.infer("model", inputs).as_numpy("output-0")[0]) == [("x", "Tensor"), ("y", "list")]


@pytest.mark.parametrize(
    "answer, datatype, shape, values",
    [
        ("[1, 2]", "INT64", [2], [1, 2]),
        ("[[1.5], [2]]", "FP64", [2, 1], [[1.5], [2.0]]),
        ("True", "BOOL", [1], [True]),
        ("7", "INT64", [1], [7]),
        ("'text'", "BYTES", [1], [b"text"]),
        ("['a', 'b']", "BYTES", [2], [b"a", b"b"]),
        ("[]", "FP64", [0], []),
        ("{}", "BYTES", [1], [b"{}"]),
        ("[{'a': 1}, [2]]", "BYTES", [1], [b'[{"a": 1}, [2]]']),
        ("10 ** 30", "BYTES", [1], [b"1" + b"0" * 30]),
        ("__import__('numpy').array([[1, 2]], 'int16')", "INT16", [1, 2], [[1, 2]]),
        ("__import__('numpy').array(['a'])", "BYTES", [1], [b"a"]),
        ("__import__('torch').ones(1, 2, dtype=__import__('torch').float16)", "FP16", [1, 2], [[1.0, 1.0]]),
    ],
)
def test_whatever_a_handler_answers_becomes_an_output(predicting, connect, answer, datatype, shape, values):
    """Named as the client asked, if it asked for one; what is no tensor is its JSON."""
    code = f"def handle(data, context):\n    return data and [{answer} for row in data]\n"
    client = connect(predicting(code).client)
    result = client.infer("model", [given("x", np.zeros(1, np.float32), "FP32")], outputs=wanted("mine"))
    assert (result.get_output("mine")["datatype"], result.get_output("mine")["shape"]) == (datatype, shape)
    assert result.as_numpy("mine").tolist() == values


def test_several_tensors_become_several_outputs(predicting, connect):
    """A list of them by number, a dictionary by name; what the handler sets goes beside them."""
    code = (
        "import torch\n"
        "def handle(data, context):\n"
        "    if data is None: return None\n"
        "    context.set_response_header(0, 'X-Own', '1')\n"
        "    return [[torch.zeros(1), torch.ones(2)]]\n"
    )
    made = predicting(code)
    result = connect(made.client).infer("model", [given("x", np.zeros(1, np.float32), "FP32")])
    assert result.as_numpy("output-1").tolist() == [1.0, 1.0]
    body = {
        "inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [0]}],
        "parameters": {"binary_data_output": True},
    }
    response = made.client.post("/v2/models/model/infer", json=body)
    assert (response.headers["X-Own"], response.headers["Content-Type"]) == ("1", "application/octet-stream")
    assert json.loads(response.content[: int(response.headers["Inference-Header-Content-Length"])])["outputs"]


TENSOR = {"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}


@pytest.mark.parametrize(
    "request_, said",
    [
        (b"no json", "not valid JSON"),
        ([], "must be a JSON object"),
        ({}, "must have inputs"),
        ({"inputs": [{"shape": [1]}]}, "input 0 must be a JSON object with a name"),
        ({"inputs": [{**TENSOR, "shape": [3]}]}, "has 2 values, but its shape [3] has 3"),
        ({"inputs": [{**TENSOR, "shape": [-1]}]}, "whole numbers, not [-1]"),
        ({"inputs": [{**TENSOR, "datatype": "FP8"}]}, "the datatype 'FP8', but must have one of BOOL,"),
        ({"inputs": [{**TENSOR, "data": [[1], 2]}]}, "lists and values beside each other"),
        ({"inputs": [{**TENSOR, "data": ["a", "b"]}]}, "values of type str"),
        ({"inputs": [{**TENSOR, "datatype": "INT8", "data": [1, 300]}]}, "no INT8"),
        ({"inputs": [{**TENSOR, "datatype": "INT32", "data": [1, 1.5]}]}, "values of type float"),
        ({"inputs": [{**TENSOR, "datatype": "BYTES"}]}, "must be text, not int"),
        ({"inputs": [TENSOR, TENSOR]}, "two inputs have one name"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32"}]}, "neither data nor"),
        ({"inputs": [{**TENSOR, "parameters": {"binary_data_size": 8}}]}, "0 bytes are left"),
        ({"inputs": [{**TENSOR, "parameters": {"shared_memory_region": "r"}}]}, "not served here"),
        ({"inputs": [TENSOR], "outputs": [1]}, "output 0 must be"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(predicting, request_, said):
    """Under ``error``, where these clients look; the handler is not run."""
    client = predicting("def handle(data, context):\n    return data and 1 / 0\n").client
    data = request_ if isinstance(request_, bytes) else json.dumps(request_)
    response = client.post("/v2/models/model/infer", data=data)
    assert response.status_code == 400
    assert said in response.json()["error"]
    assert response.json()["error"] == response.json()["message"]


def test_binary_data_must_have_the_length_that_is_said(predicting):
    """Neither more nor less, and the JSON must end where the header says."""
    client = predicting(NAMED).client
    tensor = {"name": "x", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    head = json.dumps({"inputs": [tensor]}).encode()
    header = {"Inference-Header-Content-Length": str(len(head))}
    for data, said in ((b"1234", "4 bytes are left"), (b"1" * 9, "1 bytes more")):
        response = client.post("/v2/models/model/infer", data=head + data, headers=header)
        assert (response.status_code, said in response.json()["error"]) == (400, True)
    response = client.post("/v2/models/model/infer", data=b"{}", headers={"Inference-Header-Content-Length": "3"})
    assert "the body has 2 bytes" in response.json()["error"]


def test_health_and_metadata(predicting, connect):
    """Of the server, of a model, and of one version."""
    made = predicting(NAMED)
    made.register("model", NAMED, version="2", initial_workers=0, max_workers=0)
    client = connect(made.client)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "model_repository"]
    assert [client.is_model_ready("model", version) for version in ("", "1.0", "2", "3")] == [True, True, False, False]
    assert not client.is_model_ready("nope")
    assert client.get_model_metadata("model")["versions"] == ["1.0", "2"]
    assert client.get_model_metadata("model", "2")["versions"] == ["2"]
    with pytest.raises(InferenceServerException, match="Model not found: nope"):
        client.get_model_metadata("nope")
    with pytest.raises(InferenceServerException, match="No worker is available"):
        client.infer("model", [given("x", np.zeros(1, np.float32), "FP32")], model_version="2")


def test_an_archive_with_the_envelope_works_with_binary_data(predicting, connect):
    """The envelope kservev2 opens the request's JSON, with all data in it; what it answers stays, and can be binary."""
    made = predicting("def handle(data, context):\n    return data\n")
    code = (
        "def handle(data, context):\n    return data and [[2 * each for each in tensor['data']] for tensor in data]\n"
    )
    made.register("wrapped", code, envelope="kservev2")
    client = connect(made.client)
    for binary in (True, False):
        result = client.infer(
            "wrapped", [given("x", np.arange(2, dtype=np.int32), "INT32", binary=binary)], request_id="7"
        )
        assert result.as_numpy("x").tolist() == [0, 2]
        assert (result.get_response()["id"], result.get_response()["model_name"]) == ("7", "wrapped")


def test_the_repository_loads_lists_and_unloads(backend, connect, tmp_path):
    """An archive of the model store by its name; a model without a worker gets one; what is unloaded is gone."""
    code = "def handle(data, context):\n    return data\n"
    write_model(tmp_path, "first.mar", code, name="first")
    write_model(tmp_path, "broken.mar", "raise RuntimeError('broken on purpose')\n", name="broken")
    settings = Settings(enable_model_api=True)
    with ModelManager(tmp_path, settings=settings, backend=backend) as manager, serve(manager) as server:
        client = connect(Client(server.url))
        assert {(item["name"], item["state"]) for item in client.get_model_repository_index()} == {
            ("broken", "UNAVAILABLE"),
            ("first", "UNAVAILABLE"),
        }
        client.load_model("first")
        client.load_model("first")
        manager.scale("first", 0, 0)
        assert manager.describe("first").scale.min_workers == 0
        client.load_model("first")
        index = client.get_model_repository_index()
        check_schema("RepositoryIndex", index)
        assert ("first", "1.0", "READY") in {(item["name"], item["version"], item["state"]) for item in index}
        with pytest.raises(InferenceServerException, match="broken on purpose"):
            client.load_model("broken")
        with pytest.raises(InferenceServerException, match=r"the model store has no nope\.mar"):
            client.load_model("nope")
        client.unload_model("first")
        with pytest.raises(InferenceServerException, match="Model not found: first"):
            client.unload_model("first")
        assert len(manager) == 0


def test_the_repository_is_changed_only_where_the_model_api_is_on(backend, connect, tmp_path):
    """405, as registering is."""
    with ModelManager(tmp_path, backend=backend) as manager, serve(manager) as server:
        client = connect(Client(server.url))
        for call in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="Requested method is not allowed"):
                call("first")
        assert client.get_model_repository_index() == []
