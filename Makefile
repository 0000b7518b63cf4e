# Everything below works on a fresh machine with git, make and Python 3.11 or later; it touches nothing outside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What the TPU compiler alone can run.
TPU := tests/kernels/compiled tests/infer/engine/test_programs_for_tpu.py
ON_TPU := JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false $(BIN)/python -m pytest
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help setup demo test meshes torture lint docs oracle tpu bundles wheel clean

help:
	@echo "make demo    set up, then load, verify and run a small checkpoint in the released layout"
	@echo "make test    set up, then run the tests"
	@echo "make setup   only set up (.venv)"
	@echo "make meshes  the tests' gradients on meshes of one axis each"
	@echo "make torture damaged checkpoints and requests of every kind, in full (minutes)"
	@echo "make lint    ruff and mypy"
	@echo "make docs    the pages and the API reference, in build/docs"
	@echo "make oracle  compare with transformers (installs torch)"
	@echo "make tpu     compile kernels and plans for TPUs, on any machine (installs libtpu)"
	@echo "make wheel   build/wheel/*.whl, after its demo ran in a fresh environment; PYTHON=python3.13 for another version"
	@echo "make bundles record how many instructions the TPU compiler makes of each kernel"

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, found " + sys.version.split()[0])'
	@echo "Setting up $(VENV) (once, a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(VENV)/ready-test: $(VENV)/ready
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/ready-docs: $(VENV)/ready
	@$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/ready-oracle: $(VENV)/ready-test
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[test,oracle]'
	@touch $@

$(VENV)/ready-tpu: $(VENV)/ready-test
	@$(PIP) --editable '.[test,tpu]'
	@touch $@

setup: $(VENV)/ready-test

demo: $(VENV)/ready
	@$(BIN)/v4-jax demo

test: $(VENV)/ready-test
	@$(BIN)/python -m pytest tests --ignore tests/oracle $(addprefix --ignore ,$(TPU)) --numprocesses auto --dist loadfile

meshes: $(VENV)/ready-test
	@$(BIN)/python -m pytest tests/equivalence -m by_axis --numprocesses auto --dist load

torture: $(VENV)/ready-test
	@TORTURE=20000 $(BIN)/python -m pytest tests/checkpoint/test_torture.py tests/infer/http/test_fuzzed_requests.py --numprocesses auto --dist load

lint: $(VENV)/ready-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/ready-docs
	@$(BIN)/mkdocs build --quiet
	@echo "build/docs/index.html"

oracle: $(VENV)/ready-oracle
	@$(BIN)/python -m pytest tests/oracle --numprocesses auto --dist loadfile

tpu: $(VENV)/ready-tpu
	@# Programs for other topologies can be kept and not read again. The first are counted, in processes of their own.
	@$(ON_TPU) $(firstword $(TPU)) --numprocesses auto --dist load
	@$(ON_TPU) $(wordlist 2,9,$(TPU)) tests/commands/test_plan.py --numprocesses auto --dist load

bundles: $(VENV)/ready-tpu
	@RECORD_BUNDLES=1 $(ON_TPU) $(firstword $(TPU))

wheel:
	@.ci/wheel $(PYTHON)

clean:
	rm -rf $(VENV) .cache build *.egg-info .pytest_cache .ruff_cache .mypy_cache
