"""Reward FL: the chain and its gradients against reference values and by hand; rewards; processes."""
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

import files
import lora
import memory
import records
import train_reward_fl
from files import InputError
from model import WanModel
from solver import Euler
from testdata.golden import agree, draw, fill_
from testdata.helpers import (
    ROOT,
    SHAPE,
    batch,
    evaluations,
    fill_vae,
    flags_of,
    flat,
    golden,
    gradients_agree,
    gradients_of,
    long_texts,
    noises,
    numbers,
    read_log,
    run,
    spawn,
    steps,
    tiny,
    torchrun,
    watched,
    weights_of,
    write_index,
)
from train_reward_fl import rollout
from vae import VAE_FILE, WanVAE

BRIGHT = """
mean = 0.4
deviation = 0.2

def score(video, clip):
    assert video.shape == (5, 3, 32, 32) and clip["prompt"] == "b" and clip["fps"] == 16
    return (video + 1).mean() / 2
"""
RED = """
import torch

class Reward:
    def __init__(self, args, device):
        self.weight = torch.tensor([1.0, 0.0, 0.0], device=device)

    def score(self, video, clip):
        return torch.einsum("fchw,c->", video, self.weight) / video[:, 0].numel()
"""


@pytest.fixture
def saving(world):
    """The world with a VAE and the rewards bright.py and red.py."""
    fill_vae("model")
    Path("bright.py").write_text(BRIGHT)
    Path("red.py").write_text(RED)
    return world


@pytest.fixture
def pixels(saving, monkeypatch):
    """The same without checkpoints."""
    monkeypatch.setattr(records.Checkpoints, "save", lambda *_: None)
    return saving


def fill_adapters(module, seed):
    """In place of `start_lora`: adapters that change the model from the first step on."""
    for name, layer in lora.adapters(module).items():
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part).weight
            state = {f"{name}.{part}.weight": torch.empty(weight.shape)}
            fill_(state, seed)
            files.fill(weight, *state.values())


# ------------------------------------------------------------------------------ the method

@pytest.mark.parametrize("case, first", [(0, 4), (1, 6), (2, 3)])
def test_reference_values_of_the_chain(case, first):
    """Latents, score, KL and their gradients with toy experts; grad_kl passes through the reference too."""
    values, _ = golden("reward_chain")
    solver, noise = Euler(8, 5.0), draw((1, 4, 3, 4, 4), 410)
    assert agree(solver.sigmas, values["sigmas"], 1e-6)
    assert agree(solver.timesteps, values["timesteps"][:-1], 1e-6)
    theta = (0.2 * draw((4,), 411)).requires_grad_()

    def toy(adapter):
        def velocity(x, t):
            a, b = draw((4,), 412), draw((4,), 413)
            if t[0] < 900:
                a, b = draw((4,), 414) + adapter, draw((4,), 415)
            return (a.view(4, 1, 1, 1) * x).tanh() + b.view(4, 1, 1, 1) * t.view(-1, 1, 1, 1, 1) / 1000
        return velocity

    latents, kl = rollout(toy(theta), toy(0.0), noise, solver, first)
    score = (latents * draw(latents.shape, 416)).mean()
    assert agree(latents, values[f"{case}.latents"], 1e-5)
    assert agree(score.view(1), values[f"{case}.score"].view(1), 1e-5)
    assert agree(kl.view(1), values[f"{case}.kl"].view(1), 1e-5)
    (grad_score,) = torch.autograd.grad(score, theta, retain_graph=True)
    (grad_kl,) = torch.autograd.grad(kl, theta)
    assert agree(grad_score, values[f"{case}.grad_score"], 1e-4)
    assert agree(grad_kl, values[f"{case}.grad_kl"], 1e-4)
    assert not agree(grad_kl, values[f"{case}.grad_kl_upstream"], 1e-2)


def by_hand(micro_step, clips, weight, kl_weight, adapted=True):
    """(loss, kl, gradients) of a micro-step: plain loops, whole decoding, a second model as the reference."""
    policy, start, vae = tiny(), tiny(), WanVAE.from_pretrained(Path("model", VAE_FILE))
    if adapted:
        lora.add_lora(policy, 3, 3, ["q", "k", "v", "o", "ffn.0", "ffn.2"])
        fill_adapters(policy, 0)
    start.requires_grad_(False)
    solver, texts, x, kl = Euler(4, 5.0), long_texts(clips), noises(micro_step, "reward", len(clips)), 0
    for i in range(4):
        t = solver.timesteps[i].expand(len(clips))
        with torch.set_grad_enabled(i >= 2):
            v = policy(x, t, texts)
            if i >= 2:
                kl = kl + (v - start(x, t, texts)).square().mean() / (2 * solver.sigmas[i] ** 2) / 2
            x = x + (solver.sigmas[i + 1] - solver.sigmas[i]) * v
    bright = (vae.decode(x).clamp(-1, 1) + 1).mean() / 2
    loss = -weight * (bright - 0.4) / 0.2 + kl_weight * kl
    return loss.item(), kl.item(), gradients_of(policy, loss)


@pytest.mark.parametrize("flags", [
    [],
    ["--activation_checkpointing", "--offload", "inputs"],
    pytest.param(["--kl_weight", "0"], marks=pytest.mark.full),
    pytest.param(["--activation_checkpointing", "--save_attention"], marks=pytest.mark.full),
    pytest.param(["--activation_checkpointing", "--compile"], marks=pytest.mark.full)])
def test_gradients_by_hand(pixels, monkeypatch, flags):
    """Of reward and KL together, on both clips. What has a gradient is decoded again for backward."""
    recomputed, decode = [], WanVAE.decode

    def spy(vae, latents, recompute=False):
        recomputed.append(recompute)
        return decode(vae, latents, recompute)

    monkeypatch.setattr(WanVAE, "decode", spy)
    monkeypatch.setattr(train_reward_fl, "start_lora", fill_adapters)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    kl_weight = 0.0 if "--kl_weight" in flags else 0.01
    flags = ["--steps", "1", "--reward_weight", "2", "--kl_weight", "0.01", *flags]
    (line,), _, (gradients,) = watched(monkeypatch, train_reward_fl, "run", *flags)
    assert recomputed == [False, True, True]  # the real clip, and those of the batch
    loss, kl, expected = by_hand(0, batch(0), 2, kl_weight)
    assert line["loss"] == pytest.approx(loss, rel=1e-4)
    assert line["kl"] == pytest.approx(kl if kl_weight else 0, rel=1e-4)
    assert gradients_agree(gradients, expected, 1e-3) and len(expected) == 3 * 10 * 2


def test_the_reference_is_computed_again_without_adapters(monkeypatch):
    """In backward, when the adapters are on. Every kind of checkpoint gives the same gradient of KL."""
    noise, texts = draw((1, *SHAPE), 0).requires_grad_(), [draw((3, 8), 1)]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    found = {}
    cases = {"plain": [], "checkpointed": ["--activation_checkpointing"],
             "attention": ["--activation_checkpointing", "--save_attention"],
             "compiled": ["--activation_checkpointing", "--compile"]}
    for name, flags in cases.items():
        policy = tiny(num_layers=1)
        lora.add_lora(policy, 3, 3, ["q", "v", "ffn.2"])
        fill_adapters(policy, 0)
        args = train_reward_fl.parse_args(["--reward", "none", *flags])
        if name == "compiled":
            memory.compile_block(policy.blocks[0], args.save_attention)
        policy.run_block = memory.block_runner(args, torch.device("cpu"))
        given = train_reward_fl.Batch(noise, texts, {}, [])
        _, kl = rollout(given.velocity(policy), given.reference(policy), noise, Euler(3, 5.0), 0)
        found[name] = gradients_of(policy, kl)
        assert all(layer.adapter_on for layer in lora.adapters(policy).values())
    for name in cases:
        assert gradients_agree(found[name], found["plain"], 1e-4), name
    reference = given.reference(policy)  # without its gradient, as in the published code
    _, kl = rollout(given.velocity(policy), lambda x, t: reference(x, t).detach(), noise, Euler(3, 5.0), 0)
    assert not gradients_agree(gradients_of(policy, kl), found["plain"], 1e-2)


@pytest.mark.full
def test_all_weights_can_be_trained(pixels, monkeypatch):
    """--lora_rank 0: the reference is a frozen copy; kl is 0 at first. Both micro-steps count alike."""
    flags = ["--lora_rank", "0", "--steps", "2", "--accumulation", "2"]
    log, models, gradients = watched(monkeypatch, train_reward_fl, "run", *flags)
    parts = [by_hand(n, batch(n), 0.1, 1.0, adapted=False) for n in range(2)]
    assert log[0]["loss"] == pytest.approx((parts[0][0] + parts[1][0]) / 2, rel=1e-4)
    expected = {name: (parts[0][2][name] + parts[1][2][name]) / 2 for name in parts[0][2]}
    assert gradients_agree(gradients[0], expected, 1e-3)
    assert log[0]["kl"] == 0 < log[1]["kl"]
    for parameter, start in zip(models[1].parameters(), tiny().parameters(), strict=True):
        assert not parameter.requires_grad and torch.equal(files.full_tensor(parameter), start)


def test_the_score_rises(pixels):
    """That of samples with fixed noise, by the reward of docs/reward_fl.md; a second one is reported."""
    snippet, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/reward_fl.md").read_text(), re.DOTALL)
    assert snippet == (ROOT / "demo/bright.py").read_text()
    Path("bright.py").write_text(snippet)
    flags = ["--steps", "10", "--lr", "2e-2", "--kl_weight", "0.001", "--report", "red.py",
             "--samples", "2", "--sample_every", "10"]
    log = run(train_reward_fl, "run", *flags)
    before, after = evaluations(log)
    assert after["score"] > before["score"] + 0.01
    assert set(before) == {"score", "report", "motion_energy", "contrast", "saturation"}
    assert all(0 < line["score"] < 1 and -1 < line["report"] < 1 for line in steps(log))
    assert Path("run/samples/step_000010/1.mp4").is_file() and Path("run/adapter.safetensors").is_file()
    names = {name.split(".", 2)[2].rsplit(".", 2)[0] for name in weights_of("run/adapter.safetensors")}
    assert {"0.self_attn.q", "2.cross_attn.o", "1.ffn.0", "1.ffn.2"} <= names
    assert WanModel.from_pretrained("run/model").config == tiny().config


@pytest.mark.parametrize("recipe", [None, "reward_fl_i2v_A14B"])
def test_published_settings_are_the_defaults(recipe):
    args = train_reward_fl.parse_args([f"@{ROOT}/recipes/{recipe}.args"] if recipe else [])
    assert (args.solver, args.solver_steps, args.shift, args.first_step) == ("euler", 8, 5.0, 4)
    assert (args.reward_weight, args.kl_weight, args.experts) == (0.1, 1.0, "low")
    assert (args.lr, args.weight_decay, args.max_norm, args.accumulation) == (2.5e-6, 0.0, 1.0, 1)
    assert (args.lora_rank, args.lora_targets) == (32, ["q", "k", "v", "o", "ffn.0", "ffn.2"])
    assert (args.steps, args.save_every, args.batch_size) == (500, 25, 8 if recipe else None)


# ------------------------------------------------------------------------------ rewards

def test_a_clip_without_a_score(pixels, monkeypatch):
    """kl alone teaches there, and the logged score is the mean of the others."""
    monkeypatch.setattr(train_reward_fl, "start_lora", fill_adapters)
    first, _ = batch(0)
    unscored = f"    if clip['source_id'] == '{first}':\n        return None\n    return"
    Path("bright.py").write_text(BRIGHT.replace("    return", unscored))
    flags = ["--steps", "1", "--report", "bright.py"]
    (line,), _, (gradients,) = watched(monkeypatch, train_reward_fl, "run", *flags)
    assert line["report"] == pytest.approx(line["score"], rel=1e-6)
    loss = line["kl"] - 0.1 * (line["score"] - 0.4) / 0.2 / 2
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    Path("bright.py").write_text("def score(video, clip):\n    return None\n")
    (line,), _, (alone,) = watched(monkeypatch, train_reward_fl, "none", "--steps", "1")
    assert line["score"] is None and line["loss"] == pytest.approx(line["kl"], rel=1e-6)
    assert not gradients_agree(gradients, alone, 1e-3)
    flags = ["--steps", "1", "--kl_weight", "0", "--report", "red.py", "--samples", "1",
             "--sample_every", "1"]
    before, line, after = run(train_reward_fl, "nothing", *flags)
    assert line["score"] is None and line["loss"] == line["norm"] == 0
    assert before["evaluation"] == after["evaluation"]  # the same noise, and nothing was learned


@pytest.mark.parametrize("text, message", [
    ("reward = 1", "mine.py has neither a function score.video, clip. nor a class Reward"),
    ("def score(video, clip): return (video > 0).float().mean()", "the score of clip 0 has no gradient"),
    ("import torch\ndef score(video, clip): return torch.ones((), requires_grad=True)", "has no gradient"),
    ("def score(video, clip): return video.mean(0)", "is a Tensor and not a tensor of one number"),
    ("def score(video, clip): return 0.5", "score of clip 0 is a float and not a tensor of one number"),
    ("deviation = 0\ndef score(video, clip): return video.mean()", "deviation 0; give two numbers"),
])
def test_rewards_that_cannot_be_followed(pixels, text, message):
    Path("mine.py").write_text(text)
    with pytest.raises(InputError, match=message):
        run(train_reward_fl, "run", "--reward", "mine.py")
    assert not Path("run").exists()


@pytest.mark.parametrize("flags, message", [
    (["--first_step", "4"], "--first_step 4 is none of the 4 solver steps; give 0 to 3"),
    (["--reward", "nowhere.py"], "nowhere.py does not exist"),
    (["--sp", "2"], "--sp 2 does not divide the 1 processes"),
])
def test_flags_that_do_not_fit(pixels, flags, message):
    with pytest.raises(InputError, match=message):
        run(train_reward_fl, "run", *flags)
    assert not Path("run").exists()


# ------------------------------------------------------------------------------ Wan2.2 A14B

@pytest.fixture
def a14b(saving):
    """Two experts for image to video without an image tower, the clips' first frames, one reward for them."""
    for folder, seed in (("high_noise_model", 0), ("low_noise_model", 1)):
        model = tiny(seed, model_type="i2v", in_dim=36, use_clip=False)
        model.save_pretrained(f"a14b/{folder}")
    fill_vae("a14b")
    for i, line in enumerate(saving):
        tensors = weights_of(f"clips/{i}.safetensors") | {"condition": draw(SHAPE, 50 + i)}
        files.write_safetensors(f"clips/{i}.safetensors", tensors)
        line["model_type"] = "i2v"
    write_index(saving)
    return ["--model", "a14b"]


def test_one_expert_is_trained(a14b, monkeypatch):
    """The other one takes its steps and stays as it is, without adapters."""
    flags = [*a14b, "--steps", "2", "--first_step", "1", "--offload", "reward"]  # the untrained expert
    log, models, _ = watched(monkeypatch, train_reward_fl, "run", *flags)
    assert len(models) == 2 and log[0]["kl"] == 0 < log[1]["kl"]
    start = weights_of("a14b/high_noise_model")
    for name, parameter in models[0].named_parameters():
        assert not parameter.requires_grad and torch.equal(files.full_tensor(parameter), start[name])
    assert not lora.adapters(models[0]) and len(lora.adapters(models[1])) == 30
    assert sorted(path.name for path in Path("run/model").iterdir()) == ["low_noise_model"]
    assert Path("run/adapter_low_noise_model.safetensors").is_file()
    for folder in ("run/model/low_noise_model", "a14b/low_noise_model"):
        assert WanModel.from_pretrained(folder).config.in_dim == 36
    message = "no step with gradient uses high_noise_model.* up to 625, and the boundary is 900"
    with pytest.raises(InputError, match=message):
        run(train_reward_fl, "other", *a14b, "--experts", "high", "--first_step", "3")


@pytest.mark.full
def test_both_experts_are_trained_and_resumed(a14b):
    flags = [*a14b, "--experts", "both", "--first_step", "0"]
    whole = run(train_reward_fl, "whole", *flags, "--steps", "2")
    run(train_reward_fl, "parts", *flags, "--steps", "1")
    assert numbers(run(train_reward_fl, "parts", *flags, "--steps", "2", "--resume")) == numbers(whole)
    for folder in ("high_noise_model", "low_noise_model"):
        before, after = weights_of(f"a14b/{folder}"), weights_of(f"parts/model/{folder}")
        assert not torch.equal(before["blocks.0.ffn.0.weight"], after["blocks.0.ffn.0.weight"])
        adapter = weights_of(f"parts/adapter_{folder}.safetensors")
        for name, tensor in weights_of(f"whole/adapter_{folder}.safetensors").items():
            assert torch.equal(tensor, adapter[name]), name
    with pytest.raises(InputError, match="--ema averages one transformer"):
        run(train_reward_fl, "other", *flags, "--ema", "0.5")


# ------------------------------------------------------------------------------ processes and resuming

def test_one_process_or_two(pixels):
    """The same losses, scores, norms and samples; two processes have a clip each, by default."""
    flags = ["--steps", "2", "--report", "red.py", "--samples", "1", "--sample_every", "2",
             "--activation_checkpointing", "--ema", "0.5"]
    whole = flags_of(train_reward_fl, "two", *flags)
    at = whole.index("--batch_size")
    spawn(2, [(train_reward_fl, [*whole[:at], *whole[at + 2:]])])
    one, two = numbers(run(train_reward_fl, "one", *flags)), numbers(read_log("two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert flat(b) == pytest.approx(flat(a), rel=1e-4, abs=1e-6)
    assert json.loads(Path("two/run.json").read_text())["arguments"]["batch_size"] == 2


@pytest.mark.full
@pytest.mark.parametrize("flags", [["--sp", "2"], ["--offload", "inputs", "weights"], ["--lora_rank", "0"],
                                   ["--model", "a14b", "--experts", "both", "--first_step", "0"]])
def test_two_processes_in_other_ways(pixels, a14b, flags):
    alone = ["--steps", "2", "--activation_checkpointing"]
    torchrun(2, ROOT / "train_reward_fl.py", *flags_of(train_reward_fl, "two", *alone, *flags))
    one = numbers(run(train_reward_fl, "one", *alone, *([] if "--sp" in flags else flags)))
    for a, b in zip(one, numbers(read_log("two")), strict=True):
        assert flat(b) == pytest.approx(flat(a), rel=1e-4, abs=1e-6)


def test_resume_is_exact(saving):
    flags = ["--ema", "0.8", "--warmup", "3"]
    whole = run(train_reward_fl, "whole", *flags, "--steps", "2")
    run(train_reward_fl, "parts", *flags, "--steps", "1")
    parts = run(train_reward_fl, "parts", *flags, "--steps", "2", "--resume")
    assert numbers(parts) == numbers(whole) and len(whole) == 2
    results = ["model/diffusion_pytorch_model.safetensors", "adapter.safetensors", "adapter_ema.safetensors"]
    for result in results:
        assert Path("parts", result).read_bytes() == Path("whole", result).read_bytes(), result
