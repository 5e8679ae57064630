# From a fresh clone, `make demo` and `make test` do everything: virtual environment, pinned install, native build, run.
#
#   PYTHON=python3.12   the interpreter, 3.11 or newer, that the virtual environment is made with
#   VENV=               no virtual environment and no install: PYTHON runs as it is, with the torch it has (say, a CUDA build)
#   ARGS="..."          further arguments for pytest or for the demo
#   JOBS=2              processes that interpret, where pytest-xdist is installed; as many as there are cores

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
PEFT_SDIST ?= build/peft-$(shell sed -n 's/^peft==//p' constraints-dev.txt).tar.gz
MARKS = not nightly

ifeq ($(VENV),)
PY := $(PYTHON)
NATIVE := build/.native
else
PY := $(VENV)/bin/python
NATIVE := $(VENV)/.native
INSTALLED := $(VENV)/.installed
endif

PYTEST = $(PY) -m pytest --durations=5 $(ARGS)
MAKEFLAGS += --keep-going  # a failing suite does not hide the next one; make still exits non-zero
.PHONY: help setup demo demo-templates test test-native test-interpreter test-compile nightly sdist conformance kernels bench bench-compare lint clean
.NOTPARALLEL:

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## */make \1\t/' | expand -t 24

setup: $(NATIVE)  ## environment and native library, without running anything

demo: setup  ## the main job: train and serve several tasks in one batch, on a GPU if there is one
	$(PY) -m peft_ops.demo $(ARGS)

demo-templates: setup  ## ask a masked language model in hand-written words, and with P-Tuning
	$(PY) -m peft_ops.demo.templates $(ARGS)

test: test-native test-interpreter test-compile  ## all tests, in the three processes below

test-native: setup  ## plain PyTorch and the native library; on a GPU, the compiled kernels
	$(PYTEST) -m "$(MARKS)" --ignore=tests/compile tests

test-interpreter: setup  ## the Triton kernels on CPU tensors: Triton reads TRITON_INTERPRET when it is imported
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
	  $(PYTEST) $$($(PY) -c "import xdist; print('-n$(JOBS)')" 2>/dev/null) -m "kernels and ($(MARKS))" --ignore=tests/compile tests

test-compile: setup  ## the Triton kernels compiled for GPUs that need not be there
	$(PYTEST) -m "$(MARKS)" tests/compile

nightly: MARKS = nightly or not nightly
nightly: test  ## the same suites with their wider cross products

sdist: $(PEFT_SDIST)

conformance: setup $(PEFT_SDIST)  ## PEFT's own (IA)^3 tests with our operators in its layers, beside plain PEFT
	$(PY) -m tests.conformance --sdist $(PEFT_SDIST) $(ARGS)

kernels: setup  ## what the compiler makes of every kernel and tile for every GPU; TRITON=3.6.0 asks that version
ifdef TRITON
	$(PY) -m pip install --quiet --no-deps --upgrade --target build/triton-$(TRITON) triton==$(TRITON)
endif
	$(if $(TRITON),PYTHONPATH=build/triton-$(TRITON)) $(PY) -m bench.offline $(ARGS)

# what is not the whole suite goes to out/bench, and a quick run is none to compare with
PARTIAL = $(if $(ARGS),out/bench)
RUNS = $(if $(findstring --quick,$(ARGS)),out/bench/runs,.benchmarks)
bench: setup  ## every operator beside its peers: results, tables and plots in bench/results; ARGS=--quick walks the path
	$(PY) -m pytest bench -q -r fE --benchmark-autosave --benchmark-storage=$(RUNS) --benchmark-columns=median,rounds $(ARGS)
	$(PY) -m bench.report --storage $(RUNS) $(if $(PARTIAL),--out $(PARTIAL))
	$(PY) -m bench.overhead --json $(or $(PARTIAL),bench/results/cpu)/overhead.json

bench-compare: $(INSTALLED)  ## the last two runs of `make bench` against each other: ours over 15 % slower fails
	$(PY) -m bench.report --compare

lint: $(INSTALLED)  ## what pre-commit checks, on the whole tree
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:  ## remove what was built, but not the virtual environment
	rm -rf build dist out *.egg-info peft_ops/_C*.so .pytest_cache .ruff_cache .hypothesis .benchmarks $(NATIVE)
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +

build/peft-%.tar.gz: | setup  # no wheel has its tests
	$(PY) -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest build peft==$*

# --no-build-isolation needs a newer setuptools than a bare environment has; the native library has its own rule
$(VENV)/.installed: pyproject.toml constraints-dev.txt setup.py
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	  "PYTHON=$(PYTHON) is not Python 3.11 or newer with the venv module (Debian: python3-venv); try: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade --constraint constraints-dev.txt pip setuptools
	PEFT_OPS_SKIP_BUILD=1 $(PY) -m pip install --quiet --constraint constraints-dev.txt --no-build-isolation --editable '.[dev]'
	@touch $@

$(NATIVE): $(INSTALLED) setup.py $(wildcard csrc/* csrc/*/*)
	$(PY) setup.py --quiet build_ext --inplace
	@mkdir -p $(@D) && touch $@
