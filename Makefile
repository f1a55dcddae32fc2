# One-word commands. Each sets up what it needs: make test works in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
# Where it is set, every process that Ray starts compiles Ray and torch anew: three times the time of the tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-all check fix docs figures gpu-check bench-peers

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/rayrec demo

# Those of tests/ray share one local cluster, and every CPU is theirs; the others run side by side.
TEST := $(BIN)/python -m pytest
BESIDE := -n logical --maxprocesses 4

test: setup
	$(TEST) -m "not slow" $(BESIDE) tests/unit
	$(TEST) -m "not slow" tests/ray

test-all: setup
	$(TEST) $(BESIDE) tests/unit
	$(TEST) tests/ray

check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/mkdocs build --strict --quiet

fix: setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# Writes the pages that come from the code and serves all pages on http://127.0.0.1:8000.
docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs serve

# Measures the tables between figure marks again, as far as their data are here, and shows what changed.
figures: setup
	$(BIN)/python docs/figures.py

# On a machine with torch and CUDA: neither Ray nor a network is needed, nor what setup installs. Beside torch it needs
# filelock, numpy, pandas, pyarrow, pydantic, rich and safetensors, and tomli before Python 3.11.
gpu-check:
	$(PYTHON) -m rayrec.bench.device_bench

# Beside SASRec of RecTools, which wants older libraries and so has an environment of its own. Options stand in PEERS:
# make bench-peers PEERS='--workspace my-workspace --epochs 8'
bench-peers: setup .venv-peers/.installed
	$(BIN)/python -m rayrec.bench.peers_bench --python .venv-peers/bin/python $(PEERS)

# The same release of torch as ours, so that the networks are compared and not their libraries.
.venv-peers/.installed: | setup
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check 'rectools[torch]==0.19.0' \
		"torch==$$($(BIN)/python -c 'import torch; print(torch.__version__.partition("+")[0])')"
	touch $@
