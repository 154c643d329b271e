# `make demo` and `make test` set up what they need: a virtual environment in .venv, from pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test test-slow lint types check benchmark benchmark-models prove clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	touch $(STAMP)

demo: $(STAMP) ## train, calibrate, evaluate and predict on real solar cells (under 10 minutes on 2 cores)
	$(BIN)/python scripts/demo.py demo

test: $(STAMP) ## the tests that run in minutes
	$(BIN)/python -m pytest -q -m "not slow" --numprocesses auto --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP) ## the tests that need longer: the wheel, several processes, real data
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP) ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict on src
	$(BIN)/mypy

check: lint types test ## everything that a change must pass

benchmark: $(STAMP) ## training and prediction speed, as ratios to bare PyTorch
	$(BIN)/python scripts/benchmark_training.py
	$(BIN)/python scripts/benchmark_inference.py

benchmark-models: $(STAMP) ## models x data sets x seeds, resumable (DATA="data.NAME=FOLDER ..." names the data sets)
	$(BIN)/python scripts/benchmark.py scripts/benchmark.yaml out=runs/benchmark $(DATA)

prove: $(STAMP) ## repeat calibration and test on real images, against the exact laws (DATA="--dice DIR" adds more)
	$(BIN)/python scripts/prove_calibration.py proof $(DATA)

clean: ## remove the virtual environment and what demo and prove made
	rm -rf $(VENV) demo proof
