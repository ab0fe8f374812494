"""Values of a program's own classes, as inputs and as answers, in real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.handlers import run_program, write_folder

CLASSES = """
import asyncio, enum, sys
from dataclasses import dataclass, field
from typing import NamedTuple
import torch
from torchmgmt import ModelManager

@dataclass
class Point:
    x: int
    label: str = ""
    made = 0

    def moved(self):
        return Point(self.x + STEP, "moved")

class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor

class Colour(enum.Enum):
    RED = 1
    GREEN = 2

STEP = 10

class Swapping(torch.nn.Module):
    def forward(self, pair):
        return Pair(pair.right + 1, pair.left)

class Handling:
    def handle(self, data, context):
        Point.made += 1
        return [row["body"].moved() if isinstance(row["body"], Point) else row["body"] for row in data]

def same(values):
    return values

def parts(values):
    for number in range(3):
        yield [Point(number) for value in values]

def check():
    moved = Point.moved
    with ModelManager() as manager:
        for source in (lambda values: [value.moved() for value in values], Handling, Handling()):
            model = manager.register(source, model_name="m", initial_workers=2, backend=backend)
            for number in range(4):
                answer = model.predict(Point(number))
                assert type(answer) is Point, type(answer)
                assert answer == Point(number + 10, "moved")
            assert [each.x for each in model.map([Point(1), Point(2)])] == [11, 12]
            assert type(asyncio.run(ask(model))) is Point
            model.unregister()
        model = manager.register(same, model_name="same", batch_size=4, backend=backend)
        for value in (Colour.GREEN, [Point(1)], {"a": (Point(2), Colour.RED)}, Point, Colour, None):
            assert model.predict(value) == value
        assert model.predict(fields={"one": Point(1)}) == {"one": Point(1)}
        assert model.predict(lambda: STEP)() == 10
        swapping = manager.register(Swapping().eval(), model_name="swapping", batch_size=4, backend=backend)
        answer = swapping.predict(Pair(torch.zeros(2), torch.ones(2)))
        assert type(answer) is Pair
        assert (answer.left.tolist(), answer.right.tolist()) == ([2, 2], [0, 0])
        streaming = manager.register(parts, model_name="parts", backend=backend)
        assert list(streaming.stream(1)) == [Point(0), Point(1), Point(2)]
        trusted = manager.register(sys.argv[1], model_name="archive", handler="handler.py", backend=backend)
        assert trusted.predict(Point(4)) == ("Point", Point(4))
    assert backend == "thread" or Point.made == 0
    assert Point.moved is moved

async def ask(model):
    return await model.apredict(Point(1))
"""

KIND = "def handle(data, context):\n    return data and [(type(row['body']).__name__, row['body']) for row in data]\n"


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_values_of_the_programs_own_classes_travel_both_ways(tmp_path: Path, backend: str) -> None:
    """An answer is of the very class that the program has, which stays as it is, whatever runs the model."""
    folder = write_folder(tmp_path / "m", KIND)
    done = run_program(CLASSES + f"\nbackend = {backend!r}\ncheck()\nprint('right')\n", folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


SPAWNED = """
import multiprocessing
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=check)
    child.start()
    child.join()
    print(child.exitcode)
"""


def test_so_they_do_in_a_program_that_multiprocessing_has_spawned(tmp_path: Path, repository: Path) -> None:
    """Its main module has another name."""
    folder = write_folder(tmp_path / "m", KIND)
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(repository)!r})\n{CLASSES}\nbackend = 'process'\n{SPAWNED}"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", program, folder], capture_output=True, text=True, check=False, timeout=50
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


UNTRUSTED = """
import sys
from torchmgmt import ModelManager
from torchmgmt.errors import HandlerFailed, InvalidArgument

class Mine:
    pass

with ModelManager(sys.argv[1]) as manager:
    model = manager.register("m", model_name="m", handler="handler.py", trusted=False)
    try:
        model.predict({"mine": Mine()})
    except InvalidArgument as error:
        print(error)
    try:
        model.predict("make")
    except HandlerFailed as error:
        print("pickle" in str(error))
    print(model.predict("__main__"))
"""

MAKING = """
def handle(data, context):
    return data and [type("Made", (), {"__module__": "__main__"})() if row["body"] == "make" else row["body"] for row in data]
"""


def test_no_code_goes_to_a_model_that_came_over_http_or_comes_from_it(tmp_path: Path, light_torch: Path) -> None:
    """Neither does it get what is the program's, nor is what it makes up made in the program."""
    write_folder(tmp_path / "store" / "m", MAKING)
    done = run_program(UNTRUSTED, tmp_path / "store")
    assert (done.returncode, done.stderr) == (0, "")
    refused, *others = done.stdout.splitlines()
    assert refused.startswith("data is '__main__.Mine', but must be made of what workers find by its name")
    assert others == ["True", "__main__"]
