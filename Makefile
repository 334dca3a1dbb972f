# Everything a contributor needs, from a bare machine with Python >= 3.10, a C++17 compiler and make.
#
#   PYTHON=python3.12   the interpreter to start from (or HWKERN_PYTHON in the environment); a torch that it has is used
#   VENV=.venv          where the environment goes; VENV=0 uses PYTHON itself: no environment, no network, no extras
#   HWKERN_CUDA=OFF     leaves the GPU kernels out
#   ARGS="-k gemm"      goes to pytest, `hwkern demo`, `hwkern bench` or scripts/gpu-check
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test lint build bench gpu-check clean FORCE
.SECONDARY:

PYTHON ?= $(or $(HWKERN_PYTHON),python3)
VENV ?= .venv
HWKERN_CUDA ?= ON
ARGS ?=

SOURCES := pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f)
# A build folder that stays, so that only what changed is compiled again.
export SKBUILD_BUILD_DIR := build/{wheel_tag}
export SKBUILD_CMAKE_DEFINE := HWKERN_CUDA=$(HWKERN_CUDA)$(if $(HWKERN_WERROR),;HWKERN_WERROR=$(HWKERN_WERROR))

ifeq ($(VENV),0)
  PY := $(PYTHON)
  STATE := build/state
  CLANG_FORMAT := clang-format
  PIP_INSTALL = $(PY) -m pip install -v --no-build-isolation --no-deps -e .
else
  PY := $(VENV)/bin/python
  STATE := $(VENV)/state
  CLANG_FORMAT := $(VENV)/bin/clang-format
  PIP_INSTALL = $(PY) -m pip install -v --no-build-isolation -c $(STATE)/constraints.txt -e ".[$*]"
endif

# Runs a command with its output in a log, and shows the log's end when it fails.
logged = > $(1) 2>&1 || { tail -n 60 $(1); echo "Failed; the whole log is in $(1)."; exit 1; }

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(STATE)/installed-demo  ## set everything up, then patch a real Transformer and show what was gained
	@$(PY) -m hwkern.cli demo $(ARGS)

test: $(STATE)/installed-test  ## set everything up, then run the test suite
	@$(PY) -m pytest $(ARGS)

bench: $(STATE)/installed-bench  ## compare every way to run a model on this machine: tables, plots and a page
	@$(PY) -m hwkern.cli bench $(ARGS)

lint: $(STATE)/installed-dev  ## check format, style and types
	@code=0; \
	  $(PY) -m ruff check . || code=1; \
	  $(PY) -m ruff format --check . || code=1; \
	  $(PY) -m mypy || code=1; \
	  $(CLANG_FORMAT) --dry-run -Werror $(filter %.h %.cuh %.cpp %.cu,$(SOURCES)) || code=1; \
	  $(PY) scripts/check_tree.py || code=1; \
	  exit $$code

build: $(STATE)/installed-dev  ## build the sdist and, from it, the wheel, into dist/
	@rm -rf dist
	@echo "Building the sdist and the wheel (log: $(STATE)/build.log) ..."
	@env -u SKBUILD_BUILD_DIR $(PY) -m build $(call logged,$(STATE)/build.log)
	@$(PY) scripts/check_dist.py dist

gpu-check: $(if $(filter 0,$(VENV)),,$(STATE)/installed-test)  ## on a machine with a GPU: tests, sanitizers, benchmarks
	@$(PY) scripts/gpu-check $(ARGS)

clean:  ## remove the environment and everything built
	@rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- How the environment comes to be ---------------------------------------------------------------------------------

$(STATE)/ready: constraints.txt scripts/make_venv.py cmake/hwkern_build.py
ifeq ($(VENV),0)
	@mkdir -p $(STATE)
else
	@$(PYTHON) scripts/make_venv.py $(VENV) $(STATE)/constraints.txt
	@echo "Installing the build tools ..."
	@$(PY) -m pip install scikit-build-core pybind11 $(call logged,$(STATE)/tools.log)
	@$(PY) -m pip install $$($(PY) cmake/hwkern_build.py requires) pybind11 $(call logged,$(STATE)/tools.log)
	@wheels=$$($(PY) cmake/hwkern_build.py cuda-requires); if [ -n "$$wheels" ]; then \
	  $(PY) -m pip install --no-deps --upgrade --target $(STATE)/cuda $$wheels $(call logged,$(STATE)/cuda.log); fi
endif
	@touch $@

# Changes only when a setting does.
$(STATE)/settings: $(STATE)/ready FORCE
	@echo '$(SKBUILD_CMAKE_DEFINE)' | cmp -s - $@ || echo '$(SKBUILD_CMAKE_DEFINE)' > $@

$(STATE)/installed-%: $(STATE)/ready $(STATE)/settings $(SOURCES)
	@echo "Building and installing hwkern[$*] (a few minutes the first time; log: $(STATE)/install-$*.log) ..."
	@if [ -d $(STATE)/cuda ]; then export CUDA_HOME=$(abspath $(STATE))/cuda/nvidia/cu13; fi; \
	  $(PIP_INSTALL) $(call logged,$(STATE)/install-$*.log)
	@touch $@
