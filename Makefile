# Needs make, Python 3.10 or newer and a C++20 compiler; `make help` lists the targets.

# The one place that pins torch. Whatever pip takes for a requirement overrides it, options included:
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

# The interpreter that makes .venv: the first of these that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null && echo $$p && break; done)
ifeq ($(origin CXX),default)
CXX := c++
endif
export CXX TORCH

# More arguments for what `make test`, `make demo` and `make bench` run.
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Quiet but for errors; those of a compiler come with the error.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
# What the extension is made of, and what the C++ tests add.
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
NATIVE_TESTS := $(shell find tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.DEFAULT_GOAL := setup
.DELETE_ON_ERROR:
.PHONY: setup test native-test demo bench lint format clean help FORCE

setup: $(VENV)/installed  ## make .venv, with torch, the extension and the tools in it

test: setup  ## run the tests; ARGS="tests/test_layers.py -x" goes to pytest
	$(BIN)/python -m pytest $(ARGS)

native-test:  ## run the C++ tests of csrc/core: as they are, under ASan and UBSan, under TSan; needs no .venv
	$(call check_machine,native-test)
	@echo "==> building what changed of the C++ tests"
	@$(MAKE) --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,-j2) -f tests/native/native.mk PYTHON='$(PYTHON)'

demo: setup  ## train, kill, resume, and prove that nothing was lost; ARGS=--short is quicker
	$(BIN)/python examples/kill_and_resume.py $(ARGS)

bench: setup  ## run the benchmarks and write docs/BENCHMARKS.md; ARGS=--quick only tries them
	$(BIN)/python -m benchmarks.run $(ARGS)

lint: setup  ## check form and types
	$(BIN)/black --quiet --check --diff .
	$(BIN)/ruff check --quiet
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(NATIVE_TESTS)
	$(BIN)/mypy

format: setup  ## bring everything into form
	$(BIN)/ruff check --quiet --fix-only
	$(BIN)/black --quiet .
	$(BIN)/clang-format -i $(SOURCES) $(NATIVE_TESTS)

clean:  ## remove what was built, and caches; .venv stays, for torch is large
	rm -rf build dist dtruntime_torch.egg-info dtruntime_torch/_C*.so
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -exec rm -rf {} +

help:
	@sed -n 's/^\([a-z-]*\):.*## /make \1 - /p' Makefile

# The set-up in three steps. Each leaves a file that is newer than all that the step was made from, so that a
# step is done again only when that changed. Python sources need no step: the install is editable.

# Stops with one sentence if the machine lacks something for that target.
check_machine = $(eval LACKS := $(shell scripts/check_machine.sh '$(PYTHON)' '$(CXX)' $(1)))$(if $(LACKS),$(error $(LACKS)))

# A .venv knows its own place: in a folder that was moved or copied it is made anew.
$(BIN)/python: $(if $(filter $(CURDIR),$(shell cat $(VENV)/made-in 2>/dev/null)),,FORCE)
	$(call check_machine,setup)
	@echo "==> making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo '$(CURDIR)' > $(VENV)/made-in

ifeq ($(strip $(TORCH)),)
$(error TORCH is empty: leave it out for the pinned torch, or name a requirement, as in TORCH=torch==2.13.0)
endif

# Holds the requirement that was installed: another TORCH=... installs that.
$(VENV)/torch: FORCE | $(BIN)/python
	@[ "$$(cat $@ 2>/dev/null)" = "$$TORCH" ] || { \
		echo "==> installing $$TORCH (the first time, this may download much)" && \
		set -f && $(PIP) install $$TORCH && echo "$$TORCH" > $@; }

$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py $(SOURCES) $(if $(wildcard dtruntime_torch/_C*.so),,FORCE)
	$(call check_machine,setup)
	@echo "==> building the extension and installing the tools"
	@$(PIP) install 'setuptools>=77.0.3' wheel ninja
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation --editable '.[dev]'
	@touch $@

FORCE:
