"""Every option of the two training stages does what it says: against computations by hand, at tiny size.

Faults of the published code (numbered as in the project's list of them), and what would notice them here:

    1  heads start or train apart             test_one_process_or_two (here and in test_train.py)
    2  blocks' gradients smaller than heads'  the same two: the norm is of both; test_pavrm_gradients_by_hand
    3  no batch above 1, no single process    test_pavrm_gradients_by_hand: four clips, one process
    4  sigmoid in bf16 before the BCE         test_reward.py: test_the_gradient_lives_at_a_large_logit
    5  the heads' gradients never clipped     test_blocks_and_heads_are_clipped_together
    6  a missing label counts as 0            test_pavrm_gradients_by_hand; test_train.py: test_a_missing_label_is_not_zero
    7  BT's loser random, evaluated as BCE    test_bradley_terry_*
    8  an unreadable clip is replaced         test_a_clip_that_breaks_during_training_ends_it; test_train.py: test_missing_latents_*
    9  one order for all epochs               test_every_epoch_has_another_order; test_data.py: test_each_epoch_draws_*
    10 the reward model collects gradients    test_train.py: test_the_reward_model_is_frozen
    11 training against a random head         test_a_reward_model_without_its_head_is_refused; test_train.py: test_prfl_needs_*
    12 phases share one accumulation          test_train.py: test_each_phase_has_its_own_update; here test_the_learning_rate_in_the_log
    13 rollout latents in bf16                test_the_rollout_stays_float32
    14 no resume                              test_resume_is_exact_with_adapters_and_average; test_train.py: test_resume_is_exact
    16 text to video needs CLIP               test_text_to_video_needs_no_clip
    17 synchronised at every rollout step     test_a_rollout_step_waits_for_nothing
"""
import gc
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

import files
import parallel
import records
import train_pavrm
import train_prfl
from data import Clips, Order, choose_caption, clip_statistics, read_video
from files import InputError
from model import WanModel
from reward import PAVRM
from solver import SOLVERS, DPMSolverPP, Euler, TrainingSchedule, UniPC, add_noise
from test_model import tiny
from test_reward import fill_pavrm
from test_train import fill_vae, flat, numbers, read_log, run, flags_of, steps, world, write_index  # noqa: F401 (world is a fixture)
from testdata.golden import draw

SHAPE = (16, 2, 4, 4)
STILL = ["--lr", "0", "--long_caption", "1", "--drop_prompt", "0"]  # nothing changes: what is saved is what was computed with


# ---------------------------------------------------------------------------------------------- what the tests share

def watched(monkeypatch, script, output, *flags):
    """Run a stage; returns its log lines of steps, its models as they were sharded, and before each clipping the whole
    gradients {name: tensor} of the first model, the trained one."""
    models, gradients, shard, clip = [], [], parallel.shard, parallel.clip_gradients

    def clip_gradients(parameters, max_norm):
        gradients.append({name: parameter.grad.full_tensor().clone() for name, parameter in models[0].named_parameters()
                          if parameter.grad is not None})
        return clip(parameters, max_norm)

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "shard", lambda model, *rest: models.append(model) or shard(model, *rest))
        patch.setattr(parallel, "clip_gradients", clip_gradients)
        return steps(run(script, output, *flags)), models, gradients


def gradients_of(model, loss):
    """The same by hand."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def agree(a, b, tolerance=1e-4):
    """Whether two dicts of gradients are equal to a share of the largest value of each tensor (or of all, where it is tiny)."""
    largest = max(tensor.abs().max().item() for tensor in b.values())
    scale = {name: max(tensor.abs().max().item(), 1e-3 * largest) for name, tensor in b.items()}
    return set(a) == set(b) and all((a[name] - b[name]).abs().max() <= tolerance * scale[name] for name in b)


def latents(clips):
    return torch.stack([draw(SHAPE, 10 + i) for i in clips])


def short_texts(clips):
    return [draw((2, 8), 20 + i).bfloat16() for i in clips]


def long_texts(clips):
    return [draw((5, 8), 30 + i).bfloat16() for i in clips]


def noises(micro_step, purpose, places=2):
    return torch.stack([parallel.noise(SHAPE, 0, micro_step, place, purpose) for place in range(places)])


def batch(micro_step, size=2):
    return Order([SHAPE] * 8, size, 0)[micro_step]


def weights_of(path):
    return load_file(next(Path(path).glob("*.safetensors")) if Path(path).is_dir() else path)


@pytest.fixture
def quick(world, monkeypatch):
    """The world without what costs time and has no part in most tests: checkpoints, and most timesteps of evaluation."""
    monkeypatch.setattr(records.Checkpoints, "save", lambda *_: None)
    monkeypatch.setattr(train_pavrm, "EVALUATION_TIMESTEPS", [600])
    return world


@pytest.fixture
def pairs(quick):
    """Four pairs: 1 better than 0, 3 better than 2, ..."""
    for i, line in enumerate(quick):
        line["pair_id"] = f"pair {i // 2}"
    write_index(quick)
    return quick


@pytest.fixture
def several_labels(quick):
    """Three labels, of which the second and third are missing on some clips."""
    for i, line in enumerate(quick):
        line["labels"] |= {"text_alignment": [1, None, 0][i % 3], "blur_quality": [None, None, 0, 1][i % 4]}
    write_index(quick)
    return quick


SEVERAL = ["--task", "physics_quality", "text_alignment", "blur_quality"]


def truth(lines, clips):
    """Labels (B, 3) of `several_labels`, NaN where there is none."""
    labels = [[lines[i]["labels"][name] for name in SEVERAL[1:]] for i in clips]
    return torch.tensor([[math.nan if value is None else float(value) for value in row] for row in labels])


# ---------------------------------------------------------------------------------------------- PAVRM: the losses

@pytest.mark.parametrize("flags", [[], ["--pool", "mean"], ["--pool", "max"], ["--num_queries", "3"]])
def test_pavrm_gradients_by_hand(several_labels, monkeypatch, flags):
    """One process, four clips, three labels, some missing: loss and gradients are the mean over all labels that are there."""
    (line,), _, (gradients,) = watched(monkeypatch, train_pavrm, "run", *SEVERAL, "--steps", "1", "--lr", "0", "--head_lr", "0",
                                       "--num_blocks", "2", "--timesteps", "400", *flags)
    pavrm = PAVRM.from_pretrained("run/reward")
    clips, sigma = batch(0, 4), TrainingSchedule().near(400)
    x = add_noise(latents(clips), noises(0, "noise", 4), sigma)
    logits = pavrm(x, torch.full((4,), 400.0), short_texts(clips), tasks=SEVERAL[1:])
    there = [(logit, label) for logit, label in zip(logits.flatten(), truth(several_labels, clips).flatten()) if not label.isnan()]
    terms = [F.softplus(-logit if label == 1 else logit) for logit, label in there]
    assert 4 < len(terms) < 12
    loss = sum(terms) / len(terms)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    right = [bool(logit > 0) == (label == 1).item() for logit, label in there]
    assert line["accuracy"] == pytest.approx(sum(right) / len(right))
    pavrm.dit.requires_grad_(False)
    pavrm.dit.blocks.requires_grad_(True)
    assert agree(gradients, gradients_of(pavrm, loss))


def test_a_missing_label_gives_its_head_no_gradient(several_labels, monkeypatch):
    monkeypatch.setattr(train_pavrm, "Order", lambda *_: [[0, 1, 4, 5]])  # none of these four has blur_quality
    _, _, (gradients,) = watched(monkeypatch, train_pavrm, "run", *SEVERAL, "--steps", "1", "--lr", "0")
    for name, gradient in gradients.items():
        assert gradient.any() != ("blur_quality" in name) or "in_proj_bias" in name, name  # keys' biases have no effect, nor gradient


def test_accumulation_changes_no_gradient(several_labels, monkeypatch):
    """One micro-batch of four or two of two: every label that is there counts alike, although the second has more of them."""
    monkeypatch.setattr(parallel, "noise", lambda shape, *key: draw(shape, 7))
    results = []
    for output, batches, flags in [("a", [[0, 1, 2, 3]], ["--batch_size", "4"]),
                                   ("b", [[0, 1], [2, 3]], ["--batch_size", "2", "--accumulation", "2"])]:
        monkeypatch.setattr(train_pavrm, "Order", lambda *_, batches=batches: batches)
        results.append(watched(monkeypatch, train_pavrm, output, *SEVERAL, "--steps", "1", "--lr", "0", "--timesteps", "300", *flags))
    (a, _, (a_gradients,)), (b, _, (b_gradients,)) = results
    assert agree(a_gradients, b_gradients)
    for name in ("loss", "accuracy", "norm"):
        assert a[0][name] == pytest.approx(b[0][name], rel=1e-5)


def test_a_clip_with_none_of_the_labels_is_left_out(several_labels):
    clips, items = train_pavrm.load_items(["clips/index.jsonl"], train_pavrm.parse_args(["--task", "text_alignment", "blur_quality"]))
    assert [i for i, in items] == [i for i in range(8) if not truth(several_labels, [i])[0, 1:].isnan().all()] != list(range(8))


def test_the_loss_by_timestep_in_the_log(quick, monkeypatch):
    """Each fifth has the mean loss of its own clips; together they make the loss."""
    seen, bce_loss = [], train_pavrm.bce_loss
    drawn, draw_level = [], TrainingSchedule.draw
    monkeypatch.setattr(train_pavrm, "bce_loss", lambda *a, **b: seen.append(bce_loss(*a, **b)) or seen[-1])
    monkeypatch.setattr(TrainingSchedule, "draw", lambda self, u: drawn.append(draw_level(self, u)) or drawn[-1])
    line, = steps(run(train_pavrm, "run", "--steps", "1", "--accumulation", "4", "--timesteps", "100", "500", "700", "999"))
    losses, fifths = torch.cat(seen).flatten(), [int(t // 200) for _, t in drawn]
    assert len(losses) == len(fifths) == 16 and set(fifths) == {0, 2, 3, 4}
    expected = {f"{200 * b}-{200 * b + 200}": losses[[f == b for f in fifths]].mean().item() for b in sorted(set(fifths))}
    assert line["loss_by_timestep"] == pytest.approx(expected, rel=1e-5)
    assert line["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_blocks_and_heads_are_clipped_together(quick, monkeypatch):
    """After backward, over all that is trained: the norm in the log, and gradients that have --max_norm in the end."""
    after, step = [], torch.optim.AdamW.step

    def spy(self, *rest):
        after.append(sum(p.grad.full_tensor().square().sum() for group in self.param_groups for p in group["params"]).sqrt().item())
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    log, _, gradients = watched(monkeypatch, train_pavrm, "run", "--steps", "2", "--max_norm", "0.01")
    for line, found in zip(log, gradients, strict=True):
        assert {name.split(".")[0] for name in found} == {"dit", "query_attention", "mlp"}
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in found.values()))
        assert line["norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.02
    assert after[-2:] == pytest.approx([0.01, 0.01], rel=1e-3)


# ---------------------------------------------------------------------------------------------- PAVRM: Bradley-Terry

def test_bradley_terry_pairs_share_noise_and_timestep(pairs, monkeypatch):
    """First the better clips, then the worse ones, each with its own caption; the loss is that of their logits."""
    seen, forward = [], PAVRM.forward

    def spy(self, x, t, context, **rest):
        seen.append((x, t, context, forward(self, x, t, context, **rest)))
        return seen[-1][-1]

    monkeypatch.setattr(PAVRM, "forward", spy)
    log = steps(run(train_pavrm, "run", "--loss", "bt", "--steps", "4", "--batch_size", "2", "--timesteps", "300", "600"))
    found, sigmas = set(), {t: TrainingSchedule().near(t) for t in (300.0, 600.0)}
    for line, (x, t, context, logit) in zip(log, seen):
        assert len(x) == 4 and torch.equal(t[:2], t[2:])
        for place in range(2):
            sigma = sigmas[t[place].item()]
            told = [[torch.equal(text, context[row]) for text in short_texts(range(8))].index(True) for row in (place, place + 2)]
            noise_a, noise_b = ((x[row] - (1 - sigma) * latents([i])[0]) / sigma for row, i in zip((place, place + 2), told))
            assert torch.allclose(noise_a, noise_b, atol=1e-5) and abs(noise_a.std() - 1) < 0.15
            found.add(tuple(told))
        margin = (logit[:2] - logit[2:]).flatten()
        assert line["loss"] == pytest.approx(-F.logsigmoid(margin).mean().item(), rel=1e-5)
        assert line["accuracy"] == (margin > 0).float().mean().item()
    assert found == {(1, 0), (3, 2), (5, 4), (7, 6)}


def test_bradley_terry_learns_and_is_evaluated_by_pairs(pairs):
    log = run(train_pavrm, "run", "--loss", "bt", "--steps", "25", "--timesteps", "100", "500", "--eval_timesteps", "201", "600")
    assert sum(line["accuracy"] for line in steps(log)[-5:]) / 5 > 0.9 and steps(log)[-1]["loss"] < 0.5 * log[0]["loss"]
    measures = log[-1]["evaluation"]["motion_quality"]["201"]
    assert set(measures) == {"pair_accuracy", "auc", "loss"} and measures["pair_accuracy"] == 1 and measures["loss"] < 0.5


def test_two_lists_are_matched_by_prompt(quick):
    """The published form: the better clips in one list, the worse ones in another, in any order."""
    prompts = {"better": "abca", "worse": "cbxa"}
    for n, (name, letters) in enumerate(prompts.items()):
        lines = [{**quick[4 * n + i], "short_caption": letter, "labels": {}} for i, letter in enumerate(letters)]
        Path(f"clips/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lists = ["clips/better.jsonl", "clips/worse.jsonl"]
    _, items = train_pavrm.load_items(lists, train_pavrm.parse_args(["--loss", "bt"]))
    assert sorted(items) == [(0, 7), (1, 5), (2, 4), (3, 7)]  # x has no partner, a has two
    log = run(train_pavrm, "run", "--train", *lists, "--val", *lists, "--loss", "bt", "--steps", "1", "--eval_timesteps", "201")
    assert 0 <= log[-1]["evaluation"]["motion_quality"]["201"]["pair_accuracy"] <= 1
    with pytest.raises(InputError, match="2 indices are given; give one, or two with --loss bt"):
        run(train_pavrm, "other", "--train", *lists)


def test_pairs_differ_in_the_label(pairs):
    pairs[0]["labels"]["physics_quality"] = 1       # as good as its partner
    pairs[2]["labels"]["physics_quality"] = None    # not annotated
    pairs[5]["pair_id"] = None
    pairs[4]["pair_id"] = "pair 3"                  # a second one that is worse than 7
    write_index(pairs)
    assert sorted(Clips("clips/index.jsonl").pairs("motion_quality")) == [(7, 4), (7, 6)]
    pairs[4]["shape"] = [16, 2, 4, 8]
    write_index(pairs)
    with pytest.raises(InputError, match="clips 7 and 4 are a pair and have different shapes"):
        Clips("clips/index.jsonl").pairs("motion_quality")


def test_bradley_terry_needs_pairs(quick):
    with pytest.raises(InputError, match="no two clips share a pair_id and differ in motion_quality; annotate pairs"):
        run(train_pavrm, "run", "--loss", "bt")
    with pytest.raises(InputError, match="give one --task"):
        run(train_pavrm, "run", "--loss", "bt", *SEVERAL)
    assert not Path("run").exists()


# ---------------------------------------------------------------------------------------------- PAVRM: what is trained

@pytest.mark.parametrize("blocks", [["1"], []])
def test_only_these_blocks_are_trained(quick, blocks):
    run(train_pavrm, "run", "--steps", "2", "--num_blocks", "3", "--train_blocks", *blocks)
    run(train_pavrm, "start", "--steps", "1", "--num_blocks", "3", "--lr", "0", "--head_lr", "0")
    start = weights_of("start/reward")
    for name, tensor in weights_of("run/reward").items():
        trained = not name.startswith("dit.") or any(name.startswith(f"dit.blocks.{block}.") for block in blocks)
        assert torch.equal(tensor, start[name]) != trained, name


def test_adapters_of_pavrm(quick, monkeypatch):
    """They start without effect, learn beside frozen blocks, and are merged when it is saved."""
    flags, lora = ["--steps", "3", "--num_blocks", "2"], ["--lora_rank", "3", "--lora_alpha", "6", "--lora_targets", "q", "ffn.2"]
    whole = watched(monkeypatch, train_pavrm, "whole", *flags, "--lr", "0", "--head_lr", "0")[0]
    log, (pavrm,), gradients = watched(monkeypatch, train_pavrm, "run", *flags, *lora)
    assert log[0]["loss"] == whole[0]["loss"]
    state, start, saved = pavrm.state_dict(), weights_of("whole/reward"), weights_of("run/reward")
    adapted = {f"dit.blocks.{i}.{name}" for i in range(2) for name in ("self_attn.q", "cross_attn.q", "ffn.2")}
    assert {name.rsplit(".lora_", 1)[0] for name in gradients[2] if ".lora_" in name} == adapted
    assert all(gradient.any() for name, gradient in gradients[2].items() if ".lora_" in name)
    assert not any(name.startswith("dit.") and ".lora_" not in name for name in gradients[2])
    for name, tensor in saved.items():
        layer = name.removesuffix(".weight")
        if layer in adapted:
            a, b = (state[f"{layer}.{part}.weight"].full_tensor() for part in ("lora_A", "lora_B"))
            assert torch.allclose(tensor, start[name] + 6 / 3 * b @ a, atol=1e-6) and not torch.equal(tensor, start[name])
        else:
            assert torch.equal(tensor, start[name]) == name.startswith("dit."), name
    with pytest.raises(InputError, match="no linear layer of a block is called qkv"):
        run(train_pavrm, "other", "--lora_rank", "3", "--lora_targets", "qkv")
    with pytest.raises(InputError, match="--train_blocks and --lora_rank exclude each other"):
        run(train_pavrm, "other", "--lora_rank", "3", "--train_blocks", "1")


# ---------------------------------------------------------------------------------------------- averages and learning rates

@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_the_average_by_hand(quick, monkeypatch, script):
    """average = decay * average + (1 - decay) * weights, once a step, from the weights that training began with."""
    history, update = [], parallel.EMA.update

    def spy(self):
        history.append({name: parameter.full_tensor().clone() for name, parameter in self.parameters.items()})
        return update(self)

    monkeypatch.setattr(parallel.EMA, "update", spy)
    run(script, "run", "--steps", "3", "--ema", "0.7")
    run(script, "start", "--steps", "1", "--lr", "0", *(["--head_lr", "0"] if script is train_pavrm else []))
    saved, last = {train_pavrm: ("reward", None), train_prfl: ("model_ema", "model")}[script]
    average, start = weights_of(f"run/{saved}"), weights_of(f"start/{last or saved}")
    assert len(history) == 3
    for name, expected in start.items():
        for weights in history if name in history[0] else ():
            expected = 0.7 * expected + 0.3 * weights[name]
        assert torch.allclose(average[name], expected, atol=1e-6), name
    if last:
        assert all(torch.equal(tensor, history[-1][name]) for name, tensor in weights_of(f"run/{last}").items())
        assert not any(torch.equal(tensor, average[name]) for name, tensor in weights_of(f"run/{last}").items())


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_looking_at_the_average_changes_no_training(quick, script):
    """The weights come back when the average has been evaluated, all of them."""
    fill_vae("model")
    often = ["--sample_every", "1", "--samples", "1"] if script is train_prfl else ["--eval_every", "1"]
    flags = ["--steps", "2", "--ema", "0.9", "--lr", "1e-2"]
    assert numbers(steps(run(script, "a", *flags, *often))) == numbers(steps(run(script, "b", *flags)))
    for name in ("model", "model_ema") if script is train_prfl else ("reward",):
        for path in Path("a", name).iterdir():
            assert path.read_bytes() == Path("b", name, path.name).read_bytes()


def test_the_average_is_what_is_evaluated(quick):
    """With a decay of 1 it stays what it was: so do the measures, and samples, while training goes on."""
    fill_vae("model")
    log = run(train_pavrm, "run", "--steps", "2", "--ema", "1", "--eval_every", "1")
    first, second = (line["evaluation"] for line in log if "evaluation" in line)
    assert first == second
    log = run(train_pavrm, "other", "--steps", "2", "--eval_every", "1")
    first, second = (line["evaluation"] for line in log if "evaluation" in line)
    assert first != second
    flags = ["--steps", "1", "--accumulation", "1", "--rollout_steps", "2", "--samples", "1", "--sample_every", "1"]
    assert run(train_prfl, "samples", "--ema", "1", *flags)[-1]["evaluation"]["velocity_distance"] == 0


def test_learning_rates_by_hand():
    def factors(schedule, warmup):
        args = SimpleNamespace(lr_schedule=schedule, warmup=warmup, steps=6)
        return [parallel.learning_rate_factor(step, args) for step in range(6)]

    assert factors("constant", 0) == [1] * 6
    assert factors("constant", 4) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert factors("linear", 2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert factors("cosine", 0) == pytest.approx([(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)])
    assert factors("cosine", 3) == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.75, 0.25])
    assert factors("linear", 8) == pytest.approx([(i + 1) / 8 for i in range(6)])  # a warm-up that never ends


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_the_learning_rate_in_the_log(world, monkeypatch, script):
    """It is the optimizer's, and advances once a step, however many updates that has; heads keep their ratio to blocks."""
    seen, step = [], torch.optim.AdamW.step

    def spy(self, *rest):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    flags = ["--steps", "4", "--lr", "1e-3", "--warmup", "2", "--lr_schedule", "linear"]
    flags += ["--head_lr", "3e-3"] if script is train_pavrm else ["--rollout_steps", "2", "--accumulation", "1"]
    log = steps(run(script, "run", *flags))
    expected = [0.5e-3, 1e-3, 1e-3, 0.5e-3]
    assert [line["lr"] for line in log] == pytest.approx(expected)
    if script is train_pavrm:
        assert seen[-4:] == [pytest.approx([lr, 3 * lr]) for lr in expected]
    else:
        assert seen[-8:] == [[pytest.approx(lr)] for lr in expected for _ in ("sft", "reward")]
    with pytest.raises(InputError, match="--resume with another --steps"):  # a schedule that falls to 0 has its end
        run(script, "run", *flags, "--steps", "8", "--resume")


# ---------------------------------------------------------------------------------------------- captions, timesteps, order

def test_captions_are_chosen_and_dropped_as_often_as_asked():
    sample, empty = {"text_short": torch.ones(1), "text_long": torch.full((1,), 2.0)}, torch.zeros(1)
    drawn = torch.stack([choose_caption(sample, empty, 0.7, 0.1, 0, n // 4, n % 4) for n in range(4000)])
    for value, share in [(0, 0.1), (1, 0.27), (2, 0.63)]:
        assert (drawn == value).float().mean().item() == pytest.approx(share, abs=0.03)
    assert {choose_caption(sample, empty, 0, 0, n).item() for n in range(50)} == {1.0}
    assert {choose_caption(sample, empty, 1, 0, n).item() for n in range(50)} == {2.0}
    assert {choose_caption(sample, empty, 1, 1, n).item() for n in range(50)} == {0.0}


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_the_chosen_caption_is_what_the_model_is_told(quick, monkeypatch, script):
    """Short and long ones, where both are asked for; the tests of gradients have one kind only."""
    lengths, seen, run_ = {2: short_texts, 5: long_texts}, [], WanModel._run
    monkeypatch.setattr(WanModel, "_run", lambda self, x, t, context, *rest: seen.append(context) or run_(self, x, t, context, *rest))
    monkeypatch.setattr(train_pavrm, "evaluate", lambda *_: None)
    run(script, "run", "--steps", "2", "--long_caption", "0.5", "--drop_prompt", "0")
    texts = [text for context in seen for text in context]
    assert {len(text) for text in texts} == set(lengths)
    assert all(any(torch.equal(text, clip) for clip in lengths[len(text)](range(8))) for text in texts)


def test_a_dropped_prompt_is_the_empty_one(quick, monkeypatch):
    seen, run_ = [], WanModel._run
    monkeypatch.setattr(WanModel, "_run", lambda self, x, t, context, *rest: seen.append(context) or run_(self, x, t, context, *rest))
    run(train_prfl, "run", "--steps", "1", "--drop_prompt", "1")
    assert all(torch.equal(text, draw((2, 8), 0).bfloat16()) for context in seen for text in context)


@pytest.mark.parametrize("script, phase", [(train_pavrm, []), (train_prfl, ["--phases", "sft"])])
def test_timesteps_reach_the_model(quick, monkeypatch, script, phase):
    seen, run_ = [], WanModel._run
    monkeypatch.setattr(WanModel, "_run", lambda self, x, t, *rest: seen.extend(t.tolist()) or run_(self, x, t, *rest))
    monkeypatch.setattr(train_pavrm, "evaluate", lambda *_: None)
    run(script, "run", "--steps", "3", "--timesteps", "250", "750", *phase)
    assert set(seen) == {250.0, 750.0}
    with pytest.raises(InputError, match="timesteps are drawn sometimes; give uniform, logit_normal, or timesteps"):
        run(script, "other", "--timesteps", "sometimes", *phase)


def test_every_epoch_has_another_order(quick, monkeypatch):
    """Eight clips in batches of four: two batches an epoch, each clip once, in another order than the epoch before."""
    seen, load = [], Clips.load
    monkeypatch.setattr(Clips, "load", lambda self, i: seen.append(i) or load(self, i))
    monkeypatch.setattr(train_pavrm, "evaluate", lambda *_: None)
    run(train_pavrm, "run", "--steps", "6")
    epochs = [seen[-24:][8 * n:8 * n + 8] for n in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_a_clip_that_breaks_during_training_ends_it(world, monkeypatch, script):
    """By its name: no other clip takes its place, and nothing is saved."""
    file, log = Path("clips/3.safetensors"), records.Log
    monkeypatch.setattr(records, "Log", lambda *rest: file.write_bytes(file.read_bytes()[:-200]) and log(*rest))  # after all checks
    with pytest.raises(InputError, match="clip 3: .*3.safetensors is damaged"):
        run(script, "run", "--steps", "8")
    assert not records.checkpoints("run") and not Path("run/reward").exists() and not Path("run/model").exists()


def test_text_to_video_needs_no_clip(quick):
    """Neither the clips nor the model hold anything of an image model."""
    assert all(set(weights_of(f"clips/{i}.safetensors")) == {"latents", "text_short", "text_long"} for i in range(8))
    assert not any("img" in name for name in weights_of("model"))
    assert steps(run(train_pavrm, "pavrm", "--steps", "1")) and run(train_prfl, "prfl", "--steps", "1")


# ---------------------------------------------------------------------------------------------- PRFL: the reward's gradient

def judge_and_policy():
    return fill_pavrm(tiny().config, 2, 3, 4).requires_grad_(False), tiny()


def rollout(policy, pavrm, k, noise, texts, solver=UniPC, gradient_steps=1, judge="next", guidance=1.0, start=None, tasks=None):
    """By hand: (logits, distance to the start) of k steps without gradient and one, or more, with."""
    solver, x, distances = solver(6, 5.0), noise, []

    def velocity(model, x, t):
        v = model(x, t, texts)
        negative = [draw((2, 8), 1).bfloat16()] * len(x)
        return v if guidance == 1 else guidance * v - (guidance - 1) * model(x, t, negative)

    for i in range(k + 1):
        t = torch.full((len(x),), float(solver.timesteps[i]))
        with torch.set_grad_enabled(i > k - gradient_steps):
            v = velocity(policy, x, t)
            if start and torch.is_grad_enabled():
                distances.append((v - velocity(start, x.detach(), t).detach()).square().mean())
            clean, x = x - solver.sigmas[i] * v, solver.step(v, i, x)
    x, t = (clean, 0.0) if judge == "clean" else (x, float(solver.timesteps[k + 1]))
    return pavrm(x, torch.full((len(x),), t), texts, tasks=tasks or pavrm.tasks), sum(distances) / max(len(distances), 1)


FORMS = {"hinge": lambda logit: 2 - logit.sigmoid(), "log_sigmoid": lambda logit: -logit.sigmoid().log(),
         "logit": lambda logit: -logit}


@pytest.mark.parametrize("flags, changes", [
    ([], {}),
    (["--k", "late"], {}),
    (["--reward_form", "log_sigmoid", "--reward_weight", "2"], dict(form="log_sigmoid", weight=2.0)),
    (["--reward_form", "logit"], dict(form="logit")),
    (["--judge", "clean"], dict(judge="clean")),
    (["--solver", "euler"], dict(solver=Euler)),
    (["--solver", "dpm++", "--gradient_steps", "2", "--judge", "clean"], dict(solver=DPMSolverPP, gradient_steps=2, judge="clean")),
    (["--gradient_steps", "2"], dict(gradient_steps=2)),
    (["--gradient_steps", "9", "--k", "3"], dict(gradient_steps=9)),
    (["--rollout_guidance", "3"], dict(guidance=3.0)),
    (["--rewards_per_rollout", "3", "--gradient_steps", "2"], dict(gradient_steps=2)),
    (["--rewards_per_rollout", "5"], {}),
])
def test_prfl_gradients_by_hand(quick, monkeypatch, flags, changes):
    """Every form of the reward phase: the mean over micro-steps, and over the rewards of a rollout, of rollouts of their own."""
    changes = {"form": "hinge", "weight": 0.1, **changes}
    form, weight = FORMS[changes.pop("form")], changes.pop("weight")
    (line,), _, (gradients,) = watched(monkeypatch, train_prfl, "run", "--steps", "1", "--phases", "reward", *STILL, *flags)
    pavrm, policy = judge_and_policy()
    each = len(line["k"]) // 2
    assert each == int(dict(zip(flags[::2], flags[1::2])).get("--rewards_per_rollout", 1))
    losses, rewards = [], []
    for n, k in enumerate(line["k"]):
        logit, _ = rollout(policy, pavrm, k, noises(n // each, "reward"), long_texts(batch(n // each)), **changes)
        losses.append(weight * form(logit).mean())
        rewards.append(logit.sigmoid().mean().item())
    assert len(set(line["k"][:each])) == each and line["k"][:each] == sorted(line["k"][:each])
    assert line["reward_loss"] == pytest.approx(sum(losses).item() / len(losses), rel=1e-5)
    assert line["reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-5)
    assert agree(gradients, gradients_of(policy, sum(losses) / len(losses)), 1e-3)


def test_two_gradient_steps_are_not_one():
    """The gradient passes through both steps' velocities and no further, whatever the solver remembers."""
    pavrm, policy = judge_and_policy()
    noise, texts, found = draw((2, *SHAPE), 0), long_texts([0, 1]), []
    for gradient_steps in (1, 2, 4):
        with_gradient = []

        def velocity(x, t):
            with_gradient.append(torch.is_grad_enabled())
            return policy(x, t, texts)

        def judge(x, t):
            return pavrm(x, t, texts)

        (_, _, logits, _), = train_prfl.rewarded_steps(velocity, judge, UniPC(6, 5.0), noise, [3], gradient_steps)
        found.append(gradients_of(policy, logits.sum()))
        assert with_gradient == [False] * (4 - gradient_steps) + [True] * gradient_steps
    assert not agree(found[0], found[1], 0.05) and not agree(found[1], found[2], 0.05)


@pytest.mark.parametrize("name", SOLVERS)
def test_rewards_on_one_rollout_are_those_of_rollouts_of_their_own(name):
    """In whatever order they are asked for; the noise and the rollout between them are shared, and computed once."""
    pavrm, policy = judge_and_policy()
    noise, texts, calls = draw((1, *SHAPE), 0), long_texts([0]), []

    def velocity(x, t):
        calls.append(t)
        return policy(x, t, texts)

    def judge(x, t):
        return pavrm(x, t, texts, tasks=pavrm.tasks)

    ks = []
    for k, x_next, logits, _ in train_prfl.rewarded_steps(velocity, judge, SOLVERS[name](6, 5.0), noise, [4, 0, 2]):
        ks.append(k)
        together = gradients_of(policy, logits.sum())
        logit, _ = rollout(policy, pavrm, k, noise, texts, solver=SOLVERS[name])
        assert agree(together, gradients_of(policy, logit.sum()), 1e-3) and torch.allclose(logit, logits, atol=1e-5)
    assert ks == [0, 2, 4] and len(calls) == 3 + 4  # three steps with gradient, steps 0 to 3 without


def test_labels_are_weighted(several_labels, monkeypatch):
    """The loss is the weighted sum of each label's; so is the reward."""
    torch.manual_seed(0)
    PAVRM(tiny(3), 2, SEVERAL[1:]).save_pretrained("several")
    flags = ["--reward", "several", "--task", "blur_quality=0.3", "physics_quality=0.5", "--steps", "1", "--phases", "reward", *STILL]
    (line,), _, (gradients,) = watched(monkeypatch, train_prfl, "run", *flags)
    pavrm, policy = PAVRM.from_pretrained("several").requires_grad_(False), tiny()
    losses, rewards = [], []
    for n, k in enumerate(line["k"]):
        logits, _ = rollout(policy, pavrm, k, noises(n, "reward"), long_texts(batch(n)))
        physics, _, blur = logits.sigmoid().mean(0)
        losses.append(0.1 * (0.3 * (2 - blur) + 0.5 * (2 - physics)))
        rewards.append((0.3 * blur + 0.5 * physics).item())
    assert line["reward"] == pytest.approx(sum(rewards) / 2, rel=1e-5)
    assert line["reward_loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    assert agree(gradients, gradients_of(policy, sum(losses) / 2), 1e-3)
    with pytest.raises(InputError, match="--task motion_quality is no label of this reward model, which has physics_quality, text_al"):
        run(train_prfl, "other", "--reward", "several", "--task", "motion_quality")


@pytest.mark.parametrize("words, ks", [
    (["all"], range(39)), (["early"], range(13)), (["middle"], range(13, 26)), (["late"], range(26, 39)),
    (["0"], [0]), (["38", "5", "5"], [5, 38])])
def test_steps_that_may_be_rewarded(words, ks):
    assert train_prfl.rewardable(words, 40) == list(ks)


@pytest.mark.parametrize("words, steps, message", [
    (["soon"], 40, "--k soon names no steps; give all, early, middle, late, or numbers"), (["all", "early"], 40, "names no steps"),
    (["-1"], 40, "names no steps"), (["1.5"], 40, "names no steps"),
    (["39"], 40, "--k 39 does not fit 40 rollout steps; k can be 0 to 38"), (["all"], 1, "leaves no step to reward")])
def test_steps_that_cannot_be_rewarded(words, steps, message):
    with pytest.raises(InputError, match=message):
        train_prfl.rewardable(words, steps)


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 6, 12, 41])
def test_the_thirds_make_the_whole(steps):
    thirds = []
    for third in ("early", "middle", "late"):
        try:
            thirds += train_prfl.rewardable([third], steps)
        except InputError:  # there are fewer steps than thirds
            assert steps < 4
    assert thirds == train_prfl.rewardable(["all"], steps) == list(range(steps - 1))


def test_more_rewards_than_steps_are_refused(world):
    with pytest.raises(InputError, match="--rewards_per_rollout 3 .* give 1 to 2"):
        run(train_prfl, "run", "--k", "1", "2", "--rewards_per_rollout", "3")


def test_the_rollout_stays_float32():
    """Between the steps of a bf16 policy, and before its judge: every latent keeps what bf16 would round off."""
    pavrm, policy = judge_and_policy()
    policy.bfloat16(), pavrm.dit.bfloat16()
    texts, seen = long_texts([0]), []

    def velocity(x, t):
        seen.append(x)
        return policy(x, t, texts)

    (_, x_next, logits, _), = train_prfl.rewarded_steps(velocity, lambda x, t: seen.append(x) or pavrm(x, t, texts), UniPC(6, 5.0),
                                                        draw((1, *SHAPE), 0), [3])
    assert len(seen) == 5 and logits.dtype == torch.float32
    for x in [*seen, x_next]:
        assert x.dtype == torch.float32 and (x != x.bfloat16().float()).float().mean() > 0.9


def test_a_rollout_step_waits_for_nothing(quick, monkeypatch):
    """No anomaly detection; nothing is collected, emptied or synchronised more often in a longer rollout."""
    calls, anomaly, counts, reward_loss = [], [], [], train_prfl.reward_loss

    def count(place, name, original):
        monkeypatch.setattr(place, name, lambda *a, **b: calls.append(name) or original(*a, **b))

    for name in ("barrier", "all_reduce"):
        count(dist, name, getattr(dist, name))
    for place, name in [(gc, "collect"), (torch.cuda, "empty_cache"), (torch.cuda, "synchronize")]:
        count(place, name, lambda *_: None)
    monkeypatch.setattr(train_prfl, "reward_loss", lambda *a: anomaly.append(torch.is_anomaly_enabled()) or reward_loss(*a))
    for rollout_steps in ("3", "9"):
        calls.clear()
        run(train_prfl, f"run{rollout_steps}", "--steps", "1", "--rollout_steps", rollout_steps, "--k", str(int(rollout_steps) - 2))
        counts.append({name: calls.count(name) for name in calls})
    assert counts[0] == counts[1] and set(counts[0]) == {"barrier", "all_reduce"} and anomaly == [False] * 4


def test_a_reward_model_without_its_head_is_refused(world):
    """Nothing trains against a random head."""
    tensors = {name: tensor for name, tensor in weights_of("reward").items() if not name.startswith("mlp.")}
    files.write_safetensors("reward/pavrm.safetensors", tensors)
    with pytest.raises(InputError, match="reward is a checkpoint of another model: mlp.fc1.weight is missing"):
        run(train_prfl, "run")
    shutil.rmtree("reward")
    with pytest.raises(InputError, match="reward holds no reward model"):
        run(train_prfl, "run")
    assert not Path("run").exists()


# ---------------------------------------------------------------------------------------------- PRFL: phases, adapters, distance

@pytest.mark.parametrize("phase", ["sft", "rwr"])
def test_sft_and_rwr_by_hand(quick, monkeypatch, phase):
    """rwr is sft with each clip's loss weighted by exp((reward - 1) / temperature), of the noisy clip itself, without gradient."""
    flags = ["--steps", "1", "--phases", phase, "--rwr_temperature", "0.2", "--timesteps", "400", *STILL]
    (line,), models, (gradients,) = watched(monkeypatch, train_prfl, "run", *flags)
    assert len(models) == 1 + (phase == "rwr") and set(line) >= {f"{phase}_loss", f"{phase}_norm"} and "reward" not in line
    pavrm, policy = judge_and_policy()
    sigma, losses = TrainingSchedule().near(400), []
    for micro_step in range(2):
        clips, noise = batch(micro_step), noises(micro_step, "sft")
        x0, t, texts = latents(clips), torch.full((2,), 400.0), long_texts(clips)
        x = add_noise(x0, noise, sigma)
        reward = pavrm(x, t, texts).sigmoid()
        weight = ((reward - 1) / 0.2).exp() if phase == "rwr" else torch.ones(2)
        losses += [(w * error).mean() for w, error in zip(weight, (policy(x, t, texts) - (noise - x0)).square())]
    assert line[f"{phase}_loss"] == pytest.approx(sum(losses).item() / 4, rel=1e-5)
    assert agree(gradients, gradients_of(policy, sum(losses) / 4))


@pytest.mark.parametrize("ratio, count", [("1", 2), ("0.5", 1), ("2", 4)])
def test_the_ratio_of_sft_to_reward(quick, monkeypatch, ratio, count):
    """Micro-steps of the sft phase; its loss stays their mean. Steps go on where the one before has stopped."""
    losses, sft_loss, rewards, reward_loss = [], train_prfl.sft_loss, [], train_prfl.reward_loss
    seen, draw_level = [], TrainingSchedule.draw
    monkeypatch.setattr(train_prfl, "sft_loss", lambda *a: losses.append(sft_loss(*a)) or losses[-1])
    monkeypatch.setattr(train_prfl, "reward_loss", lambda *a: rewards.append(reward_loss(*a)) or rewards[-1])
    monkeypatch.setattr(TrainingSchedule, "draw", lambda self, u: seen.append(u) or draw_level(self, u))
    log = steps(run(train_prfl, "run", "--steps", "2", "--sft_ratio", ratio, "--rollout_steps", "2"))
    assert len(losses) == 2 * count and len(rewards) == 4 and len(set(seen)) == len(seen) == 4 * count
    for n, line in enumerate(log):
        assert line["sft_loss"] == pytest.approx(sum(losses[n * count:(n + 1) * count]).item() / count, rel=1e-5)


def test_the_distance_to_the_start_by_hand():
    """The mean over clips and steps with gradient of |v - v_start|^2, v_start at the same latents and without gradient."""
    pavrm, policy = judge_and_policy()
    other, noise, texts = tiny(9), draw((2, *SHAPE), 0), long_texts([0, 1])
    velocity, judge, start = (lambda x, t, model=model: model(x, t, texts) for model in (policy, pavrm, other))
    for gradient_steps in (1, 3):
        (_, _, _, distance), = train_prfl.rewarded_steps(velocity, judge, UniPC(6, 5.0), noise, [3], gradient_steps, "next", start)
        _, expected = rollout(policy, pavrm, 3, noise, texts, gradient_steps=gradient_steps, start=other)
        assert distance.item() == pytest.approx(expected.item(), rel=1e-4) and distance > 0.01
        assert agree(gradients_of(policy, distance), gradients_of(policy, expected), 1e-3)
        assert all(parameter.grad is None for parameter in other.parameters())


def test_the_distance_to_the_start_in_training(quick, monkeypatch):
    """Zero at first, with adapters and with a frozen copy, and then not; it has a gradient of its own."""
    flags = ["--phases", "reward", "--reward_form", "logit", "--reward_weight", "10", "--rollout_steps", "3", "--accumulation", "1",
             "--rollout_guidance", "2"]  # which both velocities have
    first = watched(monkeypatch, train_prfl, "none", "--steps", "1", *flags)[0][0]
    for name, more in [("copy", []), ("adapters", ["--lora_rank", "4"])]:
        log, models, gradients = watched(monkeypatch, train_prfl, name, "--steps", "3", "--kl_weight", "1", *flags, *more)
        assert log[0]["kl"] == 0 < log[1]["kl"] < log[2]["kl"] and log[0]["reward_loss"] == first["reward_loss"]
        assert len(models) == (2 if more else 3)  # policy, frozen copy, reward model
        if not more:
            for (name, copy), start in zip(models[1].named_parameters(), tiny().parameters(), strict=True):
                assert not copy.requires_grad and copy.grad is None and torch.equal(files.whole(copy), start), name
        free = watched(monkeypatch, train_prfl, f"{name}_free", "--steps", "2", *flags, *more)[2]
        assert agree(gradients[0], free[0], 1e-6) and not agree(gradients[1], free[1], 1e-3)


def test_adapters_of_the_policy(quick, monkeypatch):
    """The base stays; the merged model, the base with the adapter's file, and what was trained are one."""
    flags = ["--lora_rank", "3", "--lora_alpha", "12", "--ema", "0.5"]
    log, models, gradients = watched(monkeypatch, train_prfl, "run", "--steps", "3", *flags)
    whole = watched(monkeypatch, train_prfl, "whole", "--steps", "1")[0]
    assert log[0]["sft_loss"] == whole[0]["sft_loss"]
    assert all(".lora_" in name for name in gradients[0]) and len(gradients[0]) == 3 * 8 * 2
    assert all(gradient.any() for gradient in gradients[-1].values())
    start, trained = tiny().state_dict(), {name: tensor.full_tensor() for name, tensor in models[0].state_dict().items()}
    assert all(torch.equal(tensor, start[name]) for name, tensor in trained.items() if ".lora_" not in name)
    for kind in ("", "_ema"):
        merged, adapter = weights_of(f"run/model{kind}"), load_file(f"run/adapter{kind}.safetensors")
        assert merged.keys() == start.keys() and len(adapter) == 48
        assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in adapter
        for name, tensor in merged.items():
            a, b = (adapter.get(f"diffusion_model.{name.removesuffix('.weight')}.{part}.weight") for part in ("lora_A", "lora_B"))
            if a is None:
                assert torch.equal(tensor, start[name]), name
            else:
                assert torch.allclose(tensor, start[name] + b @ a, atol=1e-6) and not torch.equal(tensor, start[name]), name
    b = "blocks.2.cross_attn.o.lora_B.weight"
    assert torch.allclose(load_file("run/adapter.safetensors")[f"diffusion_model.{b}"], 4 * trained[b])  # alpha / rank
    assert not torch.equal(*(weights_of(f"run/{name}")["blocks.0.self_attn.q.weight"] for name in ("model", "model_ema")))
    with pytest.raises(InputError, match="no linear layer of a block is called heads"):
        run(train_prfl, "other", "--lora_rank", "3", "--lora_targets", "heads")


# ---------------------------------------------------------------------------------------------- PRFL: looking at samples

def evaluations(log):
    return [line["evaluation"] for line in log if "evaluation" in line]


def test_what_samples_are_measured_by(quick):
    """Before training, as it goes on, and at its end; with nothing learnt, nothing moves away."""
    fill_vae("model")
    flags = ["--samples", "1", "--sample_every", "2", "--guidance", "2", "--rollout_steps", "3", "--accumulation", "1"]
    log = run(train_prfl, "run", "--steps", "3", *flags)
    assert [line["step"] for line in log if "evaluation" in line] == [0, 2, 3]
    names = ["reward", "saturated", "motion_energy", "contrast", "saturation"]
    first, *later = evaluations(log)
    assert set(first) - {"velocity_distance"} == set(names) and first.get("velocity_distance", 0) == 0
    for step, line in zip((2, 3), later):
        assert set(line) == {*names, "velocity_distance"} and 0 < line["velocity_distance"] < 1 and 0 < line["reward"] < 1
        assert line == files.read_json(f"run/samples/step_{step:06d}/evaluation.json")
        measured = clip_statistics(read_video(f"run/samples/step_{step:06d}/0.mp4"))  # as far as a codec keeps them
        assert all(line[name] == pytest.approx(measured[name], abs=0.1) for name in measured)
    still = evaluations(run(train_prfl, "still", "--steps", "1", "--lr", "0", *flags))
    assert still[0].items() <= first.items() and still[1]["velocity_distance"] == 0
    assert {name: still[1][name] for name in names} == {name: first[name] for name in names}
    alone = evaluations(run(train_prfl, "alone", "--steps", "1", "--phases", "sft", *flags))
    assert alone[0] == first and alone[1]["velocity_distance"] > 0  # without the reward phase they are scored all the same ...
    plain = evaluations(run(train_prfl, "plain", "--steps", "1", "--phases", "sft", "--reward", "none", *flags))
    assert [set(line) - {"velocity_distance"} for line in plain] == [set(names[2:])] * 2  # ... where there is a reward model


def test_the_distance_of_velocities_by_hand(quick):
    """On the held-out clips with their long captions, noised to 250, 500 and 750: the mean square distance to the start."""
    fill_vae("model")
    log = run(train_prfl, "run", "--steps", "2", "--samples", "2", "--sample_every", "2", "--guidance", "1", "--rollout_steps", "3")
    start, trained, distances = tiny(), WanModel.from_pretrained("run/model"), []
    for n in range(2):
        noise = parallel.noise((1, *SHAPE), 0, n, "sample")
        for t in (250, 500, 750):
            x = add_noise(latents([n]), noise, TrainingSchedule().near(t))
            with torch.no_grad():
                a, b = (model(x, torch.tensor([float(t)]), long_texts([n])) for model in (start, trained))
            distances.append((a - b).square().mean().item())
    assert evaluations(log)[-1]["velocity_distance"] == pytest.approx(sum(distances) / 6, rel=1e-3)


def test_statistics_of_a_clip_by_hand():
    video = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    video[1] = 255                       # black, white, black
    contrast = (12 / 11 * (1 / 3 - 1 / 9)) ** 0.5
    assert clip_statistics(video) == pytest.approx({"motion_energy": 1.0, "contrast": contrast, "saturation": 0.0})
    video = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    video[..., 0, 2] = 51                # a still picture, half of it blue
    assert clip_statistics(video)["motion_energy"] == 0 and clip_statistics(video)["saturation"] == pytest.approx(0.1)


@pytest.mark.parametrize("rewards, energies, stops_at", [
    ([0.0, 1.0, 2.0, 3.0], [0.4, 0.3, 0.1, 0.1], 2),       # the reward rises, motion falls below half
    ([0.0, 1.0, 2.0, 3.0], [0.4, 0.3, 0.3, 0.3], None),    # motion stays
    ([0.0, -1.0, -1.0, -1.0], [0.4, 0.1, 0.1, 0.1], None)])  # motion falls, but the reward has not risen
def test_a_hacked_reward_stops_the_run(world, monkeypatch, capsys, rewards, energies, stops_at):
    """As soon as it is seen; the checkpoint and the model are written."""
    fill_vae("model")
    rewards, energies = iter(rewards), iter(energies)
    monkeypatch.setattr(train_prfl, "process_logits", lambda *a, **b: torch.full((4, 1), next(rewards)))
    monkeypatch.setattr(train_prfl, "clip_statistics", lambda video: {"motion_energy": next(energies)})
    log = run(train_prfl, "run", "--steps", "3", "--accumulation", "1", "--rollout_steps", "2", "--samples", "1", "--sample_every",
              "1", "--save_every", "99", "--stop_below", "motion_energy", "0.5")
    last = stops_at or 3
    assert [line["step"] for line in steps(log)] == list(range(1, last + 1))
    assert list(records.checkpoints("run")) == [last] and WanModel.from_pretrained("run/model")
    assert ("stopped: the samples' reward has risen from 0.500 to 0.881" in capsys.readouterr().out) == bool(stops_at)
    assert [line["saturated"] for line in evaluations(log)] == [float(line["reward"] > 0.95) for line in evaluations(log)]


@pytest.mark.parametrize("flags", [["--stop_below", "velocity", "0.5"], ["--stop_below", "contrast", "half"],
                                   ["--stop_below", "contrast", "0.5", "--phases", "sft", "--reward", "none"],
                                   ["--stop_below", "contrast", "0.5", "--sample_every", "0"]])
def test_what_a_run_cannot_be_stopped_by(world, flags):
    fill_vae("model")
    with pytest.raises(InputError, match="--stop_below .* cannot be judged"):
        run(train_prfl, "run", "--steps", "1", "--sample_every", "1", *flags)
    assert not Path("run").exists()


# ---------------------------------------------------------------------------------------------- resuming, and two processes

@pytest.mark.parametrize("script, flags, results", [
    (train_pavrm, ["--accumulation", "2"], ["reward/pavrm.safetensors"]),
    (train_prfl, ["--kl_weight", "1", "--rewards_per_rollout", "2", "--rollout_steps", "3", "--accumulation", "1", "--warmup", "3"],
     ["model/diffusion_pytorch_model.safetensors", "adapter.safetensors",
      "model_ema/diffusion_pytorch_model.safetensors", "adapter_ema.safetensors"])])
def test_resume_is_exact_with_adapters_and_average(world, monkeypatch, script, flags, results):
    monkeypatch.setattr(train_pavrm, "EVALUATION_TIMESTEPS", [600])
    flags = ["--lora_rank", "2", "--ema", "0.8", *flags]
    whole = run(script, "whole", *flags, "--steps", "3", "--save_every", "99")
    run(script, "parts", *flags, "--steps", "2")
    assert numbers(steps(run(script, "parts", *flags, "--steps", "3", "--resume"))) == numbers(steps(whole))
    for result in results:
        assert Path("parts", result).read_bytes() == Path("whole", result).read_bytes(), result
    with pytest.raises(InputError, match="--resume with another --lora_rank and --ema than"):
        run(script, "parts", *flags, "--lora_rank", "4", "--ema", "0.5", "--resume")


DRIVER = """
import importlib, json
import torch.distributed as dist
import records
save = records.Checkpoints.save
dist.init_process_group("gloo")
dist.init_process_group = lambda *_, **__: None  # the processes stay together from run to run
for name, flags in json.loads(open("jobs.json").read()):
    records.Checkpoints.save = save if name == "train_prfl" else lambda *_: None  # the others are not resumed
    importlib.import_module(name).main(flags)
"""


def test_one_process_or_two(several_labels):
    """Runs with options of every kind, one after the other under one torchrun: losses, norms, rewards, measures, results.

    Two processes also stop and resume in the middle.
    """
    fill_vae("model")
    for i, line in enumerate(several_labels):
        line["pair_id"] = f"pair {i // 2}"
    write_index(several_labels)
    pairs = ["--loss", "bt", "--timesteps", "200", "500", "--num_queries", "2", "--eval_timesteps", "201"]
    labels = [*SEVERAL, "--accumulation", "2", "--ema", "0.5", "--eval_timesteps", "600"]
    adapters = ["--lora_rank", "3", "--ema", "0.5", "--kl_weight", "0.5", "--phases", "rwr", "reward", "--sft_ratio", "2",
                "--accumulation", "1", "--gradient_steps", "2", "--rewards_per_rollout", "2", "--rollout_guidance", "2",
                "--rollout_steps", "4", "--checkpoint_blocks", "--samples", "1", "--sample_every", "3", "--guidance", "1"]
    jobs = [(train_pavrm, "bt", pairs), (train_pavrm, "labels", labels), (train_prfl, "adapters", adapters)]
    jobs = [(script, name, [*flags, "--batch_size", "2", "--steps", "3"]) for script, name, flags in jobs]
    runs = [*jobs[:2], (*jobs[2][:2], [*jobs[2][2], "--steps", "2"]), (*jobs[2][:2], [*jobs[2][2], "--resume"])]
    Path("driver.py").write_text(DRIVER)
    files.write_json("jobs.json", [(script.__name__, flags_of(script, f"two_{name}", *flags)) for script, name, flags in runs])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "driver.py"],
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for script, name, flags in jobs:
        one, two = numbers(run(script, name, *flags)), numbers(read_log(f"two_{name}"))
        assert len(steps(one)) == len(steps(two)) == 3
        for a, b in zip(steps(one), steps(two)):
            assert flat(b) == pytest.approx(flat(a), rel=1e-4, abs=1e-6), name
        assert flat(two[-1]) == pytest.approx(flat(one[-1]), rel=1e-4, abs=1e-6) and "evaluation" in two[-1], name
    assert set(read_log("two_bt")[-1]["evaluation"]["motion_quality"]["201"]) == {"pair_accuracy", "auc", "loss"}
    for result in ("adapter.safetensors", "adapter_ema.safetensors", "model", "model_ema"):
        a, b = (weights_of(f"{output}/{result}") for output in ("adapters", "two_adapters"))
        assert a.keys() == b.keys()
        for name in a:  # AdamW's first steps are those of a sign: what is about zero may go either way
            assert (a[name] - b[name]).abs().mean() < 1e-3 * a[name].abs().mean(), name
