# Every target sets up first, which takes minutes once and nothing after that. `make` alone lists them.

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak check bench mutants lock clean distclean
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
NAME ?= tracking

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## .venv with the pinned packages, system packages where that is allowed
	@.ci/setup

demo: setup ## the whole wheel, once: robots fail, learn, and get the better policy
	@$(BIN)/flywheel demo

test: setup ## all tests, unit and integration, but for the soak tests
	@.ci/test

soak: setup ## the long tests: bad policies in the gate, a recorder under many kills, tasks without a shared disk
	@$(BIN)/pytest -m soak

check: setup ## lint, format, types, rules of dependency
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: setup ## one benchmark, such as NAME=tracking
	@$(BIN)/flywheel bench $(NAME)

mutants: setup ## mutation testing of the envelope and the mode machine (half an hour); lists the survivors
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

# Pins that still satisfy pyproject.toml are kept; delete a line to have that package looked up anew.
UV = .venv/lock/bin/uv pip compile pyproject.toml --python-version 3.12 --quiet \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

lock: setup ## resolve requirements.lock and requirements-edge.lock from pyproject.toml
	@test -x .venv/lock/bin/uv || { $(BIN)/python -m venv .venv/lock && .venv/lock/bin/pip install -qq uv; }
	@$(UV) --extra train --extra cloud --extra twin --extra dev --output-file requirements.lock
	@$(UV) --extra twin --constraint requirements.lock --output-file requirements-edge.lock
	@! grep -nE '://' requirements*.lock
	@.ci/setup

clean: ## remove what was built; the environment and the store's data stay
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@rm -rf report.html report.json
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## also stop the services and remove the environment, the store's data and the runs
	@if [ -x $(BIN)/flywheel ] && [ -d .flywheel ]; then $(BIN)/flywheel down; fi
	@rm -rf .venv .flywheel runs
