# Every target works alone on a fresh machine that has python3 (3.11 or newer) and make.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench lock clean

$(VENV)/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(VENV)/installed  ## real images to a trained, folded, compared network in minutes
	$(BIN)/python -m train.demo --workdir runs/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed  ## needs the extra `torch` for the PyTorch columns
	$(BIN)/python -m benchmarks

lock:  ## resolve again (needs uv): one universal file for Python 3.11 and for 3.12 and later
	uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header \
	  --extra dev --extra tpu --extra tensorboard --extra retrieval --extra video --extra medical -q -o requirements.lock

clean:
	rm -rf $(VENV) build dist runs .pytest_cache
