"""The average of the trained weights: its equation, its uses, and that looking at it changes nothing."""
from pathlib import Path

import pytest
import torch

import train_pavrm
import train_prfl
from ema import EMA
from testdata.helpers import evaluations, fill_vae, numbers, run, steps, weights_of


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_the_average_by_hand(quick, monkeypatch, script):
    """average = decay * average + (1 - decay) * weights, once per step, from the weights at the start on."""
    history, update = [], EMA.update

    def spy(self):
        history.append({name: parameter.full_tensor().clone() for name, parameter in self.parameters.items()})
        return update(self)

    monkeypatch.setattr(EMA, "update", spy)
    still = ["--steps", "1", "--lr", "0"]
    run(script, "run", "--steps", "3", "--ema", "0.7")
    run(script, "start", *still, *(["--head_lr", "0"] if script is train_pavrm else []))
    saved, last = {train_pavrm: ("reward", None), train_prfl: ("model_ema", "model")}[script]
    average, start = weights_of(f"run/{saved}"), weights_of(f"start/{last or saved}")
    assert len(history) == 3
    for name, expected in start.items():
        if name in history[0]:
            for weights in history:
                expected = 0.7 * expected + 0.3 * weights[name]
        assert torch.allclose(average[name], expected, atol=1e-6), name
    if last:
        for name, tensor in weights_of(f"run/{last}").items():
            assert torch.equal(tensor, history[-1][name]) and not torch.equal(tensor, average[name]), name


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_looking_at_the_average_changes_no_training(quick, script):
    """When the average has been evaluated, all weights come back."""
    fill_vae("model")
    flags = ["--steps", "2", "--ema", "0.9", "--lr", "1e-2"]
    often = ["--eval_every", "1"]
    if script is train_prfl:
        often = ["--sample_every", "1", "--samples", "1"]
        flags += ["--solver_steps", "3", "--accumulation", "1"]
    assert numbers(steps(run(script, "a", *flags, *often))) == numbers(steps(run(script, "b", *flags)))
    for name in ("model", "model_ema") if script is train_prfl else ("reward",):
        for path in Path("a", name).iterdir():
            assert path.read_bytes() == Path("b", name, path.name).read_bytes()


def test_the_average_is_what_is_evaluated(quick):
    """With a decay of 1 it stays what it was: so do the measures, and samples, while training goes on."""
    fill_vae("model")
    flags = ["--steps", "2", "--eval_every", "1"]
    first, second = evaluations(run(train_pavrm, "run", *flags, "--ema", "1"))
    assert first == second
    first, second = evaluations(run(train_pavrm, "other", *flags))
    assert first != second
    flags = ["--steps", "1", "--accumulation", "1", "--solver_steps", "2", "--samples", "1",
             "--sample_every", "1"]
    assert evaluations(run(train_prfl, "samples", *flags, "--ema", "1"))[-1]["velocity_distance"] == 0
    assert evaluations(run(train_prfl, "moving", *flags))[-1]["velocity_distance"] > 0
