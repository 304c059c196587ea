# Every target makes its own virtual environment, in .venv or .venv-compat: Python 3 (3.11 or newer) and make are enough.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
COMPAT := .venv-compat
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --editable
PYTEST := -m pytest -q -n 2 --dist worksteal
SOURCES := src tests examples benchmarks setup.py conftest.py

.PHONY: quickstart quickstart-full test test-compat quality style bench

quickstart: $(STAMP)  ## distil the embedded teacher on 24 prompts and write outputs/quickstart
	$(BIN)/python examples/tbcm/quickstart.py

quickstart-full: $(STAMP)  ## the same of all 5,179 prompts
	$(BIN)/python examples/tbcm/quickstart.py --full --output_dir outputs/quickstart-full

test: $(STAMP)  ## the whole suite, offline, on a CPU
	$(BIN)/python $(PYTEST)

test-compat: $(COMPAT)/.installed  ## the same with the oldest versions that are supported
	$(COMPAT)/bin/python $(PYTEST)

quality: $(STAMP)  ## what a change must pass
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

style: $(STAMP)  ## put the sources into the house style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(STAMP)  ## time of a training step and of a picture, memory
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.inference

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) '.[dev]' --constraint constraints.txt
	touch $@

$(COMPAT)/.installed: setup.py constraints-oldest.txt
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python $(PIP_INSTALL) '.[training,eval,test]' --constraint constraints-oldest.txt
	touch $@
