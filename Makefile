# Two commands set everything up by themselves: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test soak clean

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

# The simulated mesh under drawn faults for SECONDS, on all cores, from seed FIRST on: see docs/simulation.md.
SECONDS ?= 600
FIRST ?= 100000

soak: $(VENV)/.installed-test
	$(BIN)/python -m tests.simulation --soak $(SECONDS) --first $(FIRST)

# Sources of the C kernels are prerequisites: the installation is editable, but compiled code is not.
NATIVE := setup.py pyproject.toml $(wildcard kernels/csrc/*)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(BIN)/python $(NATIVE)
	$(BIN)/pip install --quiet --editable ".[mpi]"
	touch $@

$(VENV)/.installed-test: $(BIN)/python $(NATIVE)
	$(BIN)/pip install --quiet --editable ".[mpi,bench,test]"
	touch $@ $(VENV)/.installed-demo

clean:
	rm -rf $(VENV) build *.egg-info kernels/*.so
