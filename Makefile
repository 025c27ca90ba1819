# demo: install, and pretrain a tiny BERT on text that Python contains. test: everything that CI runs.
# Both need Python 3.11 or newer, gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# Threads that spin while they wait take cores from everything else on the machine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test check format torture kernels-compile kernels-compile-oldest clean

$(VENV)/installed: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e .[dev]
	touch $@

demo: $(VENV)/installed
	$(BIN)/sctd pretrain --deepspeed_config tiny

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The kernel tests need their own process: Triton's interpreter must be chosen before Triton is imported.
test: check kernels-compile
	$(BIN)/python -m pytest -q tests/kernels
	$(BIN)/python -m pytest -q --ignore=tests/kernels

# Attacks small runs from all sides, by default for ten minutes; ARGS="--hours 8 --seed 3 --only kills".
torture: $(VENV)/installed
	$(BIN)/python tests/torture.py $(ARGS)

# Builds cubins for sm_80 and sm_90 without a GPU, with the installed Triton or with the oldest supported one.
kernels-compile: $(VENV)/installed
	$(BIN)/python -W ignore kernels/compile_all.py

kernels-compile-oldest: $(VENV)/installed
	test -d $(VENV)/triton-3.6 || $(BIN)/python -m pip install -q --no-deps --target $(VENV)/triton-3.6 triton==3.6.0
	PYTHONPATH=$(VENV)/triton-3.6 $(BIN)/python -W ignore kernels/compile_all.py

clean:
	rm -rf $(VENV) build *.egg-info runs data
