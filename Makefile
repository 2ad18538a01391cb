# `make` lists the targets. Each one builds .venv from requirements.lock when it is missing or out of
# date. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.lock-installed

# The lock ties findings to these versions; `make lock UPGRADE=--upgrade` renews all the others.
PINS := torch==2.13.0 transformers==5.23.0 transformer-lens==4.3.0
UPGRADE ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint notebooks experiments families docs figures bench lock clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' \
		| while IFS='|' read -r name what; do printf '  make %-11s %s\n' "$$name" "$$what"; done

demo: $(INSTALLED) ## a first experiment on the shipped demo model
	$(BIN)/mechmm demo

test: $(INSTALLED) ## the test suite, without the slow tests
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8

lint: $(INSTALLED) ## style, formatting, types and the import arrows
	@failed=; \
	for check in "ruff check ." "ruff format --check ." "pyright" "lint-imports --no-logo"; do \
		echo "$$check"; $(BIN)/$$check || failed=1; \
	done; test -z "$$failed"

notebooks: $(INSTALLED) ## run every notebook, leaving the files as they are
	@set -e; for notebook in $(wildcard notebooks/*.ipynb); do \
		echo "$$notebook"; $(BIN)/jupyter-execute --kernel_name=python3 "$$notebook"; done

# The checkpoints that circuits_form reads are trained first where they are not there.
experiments: $(INSTALLED) ## replay every experiment on the demo model against its committed numbers
	@test -d trained/history/5-find-400 || $(BIN)/mechmm zoo train --out trained --phases 2
	@failed=; for results in $(wildcard experiments/*/results); do \
		echo "$$results"; $(BIN)/mechmm replay $$results || failed=1; \
	done; test -z "$$failed"

families: $(INSTALLED) ## make docs/families.md from the rows
	$(BIN)/python -c "from mechmm.runs.families import families_page; print(families_page(), end='')" \
		> docs/families.partial.md
	@mv docs/families.partial.md docs/families.md

docs: $(INSTALLED) ## build the documentation site: build/docs/index.html
	$(BIN)/python docs/build_site.py build/docs

# Needs the extra static (kaleido) and a Chromium.
figures: $(INSTALLED) ## make the figures of docs/methods that need no training run
	$(BIN)/python docs/figures.py

bench: $(INSTALLED) ## run every benchmark on its quick setting
	@set -e; for benchmark in $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)); do \
		echo "$$benchmark"; $(BIN)/python "$$benchmark" --quick; done

# torch's GPU libraries and local version tags depend on the machine: torch itself names the libraries
# that it needs, so the lock names neither. pip does not replace itself.
lock: $(INSTALLED) ## make requirements.lock from pyproject.toml
	$(BIN)/pip-compile pyproject.toml --extra dev --extra docs --output-file requirements.lock --quiet \
		--strip-extras --no-annotate --no-header --allow-unsafe --no-build-isolation \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
		$(UPGRADE) $(PINS:%=--upgrade-package=%)
	@{ echo "# Made by \`make lock\` from pyproject.toml and its extras dev and docs, with Python 3.11 on Linux."; \
		sed -E -e 's/\+[a-z0-9.]+$$//' -e '/^(nvidia-|cuda-|triton|pip=|#|$$)/d' requirements.lock; \
		} > requirements.lock.partial
	@mv requirements.lock.partial requirements.lock

clean: ## remove caches and built files, not .venv
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "mechmm needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." \
			"Name another one: make PYTHON=python3.11" >&2; exit 1; }
	@echo "installing requirements.lock into $(VENV); the first time takes some minutes"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation -e .
	@touch $@
