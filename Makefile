# make demo: from a fresh clone to a segmented photograph. make test: the test suite.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

# One environment serves both installs; each stamp says which of them it holds.

.PHONY: demo test lint aot ptxas clean

# -P keeps the checkout's folders (kernels/ above all) from hiding installed packages.
demo: $(VENV)/installed
	$(BIN)/python -P -m diffseg.cli segment diffseg/assets/photo.jpg --output demo --force --time

test: $(VENV)/tested
	$(BIN)/python -P -m pytest

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every Triton kernel for every target, without a GPU; fails where one spills.
aot: $(VENV)/tested
	$(BIN)/python -P -m diffseg.kernels.aot

# Registers, shared memory and spills of every CUDA kernel for every target, with nvcc and no GPU; fails where one spills.
ptxas:
	$(PYTHON) csrc/cuda/ptxas.py

$(VENV)/installed: pyproject.toml setup.py $(wildcard csrc/*/*) $(wildcard diffseg/*.py diffseg/*/*.py kernels/*.py)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet .
	rm -f $(VENV)/tested
	touch $@

$(VENV)/tested: pyproject.toml setup.py $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	rm -f $(VENV)/installed
	touch $@

clean:
	rm -rf $(VENV) build demo diffseg/*.so *.egg-info
