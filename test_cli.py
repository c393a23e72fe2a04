"""Command lines: files of flags, defaults in --help, flags that scripts share, how an error ends a script."""
import argparse
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import cli
import train_pavrm
import train_prfl
from files import InputError
from testdata.helpers import flags_of

SCRIPTS = [train_pavrm, train_prfl]


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


def actions_of(script):
    """The argparse actions of a script's flags."""
    with pytest.MonkeyPatch.context() as patch:
        found = []
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *_: found.append(self))
        script.parse_args([])
    return found[0]._actions


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
    with pytest.raises(SystemExit):
        script.parse_args([flag, "1"])
    assert flag in capsys.readouterr().err


def test_sizes():
    assert cli.parse_size("832x480") == (832, 480)
    for text in ("832", "832*480", "x480", "832x480x3", "-1x2"):
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
    (["text_alignment=much"], "--labels text_alignment=much needs a positive number"),
    (["text_alignment=-1"], "--labels text_alignment=-1 needs a positive number"),
    (["text_alignment=nan"], "--labels text_alignment=nan needs a positive number")])
def test_labels_that_cannot_be_followed(words, message):
    with pytest.raises(InputError, match=message):
        cli.parse_labels(words, SimpleNamespace(labels=["physics_quality", "text_alignment"]))
