# Every target sets up all that it needs: a Python of at least 3.11 is enough.
#   make demo PYTHON=/path/to/python3.12     uses that interpreter for a new environment

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?=
# Processes of pytest: a number, or auto for one per core.
WORKERS ?= auto
PYTEST_ARGS ?=

VENV := .venv
VENV_LOWEST := .venv-lowest
VENV_NEWEST := .venv-newest
DEV := $(VENV)/.installed-dev
NOTEBOOKS := $(VENV)/.installed-notebooks
DOCS := $(VENV)/.installed-docs
LOWEST := $(VENV_LOWEST)/.installed
NEWEST := $(VENV_NEWEST)/.installed

PYTEST := -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadgroup $(PYTEST_ARGS)
NBCONVERT := $(VENV)/bin/python -m jupyter nbconvert --to notebook --execute \
	--ExecutePreprocessor.record_timing=False

# $(call find_python,CANDIDATES,MAJOR,MINOR): sets $$python to the first that is at least that
# version and can make virtual environments, or to nothing.
find_python = python=; for candidate in $(1); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < ($(2), $(3)))' \
	    >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	done

# Of pyenv (https://github.com/pyenv/pyenv) only the versions that are switched on run by name: its
# others are taken from where it installs them.
PYENV_VERSIONS = $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
pyenv_python = $(wildcard $(PYENV_VERSIONS)/$(1)*/bin/python)

ANY_PYTHON = $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14 python \
	$(call pyenv_python,3.11.) $(call pyenv_python,3.12.) $(call pyenv_python,3.13.)
# Old releases have wheels for old interpreters only.
LOWEST_PYTHON = python3.11 $(call pyenv_python,3.11.) $(ANY_PYTHON)
NEWEST_PYTHON = python3.12 $(call pyenv_python,3.12.) python3.13 $(call pyenv_python,3.13.) \
	python3.14 $(call pyenv_python,3.14.) $(PYTHON) python3

# $(call make_venv,FOLDER,CANDIDATES,MAJOR,MINOR): makes it unless it is there and works.
define make_venv
if ! $(1)/bin/python -c 'import pip' >/dev/null 2>&1; then \
  $(call find_python,$(2),$(3),$(4)); \
  if [ -z "$$python" ]; then \
    echo "No Python >= $(3).$(4) with the modules venv and ensurepip was found." >&2; \
    echo "Install one (on Debian: apt install python3 python3-venv), or name it: make ... PYTHON=/path/to/python" >&2; \
    exit 1; \
  fi; \
  echo "Making $(1) with $$("$$python" --version)"; \
  "$$python" -m venv --clear $(1); \
fi; \
$(1)/bin/python -m pip install --quiet uv \
  || echo "uv could not be installed; going on with pip."
endef

# $(call install,FOLDER,REQUIREMENTS): with uv, which is faster, or else with pip.
define install
if $(1)/bin/python -m uv --version >/dev/null 2>&1 \
  && $(1)/bin/python -m uv pip install --python $(1)/bin/python $(2); then :; \
else $(1)/bin/python -m pip install $(2); fi
endef

.PHONY: help demo test test-slow test-lowest test-py312 lint format typecheck doctest notebooks \
	test-notebooks docs build clean

help:  ## lists the targets
	@grep -E '^[a-z0-9-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(DEV)  ## trains two networks with seven methods; a table, and a plot in demo.png
	$(VENV)/bin/python -m benchmarks demo

test: $(DEV)  ## the tests, but for slow ones
	$(VENV)/bin/python $(PYTEST)

test-slow: $(DEV)  ## the slow tests, and those that need the data sets of $$SECONDORDER_DATA
	$(VENV)/bin/python $(PYTEST) -m 'slow or data'

test-lowest: $(LOWEST)  ## the tests with the lowest versions that pyproject.toml promises
	$(VENV_LOWEST)/bin/python $(PYTEST)

test-py312:  ## the tests with a Python of at least 3.12, if there is one, and the newest JAX
	@$(call find_python,$(NEWEST_PYTHON),3,12); \
	if [ -z "$$python" ]; then echo "Skipped: there is no Python >= 3.12."; exit 0; fi; \
	$(MAKE) --no-print-directory $(NEWEST); \
	echo "$(VENV_NEWEST)/bin/python $(PYTEST)"; \
	$(VENV_NEWEST)/bin/python $(PYTEST)

lint: $(DEV)  ## ruff: rules and format
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

format: $(DEV)  ## ruff: repairs what it can
	$(VENV)/bin/python -m ruff check --fix .
	$(VENV)/bin/python -m ruff format .

typecheck: $(DEV)  ## mypy
	$(VENV)/bin/python -m mypy

doctest: $(DEV)  ## the examples in docstrings, in README and in the documentation
	$(VENV)/bin/python $(PYTEST) -p tests.conftest --doctest-modules secondorder
	$(VENV)/bin/python $(PYTEST) -m pages tests

notebooks: $(NOTEBOOKS)  ## executes the notebooks, and keeps their outputs in them
	$(NBCONVERT) --inplace notebooks/*.ipynb

test-notebooks: $(NOTEBOOKS)  ## executes the notebooks, and leaves them as they are
	$(NBCONVERT) --output-dir build/notebooks notebooks/*.ipynb

docs: $(DOCS)  ## the site of the documentation, in build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

build: $(DEV)  ## the wheel and the source distribution, in dist/
	$(VENV)/bin/python -m pip install --quiet build
	$(VENV)/bin/python -m build

clean:  ## removes environments, caches and builds
	rm -rf $(VENV) $(VENV_LOWEST) $(VENV_NEWEST) build dist demo.png \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEV): pyproject.toml
	@$(call make_venv,$(VENV),$(ANY_PYTHON),3,11)
	@$(call install,$(VENV),-e '.[dev]')
	@touch $@

$(NOTEBOOKS): $(DEV)
	@$(call install,$(VENV),-e '.[notebooks]')
	@touch $@

$(DOCS): $(DEV)
	@$(call install,$(VENV),-e '.[docs]')
	@touch $@

# Only uv can resolve to the lowest versions; pip has no such option.
$(LOWEST): pyproject.toml
	@$(call make_venv,$(VENV_LOWEST),$(LOWEST_PYTHON),3,11)
	@$(VENV_LOWEST)/bin/python -m uv pip install --python $(VENV_LOWEST)/bin/python \
	  --resolution lowest-direct -e '.[test]'
	@touch $@

$(NEWEST): pyproject.toml
	@$(call make_venv,$(VENV_NEWEST),$(NEWEST_PYTHON),3,12)
	@$(call install,$(VENV_NEWEST),--upgrade -e '.[test]')
	@touch $@
