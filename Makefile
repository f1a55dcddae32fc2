# One-word commands. Each sets up what it needs: make test works in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all check fix gpu-check

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/rayrec demo

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-all: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

fix: setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# On a machine with torch and CUDA: neither Ray nor a network is needed, nor what setup installs.
gpu-check:
	$(PYTHON) -m rayrec.bench.device_bench
