"""Training a reward model: every option does what it says, against computations by hand, at tiny size."""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import files
import parallel
import train_pavrm
from files import InputError
from reward import PAVRM
from solver import TrainingSchedule, add_noise
from testdata.golden import draw
from testdata.helpers import (
    SEVERAL,
    batch,
    gradients_agree,
    gradients_of,
    latents,
    noises,
    run,
    short_texts,
    steps,
    tiny,
    watched,
    weights_of,
    write_index,
)


def truth(lines, clips):
    """Labels (B, 3) of `several_labels`, NaN where there is none."""
    labels = [[lines[i]["labels"][name] for name in SEVERAL[1:]] for i in clips]
    return torch.tensor([[math.nan if value is None else float(value) for value in row] for row in labels])


class Fixed(list):
    """An order of given batches."""
    repeated = []


# ------------------------------------------------------------------------------ cross-entropy

def test_pavrm_learns_its_labels(world):
    at = ["201", "400", "600", "800", "1000"]
    log = run(train_pavrm, "run", "--steps", "60", "--eval_timesteps", *at)
    losses = [line["loss"] for line in steps(log)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert sum(line["accuracy"] for line in steps(log)[-10:]) / 10 > 0.9
    evaluation = log[-1]["evaluation"]["motion_quality"]
    assert list(evaluation) == at
    assert set(evaluation["400"]) == {"accuracy", "precision", "recall", "f1", "auc", "loss", "ece"}
    assert files.read_json("run/evaluation.json") == log[-1]["evaluation"]
    assert PAVRM.from_pretrained("run/reward").labels == ["motion_quality"]


@pytest.mark.parametrize("flags", [[], ["--pool", "mean"], ["--pool", "max"], ["--num_queries", "3"]])
def test_pavrm_gradients_by_hand(several_labels, monkeypatch, flags):
    """One process, four clips, three labels, some missing: loss and gradients are means over the labels that
    exist."""
    flags = ["--steps", "1", "--lr", "0", "--head_lr", "0", "--num_blocks", "2", "--timesteps", "400", *flags]
    (line,), _, (gradients,) = watched(monkeypatch, train_pavrm, "run", *SEVERAL, *flags)
    pavrm = PAVRM.from_pretrained("run/reward")
    clips, sigma = batch(0, 4), TrainingSchedule().near(400)
    x = add_noise(latents(clips), noises(0, "noise", 4), sigma)
    logits = pavrm(x, torch.full((4,), 400.0), short_texts(clips), labels=SEVERAL[1:])
    labels = truth(several_labels, clips).flatten()
    pairs = zip(logits.flatten(), labels, strict=True)
    present = [(logit, label) for logit, label in pairs if not label.isnan()]
    terms = [F.softplus(-logit if label == 1 else logit) for logit, label in present]
    assert 4 < len(terms) < 12
    loss = sum(terms) / len(terms)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    right = [bool(logit > 0) == (label == 1).item() for logit, label in present]
    assert line["accuracy"] == pytest.approx(sum(right) / len(right))
    pavrm.dit.requires_grad_(False)
    pavrm.dit.blocks.requires_grad_(True)
    assert gradients_agree(gradients, gradients_of(pavrm, loss))


def test_a_missing_label_is_not_zero(world):
    """Clips without the label are left out."""
    for line in world:
        line["labels"]["human_quality"] = None
        line["labels"]["physics_quality"] = 1 if line["source_id"] in "03" else None
    write_index(world)
    args = train_pavrm.parse_args(["--labels", "physics_quality"])
    _, items = train_pavrm.load_items(["clips/index.jsonl"], args)
    assert items == [(0,), (3,)]
    with pytest.raises(InputError, match="no clip .* annotated for motion_quality"):
        train_pavrm.load_items(["clips/index.jsonl"], train_pavrm.parse_args([]))


def test_a_clip_with_none_of_the_labels_is_left_out(several_labels):
    args = train_pavrm.parse_args(["--labels", "text_alignment", "blur_quality"])
    _, items = train_pavrm.load_items(["clips/index.jsonl"], args)
    annotated = [i for i in range(8) if not truth(several_labels, [i])[0, 1:].isnan().all()]
    assert [i for i, in items] == annotated != list(range(8))


def test_a_missing_label_gives_its_head_no_gradient(several_labels, monkeypatch):
    without_blur_quality = Fixed([[0, 1, 4, 5]])
    monkeypatch.setattr(train_pavrm, "Order", lambda *_: without_blur_quality)
    _, _, (gradients,) = watched(monkeypatch, train_pavrm, "run", *SEVERAL, "--steps", "1", "--lr", "0")
    for name, gradient in gradients.items():
        if "in_proj_bias" not in name:  # the keys' bias has no effect, so no gradient
            assert gradient.any() != ("blur_quality" in name), name


def test_accumulation_changes_no_gradient(several_labels, monkeypatch):
    """One micro-batch of four or two of two: every label counts alike, also if one of the two has more."""
    monkeypatch.setattr(parallel, "noise", lambda shape, *key: draw(shape, 7))
    results = []
    for output, batches, flags in [("a", [[0, 1, 2, 3]], ["--batch_size", "4"]),
                                   ("b", [[0, 1], [2, 3]], ["--batch_size", "2", "--accumulation", "2"])]:
        monkeypatch.setattr(train_pavrm, "Order", lambda *_, batches=batches: Fixed(batches))
        flags = [*SEVERAL, "--steps", "1", "--lr", "0", "--timesteps", "300", *flags]
        results.append(watched(monkeypatch, train_pavrm, output, *flags))
    (a, _, (a_gradients,)), (b, _, (b_gradients,)) = results
    assert gradients_agree(a_gradients, b_gradients)
    for name in ("loss", "accuracy", "norm"):
        assert a[0][name] == pytest.approx(b[0][name], rel=1e-5)


def test_the_loss_by_timestep_in_the_log(quick, monkeypatch):
    """Each fifth has the mean loss of its own clips; together they make the loss."""
    seen, bce_loss = [], train_pavrm.bce_loss
    drawn, draw_level = [], TrainingSchedule.draw

    def spy_loss(*inputs, **options):
        seen.append(bce_loss(*inputs, **options))
        return seen[-1]

    def spy_draw(self, u):
        drawn.append(draw_level(self, u))
        return drawn[-1]

    monkeypatch.setattr(train_pavrm, "bce_loss", spy_loss)
    monkeypatch.setattr(TrainingSchedule, "draw", spy_draw)
    flags = ["--steps", "1", "--accumulation", "4", "--timesteps", "100", "500", "700", "999"]
    line, = steps(run(train_pavrm, "run", *flags))
    losses, fifths = torch.cat(seen).flatten(), [int(t // 200) for _, t in drawn]
    assert len(losses) == len(fifths) == 16 and set(fifths) == {0, 2, 3, 4}
    expected = {}
    for b in set(fifths):
        expected[f"{200 * b}-{200 * b + 200}"] = losses[[fifth == b for fifth in fifths]].mean().item()
    assert line["loss_by_timestep"] == pytest.approx(expected, rel=1e-5)
    assert line["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_blocks_and_heads_are_clipped_together(quick, monkeypatch):
    """The norm in the log is that of all trained gradients; after clipping they have --max_norm together."""
    after, step = [], torch.optim.AdamW.step

    def spy(self, *rest):
        gradients = [p.grad.full_tensor() for group in self.param_groups for p in group["params"]]
        after.append(sum(gradient.square().sum() for gradient in gradients).sqrt().item())
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    log, _, gradients = watched(monkeypatch, train_pavrm, "run", "--steps", "2", "--max_norm", "0.01")
    for line, found in zip(log, gradients, strict=True):
        assert {name.split(".")[0] for name in found} == {"dit", "query_attention", "mlp"}
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in found.values()))
        assert line["norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.02
    assert after[-2:] == pytest.approx([0.01, 0.01], rel=1e-3)


def test_timesteps_reach_the_reward_model(quick, monkeypatch):
    seen, forward = [], PAVRM.forward

    def spy(self, x, t, *rest, **more):
        seen.extend(t.tolist())
        return forward(self, x, t, *rest, **more)

    monkeypatch.setattr(PAVRM, "forward", spy)
    monkeypatch.setattr(train_pavrm, "evaluate", lambda *_: None)
    run(train_pavrm, "run", "--steps", "3", "--timesteps", "250", "750")
    assert set(seen) == {250.0, 750.0}
    with pytest.raises(InputError, match="--timesteps sometimes"):
        run(train_pavrm, "other", "--timesteps", "sometimes")


# ------------------------------------------------------------------------------ Bradley-Terry

def test_bradley_terry_pairs_share_noise_and_timestep(pairs, monkeypatch):
    """First the better clips, then the worse ones, with their captions; the loss is that of their logits."""
    seen, forward = [], PAVRM.forward

    def spy(self, x, t, context, **rest):
        seen.append((x, t, context, forward(self, x, t, context, **rest)))
        return seen[-1][-1]

    monkeypatch.setattr(PAVRM, "forward", spy)
    flags = ["--loss", "bt", "--steps", "4", "--batch_size", "2", "--timesteps", "300", "600"]
    log = steps(run(train_pavrm, "run", *flags))
    found, sigmas = set(), {t: TrainingSchedule().near(t) for t in (300.0, 600.0)}
    texts = short_texts(range(8))
    for line, (x, t, context, logit) in zip(log, seen, strict=False):  # later ones are seen in evaluation
        assert len(x) == 4 and torch.equal(t[:2], t[2:])
        clips = [[torch.equal(text, told) for text in texts].index(True) for told in context]
        for better, worse in [(0, 2), (1, 3)]:  # places in the batch
            sigma = sigmas[t[better].item()]
            noise = [(x[row] - (1 - sigma) * latents([clips[row]])[0]) / sigma for row in (better, worse)]
            assert torch.allclose(*noise, atol=1e-5) and abs(noise[0].std() - 1) < 0.15
            found.add((clips[better], clips[worse]))
        margin = (logit[:2] - logit[2:]).flatten()
        assert line["loss"] == pytest.approx(-F.logsigmoid(margin).mean().item(), rel=1e-5)
        assert line["accuracy"] == (margin > 0).float().mean().item()
    assert found == {(1, 0), (3, 2), (5, 4), (7, 6)}


def test_bradley_terry_learns_and_is_evaluated_by_pairs(pairs):
    flags = ["--loss", "bt", "--steps", "25", "--timesteps", "100", "500", "--eval_timesteps", "201", "600"]
    log = run(train_pavrm, "run", *flags)
    assert sum(line["accuracy"] for line in steps(log)[-5:]) / 5 > 0.9
    assert steps(log)[-1]["loss"] < 0.5 * log[0]["loss"]
    measures = log[-1]["evaluation"]["motion_quality"]["201"]
    assert set(measures) == {"pair_accuracy", "auc", "loss"}
    assert measures["pair_accuracy"] == 1 and measures["loss"] < 0.5


def test_two_lists_are_matched_by_prompt(quick):
    """The published form: the better clips in one list, the worse ones in another, in any order."""
    prompts = {"better": "abca", "worse": "cbxa"}
    for n, (name, letters) in enumerate(prompts.items()):
        lines = []
        for i, letter in enumerate(letters):
            lines.append({**quick[4 * n + i], "short_caption": letter, "labels": {}})
        Path(f"clips/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lists = ["clips/better.jsonl", "clips/worse.jsonl"]
    _, items = train_pavrm.load_items(lists, train_pavrm.parse_args(["--loss", "bt"]))
    assert sorted(items) == [(0, 7), (1, 5), (2, 4), (3, 7)]  # x has no partner, a has two
    log = run(train_pavrm, "run", "--train", *lists, "--val", *lists, "--loss", "bt", "--steps", "1")
    assert 0 <= log[-1]["evaluation"]["motion_quality"]["600"]["pair_accuracy"] <= 1
    with pytest.raises(InputError, match="2 indices are given; give one, or two with --loss bt"):
        run(train_pavrm, "other", "--train", *lists)


def test_bradley_terry_needs_pairs(quick):
    with pytest.raises(InputError, match="no two clips share a pair_id and differ in motion_quality"):
        run(train_pavrm, "run", "--loss", "bt")
    with pytest.raises(InputError, match="give one with --labels"):
        run(train_pavrm, "run", "--loss", "bt", *SEVERAL)
    assert not Path("run").exists()


# ------------------------------------------------------------------------------ what is trained

def test_only_blocks_and_head_of_pavrm_change(quick):
    run(train_pavrm, "run", "--steps", "2", "--num_blocks", "2")
    start = tiny().state_dict()
    for name, tensor in PAVRM.from_pretrained("run/reward").dit.state_dict().items():
        assert torch.equal(tensor, start[name]) != name.startswith("blocks."), name


@pytest.mark.parametrize("blocks", [["1"], []])
def test_only_these_blocks_are_trained(quick, blocks):
    run(train_pavrm, "run", "--steps", "2", "--num_blocks", "3", "--train_blocks", *blocks)
    run(train_pavrm, "start", "--steps", "1", "--num_blocks", "3", "--lr", "0", "--head_lr", "0")
    start = weights_of("start/reward")
    for name, tensor in weights_of("run/reward").items():
        trained = tuple(f"dit.blocks.{block}." for block in blocks)
        changes = not name.startswith("dit.") or name.startswith(trained)
        assert torch.equal(tensor, start[name]) != changes, name


def test_adapters_of_pavrm(quick, monkeypatch):
    """They start without effect, learn beside frozen blocks, and are merged when the model is saved."""
    flags = ["--steps", "3", "--num_blocks", "2"]
    lora = ["--lora_rank", "3", "--lora_alpha", "6", "--lora_targets", "q", "ffn.2"]
    whole = watched(monkeypatch, train_pavrm, "whole", *flags, "--lr", "0", "--head_lr", "0")[0]
    log, (pavrm,), gradients = watched(monkeypatch, train_pavrm, "run", *flags, *lora)
    assert log[0]["loss"] == whole[0]["loss"]
    targets = ("self_attn.q", "cross_attn.q", "ffn.2")
    adapted = {f"dit.blocks.{i}.{name}" for i in range(2) for name in targets}
    assert {name.rsplit(".lora_", 1)[0] for name in gradients[2] if ".lora_" in name} == adapted
    assert all(gradient.any() for name, gradient in gradients[2].items() if ".lora_" in name)
    assert not any(name.startswith("dit.") and ".lora_" not in name for name in gradients[2])

    state, start = pavrm.state_dict(), weights_of("whole/reward")
    for name, tensor in weights_of("run/reward").items():
        layer = name.removesuffix(".weight")
        if layer in adapted:
            a, b = (state[f"{layer}.{part}.weight"].full_tensor() for part in ("lora_A", "lora_B"))
            assert torch.allclose(tensor, start[name] + 6 / 3 * b @ a, atol=1e-6)
            assert not torch.equal(tensor, start[name])
        else:
            assert torch.equal(tensor, start[name]) == name.startswith("dit."), name
    with pytest.raises(InputError, match="qkv"):
        run(train_pavrm, "other", "--lora_rank", "3", "--lora_targets", "qkv")
    with pytest.raises(InputError, match="--train_blocks and --lora_rank exclude each other"):
        run(train_pavrm, "other", "--lora_rank", "3", "--train_blocks", "1")
