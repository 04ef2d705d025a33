# `make demo` and `make test` set everything up themselves: a virtual environment in .venv, the package and its tools.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.PHONY: demo test test-fast lint clean

demo: $(READY)
	$(BIN)/comp-edge demo

# Everything, slow tests included; two workers with one thread each.
test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" -n $(WORKERS) --dist worksteal --durations=40

test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(READY)
	$(BIN)/ruff check .

# The stamp is written last: an interrupted installation is taken up again.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,lmms-eval,onnx]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.3
	touch $(READY)

clean:
	rm -rf $(VENV) demo
