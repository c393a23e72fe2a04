"""The paper's comparison: its flags are flags of the scripts, a run that is done is kept, and its numbers are means over seeds."""
import sys

import pytest

import demo
import paper
import train_pavrm
import train_prfl
from files import InputError


def test_all_flags_are_flags_of_the_scripts():
    for labels, flags in paper.REWARD_MODELS.values():
        train_pavrm.parse_args([*demo.PAVRM_FLAGS, *flags.split()])
    for flags in [*paper.METHODS.values(), *paper.ABLATIONS.values()]:
        args = train_prfl.parse_args([*demo.PRFL_FLAGS, *flags.split()])
        train_prfl.rewardable(args.k, args.rollout_steps)
    assert set(paper.OTHER_REWARDS) < set(paper.REWARD_MODELS)


def test_done_runs_are_kept_and_failed_ones_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/sh")  # a command is then a line of shell
    results = [tmp_path / name / "model" for name in ("a", "b")]
    results[0].mkdir(parents=True)
    paper.run_all([(result, ["-c", f"echo ran; mkdir -p {result}"]) for result in results])
    assert not (tmp_path / "a.log").exists() and (tmp_path / "b.log").read_text() == "ran\n"
    with pytest.raises(InputError, match="its message is in .*c.log"):
        paper.run_all([(tmp_path / "c" / "model", ["-c", "echo wrong; exit 1"])])


def test_means_over_seeds_and_their_table():
    rows = [{"reward": 0.5, "good motion": 0.25}, {"reward": 0.7, "good motion": 0.25}]
    table = paper.lines("generator", {"PRFL": paper.spread(rows), "base": paper.spread(rows[:1])})
    assert table.splitlines() == ["| generator | reward | good motion |", "|---|---|---|",
                                  "| PRFL | 0.600 ± 0.141 | 0.250 ± 0.000 |", "| base | 0.500 | 0.250 |"]
