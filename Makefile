# Two entry points: `make demo` and `make test`. Both need only Python 3.10+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo
# Parts run side by side, ComfyUI within them: more threads only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow"
# Without byte code: of the many modules that torch and diffusers bring, tests import few.
PIP := $(BIN)/python -m pip install --quiet --no-compile

.PHONY: demo test tritons aot lint format clean

$(VENV)/.ready: pyproject.toml requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch==2.13.0 -e ".[demo]"
	touch $@

$(VENV)/.ready-test: pyproject.toml requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch==2.13.0 -e ".[demo,test]"
	touch $(VENV)/.ready $@

demo: $(VENV)/.ready
	$(BIN)/lowbit demo --out $(OUT)

# In parts, two at a time, the longest first: one core each, and neither waits for the other. The
# other Tritons are installed meanwhile.
COMPILED := tests/ops/test_aot.py tests/ops/test_aot_fp4.py tests/ops/attention/test_aot.py \
	tests/ops/attention_fp4
VERSIONS := tests/ops/test_triton_versions.py
INTERPRETED := tests/ops/test_interpreted.py
PARTS := test-compiled test-versions test-host test-quant test-rest test-interpreted test-browser
.PHONY: $(PARTS)

test: lint
	$(MAKE) --keep-going --output-sync=target --jobs=2 $(PARTS)

test-compiled:
	$(PYTEST) $(COMPILED)

test-versions: tritons
	$(PYTEST) $(VERSIONS)

test-interpreted:
	$(PYTEST) $(INTERPRETED)

test-host test-quant test-browser:
	$(PYTEST) tests/$(@:test-%=%)

APART := $(COMPILED) $(VERSIONS) $(INTERPRETED) tests/host tests/quant tests/browser
test-rest:
	$(PYTEST) $(APART:%=--ignore=%)

# The oldest and the newest Triton, with which the kernels are compiled too.
tritons: $(VENV)/.ready-test
	$(BIN)/python tests/ops/triton_versions.py | xargs -P 2 -I % $(MAKE) build/triton-%/.ready

build/triton-%/.ready:
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) triton==$*
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
