# make demo   PAVRM, then PRFL, then samples before and after, on the tiny world
# make test   the test suite
# Both set up a virtual environment in .venv first.

PYTHON ?= python3
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

demo: .venv/installed
	.venv/bin/python demo.py

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.PHONY: demo test
