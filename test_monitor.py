"""Samples during training: their measures, what looks like reward hacking, and that it can stop a run."""
from pathlib import Path

import pytest
import torch

import files
import monitor
import parallel
import records
import train_prfl
from files import InputError
from model import WanModel
from reward import PAVRM
from solver import TrainingSchedule, add_noise
from testdata.helpers import ROOT, SHAPE, evaluations, fill_vae, latents, long_texts, run, steps, tiny
from video import clip_statistics, read_video

SAMPLED = ["--samples", "1", "--solver_steps", "3", "--accumulation", "1", "--sample_guidance", "1"]


def test_what_samples_are_measured_by(quick):
    """Before training, as it goes on, and at its end; with nothing learnt, nothing moves away."""
    fill_vae("model")
    flags = [*SAMPLED, "--sample_every", "2", "--sample_guidance", "2"]
    log = run(train_prfl, "run", "--steps", "3", *flags)
    assert [line["step"] for line in log if "evaluation" in line] == [0, 2, 3]
    names = ["reward", "saturated", "motion_energy", "contrast", "saturation"]
    first, *later = evaluations(log)
    assert set(first) == {*names, "velocity_distance"} and first["velocity_distance"] == 0
    for step, line in zip((2, 3), later, strict=True):
        assert set(line) == {*names, "velocity_distance"}
        assert 0 < line["velocity_distance"] < 1 and 0 < line["reward"] < 1
        assert line == files.read_json(f"run/samples/step_{step:06d}/evaluation.json")
        measured = clip_statistics(read_video(f"run/samples/step_{step:06d}/0.mp4"))
        for name, value in measured.items():
            assert line[name] == pytest.approx(value, abs=0.1)  # as far as a codec keeps it
    still = evaluations(run(train_prfl, "still", "--steps", "1", "--lr", "0", *flags))
    assert still == [first, first]
    # Without the reward phase they are scored all the same, if there is a reward model.
    alone = evaluations(run(train_prfl, "alone", "--steps", "1", "--phases", "sft", *flags))
    assert alone[0] == first and alone[1]["velocity_distance"] > 0
    flags += ["--phases", "sft", "--reward", "none"]
    plain = evaluations(run(train_prfl, "plain", "--steps", "1", *flags))
    assert [set(line) for line in plain] == [{*names[2:], "velocity_distance"}] * 2


def test_the_distance_of_velocities_by_hand(quick):
    """On the held-out clips with long captions, noised to 250, 500 and 750: the mean square distance."""
    fill_vae("model")
    log = run(train_prfl, "run", "--steps", "2", *SAMPLED, "--samples", "2", "--sample_every", "2")
    start, trained, distances = tiny(), WanModel.from_pretrained("run/model"), []
    for n in range(2):
        noise = parallel.noise((1, *SHAPE), 0, n, "sample")
        for t in (250, 500, 750):
            x = add_noise(latents([n]), noise, TrainingSchedule().near(t))
            with torch.no_grad():
                a, b = (model(x, torch.tensor([float(t)]), long_texts([n])) for model in (start, trained))
            distances.append((a - b).square().mean().item())
    assert evaluations(log)[-1]["velocity_distance"] == pytest.approx(sum(distances) / 6, rel=1e-3)


def test_the_reward_of_samples_by_hand(quick, monkeypatch):
    """The finished clip is noised again to the reward's timesteps, and the rewards there are averaged."""
    fill_vae("model")
    finished, walk = [], monitor.walk
    monkeypatch.setattr(monitor, "walk", lambda *a, **b: finished.append(walk(*a, **b)) or finished[-1])
    log = run(train_prfl, "run", "--steps", "1", *SAMPLED, "--sample_every", "9")
    pavrm, rewards = PAVRM.from_pretrained("reward"), []
    for t in (201, 400, 600, 800):
        x = add_noise(finished[0], parallel.noise((1, *SHAPE), 0, 0, "score"), TrainingSchedule().near(t))
        with torch.no_grad():
            rewards.append(pavrm(x, torch.tensor([float(t)]), long_texts([0])).sigmoid().item())
    assert evaluations(log)[0]["reward"] == pytest.approx(sum(rewards) / 4, rel=1e-4)


# ------------------------------------------------------------------------------ reward hacking

RECORDED = files.read_json(ROOT / "testdata/hacking.json")


@pytest.mark.parametrize("name, stops_at", [("both phases", None), ("reward alone", 40)])
def test_a_run_that_hacks_is_told_from_one_that_does_not(name, stops_at):
    """By the measures of two real runs, which differ in the SFT phase alone."""
    start, *later = RECORDED[name]
    found = [line["step"] for line in later if monitor.hacked(line, start)]
    assert found == ([] if stops_at is None else [line["step"] for line in later if line["step"] >= stops_at])


START = {"velocity_distance": 0.0, "reward": 0.5, "saturated": 0.0, "motion_energy": 0.4, "contrast": 0.2,
         "saturation": 0.1}
MOVED = {"velocity_distance": 0.51, "reward": 0.6}
CHANGED = {"velocity_distance": 0.1, "reward": 0.99, "saturated": 1.0, "motion_energy": 0.7}


@pytest.mark.parametrize("measures, reason", [
    ({}, None),                                                     # nothing has happened
    (MOVED, "the velocity moved by 0.51"),
    (MOVED | {"velocity_distance": 0.49}, None),
    (MOVED | {"reward": 0.5}, None),                                # the reward has not risen
    (CHANGED, "motion_energy is 1.75 times that of the start"),
    (CHANGED | {"reward": 0.4}, None),
    (CHANGED | {"saturated": 0.75}, None),                          # not all rewards are saturated
    (CHANGED | {"motion_energy": 0.5}, None),
    (CHANGED | {"motion_energy": 0.4, "contrast": 0.1}, "contrast is 0.50 times"),
    (CHANGED | {"motion_energy": 0.4, "saturation": 0.16}, "saturation is 1.60 times")])
def test_what_looks_like_hacking(measures, reason):
    found = monitor.hacked(START | measures, START)
    assert found is None if reason is None else reason in found and "the reward rose from 0.500 to" in found


def test_without_a_reward_nothing_looks_like_hacking():
    plain = {name: value for name, value in START.items() if name not in ("reward", "saturated")}
    assert monitor.hacked(plain | {"velocity_distance": 9.0, "contrast": 9.0}, plain) is None


@pytest.mark.parametrize("energies, flags, last, told", [
    ([0.4, 0.4, 0.1, 0.1], ["--stop_if_hacked"], 2, True),
    ([0.4, 0.4, 0.1, 0.1], [], 3, True),                            # told, but not asked to stop
    ([0.4, 0.4, 0.4, 0.4], ["--stop_if_hacked"], 3, False)])
def test_a_hacked_reward_stops_the_run(world, monkeypatch, capsys, energies, flags, last, told):
    """As soon as it is seen; the checkpoint and the model are written."""
    fill_vae("model")
    rewards, energies = iter([0.5, 0.6, 0.96, 0.97]), iter(energies)

    def measured(video):
        return {"motion_energy": next(energies), "contrast": 0.2, "saturation": 0.1}

    judged = []

    def value(self, scores):  # four times per sample, once for each timestep
        judged.append(next(rewards) if len(judged) % 4 == 0 else judged[-1])
        return torch.full((len(scores),), judged[-1])

    monkeypatch.setattr(train_prfl.ProcessReward, "value", value)
    monkeypatch.setattr(monitor, "clip_statistics", measured)
    log = run(train_prfl, "run", "--steps", "3", "--phases", "sft", *SAMPLED, "--sample_every", "1",
              "--save_every", "99", *flags)
    assert [line["step"] for line in steps(log)] == list(range(1, last + 1))
    assert list(records.checkpoints("run")) == [last] and WanModel.from_pretrained("run/model")
    assert ("the samples look hacked: the reward rose from 0.500 to 0.960" in capsys.readouterr().out) == told
    assert [line["saturated"] for line in evaluations(log)] == [0, 0, 1, 1][:last + 1]


@pytest.mark.parametrize("flags", [["--sample_every", "0"], ["--samples", "0"],
                                   ["--phases", "sft", "--reward", "none"]])
def test_what_a_run_cannot_be_stopped_by(world, flags):
    """Without samples, or without a reward, nothing shows hacking."""
    fill_vae("model")
    with pytest.raises(InputError, match="--stop_if_hacked"):
        run(train_prfl, "run", "--steps", "1", "--sample_every", "1", *flags, "--stop_if_hacked")
    assert not Path("run").exists()
