PYTHON ?= python3
VENV := .venv

$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q torch==2.13.0
	$(VENV)/bin/pip install -q -e ".[dev]"
	touch $@

.PHONY: test
test: $(VENV)/.done
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2
