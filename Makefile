# Every target makes its own virtual environment in .venv: Python 3 (3.11 or newer) and make are enough.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SOURCES := src tests examples benchmarks setup.py

.PHONY: quickstart test quality style bench

quickstart: $(STAMP)  ## distil the embedded teacher and write outputs/quickstart
	$(BIN)/python examples/tbcm/quickstart.py

test: $(STAMP)  ## the whole suite, offline, on a CPU
	$(BIN)/python -m pytest -q

quality: $(STAMP)  ## what a change must pass
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

style: $(STAMP)  ## put the sources into the house style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(STAMP)  ## step time and memory
	$(BIN)/python benchmarks/full_size_step.py

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	touch $@
