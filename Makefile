# Two commands set everything up in .venv: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f -not -path '*/__pycache__/*')
# Two tests at a time, each on one core; who is done first takes over what the other has not begun.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.PHONY: demo test test-slow test-all lint docs clean
demo: $(VENV)/installed
	$(BIN)/skipnet-rt demo

# Every engine, promise and command at least once.
test: $(VENV)/developing
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/developing
	$(PYTEST) -m slow

test-all: test test-slow

lint: $(VENV)/developing
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	$(BIN)/mypy

# Into build/site. The package is laid out as it is installed, with kernels/ inside: names are looked up there.
docs: $(VENV)/torch
	$(BIN)/pip install --quiet --constraint constraints.txt --group docs
	rm -rf build/package && mkdir -p build/package
	cp -r skipnet_rt build/package/ && cp -r kernels build/package/skipnet_rt/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# PyTorch first and by its exact version: a range would fetch whatever is newest.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[serve]"
	touch $@

# Not after `installed`: what is there to test is built once.
$(VENV)/developing: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build dist *.egg-info skipnet_rt/*.so
