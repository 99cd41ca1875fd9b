# Two commands are enough: `make app` opens the app, `make test` runs every test. Both set up what they need, once.
# Settings, on the command line or in the environment:
#   PYTHON=python3.12   which Python makes the environment (3.11 or newer)
#   TORCH_INDEX=URL     a package index that has CPU-only builds of torch, as PyTorch's installation page names it;
#                       without it a Linux machine may download a CUDA build of several GB
#   EXPLORER_BROWSER=/path  the chromium or chrome that the browser tests drive
#   WORKERS=N           how many test files run at a time; 2, as much of what they do is waiting
#   ARGS='...'          passed on: make test ARGS='-k schedule', make app ARGS='--port 8900', make bench ARGS='--threads 2'

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.set-up

.DEFAULT_GOAL := help
.PHONY: help setup app test browser check format bench clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## make the environment in .venv (every command below does it when needed)

$(STAMP): pyproject.toml constraints.txt .ci/setup
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" bash .ci/setup app test bench
	@touch $@

app: $(STAMP)  ## open the app on the bundled demo
	@echo "Starting the app; Ctrl-C ends it."
	@$(BIN)/sparsity-explorer app $(ARGS)

test: $(STAMP)  ## run every test, in a real browser too
	@bash .ci/ensure-browser
	@echo "Running the tests."
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

browser: $(STAMP)  ## run the browser tests alone
	@bash .ci/ensure-browser
	@$(BIN)/python -m pytest -m browser $(ARGS)

check: $(STAMP)  ## lint, format, types, spelling, notebooks without saved outputs
	@$(BIN)/python .ci/check.py

format: $(STAMP)  ## let ruff fix and format what it can, and strip the notebooks
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/nbstripout --keep-id notebooks/*.ipynb
	@echo "Formatted."

bench: $(STAMP)  ## time this engine beside the alternatives on this machine
	@$(BIN)/python -m explorer.bench $(ARGS)

clean:  ## remove the environment and everything that was made
	@rm -rf .venv build dist run .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find explorer tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Removed the environment and the caches."
