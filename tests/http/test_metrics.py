"""GET /metrics over real sockets: alone, on a shared address, under a flood, and in the program."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from tests.handlers import ECHO, until, write_folder
from tests.http.conftest import Client
from tests.http.test_program import start
from tests.pages import OPENMETRICS, read, samples_of
from torchmgmt import ModelManager, ProcessBackend
from torchmgmt.errors import NoWorker
from torchmgmt.http import create_metrics_app
from torchmgmt.http.addresses import Addresses, Role
from torchmgmt.http.server import start_servers
from torchmgmt.http.tokens import Keys
from torchmgmt.metrics import Metrics
from torchmgmt.settings import Settings

__all__ = ["start"]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "grafana"
ANY_PORT = "http://127.0.0.1:0"


@pytest.fixture
def real(backend: ProcessBackend) -> Iterator[ModelManager]:
    with ModelManager(backend=backend) as manager:
        yield manager


@pytest.fixture
def metrics(real: ModelManager) -> Iterator[Metrics]:
    with Metrics(real) as metrics:
        yield metrics


@pytest.fixture
def serve_all(real: ModelManager, metrics: Metrics) -> Iterator[Callable[..., dict[Role, Client]]]:
    """Serve all roles, and return a client for each."""
    with contextlib.ExitStack() as stack:

        def serve(**options: object) -> dict[Role, Client]:
            given = {role.setting: ANY_PORT for role in Role} | options
            addresses = stack.enter_context(Addresses.bind(Settings(**given), Role))
            app = create_metrics_app(metrics)
            settings = Settings(**given, disable_token_authorization=True)
            servers = start_servers(real, addresses, settings, Keys(), metrics=app, on_response=metrics.count_response)
            stack.callback(servers.close, 10)
            return {role: Client(str(addresses[role])) for role in Role}

        yield serve


def test_a_scrape_is_prometheus_text(serve_all, real, tmp_path):
    """Of a model that has answered, with the content type that says so; TorchServe's names beside ours."""
    client = serve_all()[Role.METRICS]
    model = real.register(write_folder(tmp_path / "m", ECHO), model_name="m", handler="handler.py")
    assert model.predict("x") == "x"
    until(lambda: "torchmgmt_requests_total{" in client.get("/metrics").text)
    answer = client.get("/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = read(answer.text)
    assert samples("torchmgmt_requests_total", model="m", version="1.0") == 1
    assert samples("ts_inference_requests_total", model_name="m", model_version="1.0") == 1
    assert samples("process_resident_memory_bytes") > 1e6
    assert "# TYPE Requests2XX counter\n" in answer.text


def test_a_client_may_have_openmetrics(serve_all):
    """As Prometheus asks for it."""
    answer = serve_all()[Role.METRICS].get("/metrics", headers={"Accept": OPENMETRICS})
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert "torchmgmt_requests" in {family.name for family in parse_openmetrics(answer.text)}


def test_names_choose_what_is_shown(serve_all):
    """As often as wanted, with a comma in one or not; of an unknown one nothing."""
    client = serve_all()[Role.METRICS]
    chosen = read(client.get("/metrics?name[]=CPUUtilization&name[]=MemoryUsed").text)
    assert chosen.names == {"CPUUtilization", "MemoryUsed"}
    for query in ("name[]=nothing", "name%5B%5D=a,b"):
        answer = client.get(f"/metrics?{query}")
        assert (answer.status_code, answer.text) == (200, "")


def test_every_answer_is_counted_by_its_code(serve_all):
    """Those of all addresses, waitress' and uvicorn's."""
    clients = serve_all()
    assert clients[Role.MANAGEMENT].get("/models").status_code == 200
    assert clients[Role.MANAGEMENT].get("/models/none").status_code == 404
    assert clients[Role.INFERENCE].get("/ping").status_code == 200
    assert clients[Role.METRICS].get("/nothing").status_code == 404
    samples = read(clients[Role.METRICS].get("/metrics").text)
    assert (samples("Requests2XX"), samples("Requests4XX"), samples("Requests5XX")) == (2, 2, 0)
    assert samples("torchmgmt_http_responses_total", code="404") == 2


@pytest.mark.parametrize("shared", [Role.INFERENCE, Role.MANAGEMENT])
def test_the_page_may_share_an_address(serve_all, shared):
    """With either of the other APIs, or both; the other paths stay theirs."""
    with Addresses.bind(Settings(metrics_address=ANY_PORT), [Role.METRICS]) as free:
        address = str(free[Role.METRICS])
    client = serve_all(**{shared.setting: address, "metrics_address": address})[Role.METRICS]
    path = "/ping" if shared is Role.INFERENCE else "/models"
    assert client.get(path).status_code == 200
    assert read(client.get("/metrics/").text)("Requests2XX") == 1


def test_only_get_is_served(serve_all):
    """And there is nothing else at this address."""
    client = serve_all()[Role.METRICS]
    assert client.post("/metrics").status_code == 405
    assert client.get("/").json()["code"] == 404


def test_a_flood_of_requests_does_not_keep_the_page_away(serve_all, real, tmp_path):
    """Its server has a thread of its own: while a queue is full and clients hammer, it answers, and counts."""
    clients = serve_all()
    gate = tmp_path / "gate"
    source = f"import os, time\ndef handle(data, context):\n    while data and not os.path.exists({str(gate)!r}): time.sleep(0.002)\n    return data"
    model = real.register(write_folder(tmp_path / "m", source), model_name="m", handler="handler.py")
    over = threading.Event()

    def hammer() -> None:
        while not over.is_set():
            with contextlib.suppress(Exception):
                model.submit("x")
            clients[Role.INFERENCE].get("/ping")

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        full = until(
            lambda: read(clients[Role.METRICS].get("/metrics").text)("torchmgmt_errors_total", error="QueueFull")
        )
        assert full >= 1
        assert read(clients[Role.METRICS].get("/metrics").text)("torchmgmt_queue_length") == 100
    finally:
        over.set()
        gate.touch()
        for thread in threads:
            thread.join()


def test_the_program_serves_them(start):
    """At the address that it prints, without a key."""
    program = start()
    samples = read(program.client("Metrics").get("/metrics").text)
    assert samples("Requests2XX") == 0
    assert samples("MemoryUsed") > 0
    assert program.end() == 0


def test_the_program_serves_none_if_told_so(start):
    """enable_metrics_api=false: no address; disable_system_metrics: not this machine's."""
    program = start("--enable-metrics-api", "false")
    assert not any("Metrics address" in line for line in program.lines)
    assert program.end() == 0
    program = start("--disable-system-metrics")
    assert read(program.client("Metrics").get("/metrics").text)("MemoryUsed") is None
    assert program.end() == 0


def expressions_of(dashboard: dict) -> list[str]:
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    return [*panels, *variables]


def test_the_dashboard_asks_for_what_there_is(real, metrics, tmp_path):
    """Every metric and every label that an expression of examples/grafana names is on the page."""
    model = real.register(write_folder(tmp_path / "m", ECHO), model_name="m", handler="handler.py")
    model.predict("x")
    real.scale("m", 0)
    with pytest.raises(NoWorker):
        model.predict("x")
    real.scale("m", 1)
    metrics.count_response(200)
    until(lambda: samples_of(metrics)("torchmgmt_batch_size_count"))
    samples = samples_of(metrics)
    dashboard = json.loads((EXAMPLES / "torchmgmt.json").read_text())
    names = {
        name
        for text in expressions_of(dashboard)
        for name in re.findall(r"\b(?:torchmgmt|process)_\w+|\b[A-Z]\w+Utilization", text)
    }
    assert len(names) > 15
    assert names - samples.names == set()
    labels = {label for _, of in samples for label, _ in of} | {"job", "instance"}
    for text in expressions_of(dashboard):
        by = [label for group in re.findall(r"\bby \(([^)]*)\)", text) for label in group.split(", ")]
        assert set(by) | set(re.findall(r'(\w+)=~"', text)) <= labels, text


def test_the_dashboard_has_one_place_for_each_panel():
    """No two have one id, and none lies upon another."""
    panels = json.loads((EXAMPLES / "torchmgmt.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23


def test_prometheus_is_told_to_read_the_default_address():
    """The configuration beside the dashboard."""
    config = yaml.safe_load((EXAMPLES / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert f"http://{job['static_configs'][0]['targets'][0]}" == Settings().metrics_address
