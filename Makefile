# make pretrain   the main job on real text, from nothing to a sampled text
# make test       all tests but the long ones;   make test-full   every test
# make lint       style and types
#
# TORCH is what pip installs as torch. The default is the CPU build where the index offers one; a user with GPUs gives the build
# of their CUDA version, e.g.  make pretrain TORCH="torch==2.13.0 --index-url URL_OF_THE_CUDA_BUILDS"
TORCH ?= torch==2.13.0
PYTHON ?= python3
NPROC ?= 2
RUN ?= runs/quickstart

BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: pretrain pretrain-long test test-full lint setup clean

setup: .venv/.runtime

.venv/.runtime: requirements.txt constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -r requirements.txt -c constraints.txt
	$(BIN)/pip install -q --no-deps -e .
	touch $@

.venv/.dev: .venv/.runtime requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt -c constraints.txt
	touch $@

pretrain: .venv/.runtime
	$(BIN)/python tools/quickstart.py prepare
	$(BIN)/python launch/pretrain.py --config configs/pretrain/quickstart.yaml --run_dir $(RUN) --nproc $(NPROC)
	$(BIN)/python tools/quickstart.py report --run_dir $(RUN)

pretrain-long: .venv/.runtime
	$(BIN)/python tools/quickstart.py prepare
	$(BIN)/python launch/pretrain.py --config configs/pretrain/quickstart_long.yaml --run_dir $(RUN)_long --nproc $(NPROC)
	$(BIN)/python tools/quickstart.py report --run_dir $(RUN)_long

test: .venv/.dev
	$(BIN)/python -m pytest -m "not full"

test-full: .venv/.dev
	$(BIN)/python -m pytest

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs build *.egg-info
