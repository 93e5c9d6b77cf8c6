# Every target works from a fresh clone; each calls `setup`, which does nothing when the environment is up to date.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
LOCKS := requirements/cpu.lock requirements/dev.lock
TORCH := torch==2.13.0
TORCHVISION := torchvision==0.28.0
# Reached where it can be, for these two alone; elsewhere pip goes on with the ordinary registry.
TORCH_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu --retries 1
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.PHONY: setup demo test ui check bench docs clean

setup: $(STAMP)

$(STAMP): $(LOCKS) pyproject.toml requirements/torchvision_shim.py Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	  "Python 3.11 to 3.13 is needed, this is %d.%d; run: make setup PYTHON=/path/to/python3.11" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch (CPU build) ..."
	@$(PIP) install -q --no-deps --no-compile $(TORCH_INDEX) $(TORCH) $(TORCHVISION) 2>&1 | grep -v -e Retrying -e '^$$' || true
	@echo "Installing the locked packages ..."
	@$(PIP) install -q --no-deps --no-compile -r requirements/cpu.lock -r requirements/dev.lock
	@# A torch that needs CUDA libraries to import came from a registry without CPU builds: give it what it names.
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "Only a CUDA build of torch is to be had here: adding its libraries ..."; \
	  $(PIP) install -q $(TORCH); }
	@$(BIN)/python requirements/torchvision_shim.py
	@$(PIP) install -q --no-deps --no-compile --no-build-isolation -e .
	@# Python compiles a library when it is first imported: done here, so that no first command waits for it.
	@$(BIN)/python -c 'import dagster, ray, torch, torchvision, vllm, webdataset; \
	  from accelerate import Accelerator; from diffusers import AutoencoderKL, DiffusionPipeline; \
	  from transformers import AutoModelForCausalLM, Qwen3VLForConditionalGeneration' >/dev/null
	@touch $(STAMP)
	@echo "Ready: $(BIN)/throughline --help"

demo: setup
	@$(BIN)/throughline run --profile demo

ui: setup
	@$(BIN)/throughline ui --profile demo

test: setup
	@$(BIN)/python -m pytest -n 2

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q -n 2 -m "not slow"

bench: setup
	@$(BIN)/python -m tests.benchmarks

# The API reference is read from source, so the site needs none of the project's own packages.
DOCS_VENV := .venv-docs

$(DOCS_VENV)/.set-up: requirements/docs.lock
	@test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r requirements/docs.lock
	@touch $@

docs: $(DOCS_VENV)/.set-up
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "Built: .throughline/site/index.html"

clean:
	@rm -rf $(VENV) $(DOCS_VENV) .throughline
