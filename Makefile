# Two commands set up everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LONG := ray or slow
FAST := $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not ($(LONG) or full or compile or gpu)'

.PHONY: demo test test-fast test-all gpu soak docs lint format clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "vlmo-ray needs Python >= 3.11; set PYTHON=python3.11 (or later)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m vlmo_ray.demo

# every promise at least once: what needs no cluster in two processes, the rest one by one; both even if one fails
test: $(VENV)/.installed
	$(FAST); failed=$$?; $(BIN)/python -m pytest -m '($(LONG)) and not full and not compile and not gpu' && exit $$failed

# for the inner loop: without Ray clusters and tests that take more than a few seconds
test-fast: $(VENV)/.installed
	$(FAST)

# every test there is: further faults on several raylets, larger cases, whole curves, compiled layers
test-all: $(VENV)/.installed
	$(FAST); failed=$$?; $(BIN)/python -m pytest -m '($(LONG) or full or compile) and not gpu' && exit $$failed

# on a machine with a GPU: its tests, a step of base and large, two minutes of learning; one table of verdicts
gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu.py

# half an hour of runs with random faults, and a table of the results
soak: $(VENV)/.installed
	$(BIN)/python tests/soak.py

# the documentation as a site in site/; every broken link or name is an error
docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs site

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-out runs site
