# Two commands make the whole trip: `make train`, then `make test`. Both set up everything they need.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
# An index of CPU-only torch builds, for those who want to save the GPU libraries' gigabytes; empty = pip's own index
TORCH_INDEX ?=
# What `make train` trains; a finished run is left as it is, an interrupted one goes on
RUN ?= runs/first
DATA ?= critters
STEPS ?= 600
BATCH ?= 32
SEED ?= 0
OVERRIDES ?= training_params.val_every=200
PROMPT ?= a blue water pokemon with wings
N ?= 4
PORT ?= 8000

BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
.DEFAULT_GOAL := help
.PHONY: help setup train generate serve test test-all lint prepare readme train-smoke pull bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14
	@echo; echo 'Variables: DATA=critters|FOLDER  RUN=runs/NAME  STEPS=N  SEED=N  OVERRIDES="group=choice key=value"  PROMPT="..."'

setup: $(VENV)/.ready ## Make .venv and install the project with all that tests need

# The exact versions were tested on Python 3.11; some of them do not exist for 3.10, which gets pip's choice above the lower bounds.
$(VENV)/.ready: settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v=sys.version_info; sys.exit(0 if v >= (3, 10) else f"Python 3.10 or newer is needed, got {v[0]}.{v[1]}; name another one: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	pins=$$($(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")'); \
	torch=$$(grep -i '^torch==' constraints.txt); \
	$(if $(TORCH_INDEX),PIP_INDEX_URL=$(TORCH_INDEX)) $(BIN)/python -m pip install --quiet --no-compile "$$torch" && \
	$(BIN)/python -m pip install --quiet --no-compile $$pins -e '.[dev,offline]'
	touch $@

train: setup ## Train by papermill into RUN (critters by default: about 3 minutes on two cores)
	mkdir -p $(RUN)
	$(BIN)/papermill nbs/05_train.ipynb $(RUN)/05_train.ipynb -p out $(RUN) -p data $(DATA) -p steps $(STEPS) \
		-p batch_size $(BATCH) -p seed $(SEED) -p overrides "$(OVERRIDES)" --log-output --no-progress-bar
	@echo; echo "Done: $(RUN)/grid.png shows what it draws. Next: make generate PROMPT=\"a red creature\", or make serve"

generate: setup ## Draw N pictures of PROMPT with the newest checkpoint into samples/
	$(BIN)/pokemon_generate "$(PROMPT)" -n $(N) --seed $(SEED) --out samples

serve: setup ## Serve the newest checkpoint: a page and an API on PORT
	$(BIN)/pokemon_serve --port $(PORT)

test: setup ## Lint, run the notebooks, run the fast tests
	$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: test ## The same and the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

lint: setup ## ruff over notebooks, tests and benchmarks
	$(BIN)/ruff check .

prepare: setup ## Before a commit: export, clean, README, test
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(MAKE) --no-print-directory readme test

readme: setup ## Write README.md from nbs/index.ipynb
	$(BIN)/python -m pytest -q tests/test_project.py -k readme --write-readme

train-smoke: setup ## The training notebook by papermill with its own small defaults
	mkdir -p runs/smoke
	$(BIN)/papermill nbs/05_train.ipynb runs/smoke/05_train.ipynb --no-progress-bar

pull: setup ## Get the data that data.dvc describes from the team's store (needs the extra dvc)
	$(BIN)/pokemon_pull

bench: setup ## Training throughput beside two peers (installs them)
	$(BIN)/python -m pip install --quiet -c constraints.txt einops accelerate
	$(BIN)/python -m pip install --quiet --no-deps denoising_diffusion_pytorch==2.3.4 ema_pytorch==0.8.3 pytorch_fid==0.3.0
	$(BIN)/python benchmarks/train_throughput.py

clean: ## Remove caches and build products; runs, data and the environment stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache _proc _docs
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
