# make demo      PAVRM, then PRFL, then samples before and after, on the tiny world
# make test      the test suite
# make test-all  the same and what takes minutes: every mesh of processes, twenty kills
# make paper     the paper's comparisons on the tiny world, an hour
# All set up a virtual environment in .venv first.

PYTHON ?= python3
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

demo: .venv/installed
	.venv/bin/python demo.py

paper: .venv/installed
	.venv/bin/python paper.py

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q

test-all: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -m "full or not full"
	.venv/bin/python crash.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.PHONY: demo paper test test-all
