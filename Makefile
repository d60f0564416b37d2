# The targets a fresh clone needs; each sets up what it uses. PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench types
demo: $(VENV)/ready
	$(BIN)/longctx demo

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

lint: $(VENV)/ready types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# pyright reads files, not the installed mapping: the four folders linked together as they install.
types:
	rm -rf build/types && mkdir -p build/types
	cp -rs "$(CURDIR)/longctx" build/types/longctx
	for part in patches train eval; do cp -rs "$(CURDIR)/$$part" build/types/longctx/$$part; done
