"""The README does what it says: its blocks are run in order of reading, each by itself.

```python            run in a new interpreter, from standard input, in a folder that looks like a checkout after
                     `make demo`: model_store/ holds the archives of examples/digits, and examples/ is there
```text              directly after it: exactly what it prints; `...` stands for anything
```sh                its `python`, `make` and `pip install` lines name what exists
<!-- beside a server -->   on the line before a python block: it needs one, started as the README says
"""

from __future__ import annotations

import doctest
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 90
BESIDE_A_SERVER = "<!-- beside a server -->"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)


@attrs.frozen
class Block:
    """One fenced block, and what stands around it."""

    language: str
    text: str
    line: int
    needs_server: bool
    expected: str | None

    def __str__(self) -> str:
        return f"line {self.line}"


def blocks_of(markdown: str) -> list[Block]:
    """The fenced blocks of a page, each python block with the output that is shown after it."""
    matches = list(FENCE.finditer(markdown))
    blocks = []
    for index, match in enumerate(matches):
        before = markdown[: match.start()].rstrip()
        following = matches[index + 1] if index + 1 < len(matches) else None
        is_shown = (
            following is not None and following[1] == "text" and not markdown[match.end() : following.start()].strip()
        )
        blocks.append(
            Block(
                language=match[1],
                text=match[2],
                line=markdown.count("\n", 0, match.start()) + 1,
                needs_server=before.endswith(BESIDE_A_SERVER),
                expected=following[2] if following is not None and is_shown else None,
            )
        )
    return blocks


def _readme_blocks() -> list[Block]:
    readme = ROOT / "README.md"
    return blocks_of(readme.read_text(encoding="utf-8")) if readme.exists() else []


BLOCKS = _readme_blocks()
RUN = [block for block in BLOCKS if block.language == "python"]
SHELL_LINES = [
    (block, line) for block in BLOCKS if block.language == "sh" for line in block.text.replace("\\\n", " ").splitlines()
]


@pytest.fixture(scope="module")
def model_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archives of examples/digits, made by the real torch-model-archiver."""
    from examples.digits import pack

    folder = tmp_path_factory.mktemp("readme") / "model_store"
    folder.mkdir()
    pack.build(folder)
    assert (folder / "digits.mar").is_file()
    return folder


@pytest.fixture
def checkout(tmp_path: Path, model_store: Path) -> Path:
    shutil.copytree(model_store, tmp_path / "model_store")
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    return tmp_path


def test_the_readme_has_something_to_run() -> None:
    """A reader can paste at least one block of Python."""
    assert RUN


@pytest.mark.timeout(TIMEOUT_S + 30)
@pytest.mark.parametrize("block", RUN, ids=str)
def test_a_block_runs_as_pasted_and_prints_what_is_shown(block: Block, checkout: Path) -> None:
    """Every block of Python runs by itself, and its output is the one that the README shows."""
    with server_in(checkout) if block.needs_server else nullcontext(dict(os.environ)) as environment:
        finished = subprocess.run(
            [sys.executable, "-"],
            check=False,
            input=block.text,
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    if block.expected is not None:
        assert_output(block.expected, finished.stdout)


@contextmanager
def server_in(folder: Path) -> Iterator[dict[str, str]]:
    """Run the server as the README starts it, but on ports of the system's choice; yield the environment to find it."""
    command = [sys.executable, "-m", "torchmgmt.http", "--model-store", "model_store", "--enable-model-api"]
    names = ("management", "inference", "metrics")
    ports = [part for name in names for part in (f"--{name}-address", "http://127.0.0.1:0")]
    with subprocess.Popen(command + ports, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            lines = list(itertools.takewhile(lambda line: line != "Model server started\n", server.stdout))
            address = next(line.split()[-1] for line in lines if line.startswith("Management address"))
            yield {**os.environ, "TORCHMGMT_MANAGEMENT_ADDRESS": address}
        finally:
            server.terminate()
            server.wait(TIMEOUT_S)


def assert_output(expected: str, got: str) -> None:
    """Compare as doctest does, `...` for anything."""
    want, got = expected.strip() + "\n", got.strip() + "\n"
    example = doctest.Example(source="", want=want)
    checker = doctest.OutputChecker()
    if not checker.check_output(want, got, doctest.ELLIPSIS):
        flags = doctest.ELLIPSIS | doctest.REPORT_UDIFF
        pytest.fail(checker.output_difference(example, got, flags), pytrace=False)


@pytest.mark.parametrize("line", [pytest.param(line, id=f"{block}: {line}") for block, line in SHELL_LINES])
def test_a_shell_line_names_what_exists(line: str) -> None:
    """No command of the README starts a module, a script, a make target or an extra that is not there."""
    assert missing_in(line) == []


def missing_in(line: str) -> list[str]:
    """What a shell line refers to in this project that is not there."""
    modules = re.findall(r"\bpython3? -m ((?:torchmgmt|benchmarks|examples)[\w.]*)", line)
    scripts = re.findall(r"\bpython3? ([\w./-]+\.py)\b", line)
    targets = re.findall(r"(?:^|[;&|]\s*)make ([\w-]+)", line.strip())
    extras = re.findall(r"\btorchmgmt\[([\w,-]+)\]", line)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return [
        *(name for name in modules if not _is_runnable(name)),
        *(name for name in scripts if not (ROOT / name).is_file()),
        *(name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)),
        *(
            name
            for names in extras
            for name in names.split(",")
            if not re.search(rf"^{name} = \[", project, re.MULTILINE)
        ),
    ]


def _is_runnable(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


PAGE = """\
Words.

```python
print("one")
```

```text
o...e
```

<!-- beside a server -->
```python
call()
```

Words between.

```text
not output
```

```sh
make demo
```
"""


def test_blocks_are_told_apart() -> None:
    """The reader of the page knows what is run, what it needs, and what is output."""
    blocks = blocks_of(PAGE)
    assert [(b.language, b.needs_server, b.expected, b.line) for b in blocks] == [
        ("python", False, "o...e\n", 3),
        ("text", False, None, 7),
        ("python", True, None, 12),
        ("text", False, None, 18),
        ("sh", False, None, 22),
    ]


def test_other_output_than_shown_is_a_failure() -> None:
    """Output is compared as a whole; only `...` is free."""
    assert_output("a ... c", "a b c\n")
    with pytest.raises(pytest.fail.Exception, match="Expected"):
        assert_output("a b", "a c")


@pytest.mark.parametrize(
    "line, missing",
    [
        ("make demo", []),
        ("git pull && make tea", ["tea"]),
        ("python examples/digits/pack.py model_store", []),
        ("python examples/digits/absent.py", ["examples/digits/absent.py"]),
        ("python -m torchmgmt.absent --port 0", ["torchmgmt.absent"]),
        ("pip install 'torchmgmt[http]'", []),
        ("pip install 'torchmgmt[http,tea]'", ["tea"]),
        ("curl http://127.0.0.1:8081/models", []),
    ],
)
def test_a_wrong_shell_line_is_found(line: str, missing: list[str]) -> None:
    """What a command names is looked up in the project, not believed."""
    assert missing_in(line) == missing
