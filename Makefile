# Every target makes .venv and what it needs by itself, and reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/.installed
FLOOR := $(CURDIR)/build/floor

.PHONY: demo test test-floor lint format clean

demo: $(INSTALLED)
	$(BIN)/bifocal demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2

# Saving and loading with the oldest transformers and huggingface_hub that pyproject.toml allows.
test-floor: $(FLOOR)/.installed
	PYTHONPATH=$(FLOOR) $(BIN)/python -c "import transformers; print('transformers', transformers.__version__)"
	PYTHONPATH=$(FLOOR) $(BIN)/python -m pytest -n 2 $(addprefix tests/modeling/test_,config.py loading.py encoding.py text.py)

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

# These come before the installed ones on the path. tokenizers: what that transformers takes.
$(FLOOR)/.installed: pyproject.toml $(INSTALLED)
	rm -rf $(FLOOR)
	$(PIP) install --no-deps --target $(FLOOR) tokenizers==0.22.0 \
		$$(sed -nE 's/^    "(transformers|huggingface_hub)>=([0-9.]+).*/\1==\2/p' pyproject.toml)
	touch $@

# mypy does not follow the mapping of folders to packages in pyproject.toml; links show it the packages as installed.
build/types/bifocal: pyproject.toml
	rm -rf $@ && mkdir -p $@
	ln -s $(CURDIR)/bifocal/* $@
	for package in modeling training evaluation hub; do ln -s $(CURDIR)/$$package $@/$$package; done
	ln -s $(CURDIR)/benchmarks/claims $@/claims
