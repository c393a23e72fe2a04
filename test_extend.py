"""The snippets of docs/extend.md run, and do what the page says."""
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import solver
import train_prfl
from model import WanModel
from testdata.helpers import ROOT, evaluations, fill_vae, run, steps

PAGE = (ROOT / "docs/extend.md").read_text()
SNIPPETS = dict(re.findall(r"<!-- (\w+\.py) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
FLAGS = ["--phases", "reward", "--steps", "2", "--solver_steps", "4", "--samples", "1", "--sample_every", "2",
         "--sample_guidance", "1", "--accumulation", "1"]


def snippet(name):
    """Write a snippet of the page to the current directory; returns its global names."""
    Path(name).write_text(SNIPPETS[name])
    return runpy.run_path(name)


def test_every_snippet_is_run_here():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert set(SNIPPETS) == {"heun.py", "calm.py", "brightness.py", "small.py"}
    rest = [block for block in blocks if block not in SNIPPETS.values()]
    assert rest == ['SOLVERS = {"unipc": UniPC, "dpm++": DPMSolverPP, "euler": Euler, "heun": Heun}\n']
    for name in ("unipc", "dpm++", "euler"):
        assert f'"{name}": {solver.SOLVERS[name].__name__}' in rest[0]


def test_heun_is_of_second_order(tmp_path, monkeypatch):
    """dx/ds = a x has the solution x(0) = x(1) exp(-a): twice the steps, a quarter of the error."""
    monkeypatch.chdir(tmp_path)
    Heun = snippet("heun.py")["Heun"]
    errors = []
    for count in (21, 41):
        walked = solver.walk(lambda x, t: 2 * x, torch.ones(1, 1, dtype=torch.float64), Heun(count, 1.0))
        errors.append(abs(walked.item() - np.exp(-2)))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


def test_heun_in_training(world, monkeypatch):
    """Rollouts, samples and the rewarded step; all steps but the last may be rewarded."""
    fill_vae("model")
    monkeypatch.setitem(solver.SOLVERS, "heun", snippet("heun.py")["Heun"])
    log = run(train_prfl, "run", *FLAGS, "--solver", "heun", "--solver_steps", "5", "--k", "3")
    assert [line["k"] for line in steps(log)] == [[3], [3]]
    assert all(line["reward_norm"] > 0 for line in steps(log))
    assert len(evaluations(log)) == 2


@pytest.mark.parametrize("name, flags", [("calm.py", []),
                                         ("brightness.py", ["--judge", "clean", "--k", "late"])])
def test_a_reward_of_ones_own(world, name, flags):
    """It trains, it is logged with its own squashing, and the samples report it."""
    fill_vae("model")
    snippet(name)
    log = run(train_prfl, "run", *FLAGS, "--reward", name, "--reward_weight", "2", *flags)
    for line in steps(log):
        assert line["reward_norm"] > 0 and 0 < line["reward"] < 1
        if name == "brightness.py":
            assert line["reward"] == pytest.approx(-line["reward_loss"] / 2, rel=1e-5)
        else:
            assert line["reward"] != pytest.approx(-line["reward_loss"] / 2)
    first, last = evaluations(log)
    assert {"reward", "saturated", "velocity_distance"} <= set(last) and last["reward"] != first["reward"]


def test_brightness_is_that_of_the_frames(world):
    """The reward of a finished clip is the mean brightness of its video."""
    fill_vae("model")
    args = train_prfl.parse_args(["--model", "model"])
    reward = snippet("brightness.py")["Reward"](args, torch.device("cpu"))
    latents = torch.randn(2, 16, 2, 4, 4)
    scores = reward.scores(latents, torch.zeros(2), None)
    video = reward.vae.decode(latents)
    assert torch.allclose(reward.value(scores), (video + 1).mean((1, 2, 3, 4)) / 2, atol=1e-6)


def test_a_model_size(world):
    """The smaller model is saved in the official layout and trains; its text states are as wide as the tiny
    world's."""
    snippet("small.py")
    model = WanModel.from_pretrained("outputs/small")
    assert model.config.dim == 64 and len(model.blocks) == 4
    flags = ["--model", str(ROOT / "demo/model"), "--data", str(ROOT / "demo/train/index.jsonl")]
    run(train_prfl, "run", *flags, "--model", "outputs/small", "--phases", "sft", "--skip_poor", "none",
        "--sample_every", "0", "--lr", "1e-3", "--batch_size", "2", "--steps", "1", "--accumulation", "1")
    assert WanModel.from_pretrained("run/model").config.dim == 64
