# The targets a fresh clone needs; each sets up what it uses. PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-floor test-latest lint bench types
demo: $(VENV)/ready
	$(BIN)/longctx demo

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

# Exactly the floors of pyproject.toml, and the newest of everything: constraints.txt is not read.
test-floor: RESOLUTION := lowest-direct
test-latest: RESOLUTION := highest
test-floor test-latest:
	$(PYTHON) -m venv --clear .venv-$(RESOLUTION)
	.venv-$(RESOLUTION)/bin/pip install -q uv
	.venv-$(RESOLUTION)/bin/uv pip install -q --python .venv-$(RESOLUTION)/bin/python \
		--resolution $(RESOLUTION) -r pyproject.toml --extra dev
	.venv-$(RESOLUTION)/bin/uv pip install -q --python .venv-$(RESOLUTION)/bin/python --no-deps -e .
	OMP_NUM_THREADS=1 .venv-$(RESOLUTION)/bin/pytest -n auto

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
