# `make pretrain` and `make test` work on a fresh machine: each makes .venv, installs the tested versions and runs.
# PYTHON=python3.12 chooses the interpreter, ARGS="--steps 100" is handed to `subspan pretrain`.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

EXTRAS_run := train,test,report
EXTRAS_dev := train,test,report,dev
EXTRAS_docs := docs

.PHONY: help pretrain test check docs clean
.DELETE_ON_ERROR:

help:
	@echo "make pretrain   train a small LLaMA with GaLore (ARGS=\"--steps 100 ...\")"
	@echo "make test       run all tests"
	@echo "make check      linters, types, import directions, fast tests"
	@echo "make docs       build the documentation into site/"
	@echo "make clean      remove .venv, caches and site/"

pretrain: $(VENV)/.installed-run
	$(BIN)/subspan pretrain $(ARGS)

test: $(VENV)/.installed-run
	$(PYTEST)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy src
	$(BIN)/python -m pytest -q tests/test_layers.py
	$(PYTEST) -m "not slow"

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache site

# torch goes first and alone: pip then takes a CPU build that it finds locally, and otherwise the one on PyPI, and what
# follows finds it installed. A stamp is older than what it was made from exactly when the installation is out of date.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS_$*)]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python 3.11 or later is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
