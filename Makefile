# make demo   turn real recordings into ids and back, with metrics and pictures (installs what it needs)
# make test   the quick tests            make test-slow   all of them
# make check  lint, format, types, README            make format   mend lint and format
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread a process: on two cores more threads only get in each other's way, and codes do not depend on it.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow check format install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/audiotok demo --output runs/demo --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check
	$(BIN)/python -m pytest -q tests/test_readme.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
