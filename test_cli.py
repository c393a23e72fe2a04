"""Command lines: files of flags, numbers, defaults in --help, flags that scripts share, how an error ends a
script."""
import argparse
import importlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cli

import pytest
import torch.distributed as dist

import train_pavrm
import train_prfl
from files import InputError
from testdata.helpers import ROOT, flags_of

SCRIPTS = [train_pavrm, train_prfl]
WITH_FLAGS = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"))
              if "cli.Parser(" in path.read_text() and not path.stem.startswith("test_")]


# ------------------------------------------------------------------------------ settings of PyTorch

# Prints the environment at the moment when a script first asks for PyTorch, and goes no further.
AT_TORCH = """
import importlib, json, os, sys
from importlib import metadata

class Finder:
    def find_spec(name, *_):
        if name.partition(".")[0] == "torch":
            print(json.dumps([script, dict(os.environ)]), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Finder)
metadata.version = {"torch": sys.argv[1]}.get
for script in sys.argv[2:]:
    if os.fork() == 0:
        importlib.import_module(script)
        os._exit(1)
    assert os.wait()[1] == 0, script
"""


def environments(scripts, torch_version, **own):
    """{script: the environment in which it imports PyTorch}; `own` is set before."""
    ours = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "GOMP_SPINCOUNT")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run([sys.executable, "-c", AT_TORCH, torch_version, *scripts], env=env | own, cwd=ROOT,
                          stdout=subprocess.PIPE, check=True)
    return dict(map(json.loads, done.stdout.splitlines()))


def test_every_script_has_the_settings_before_it_imports_torch():
    scripts = []
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")):
        if "cli.run(" in path.read_text() and not path.stem.startswith("test_"):
            scripts.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert {"train_prfl", "train_pavrm", "sample", "score", "data", "demo", "tools.bench"} <= set(scripts)
    found = environments(scripts, "2.13.0+cpu")
    assert found.keys() == set(scripts)
    for script, env in found.items():
        allocator = "expandable_segments:True,pinned_max_round_threshold_mb:64"
        assert (env["PYTORCH_ALLOC_CONF"], env["GOMP_SPINCOUNT"]) == (allocator, "10000"), script


@pytest.mark.parametrize("torch_version, known", [("2.11.0+cu130", False), ("2.12.1", False),
                                                  ("2.13.0a0+git1234567", True), ("2.14.0", True)])
def test_no_setting_that_pytorch_does_not_know(torch_version, known):
    """An unknown one ends a run on a GPU when it starts."""
    (env,) = environments(["cli"], torch_version).values()
    assert env["PYTORCH_ALLOC_CONF"].startswith("expandable_segments:True")
    assert ("pinned_max_round_threshold_mb" in env["PYTORCH_ALLOC_CONF"]) == known


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_ones_own_settings_are_kept(name):
    own = {name: "max_split_size_mb:512", "GOMP_SPINCOUNT": "7"}
    (env,) = environments(["cli"], "2.13.0", **own).values()
    assert {key: env[key] for key in env if key.endswith("_ALLOC_CONF") or key == "GOMP_SPINCOUNT"} == own


# ------------------------------------------------------------------------------ flags

def test_files_of_flags(tmp_path):
    """Several flags a line, comments, quotes; flags after the file change its flags."""
    path = tmp_path / "some.args"
    path.write_text('# a comment\n--steps 7 --lr 0.5  # another\n\n--prompt "a red ball" two\n')
    parser = cli.Parser("A test.")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--prompt", nargs="+")
    args = parser.parse_args([f"@{path}", "--steps", "8"])
    assert vars(args) == {"steps": 8, "lr": 0.5, "prompt": ["a red ball", "two"]}


def test_defaults_are_in_the_help():
    """Not None, an empty list, that of a switch, nor one that the help says in words; but 0."""
    parser = cli.Parser("A test.")
    parser.add_argument("--steps", type=int, default=7, help="iterations")
    parser.add_argument("--zero", type=int, default=0, help="a number; 0: never")
    parser.add_argument("--alpha", type=float, help="scale (default: the rank)")
    parser.add_argument("--nothing", help="a path")
    parser.add_argument("--offload", nargs="+", default=[], help="parts")
    parser.add_argument("--compile", action="store_true", help="compile")
    text = " ".join(parser.format_help().split())
    for said in ("iterations (default: 7)", "0: never (default: 0)", "scale (default: the rank)", "a path"):
        assert said in text, said
    assert text.count("(default: ") == 3 and "None" not in text and "False" not in text and "[]" not in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit) as exit:
        script.parse_args(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "(default: None)" not in text and "(default: False)" not in text
    actions = [action for action in actions_of(script) if action.dest != "help"]
    assert len(actions) > 30 and all(action.help for action in actions)
    groups = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert len(groups) >= 6, groups  # flags are grouped


class Caught(Exception):
    pass


def parser_of(script):
    """A script's parser, caught when it begins to parse."""
    def catch(parser, *_):
        raise Caught(parser)

    function = getattr(script, "parse_args", None) or script.main
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(cli.Parser, "parse_known_args", catch)
        function(*[[]] * function.__code__.co_argcount)
    return caught.value.args[0]


def actions_of(script):
    """The argparse actions of a script's flags."""
    return parser_of(script)._actions


def test_flags_of_both_scripts_mean_the_same():
    """One name has one meaning: the same help and type. Only defaults differ, where training differs."""
    a, b = ({action.dest: action for action in actions_of(script)} for script in SCRIPTS)
    shared = a.keys() & b.keys() - {"help"}
    assert len(shared) > 25
    worded_for_the_stage = {"model", "output", "labels", "steps", "val"}
    differing = {name for name in shared if (a[name].help, a[name].type) != (b[name].help, b[name].type)}
    assert differing <= worded_for_the_stage
    defaults = {name for name in shared if a[name].default != b[name].default}
    assert defaults <= {"output", "labels", "steps", "accumulation", "lr", "long_caption", "drop_prompt",
                        "save_every", "val"}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--task", "--good", "--rollout_steps", "--guidance", "--checkpoint_blocks",
                                  "--sft_ratio", "--rewards_per_rollout", "--gather", "--stop_below"])
def test_flags_of_earlier_versions_are_unknown(script, flag, capsys):
    """And none of them is the beginning of one flag of today, which argparse would take it for."""
    with pytest.raises(cli.FlagError, match=f"unrecognized arguments: {flag} 1; --help shows"):
        script.parse_args([flag, "1"])


# ------------------------------------------------------------------------------ wrong flags

@pytest.mark.parametrize("path", WITH_FLAGS, ids=lambda path: path.stem)
def test_every_number_has_its_limits_where_its_flag_is(path):
    """Of every script. A new flag is found by itself, and fails if it is an int or a float without limits."""
    script = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    parser = parser_of(script)
    for action in parser._actions:
        values = action.default if isinstance(action.default, list | tuple) else [action.default]
        if not isinstance(action.type, cli.Number):
            assert action.type not in (int, float), action.option_strings
            assert not any(type(value) in (int, float) for value in values), action.option_strings
            continue
        low, high, step = action.type
        refused = ["nan", "inf", "-inf", "-1", "1e400", "9" * 5000, "many", "", "0x10", str(high + 1)]
        refused += {0: [str(low / 2)] if low else [], 1: ["1.5", str(low - 1)], 4: ["2", "80"]}[step]
        for word in refused:
            with pytest.raises(cli.FlagError) as error:
                parser.parse_args([f"{action.option_strings[0]}={word}"])
            sentence = f"{action.option_strings[0]} {word[:40]} is not possible; give "
            assert str(error.value).startswith(" ".join(sentence.split()))
        assert 0 <= low < high < math.inf
        for value in (low, high, *(value for value in values if value is not None)):
            assert action.type(str(value)) == value, action.option_strings


def test_scripts_with_flags_are_found():
    found = {path.stem for path in WITH_FLAGS}
    assert found > {"train_pavrm", "train_prfl", "sample", "score", "data", "label", "bench", "plan", "crash"}


@pytest.mark.parametrize("words, sentence", [
    ("--lr nan", "--lr nan is not possible; give a number from 0 to 10"),
    ("--steps 0", "--steps 0 is not possible; give a whole number from 1 to 1,000,000,000"),
    ("--ema 1.5", "--ema 1.5 is not possible; give a number from 0 to 1"),
    ("--lora_alpha 0", "--lora_alpha 0 is not possible; give a number from 0.001 to 1,000,000"),
    ("--lr", "--lr expected one argument; --help shows what is possible"),
    ("--judge all", "--judge cannot be 'all' (choose from 'next', 'clean'); --help shows what is possible"),
    ("--lrr 1", "unrecognized arguments: --lrr 1; --help shows what is possible"),
    ("@gone.args", "[Errno 2] No such file or directory: 'gone.args'; --help shows what is possible"),
    ("@wrong.args", "--seed -1 is not possible; give a whole number from 0 to 9,223,372,036,854,775,807"),
    ("@open.args", "a file of flags has the line '--model \"demo' (No closing quotation); check its quotes"),
    ("@circle.args", "a file of flags names itself; take that line out")])
def test_a_wrong_flag_is_one_sentence(words, sentence, tmp_path, monkeypatch):
    """In a file of flags, such as a recipe, too."""
    monkeypatch.chdir(tmp_path)
    Path("wrong.args").write_text("# a comment\n--lr 1 --seed -1\n")
    Path("open.args").write_text('--model "demo')
    Path("circle.args").write_text("@circle.args")
    with pytest.raises(cli.FlagError) as error:
        train_prfl.parse_args(words.split())
    assert str(error.value) == sentence


def test_frames_are_those_that_the_vae_takes():
    assert [cli.FRAMES(text) for text in ("1", "5", "81")] == [1, 5, 81]
    with pytest.raises(argparse.ArgumentTypeError, match="^80 is .* give 1 . 4n from 1 to 10,001$"):
        cli.FRAMES("80")


def test_sizes():
    assert cli.parse_size("832x480") == (832, 480)
    for text in ("832", "832*480", "x480", "832x480x3", "-1x2", "0x0", "8x480", "99999x480", "²x48", "xnan"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a size; write width x height"):
            cli.parse_size(text)


# ------------------------------------------------------------------------------ how a script ends

class Ended(Exception):
    pass


@pytest.fixture
def ended(monkeypatch):
    """Ends of the process raise Ended(code) instead, and nothing waits; the value is the list of pauses."""
    pauses = []

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(cli.time, "sleep", pauses.append)
    monkeypatch.delenv("RANK", raising=False)
    yield pauses
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def fails(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, message", [
    (InputError("clips is empty; add clips"), "error: clips is empty; add clips"),
    (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
    (dist.DistBackendError("NCCL timed out"), "error: another process has ended or hangs"),
    (RuntimeError("[gloo] Connection closed by peer"), "error: another process has ended or hangs")])
def test_an_error_is_one_sentence(ended, capsys, error, message):
    with pytest.raises(Ended, match="1"):
        cli.run(fails(error))
    out, err = capsys.readouterr()
    assert err.startswith(message) and err.count("\n") == 1 and out == "" and ended == []


def test_a_wrong_flag_has_the_exit_code_2(ended, capsys):
    with pytest.raises(Ended, match="2"):
        cli.run(lambda: train_prfl.main(["--lr", "nan"]))
    assert capsys.readouterr().err == "error: --lr nan is not possible; give a number from 0 to 10\n"


def test_an_error_of_the_program_keeps_its_traceback(ended):
    for error in (RuntimeError("shapes cannot be multiplied"), ValueError("no")):
        with pytest.raises(type(error)):
            cli.run(fails(error))


def test_other_ranks_let_rank_0_speak_first(ended, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(Ended, match="1"):
        cli.run(fails(InputError("no such clip")))
    assert len(ended) == 1 and capsys.readouterr().err == "error: no such clip\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # torchrun may end the wait


def test_an_interrupt_has_its_exit_code(ended):
    with pytest.raises(Ended, match="130"):
        cli.run(fails(KeyboardInterrupt()))


@pytest.mark.parametrize("code", [None, 0, 1])
def test_the_exit_code_is_that_of_main(ended, code):
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda: code)
    assert exit.value.code == code


def test_errors_are_one_sentence_and_an_exit_code(world):
    """As a user meets it."""
    command = [sys.executable, train_prfl.__file__, *flags_of(train_prfl, "run", "--reward", "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: nowhere holds no reward model")


def test_labels_and_weights():
    pavrm = SimpleNamespace(labels=["physics_quality", "text_alignment"])
    first = {"physics_quality": 1.0}
    assert cli.parse_labels(None, pavrm) == first == cli.parse_labels(["physics_quality"], pavrm)
    weights = {"text_alignment": 0.3, "physics_quality": 1.0}
    assert cli.parse_labels(["text_alignment=0.3", "physics_quality"], pavrm) == weights


@pytest.mark.parametrize("words, message", [
    (["beauty"], "--labels beauty: this reward model predicts physics_quality, text_alignment"),
    (["physics_quality", "physics_quality=2"], "--labels physics_quality=2: .* each once"),
    (["text_alignment=much"], "--labels text_alignment=much: the weight much is not possible; give"),
    (["text_alignment=-1"], "--labels text_alignment=-1: the weight -1 is not possible; give"),
    (["text_alignment=nan"], "--labels text_alignment=nan: the weight nan is not possible; give")])
def test_labels_that_cannot_be_followed(words, message):
    with pytest.raises(InputError, match=message):
        cli.parse_labels(words, SimpleNamespace(labels=["physics_quality", "text_alignment"]))
