# Each target sets itself up: `make demo`, `make test`, `make test ARGS="-k lora"`. PYTHON is the interpreter, 3.11-3.13.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: demo test test-all mutate lint bench
demo: .venv/.ready
	$(BIN)/graftax demo

test: .venv/.ready
	$(PYTEST) -m "not full" $(ARGS)

test-all: .venv/.ready
	$(PYTEST) $(ARGS)

mutate: .venv/.ready
	$(BIN)/python tests/mutations.py $(ARGS)

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir .cache/site

bench: .venv/.ready
	$(BIN)/python -m graftax.train.bench $(ARGS)
	$(BIN)/python -m graftax.train.bench.safety
	$(BIN)/python -m graftax.train.bench.lanes

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
