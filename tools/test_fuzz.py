"""A short form of fuzz.py: wrong inputs of every kind to most scripts. `python -m tools.fuzz` gives all."""
import os
import re
import subprocess
import sys

from testdata.helpers import ROOT


def test_nothing_wrong_goes_through():
    command = [sys.executable, "-m", "tools.fuzz", "--every", "480", "--seconds", "600"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) cases, 0 went wrong", done.stdout)[1]) > 10
