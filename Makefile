# The project's verbs. Each target creates the virtual environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Optional: without a C compiler everything runs in pure Python.
KERNELS = $(BIN)/python -m flexure.units.kernels >/dev/null 2>&1 || true

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.installed
	@$(KERNELS)
	$(BIN)/flexure demo

test: $(VENV)/.installed-dev
	@$(KERNELS)
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed-dev
	@$(KERNELS)
	$(BIN)/python -m pytest -m ""

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	@$(KERNELS)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev]'
	touch $@ $(VENV)/.installed
