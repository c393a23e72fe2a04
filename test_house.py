"""The form of the code: what one reads to follow a PRFL step, what imports what, and how long things are."""
import ast
import json
import re
import subprocess
import sys

import pytest

from testdata.helpers import ROOT

READING_SET = ["train_prfl.py", "reward.py", "solver.py", "model.py", "parallel.py"]
STAGES = {"train_prfl", "train_pavrm", "train_reward_fl", "sample", "score", "data"}
MODULES = {path.stem: path for path in ROOT.glob("*.py") if not path.stem.startswith("test_")}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("testdata/*.py")]
TESTS = [path for path in FILES if path.stem.startswith("test_") or path.stem in ("conftest", "helpers")]
SOURCES = [path for path in FILES if path not in TESTS]


def lines_of(path):
    return path.read_text().splitlines()


def imports_of(path):
    """The names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.fixture(scope="module")
def imported():
    """What is in sys.modules when a fresh process has imported train_prfl."""
    program = "import json, sys, train_prfl; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return set(json.loads(done.stdout))


# ------------------------------------------------------------------------------ reading

def test_one_prfl_step_is_read_in_under_1500_lines():
    assert sum(len(lines_of(ROOT / name)) for name in READING_SET) < 1500


def test_the_readme_says_how_many_lines_train_prfl_imports(imported):
    """The training script and all of ours that it imports."""
    said = re.search(r"imports\s+([\d,]+)\s+lines\s+in\s+all", (ROOT / "README.md").read_text())
    assert said, 'the README has no sentence with "imports N lines in all"'
    ours = [MODULES[name] for name in imported & MODULES.keys()]
    assert len(ours) > 10
    count = sum(len(lines_of(path)) for path in ours)
    assert int(said[1].replace(",", "")) == pytest.approx(count, rel=0.02)


def test_no_line_is_over_110_columns():
    wide = []
    for path in FILES:
        wide += [f"{path.name}:{number}" for number, line in enumerate(lines_of(path), 1) if len(line) > 110]
    assert not wide


def test_files_and_functions_are_short():
    """A file has up to 450 lines, a function up to 80, and the main() of a script up to 180."""
    long = []
    for path in SOURCES:
        if len(lines_of(path)) > 450:
            long.append(path.name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > (180 if node.name == "main" else 80):
                    long.append(f"{path.name}: {node.name}, {length} lines")
    assert not long


# ------------------------------------------------------------------------------ imports

def reached(module):
    """All that a module imports, itself or through others of ours."""
    found, left = set(), {module}
    while left:
        new = imports_of(MODULES[left.pop()])
        left |= (new - found) & MODULES.keys()
        found |= new
    return found


def test_training_needs_neither_videos_nor_text_encoders(imported):
    assert {"train_prfl", "clips", "reward", "solver", "model", "parallel"} <= imported
    assert not imported & {"av", "sentencepiece", "t5", "clip", "data", "encode", "annotations", "video"}
    for module in ("clips", "evaluation"):  # which train_pavrm needs as well
        assert not reached(module) & {"av", "t5", "clip", "data", "encode", "annotations", "video"}, module


def test_no_module_imports_itself_in_a_circle():
    needs = {name: imports_of(path) & MODULES.keys() for name, path in MODULES.items()}
    while needs:  # take away the modules that need no other one of those that are left
        free = {name for name, others in needs.items() if not others & needs.keys()}
        assert free, f"these modules import each other in a circle: {sorted(needs)}"
        needs = {name: others for name, others in needs.items() if name not in free}


def test_what_may_import_what():
    """Stages do not import each other, leaves import files.py at most, one file reads and writes videos."""
    for stage in STAGES:
        assert not imports_of(MODULES[stage]) & STAGES, stage
    for leaf in ("vae", "t5", "clip", "lora_files", "ema", "solver", "sequence", "memory", "gpu", "watch",
                 "face", "files"):
        assert imports_of(MODULES[leaf]) & MODULES.keys() <= {"files"} - {leaf}, leaf
    assert {name for name, path in MODULES.items() if "av" in imports_of(path)} <= {"video", "demo"}


def test_the_tests_that_notice_faults_exist():
    """The table at the head of test_train_prfl.py names them."""
    docstring = ast.get_docstring(ast.parse((ROOT / "test_train_prfl.py").read_text()))
    named = re.findall(r"(?:(test_\w+\.py): )?(test_\w+)(\*?)(?!\.py)", docstring)
    assert len(named) > 12
    for file, name, several in named:
        text = (ROOT / (file or "test_train_prfl.py")).read_text()
        assert f"def {name}" + ("" if several else "(") in text, f"{file} {name}"


def test_no_test_imports_another_test():
    """What they share is in testdata/helpers.py and conftest.py."""
    for path in TESTS:
        shared = {name for name in imports_of(path) if name.startswith("test_") or name == "conftest"}
        assert not shared, f"{path.name} imports {sorted(shared)}"
