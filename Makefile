# Two commands set a fresh machine up: `make quickstart` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1

.PHONY: quickstart test test-all lint types layers check bench wheel clean

# torch is asked for first and by its exact version: a resolver that sees it in a range takes the CUDA build.
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

quickstart: $(VENV)/.run
	$(BIN)/fedtune run finance

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# the slow ones too (and those that need a GPU, which skip without one)
test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m ""

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports

check: lint types layers test

# ours against the reference's procedure, with Flower's Ray simulation beside it: about a quarter of an hour on 2 cores
$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/pip install -q -c constraints.txt -e ".[simulation]"
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/speed.py

wheel: $(VENV)/.dev
	$(BIN)/pip wheel -q --no-deps -w dist .

clean:
	rm -rf $(VENV) build dist
