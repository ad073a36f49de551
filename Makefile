# Sets up .venv from the pinned locks and runs pocketgrpo, its tests and its linters. `make help` lists the targets.

SHELL := /bin/sh
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
# -qq: errors are shown, progress and warnings are not. Every version is pinned, so none is resolved.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps
# A stamp says "this lock is installed"; it is written last, so an interrupted set-up leaves none.
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
# TRL, which the tests compare losses with, lives apart.
TRL_VENV := .venv-trl
TRL := $(TRL_VENV)/.installed

# The other set of versions that is tested (cluster/versions.py), as far as it differs.
OLD_VENV := .venv-vllm-0.26
OLD := $(OLD_VENV)/.installed
OLD_TESTS := $(addprefix tests/test_,sampling.py weight_sync.py transports.py update_in_flight.py tensor_parallel.py \
	policy.py sampled_from.py preflight.py)

TORCH := $(shell grep '^torch==' requirements.lock)
DEEPSPEED := $(shell grep '^deepspeed==' requirements.lock)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
FROM_TORCH := --extra-index-url $(TORCH_CPU_INDEX)

# Nothing is compiled: DeepSpeed's ops are neither built at installation nor wanted at run time.
export DS_BUILD_OPS := 0
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev run test test-long test-vllm-0.26 lint format clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z0-9.-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(RUNTIME) ## create .venv and install the pinned lock

setup-dev: $(DEV) $(TRL) ## the same, plus tests, linters and the type checker

run: $(RUNTIME) ## train; make run ARGS="--config configs/X.yaml training.steps=10"
	$(BIN)/python run_local.py $(ARGS)

test: $(DEV) $(TRL) ## run the tests, without those marked long; ARGS go to pytest
	$(BIN)/python -m pytest $(ARGS)

test-long: $(DEV) ## run only the tests marked long
	$(BIN)/python -m pytest -m long $(ARGS)

test-vllm-0.26: $(DEV) $(OLD) ## run the tests of what touches vLLM under 0.26, torch 2.11 and transformers 5.17
	$(OLD_VENV)/bin/python -m pytest $(or $(ARGS),$(OLD_TESTS))

lint: $(DEV) ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV) ## rewrite the code as ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build leftovers; environments and runs/ stay
	rm -rf build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . \( -path './$(VENV)' -o -path './$(TRL_VENV)' -o -path './$(OLD_VENV)' -o -path ./.git -o -path ./runs \) -prune -o \
		-name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove the environments as well
	rm -rf ./.venv './$(TRL_VENV)' './$(OLD_VENV)'

# setuptools comes first because DeepSpeed, the one source package, is built with it and needs torch to be there.
$(RUNTIME): requirements.lock
	@rm -f $(RUNTIME) $(DEV)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "pocketgrpo needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	@$(INSTALL) $(TORCH) || { echo "not found there; trying $(TORCH_CPU_INDEX)"; \
		$(INSTALL) --index-url $(TORCH_CPU_INDEX) $(TORCH); }
	@grep -v -e '^torch==' -e '^deepspeed==' requirements.lock > $(VENV)/wheels.lock
	@echo "installing the other $$(grep -c '==' $(VENV)/wheels.lock) wheels of requirements.lock (about 1 GB, minutes)"
	@$(INSTALL) --only-binary :all: -r $(VENV)/wheels.lock
	@echo "installing $(DEEPSPEED)"
	@$(INSTALL) --no-build-isolation --use-pep517 $(DEEPSPEED)
	@touch $(RUNTIME)

$(DEV): requirements-dev.lock $(RUNTIME)
	@rm -f $(DEV)
	@echo "installing requirements-dev.lock"
	@$(INSTALL) --only-binary :all: -r requirements-dev.lock
	@touch $(DEV)

# An environment beside $(VENV): it holds what a lock pins and looks into $(VENV) for the rest. The .pth file by which
# it does is written last, so that pip sees an empty environment.
define beside # environment, lock, further options of pip
	@echo "installing $(2) into $(1)"
	@$(BIN)/python -m venv --clear --without-pip $(1)
	@$(BIN)/python -m pip --disable-pip-version-check --python $(1)/bin/python \
		install -qq --no-deps --only-binary :all: $(3) -r $(2)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	@touch $(1)/.installed
endef

$(TRL): requirements-trl.lock $(RUNTIME)
	$(call beside,$(TRL_VENV),requirements-trl.lock)

$(OLD): requirements-vllm-0.26.lock $(RUNTIME)
	$(call beside,$(OLD_VENV),requirements-vllm-0.26.lock,$(FROM_TORCH))
