# foveate: `make demo` shows what it does, `make test` proves it. Both set up .venv on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints-ci.txt
BIN := $(VENV)/bin
FAMILY ?=

.PHONY: demo test test-all check format bench clean

demo: $(VENV)/.installed
	$(BIN)/foveate demo --out demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n auto -m "not slow"

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n auto

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/foveate bench $(if $(FAMILY),$(FAMILY),all)

clean:
	rm -rf $(VENV) build demo .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "foveate needs Python >= 3.11; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/pip
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/pip
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,transformers]'
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) --no-deps timm  # torchvision would pull CUDA in
	touch $@ $(VENV)/.installed
