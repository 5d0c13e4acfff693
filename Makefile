# make demo | test | test-all | test-oldest | benchmarks | lint | types | clean
# The environment is made on first use. VENV=/path uses another one, PYTHON=python3.12 another interpreter.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
OLDEST ?= .venv-oldest
JOBS ?= 2
# One thread per process: two processes with a thread each beat one process with two on networks this small,
# and results do not depend on the machine's number of cores.
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(JOBS) --dist worksteal -q

# The lower bounds of setup.cfg's install_requires, as pins; torchvision's release follows torch's.
OLDEST_PINS = $(shell sed -n 's/^ *\(torch\|timm\|numpy\|scipy\)>=\([0-9.]*\).*/\1==\2.*/p' setup.cfg) torchvision==0.21.*

.PHONY: demo test test-all test-oldest benchmarks lint types clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m ms_optim.demo

test: $(VENV)/.installed
	$(call PYTEST,$(VENV)) -m "not slow and not cuda"

test-all: $(VENV)/.installed
	$(call PYTEST,$(VENV))

test-oldest: $(OLDEST)/.installed
	$(call PYTEST,$(OLDEST)) -m "not slow and not cuda"

# Every script, tiny, to see that it runs: minutes. What is committed is measured by `--scale cpu`, in hours.
benchmarks: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks --scale smoke --jobs $(JOBS)

lint: $(VENV)/.installed
	$(VENV)/bin/python -m ruff check .

types: $(VENV)/.installed
	$(VENV)/bin/python -m mypy

$(VENV)/.installed: setup.cfg pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(OLDEST)/.installed: setup.cfg pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --editable ".[test]" $(OLDEST_PINS)
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
