# make pretrain   the main job on real text, from nothing to a sampled text
# make evaluate   score what make pretrain made on held-out text:  make evaluate RUN=my/run TASKS=a,b EVALUATION=folder
# make layouts    compare every layout of NPROC processes with one process:  make layouts NPROC=4 CONFIG=my.yaml
# make reverse    an encoder-decoder learns to reverse sequences of letters, or with   make sort   to sort them (docs/seq2seq.md)
# make test       all tests but the long ones;   make test-full   every test;   make test-slice   this commit's share of
#                 the long ones, which .ci/run runs too (SLICE=N another share)
# make layouts-vision   compare every layout of a model with a vision tower with one process, on rows with and without images
# make chem       .venv-chem: what runs need, and RDKit and scikit-learn for molecules; use .venv-chem/bin/python
# make lightning  .venv-lightning: what runs need, and Lightning for Miniformer's modules; use .venv-lightning/bin/python
# make export     .venv-export: what runs need, and onnx and onnxruntime for exported models; use .venv-export/bin/python
# make lint       style and types
# make vision-reference   what the image processor of transformers makes of generated pictures, again
#
# TORCH is what pip installs as torch. Left empty, it is version 2.13.0, the CPU build where pip's index offers one by that name.
# A user with GPUs gives the build of their CUDA version:  make pretrain TORCH="torch==2.13.0 --index-url URL_OF_THE_CUDA_BUILDS"
TORCH ?=
PYTHON ?= python3
NPROC ?= 2
SLICE ?=
RUN ?= runs/quickstart
CONFIG ?= configs/pretrain/quickstart.yaml
TASKS ?= python_sources
# of the run's newest checkpoint, so that a run that went on is evaluated again beside what it was
EVALUATION ?= $(RUN)/evaluation$(addprefix /,$(notdir $(lastword $(shell ls -d $(RUN)/checkpoints/step_* 2>/dev/null | grep -E 'step_[0-9]+$$' | sort -V))))

# unit tests share the cores, file by file; a distributed test has them all
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile
BIN := .venv/bin
PEERS := .venv-peers
HARNESS := .venv-eval
VISION := .venv-vision
CHEM := .venv-chem
EXPORT := .venv-export
LIGHTNING := .venv-lightning
RUNTIME := .venv/.runtime-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
INSTALL_TORCH = $(if $(TORCH),$(1)/pip install -q $(TORCH),\
    $(1)/pip install -q torch==2.13.0+cpu 2>/dev/null || $(1)/pip install -q torch==2.13.0)
STAGE := sh tools/stage.sh
export OMP_NUM_THREADS ?= 1

.PHONY: pretrain pretrain-long reverse sort evaluate layouts layouts-vision test test-slice test-full vision-reference chem export lightning lint setup clean

setup: $(RUNTIME)

$(RUNTIME): requirements.txt constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: PYTHON=$(PYTHON) is not Python 3.11 or later; name one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; \
	    exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: $(PYTHON) lacks the module venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@$(STAGE) "set-up 1 of 4: an environment in .venv" $(PYTHON) -m venv .venv
	@$(STAGE) "set-up 2 of 4: torch, the largest of all" sh -c '$(call INSTALL_TORCH,$(BIN))'
	@$(STAGE) "set-up 3 of 4: what a run needs, by requirements.txt" $(BIN)/pip install -q -r requirements.txt -c constraints.txt
	@$(STAGE) "set-up 4 of 4: Lattice itself" $(BIN)/pip install -q --no-deps -e .
	@touch $@
	@$(STAGE) "set-up done: .venv/bin/lattice doctor looks at this machine"

.venv/.dev: $(RUNTIME) requirements-dev.txt
	@$(STAGE) "set-up: what the tests need, by requirements-dev.txt" $(BIN)/pip install -q -r requirements-dev.txt -c constraints.txt
	@touch $@
	@$(STAGE) "set-up of the tests done"

# what long tests of fine-tuning compare with: apart, because what these want must not hold back what a run needs
$(PEERS)/.made: .venv/.dev requirements-peers.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(call INSTALL_TORCH,$(PEERS)/bin)
	$(PEERS)/bin/pip install -q -r requirements-peers.txt -c constraints.txt
	touch $@

# lm-eval with the model of `transformers` that it drives, and what Lattice itself needs: long tests of evaluation compare
# the two there
$(HARNESS)/.made: .venv/.dev requirements-eval.txt constraints.txt
	$(PYTHON) -m venv $(HARNESS)
	$(call INSTALL_TORCH,$(HARNESS)/bin)
	$(HARNESS)/bin/pip install -q -r requirements-eval.txt -c constraints.txt
	touch $@

# torchvision, without which that processor is not, must not be in .venv: pip's index offers it built for CUDA alone, and
# beside a CPU build of torch it breaks `import transformers` (tests/vision/reference.py does what that takes)
$(VISION)/.made: requirements-vision.txt constraints.txt
	$(PYTHON) -m venv $(VISION)
	$(call INSTALL_TORCH,$(VISION)/bin)
	$(VISION)/bin/pip install -q -r requirements-vision.txt -c constraints.txt
	$(VISION)/bin/pip install -q --no-deps torchvision==0.28.0
	touch $@

# an environment of its own for what runs need and an extra, as heavy packages stay out of .venv
define BESIDE
$(PYTHON) -m venv $(1)
$(call INSTALL_TORCH,$(1)/bin)
$(1)/bin/pip install -q -r $(2) -c constraints.txt
$(1)/bin/pip install -q --no-deps -e .
touch $@
endef

# RDKit and scikit-learn beside what runs need, for molecules (docs/molecules.md)
$(CHEM)/.made: $(RUNTIME) requirements-chem.txt constraints.txt
	$(call BESIDE,$(CHEM),requirements-chem.txt)

chem: $(CHEM)/.made

# onnx, onnxscript and onnxruntime beside what runs need, for models that other programs run (docs/export.md)
$(EXPORT)/.made: $(RUNTIME) requirements-export.txt constraints.txt
	$(call BESIDE,$(EXPORT),requirements-export.txt)

export: $(EXPORT)/.made

# Lightning beside what runs need, for the modules of docs/siblings/miniformer.md
$(LIGHTNING)/.made: $(RUNTIME) requirements-lightning.txt constraints.txt
	$(call BESIDE,$(LIGHTNING),requirements-lightning.txt)

lightning: $(LIGHTNING)/.made

vision-reference: $(VISION)/.made
	$(VISION)/bin/python -m tests.vision.reference

pretrain: $(RUNTIME)
	$(BIN)/python tools/quickstart.py prepare
	$(BIN)/python launch/pretrain.py --config configs/pretrain/quickstart.yaml --run_dir $(RUN) --nproc $(NPROC)
	$(BIN)/python tools/quickstart.py report --run_dir $(RUN)

pretrain-long: $(RUNTIME)
	$(BIN)/python tools/quickstart.py prepare
	$(BIN)/python launch/pretrain.py --config configs/pretrain/quickstart_long.yaml --run_dir $(RUN)_long --nproc $(NPROC)
	$(BIN)/python tools/quickstart.py report --run_dir $(RUN)_long

reverse sort: $(RUNTIME)
	$(BIN)/python tools/sequences.py run --task $@

evaluate: $(RUNTIME)
	$(BIN)/python launch/evaluate.py --model $(RUN) --tasks $(TASKS) --output $(EVALUATION) --nproc $(NPROC)

layouts: $(RUNTIME)
ifeq ($(CONFIG),configs/pretrain/quickstart.yaml)
	$(BIN)/python tools/quickstart.py prepare
endif
	$(BIN)/python tools/layouts.py --config $(CONFIG) --nproc $(NPROC) --shrink

layouts-vision: .venv/.dev
	$(BIN)/python -m pytest tests/distributed/test_vision_layouts.py

test: .venv/.dev
	$(BIN)/python -m pytest -m "not full and not distributed" --budget units $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest -m "not full and distributed" --budget jobs

test-slice: .venv/.dev
	$(BIN)/python -m tests.slices $(if $(SLICE),--number $(SLICE))

test-full: .venv/.dev $(PEERS)/.made $(HARNESS)/.made $(CHEM)/.made $(EXPORT)/.made $(LIGHTNING)/.made
	$(BIN)/python -m pytest -m "not distributed" $(SIDE_BY_SIDE)
	$(CHEM)/bin/python -m pytest tests/data/test_enumeration.py tests/tools/test_molecules.py
	$(EXPORT)/bin/python -m pytest tests/export
	$(LIGHTNING)/bin/python -m pytest tests/siblings/test_miniformer_lightning.py
	$(BIN)/python -m pytest -m distributed

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv $(PEERS) $(HARNESS) $(VISION) $(CHEM) $(EXPORT) $(LIGHTNING) build *.egg-info
