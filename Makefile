# Every target makes .venv and what it needs by itself, and reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/.linked
FLOOR := $(CURDIR)/build/floor

.PHONY: demo test test-quick test-floor lint format docs clean

demo: $(INSTALLED)
	$(BIN)/bifocal demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Without the tests that start processes.
test-quick: $(INSTALLED)
	BIFOCAL_TESTS=quick $(BIN)/python -m pytest -n 2 --dist worksteal

# Saving and loading with the oldest transformers and huggingface_hub that pyproject.toml allows.
test-floor: $(FLOOR)/.installed
	PYTHONPATH=$(FLOOR) $(BIN)/python -c "import transformers; print('transformers', transformers.__version__)"
	PYTHONPATH=$(FLOOR) $(BIN)/python -m pytest -n 2 $(addprefix tests/modeling/test_,config.py loading.py encoding.py text.py long_texts.py families.py)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Offline, and any broken link, anchor or docstring is an error. Needs Python 3.11.
docs: $(INSTALLED) $(VENV)/.docs
	$(BIN)/python docs/site/build.py

$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# torch first and pinned: a wider requirement would pull gigabytes of CUDA packages onto a machine without a GPU.
$(VENV)/.installed: pyproject.toml setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

# The editable install links file by file (setup.cfg), so a new file needs a link of its own.
$(INSTALLED): $(VENV)/.installed build/files.txt
	$(PIP) install --no-deps --editable .
	touch $@

build/files.txt: FORCE
	@mkdir -p build
	@find bifocal modeling embedding data training evaluation hub -type f ! -path '*/__pycache__/*' | sort > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

FORCE:

# These come before the installed ones on the path. tokenizers: what that transformers takes.
$(FLOOR)/.installed: pyproject.toml $(INSTALLED)
	rm -rf $(FLOOR)
	$(PIP) install --no-deps --target $(FLOOR) tokenizers==0.22.0 \
		$$(sed -nE 's/^    "(transformers|huggingface_hub)>=([0-9.]+).*/\1==\2/p' pyproject.toml)
	touch $@
