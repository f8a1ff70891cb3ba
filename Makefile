# medshard: the commands a newcomer needs are `make demo` and `make test`. Both make .venv by themselves the first time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Hundreds of processes start in the tests. Where bytecode is not kept, as some images are set, each compiles the whole program anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench soak vectors lock clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 10

# The lock file pins every package by hash; --no-build-isolation then builds our own one C file with the pinned setuptools.
$(READY): requirements.lock pyproject.toml setup.py protocol/medshard_protocol/_gf256.c protocol/medshard_protocol/_gf256_kernel.h
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	    { echo "medshard needs Python 3.11, 3.12 or 3.13; say which: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	@echo "setting up $(VENV) (once; a minute or so)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "  installing the pinned packages"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@echo "  building and installing medshard itself"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)  ## a local consortium, real DICOM and PDF in, nodes killed, files back by hash
	@$(BIN)/medshard demo

test: $(READY)  ## all tests but the long ones (some 5 minutes on 2 cores)
	@$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)  ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY)  ## rewrite the code in its one style
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: $(READY)  ## measure beside Tahoe-LAFS and Swift; writes bench/results/
	@$(BIN)/python -m bench.run $(ARGS)

soak: $(READY)  ## the long tests, with their figures (by hours; one: ARGS=tests/chaos/test_kills.py)
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m soak --timeout 3600 -rP $(ARGS)

vectors: $(READY)  ## make the test vectors of the formats again, without medshard code
	@$(BIN)/python tools/make_vectors.py
	@$(BIN)/python tools/make_ledger_vectors.py
	@$(BIN)/python tools/make_key_vectors.py
	@$(BIN)/python tools/make_spool_vectors.py

lock: $(READY)  ## pin every package again, by hash and without naming a registry
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	    --all-extras pyproject.toml -o requirements.lock
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	    -c requirements.lock --extra node pyproject.toml -o deploy/requirements.lock

clean:  ## remove everything that was made
	rm -rf $(VENV) build dist *.egg-info bench/work bench/results .pytest_cache .mypy_cache .ruff_cache
