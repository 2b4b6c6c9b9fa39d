# Every target installs what it needs from the package index. State stays inside the checkout.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export VERITUNE_CACHE ?= $(CURDIR)/.cache/veritune
export VERITUNE_HOME ?= $(CURDIR)/.cache/home
VLLM := .cache/vllm
VLLM_PINS := tests/vllm/constraints.txt
LLAMA := .cache/llama.cpp
LLAMA_PIN := llama-cpp-python==0.3.36
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help setup demo up test check format acceptance chaos gpu vllm bench bench-training bench-inference bench-quality bench-gpu llama model clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(READY) ## Create the environment in .venv, with pinned versions

$(READY): pyproject.toml constraints.txt
	@mkdir -p .cache
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (the first time takes a few minutes)"
	@{ $(PIP) "$$(grep '^torch==' constraints.txt)" && $(PIP) -e '.[worker,embedded,dev]'; } \
		> .cache/install.log 2>&1 || { cat .cache/install.log; exit 1; }
	@touch $@

model: $(READY) ## Fetch and convert the small base model, once
	@$(BIN)/python -m worker.models fetch smollm2-135m --cache $(VERITUNE_CACHE) > /dev/null

demo: $(READY) ## Upload, train, publish, and judge held-out claims; BASE=smollm2-135m takes the small base model
	@$(if $(BASE),VERITUNE_DEFAULT_BASE_MODEL=$(BASE)) $(BIN)/veritune demo

up: $(READY) ## Run the service until Ctrl-C: http://127.0.0.1:8000/docs
	@$(BIN)/veritune up

test: model ## Check lint, types and imports, and run all tests except the slow suites
	@$(MAKE) --no-print-directory check
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not chaos and not acceptance and not vllm and not gpu"

check: $(READY) ## Check format, lint, types and import rules
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/lint-imports --no-logo > .cache/imports.log 2>&1 || { cat .cache/imports.log; exit 1; }
	@$(BIN)/mypy --no-error-summary

format: $(READY) ## Format the code
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --fix --quiet .

acceptance: model ## Train on the whole example CSV, embedded and over Postgres and Redis; test jobs and inference at the limit of memory
	@VERITUNE_E2E_ROWS=270 $(BIN)/python -m pytest -q tests/e2e/test_main_job.py tests/e2e/test_too_large.py \
		tests/e2e/test_two_tenants.py

chaos: model ## Kill each process while jobs run and claims are judged
	@$(BIN)/python -m pytest -q -m chaos

gpu: $(READY) ## Test serving and training on this machine's GPU; the tests fail without one
	@$(BIN)/python -m pytest -q -m gpu tests/gpu

vllm: model $(VLLM)/.ready ## Test against a real vLLM: the protocol, and the same predictions and verdicts as the embedded engine
	@$(BIN)/python -m pytest -q -m vllm --runxfail tests/vllm

$(VLLM)/.ready: $(VLLM_PINS)
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "installing vLLM for the CPU into $(VLLM) (the first time takes a few minutes)"
	@pip="$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check"; \
		{ $$pip -c $(VLLM_PINS) "$$(grep '^torch==' $(VLLM_PINS))" && $$pip --no-deps -r $(VLLM_PINS); } \
		> .cache/vllm.log 2>&1 || { cat .cache/vllm.log; exit 1; }
	@touch $@

bench: model ## Benchmark the service against a peer or a limit
	@$(BIN)/python -m benchmarks.service

bench-training: model ## Benchmark training against TRL and bare matrix products: about an hour
	@$(BIN)/python -m benchmarks.training

bench-inference: model $(VLLM)/.ready ## Benchmark serving against vLLM, PEFT and, if it is built, llama.cpp: about 40 minutes
	@$(BIN)/python -m benchmarks.inference
	@$(BIN)/python -m benchmarks.served
	@$(BIN)/python -m benchmarks.decode_step

bench-quality: $(READY) ## Judge FEVER with trained adapters, beside controls and a small encoder: hours; a stopped run goes on
	@$(BIN)/python -m benchmarks.quality

llama: $(LLAMA)/.ready ## Build llama.cpp's server for bench-inference: five minutes, needs a C++ compiler

$(LLAMA)/.ready:
	@mkdir -p $(LLAMA)/source
	@test -x $(LLAMA)/venv/bin/python || $(PYTHON) -m venv $(LLAMA)/venv
	@echo "building llama.cpp's server in $(LLAMA)"
	@pip="$(LLAMA)/venv/bin/python -m pip"; PATH="$(CURDIR)/$(LLAMA)/venv/bin:$$PATH"; \
		{ $$pip install --quiet cmake==4.4.5 ninja==1.13.2 && \
		$$pip install --quiet --no-deps --target $(LLAMA)/site sentencepiece==0.2.1 && \
		$$pip download --quiet --no-deps --no-binary llama-cpp-python -d $(LLAMA) $(LLAMA_PIN) && \
		tar xzf $(LLAMA)/llama_cpp_python-*.tar.gz -C $(LLAMA)/source --strip-components 1 && \
		cmake -G Ninja -S $(LLAMA)/source/vendor/llama.cpp -B $(LLAMA)/build -DCMAKE_BUILD_TYPE=Release \
			-DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_USE_PREBUILT_UI=OFF && \
		cmake --build $(LLAMA)/build --target llama-server; } > .cache/llama.log 2>&1 || { tail -50 .cache/llama.log; exit 1; }
	@touch $@

bench-gpu: $(READY) ## Benchmark this machine's GPU at Llama-2-7B's sizes, against PEFT and the plan: some minutes, 14 GB of disk
	@$(BIN)/python -m benchmarks.gpu

clean: ## Remove state and caches, but not the environment
	@rm -rf .cache .mypy_cache .ruff_cache .hypothesis
