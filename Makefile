# Each target sets up what it needs. PYTHON chooses the interpreter (3.11 or newer) the environment is made with.
PYTHON ?= python3
BIN := .venv/bin
SEEDS ?= 20
MINUTES ?= 10

run: .venv/all            ## Start the whole stack on this machine and chat with it
	@$(BIN)/oasst up --chat

test: .venv/dev           ## Run the tests
	$(BIN)/pytest

fuzz: .venv/dev           ## Fuzz the queue with many seeds
	$(BIN)/pytest -m fuzz tests/jobs

faults: .venv/dev         ## Break everything there is to break, with many seeds; SEEDS=20 ROWS="2 6a"
	PYTHONPATH=tests $(BIN)/python -m faults --seeds $(SEEDS) --markdown build/faults.md $(if $(ROWS),--rows $(ROWS))

soak: .venv/dev           ## Stream from 256 callers at once; memory must stay flat; MINUTES=10
	PYTHONPATH=tests $(BIN)/python -m faults.soak --minutes $(MINUTES)

lint: .venv/dev           ## Check style, types and the protobuf files
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/buf lint

format: .venv/dev         ## Bring the code into the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: .venv/dev          ## Generate the Python code of the protobuf files
	$(BIN)/python protos/generate.py

demo: .venv/dev           ## Train the demo checkpoint anew
	$(BIN)/python -m oasst_training.train_demo

bench: .venv/dev          ## Measure engine, whole path and start; prints ratios
	$(BIN)/python -m bench

clean:                    ## Remove the environment and everything built
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache

help:                     ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 10

.venv/all .venv/dev: .venv/%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "oasst-serve needs Python 3.11 or newer")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing oasst-serve[$*] into .venv; PyTorch is large, the first time takes a few minutes." >&2
	$(BIN)/pip install --disable-pip-version-check --progress-bar on -e '.[$*]' >&2
	@touch $@

.DELETE_ON_ERROR:
.PHONY: run test fuzz lint format proto demo bench clean help
