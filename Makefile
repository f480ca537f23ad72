# Every target makes .venv and what it needs by itself, and reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format clean

demo: $(INSTALLED)
	$(BIN)/bifocal demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2

lint: $(INSTALLED) build/types/bifocal
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/types $(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# torch first and pinned: a wider requirement would pull gigabytes of CUDA packages onto a machine without a GPU.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

# mypy does not follow the mapping of folders to packages in pyproject.toml; links show it the packages as installed.
build/types/bifocal: pyproject.toml
	rm -rf $@ && mkdir -p $@
	ln -s $(CURDIR)/bifocal/* $@
	for package in modeling training evaluation hub; do ln -s $(CURDIR)/$$package $@/$$package; done
	ln -s $(CURDIR)/benchmarks/claims $@/claims
