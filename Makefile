# Two entry points: `make demo` and `make test`. Both need only Python 3.10+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo
PYTEST := $(BIN)/python -m pytest -m "not gpu and not slow"
KERNEL_TESTS := tests/ops/test_aot.py tests/ops/test_aot_fp4.py tests/ops/attention/test_aot.py \
	tests/ops/attention/test_interpreted.py tests/ops/test_interpreted.py \
	tests/ops/test_triton_versions.py tests/ops/attention_fp4

.PHONY: demo test test-kernels test-rest tritons aot lint format clean

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

# Two processes on two cores, of about the same length where there is a ComfyUI: what compiles and
# interprets kernels, with the quantizer's tests; and all the rest.
FIRST_TESTS := $(KERNEL_TESTS) tests/quant
test: lint tritons
	$(MAKE) --output-sync=target -j 2 test-kernels test-rest

test-kernels:
	$(PYTEST) $(FIRST_TESTS)

test-rest:
	$(PYTEST) $(FIRST_TESTS:%=--ignore=%)

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
