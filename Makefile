# make demo: from a fresh clone to a segmented photograph. make test: the test suite.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

# Keeps the checkout's folders (kernels/ above all) from hiding installed packages, from Python 3.11 on.
export PYTHONSAFEPATH := 1

.PHONY: demo test bench sanitize lint aot ptxas model clean
.NOTPARALLEL:  # the targets share one environment

demo: $(VENV)/installed
	$(BIN)/python -m diffseg.cli segment diffseg/assets/photo.jpg --output demo --force --time
	$(BIN)/python -m diffseg.cli bench aggregate merge label --case bundled --seconds 0.5 --passes 3

test: $(VENV)/tested
	$(BIN)/python -m pytest

# The subset of two minutes and a quarter; `diffseg bench --help` lists what else there is.
bench: $(VENV)/tested
	$(BIN)/python -m diffseg.cli bench --json benchmarks/results/latest.json --plot benchmarks/results/latest.svg

# The C++ kernels' tests on a build with the address and undefined-behaviour sanitizers, beside the ordinary build.
SANITIZED := build/sanitize
SANITIZER_RUNTIMES = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libubsan.so)
sanitize: $(VENV)/tested
	DIFFSEG_SANITIZE=1 $(BIN)/python setup.py -q build --build-base $(SANITIZED)
	test -n "$$(ls $(SANITIZED)/lib*/diffseg/_cpu*.so)"
	PYTHONPATH="$$(ls -d $(CURDIR)/$(SANITIZED)/lib*)" LD_PRELOAD="$(SANITIZER_RUNTIMES)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	$(BIN)/python -m pytest -p no:faulthandler -p no:cacheprovider \
	tests/test_cpu_aggregate.py tests/test_cpu_merge.py tests/test_cpu_label.py tests/test_cross.py

# The bundled model anew, in five stages; interrupted, it goes on where it was. Its threshold is chosen at the end.
MODEL := runs/model
TRAIN = $(BIN)/python -m diffseg.tiny.train --output $(MODEL)
model: $(VENV)/tested
	$(TRAIN)/1 --timesteps 50 500 --uniform
	$(TRAIN)/2 --timesteps 50 500 --uniform --initial $(MODEL)/1/model --steps 900 --scenes 9000 --learning-rate 6e-4 --seed 2
	$(TRAIN)/3 --bf16 --initial $(MODEL)/2/model --steps 400 --scenes 3000 --learning-rate 8e-4 --seed 5
	$(TRAIN)/4 --bf16 --initial $(MODEL)/3/model --steps 1500 --stop 1250 --learning-rate 8e-4 --seed 7
	$(TRAIN)/5 --bf16 --initial $(MODEL)/4/model --sharpen 1.5 --rich --steps 3000 --stop 1800 --keep 0.5 --scenes 14000 --seed 51
	$(BIN)/python -m diffseg.tiny.report --choose --scenes 50 --model $(MODEL)/5/model

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every Triton kernel for every target, without a GPU; fails where one spills.
aot: $(VENV)/tested
	$(BIN)/python -m diffseg.kernels.aot

# Registers, shared memory and spills of every CUDA kernel for every target, with nvcc and no GPU; fails where one spills.
ptxas:
	$(PYTHON) csrc/cuda/ptxas.py

# One environment, in which the checkout itself is installed; `tested` has what the tests need besides.
SOURCES := pyproject.toml setup.py $(wildcard csrc/*/*)

$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/tested: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build demo diffseg/*.so *.egg-info
