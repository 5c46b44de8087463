# Each target sets up what it needs. PYTHON chooses the interpreter (3.11 or newer) the environment is made with.
PYTHON ?= python3
BIN := .venv/bin
LOCK = $(BIN)/uv pip compile --quiet --generate-hashes --no-header --no-annotate --no-emit-index-url \
	--python-version 3.12 --python-platform x86_64-manylinux_2_28
# In as many processes as there are cores: most tests wait for what they have started.
PYTEST := $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist worksteal
SEEDS ?= 20
MINUTES ?= 10

run: .venv/all            ## Start the whole stack on this machine and chat with it
	@$(BIN)/oasst up --chat

test: .venv/dev .venv/helm ## Run the tests
	$(PYTEST)

test-triton: .venv/dev    ## Run the tests of the kernels for GPUs, in Triton's interpreter; installs 200 MB
	$(BIN)/pip install --disable-pip-version-check -q --no-deps 'triton>=3.7,<3.8' >&2
	$(PYTEST) tests/worker/test_paged_attention.py tests/worker/test_buckets.py

fuzz: .venv/dev           ## Fuzz the queue with many seeds
	$(BIN)/pytest -m fuzz tests/jobs

faults: .venv/dev         ## Break everything there is to break, with many seeds; SEEDS=20 ROWS="2 6a" JOBS=4
	PYTHONPATH=tests $(BIN)/python -m faults --seeds $(SEEDS) --markdown build/faults.md \
		$(if $(ROWS),--rows $(ROWS)) $(if $(JOBS),--jobs $(JOBS))

soak: .venv/dev           ## Stream from 256 callers at once; memory must stay flat; MINUTES=10
	PYTHONPATH=tests $(BIN)/python -m faults.soak --minutes $(MINUTES)

lint: .venv/dev           ## Check style, types and the protobuf files
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/basedpyright
	PYTHONPATH=client:protos $(BIN)/basedpyright --verifytypes oasst_client --ignoreexternal
	$(BIN)/buf lint

format: .venv/dev         ## Bring the code into the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: .venv/dev          ## Generate the Python code of the protobuf files
	$(BIN)/python protos/generate.py

docs: .venv/dev           ## Write the command's reference anew
	$(BIN)/typer oasst_cli.__main__ utils docs --name oasst --output docs/client/command-reference.md

train-demo: .venv/dev     ## Train the demo checkpoint by its recipe, serve it, ask it
	rm -rf build/demo
	$(BIN)/python -m oasst_training.train_demo --work-dir build/demo
	printf 'What is a meme?\nAnd who coined the word?\n' | $(BIN)/oasst up --chat

bench: .venv/dev          ## Measure every part, or PARTS="engine path" ROUNDS=1
	$(BIN)/python -m bench $(PARTS) $(if $(ROUNDS),--rounds $(ROUNDS))

bench-peers: .venv/dev    ## Measure beside other systems; SHAPES=160m DTYPES=int8 SYSTEMS= CONCURRENT=8 ROUNDS=1
	$(BIN)/python -m bench.peers $(if $(SHAPES),--shapes $(SHAPES)) $(if $(DTYPES),--dtypes $(DTYPES)) \
		$(if $(SYSTEMS),--systems $(SYSTEMS)) $(if $(CONCURRENT),--concurrent $(CONCURRENT)) \
		$(if $(ROUNDS),--rounds $(ROUNDS))

bench-gpu: .venv/dev      ## Measure on one GPU, at the 12 B model's shape, beside what the card can do and transformers
	$(BIN)/python -m bench.gpu

chart: .venv/dev .venv/helm ## Check the chart, its rules and the images; prints a table of profiles and checks
	@command -v promtool >/dev/null || { echo "make chart needs promtool: apt-get install prometheus" >&2; exit 1; }
	$(BIN)/pytest tests/ops --matrix

generated: .venv/dev      ## Write the dashboards, the table of metrics and the queue's users
	$(BIN)/python -m observe write

observe: .venv/dev        ## Watch a real run with a real Prometheus: rules, dashboards, pictures, cost
	@command -v prometheus >/dev/null && command -v prometheus-redis-exporter >/dev/null || \
		{ echo "make observe needs Prometheus: apt-get install prometheus prometheus-redis-exporter" >&2; exit 1; }
	$(BIN)/python -m observe run

images:                   ## Build the gateway's and the worker's image; needs Docker
	docker build -f docker/Dockerfile --target gateway -t oasst-gateway:0.1.0 .
	docker build -f docker/Dockerfile --target worker -t oasst-worker:0.1.0 .

lock: .venv/dev           ## Pin what the images install, by hash
	echo hatchling | $(LOCK) -o docker/build.txt -
	$(LOCK) --extra gateway --extra trace -o docker/gateway.txt pyproject.toml
	$(LOCK) --extra worker --extra trace -o docker/worker.txt pyproject.toml

clean:                    ## Remove the environment and everything built
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache

help:                     ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

.venv/all .venv/dev: .venv/%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "oasst-serve needs Python 3.11 or newer")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing oasst-serve[$*] into .venv; PyTorch is large, the first time takes a few minutes." >&2
	$(BIN)/pip install --disable-pip-version-check --progress-bar on -e '.[$*]' >&2
	@touch $@

# Helm as a library. Its metadata asks for Python 3.12; it runs on 3.11 as well.
.venv/helm: .venv/dev
	$(BIN)/pip install --disable-pip-version-check -q --ignore-requires-python --no-deps helm-sdkpy==0.1.32 >&2
	@touch $@

.DELETE_ON_ERROR:
.PHONY: run test test-triton fuzz faults soak lint format proto docs train-demo bench bench-peers bench-gpu chart generated observe images lock clean help
