"""The paper's comparison: its flags are flags of the scripts, finished runs are kept, and its numbers are
means over seeds."""
import sys

import pytest

import demo
import train_pavrm
import train_prfl
from files import InputError
from testdata.helpers import ROOT
from tools import paper


def test_all_flags_are_flags_of_the_scripts(monkeypatch):
    monkeypatch.chdir(ROOT)  # the demo's flags are in recipes/
    for _, flags in paper.REWARD_MODELS.values():
        train_pavrm.parse_args([*demo.PAVRM_FLAGS, *flags.split()])
    for flags in [*paper.METHODS.values(), *paper.ABLATIONS.values()]:
        args = train_prfl.parse_args([*demo.PRFL_FLAGS, *flags.split()])
        train_prfl.rewardable(args.k, args.solver_steps)


def test_names_that_refer_to_others():
    models = set(paper.REWARD_MODELS)
    assert set(paper.OTHER_REWARDS) < models and set(paper.SHORT_REWARD_MODELS) < models
    assert set(paper.WATCHED) < set(paper.METHODS)


def test_finished_runs_are_kept_and_failed_ones_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/sh")  # a command is then a line of shell
    results = [tmp_path / name / "model" for name in ("a", "b")]
    results[0].mkdir(parents=True)
    paper.run_all([(result, ["-c", f"echo ran; mkdir -p {result}"]) for result in results])
    assert not (tmp_path / "a.log").exists() and (tmp_path / "b.log").read_text() == "ran\n"
    with pytest.raises(InputError, match="its message is in .*c.log"):
        paper.run_all([(tmp_path / "c" / "model", ["-c", "echo wrong; exit 1"])])


def test_a_run_that_was_stopped_after_its_training_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    (tmp_path / "a/checkpoints/step_000010").mkdir(parents=True)
    paper.run_all([(tmp_path / "a/model", ["-c", "echo $0"])])
    assert (tmp_path / "a.log").read_text() == "--resume\n"


def test_means_over_seeds_and_their_table():
    rows = [{"reward": 0.5, "good motion": 0.25}, {"reward": 0.7, "good motion": 0.25}]
    table = paper.markdown("generator", {"PRFL": paper.spread(rows), "base": paper.spread(rows[:1])})
    assert table.splitlines() == ["| generator | reward | good motion |",
                                  "|---|---|---|",
                                  "| PRFL | 0.600 ± 0.141 | 0.250 ± 0.000 |",
                                  "| base | 0.500 | 0.250 |"]


def test_measures_by_timestep():
    evaluations = {"a": {"201": {"auc": 0.75}, "400": {"auc": 0.5}}, "b": {"201": {"loss": 1.0}, "400": {}}}
    table = paper.by_timestep(evaluations, "auc", ["a", "b"])
    assert paper.markdown("reward model", table).splitlines() == ["| reward model | t = 201 | t = 400 |",
                                                                  "|---|---|---|",
                                                                  "| a | 0.750 | 0.500 |",
                                                                  "| b | - | - |"]
