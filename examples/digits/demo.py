"""One life of a model, from archive to unregister: what `make demo` shows.

Everything real: torch-model-archiver builds the archives, worker processes run the network, a client talks to the
Management API over a socket. Exits with 1 if a step or the accuracy is not what it has to be.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import pack  # noqa: E402 - beside this file, whatever the working directory is

from torchmgmt import ModelManager, register_model_with_params  # noqa: E402
from torchmgmt.http import serve  # noqa: E402
from torchmgmt.settings import Settings  # noqa: E402

SHADES = " .:-=+*#%@"
SHOWN = 4
# One request for each sample, and again, so that predictions are still under way while the model is being scaled.
ROUNDS_WHILE_SCALING = 60


class Failed(Exception):
    """A step did not do what it has to do."""


def main() -> int:
    """Run the demo; return the exit code."""
    started = time.perf_counter()
    samples = [file.read_bytes() for file in sorted((HERE / "samples").glob("*.pgm"))]
    labels = json.loads((HERE / "samples" / "labels.json").read_text())
    expected = json.loads((HERE / "metrics.json").read_text())
    try:
        with tempfile.TemporaryDirectory(prefix="digits-demo-") as store:
            live(Path(store), samples, labels, expected)
    except Failed as error:
        print(f"\nThe demo failed: {error}")
        return 1
    print(f"\nAll steps did what they should, in {time.perf_counter() - started:.1f} s.")
    return 0


def live(store: Path, samples: Sequence[bytes], labels: Sequence[int], expected: dict[str, Any]) -> None:
    """Take the digits model through its life."""
    with step("torch-model-archiver builds digits 1.0 and 2.0 from examples/digits"):
        for version, archive in pack.build(store).items():
            say(f"{version}: {archive.name}, {archive.stat().st_size / 1024:.0f} KiB")

    settings = Settings(enable_model_api=True)
    with ModelManager(store, settings=settings) as manager, serve(manager, port=0) as server:
        say_title(f"a ModelManager in this process, and its Management API at {server.url}")
        api = Api(server.url)

        with step('manager.register("digits.mar", initial_workers=1, batch_size=8, max_batch_delay=5)'):
            digits = manager.register("digits.mar", initial_workers=1, batch_size=8, max_batch_delay=5)
            say(f"{digits!r} is {digits.state.name}")
            check(digits.state.name == "READY", "the model is not ready")

        with step("digits.map(samples)"):
            answers = list(digits.map(samples))
        show(samples, answers)
        check_answers(answers, labels, expected, "1.0")

        with step("PUT /models/digits?min_worker=4&synchronous=true, while predictions run"):
            scale_under_load(api, digits.predict, samples, answers)

        with step('register_model_with_params({"url": "digits_v2.mar", "initial_workers": 2, ...})'):
            response = register_model_with_params(
                {"url": "digits_v2.mar", "initial_workers": 2, "synchronous": "true"}, management_address=server.url
            )
            api.say(response)
            check(response.status_code == 200, "version 2.0 was not registered")

        with step("PUT /models/digits/2.0/set-default"):
            api.call("PUT", "/models/digits/2.0/set-default")

        with step("manager.predict for every sample: the same call now reaches version 2.0"):
            answers = [manager.predict("digits", sample) for sample in samples]
        check_answers(answers, labels, expected, "2.0")

        with step("GET /models/digits/all"):
            for item in api.call("GET", "/models/digits/all", quietly=True).json():
                pids = [worker["pid"] for worker in item["workers"]]
                say(f"{item['modelName']} {item['modelVersion']}: {item['state']}, workers {pids}")

        with step("GET /models"):
            api.call("GET", "/models")

        for version in ("1.0", "2.0"):
            with step(f"DELETE /models/digits/{version}"):
                api.call("DELETE", f"/models/digits/{version}")
        check(manager.models() == (), "a model is left after all were unregistered")

        with step("manager.close()"):
            report = manager.close()
            say(f"{report.stopped_workers} workers ended, {len(report.killed_pids)} had to be killed")
            check(report.clean, f"closing was not clean: {report}")


def scale_under_load(
    api: Api, predict: Callable[[bytes], Any], samples: Sequence[bytes], answers: Sequence[Any]
) -> None:
    """Scale to 4 workers while requests are under way; each must be answered, and as before."""
    with ThreadPoolExecutor(8) as callers:
        futures = [callers.submit(predict, sample) for _ in range(ROUNDS_WHILE_SCALING) for sample in samples]
        api.call("PUT", "/models/digits?min_worker=4&synchronous=true")
        under_way = sum(not future.done() for future in futures)
        got = [future.result(timeout=30) for future in futures]
    say(f"{len(got)} predictions answered, {under_way} of them after the answer above")
    same = all(answer["digit"] == answers[index % len(answers)]["digit"] for index, answer in enumerate(got))
    check(same, "a prediction changed while the model was scaled")
    workers = api.call("GET", "/models/digits", quietly=True).json()[0]["workers"]
    check([worker["status"] for worker in workers] == ["READY"] * 4, f"there are not 4 ready workers: {workers}")


class Api:
    """A client of the Management API that prints what comes back."""

    def __init__(self, url: str) -> None:
        self._url = url

    def call(self, method: str, path: str, *, quietly: bool = False) -> requests.Response:
        """Make a call and return its response, which must be a success."""
        response = requests.request(method, self._url + path, timeout=60)
        if not quietly or not response.ok:
            self.say(response)
        check(response.ok, f"{method} {path} answered {response.status_code}")
        return response

    @staticmethod
    def say(response: requests.Response) -> None:
        """Print a response on one line."""
        say(f"{response.status_code} {json.dumps(response.json())}")


def show(samples: Sequence[bytes], answers: Sequence[dict[str, Any]]) -> None:
    """Print some digits side by side, with what was predicted under each."""
    pictures = [list(rows(sample)) for sample in samples[:SHOWN]]
    print()
    for lines in zip(*pictures, strict=True):
        print("     " + "     ".join(lines))
    print(
        "     "
        + "     ".join(f"{answer['digit']} ({answer['probability']:.0%})".ljust(16) for answer in answers[:SHOWN])
    )


def rows(image: bytes) -> Iterator[str]:
    """Give the rows of an 8x8 picture (a binary PGM, maxval 16) as text, two characters a pixel."""
    pixels = image[-64:]
    for start in range(0, 64, 8):
        yield "".join(2 * SHADES[pixel * (len(SHADES) - 1) // 16] for pixel in pixels[start : start + 8])


def check_answers(
    answers: Sequence[dict[str, Any]], labels: Sequence[int], expected: dict[str, Any], version: str
) -> None:
    """Say how many answers are right; as many must be as when the weights were made."""
    right = sum(answer["digit"] == label for answer, label in zip(answers, labels, strict=True))
    figures = expected["versions"][version]
    say(f"{right} of {len(labels)} right (accuracy on all held-out images: {figures['accuracy']:.2%})")
    check(right >= figures["samples_right"], f"only {right} of {len(labels)} predictions are right")


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print what is called, and afterwards how long it took; turn an error into a failure of the demo."""
    say_title(title)
    started = time.perf_counter()
    try:
        yield
    except Failed:
        raise
    except Exception as error:
        raise Failed(f"{title}: {type(error).__name__}: {error}") from error
    say(f"took {(time.perf_counter() - started) * 1000:,.0f} ms")


def say_title(text: str) -> None:
    """Print the headline of a step."""
    print(f"\n>> {text}", flush=True)


def say(text: str) -> None:
    """Print a line of what came back."""
    print(f"   {text}", flush=True)


def check(is_so: bool, otherwise: str) -> None:
    """Fail the demo unless something is so."""
    if not is_so:
        raise Failed(otherwise)


if __name__ == "__main__":
    sys.exit(main())
