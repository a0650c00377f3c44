# Everything a fresh machine needs is installed by the targets themselves, into .venv (or VENV=path).
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= gpu-report
ARGS   ?=
BIN    := $(VENV)/bin
READY  := $(VENV)/.fastmon-ready

.PHONY: train test test-all lint format bench tables tables-check gpu-report clean

train: $(READY)
	$(BIN)/python train.py $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" --timeout=300 $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest --timeout=1800 $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.run $(ARGS)

tables: $(READY)
	$(BIN)/python -m benchmarks.tables

tables-check: $(READY)
	$(BIN)/python -m benchmarks.tables --check

# On a machine with a GPU: builds, tests, checks and measures with the Python and torch that are installed there.
gpu-report:
	$(PYTHON) -m benchmarks.gpu_report --out $(OUT)

clean:
	rm -rf build *.egg-info fastmon/_C*.so .pytest_cache .mypy_cache .ruff_cache

# The pinned torch is installed first: the extension is built against it, without an isolated second copy.
$(READY): pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cpp csrc/*/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@
