# Two entry points: `make demo` and `make test`. Both need only Python 3.10+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo

.PHONY: demo test tritons aot lint format clean

$(VENV)/.ready: pyproject.toml requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/lowbit demo --out $(OUT)

test: lint tritons
	$(BIN)/python -m pytest -m "not gpu and not slow"

# The oldest and the newest Triton, with which the kernels are compiled too.
tritons: $(VENV)/.ready-test
	$(BIN)/python tests/ops/triton_versions.py | xargs -P 2 -I % $(MAKE) build/triton-%/.ready

build/triton-%/.ready:
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) triton==$*
	touch $@

# make aot TRITON=3.7.1: all kernels with one more.
aot: $(VENV)/.ready-test build/triton-$(TRITON)/.ready
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python -m pytest tests/ops/test_aot.py

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
