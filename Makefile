# Everything starts from a machine with Python 3.11 or newer, venv and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help install run test faults bench check format clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## make .venv with everything that run, test and check need

# The stamp is newer than what it depends on, so that a change of dependencies installs again.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "glm4v-batch needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

run: $(INSTALLED) ## run jobs/caption.yaml on the bundled model and data
	$(BIN)/glm4v-batch run jobs/caption.yaml

test: $(INSTALLED) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/e2e/test_scale.py
	$(BIN)/python -m pytest tests/e2e/test_scale.py -s  # alone, because it measures speed

faults: $(INSTALLED) ## try every fault, where `make test` takes a sample; says how many
	FAULTS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/faults

bench: $(INSTALLED) ## measure the engines on a full-size random model; needs a GPU and 22 GB in build/bench
	PYTHONPATH=pipeline:. $(BIN)/python -m tests.bench build/bench --out build/bench/figures.json

check: $(INSTALLED) ## ruff, mypy and the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=pipeline $(BIN)/lint-imports

format: $(INSTALLED) ## let ruff lay out the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what make made, the outputs included
	rm -rf .venv out build *.egg-info pipeline/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
