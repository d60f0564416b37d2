# The targets a fresh clone needs; each sets up what it uses. PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-floor test-latest lint docs bench types gpu
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

# The site, into build/site: without network, and with an error for every warning.
docs: $(VENV)/ready-docs types
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/ready-docs: $(VENV)/ready
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,docs]'
	touch $@

# pyright and mkdocstrings read files, not the installed mapping: the four folders linked together
# as they install.
types:
	rm -rf build/types && mkdir -p build/types
	cp -rs "$(CURDIR)/longctx" build/types/longctx
	for part in patches train eval; do cp -rs "$(CURDIR)/$$part" build/types/longctx/$$part; done

# All that needs a GPU, in 9 minutes, with PYTHON as it is: nothing is installed into it. The folder
# WHEELS holds what it lacks (CONTRIBUTING.md); tests run from build/gpu, where all is linked.
GPU_SECONDS ?= 530
GPU_TEST_SECONDS ?= 180
GPU_WORKERS ?= 4
gpu: PYTHON_PATH := $(abspath $(shell command -v $(PYTHON)))
gpu:
	rm -rf build/gpu && mkdir -p build/gpu/site
	cp -rs "$(CURDIR)/longctx" "$(CURDIR)/tests" "$(CURDIR)/benchmarks" build/gpu/
	for part in patches train eval; do cp -rs "$(CURDIR)/$$part" build/gpu/longctx/$$part; done
	cp -s "$(CURDIR)/pyproject.toml" build/gpu/
	$(if $(WHEELS),$(PYTHON) -m pip install -q --no-index --no-deps --no-compile --target build/gpu/site $(WHEELS)/*.whl)
	@cd build/gpu && export PYTHONPATH="$$PWD:$$PWD/site" && begin=$$(date +%s) && \
	timeout -s INT -k 20 $(GPU_TEST_SECONDS) $(PYTHON_PATH) -m pytest -m gpu -n $(GPU_WORKERS) -W default -rs \
	$$(grep -Rl --include='test_*.py' 'mark\.gpu' tests); \
	tests=$$?; left=$$(($(GPU_SECONDS) - $$(date +%s) + begin)); \
	$(PYTHON_PATH) -m benchmarks.gpu --seconds $$left; parts=$$?; \
	echo "tests marked gpu: exit $$tests (124: out of time); benchmarks: exit $$parts"; \
	test $$tests -eq 0 -a $$parts -eq 0
