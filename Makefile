# make demo      PAVRM, then PRFL, then samples before and after, on the tiny world
# make test      the test suite
# make test-all  the same and what takes minutes: every mesh of processes, the compiler, 20 kills
# make lint      ruff
# make paper     the paper's comparisons on the tiny world, an hour
# All set up a virtual environment in .venv first.

PYTHON ?= python3
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

demo: .venv/installed
	.venv/bin/python demo.py

paper: .venv/installed
	.venv/bin/python -m tools.paper

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto --dist worksteal

test-all: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto --dist worksteal -m "full or not full"
	.venv/bin/python -m tools.crash

lint: .venv/installed
	.venv/bin/ruff check .

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo paper test test-all lint
