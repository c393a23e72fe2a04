"""PAVRM agrees with the official one, in values, losses and gradients, is one directory on disk, and scores videos."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import files
import reward
from data import label, read_video, write_video
from files import InputError
from model import WanModel
from reward import PAVRM, QueryAttention, bce_loss, bradley_terry_loss, reward_loss
from score import attention_video, classification_measures, main, measure, parse_tasks
from test_model import golden_inputs, tiny
from test_vae import golden
from testdata.golden import agree, draw, fill_

ROOT = Path(__file__).parent
INPUTS = dict(x=draw((2, 16, 2, 4, 4), 1), t=torch.tensor([500.0, 900.0]), context=[draw((3, 8), 2), draw((5, 8), 3)])


def fill_pavrm(config, num_blocks, dit_seed, head_seed):
    pavrm = PAVRM(WanModel(config), num_blocks)
    fill_(pavrm.dit.state_dict(), dit_seed)
    fill_({name: tensor for name, tensor in pavrm.state_dict().items() if not name.startswith("dit.")}, head_seed)
    return pavrm


@pytest.mark.parametrize("name", ["pavrm_t2v", "pavrm_i2v"])
def test_official_values(name):
    values, meta = golden(name)
    inputs, config, seed = golden_inputs(meta)
    pavrm = fill_pavrm(config, int(meta["k"]), seed, seed + 7)
    other = {**inputs, "x": draw(inputs["x"].shape, seed + 5)}
    inputs["x"].requires_grad_()

    def gradients_agree(kind):
        for key in (key for key in values if key.startswith(f"grad_{kind}.")):
            name = key.removeprefix(f"grad_{kind}.")
            parameter = pavrm.get_parameter(name if not name.startswith("blocks") else f"dit.{name}")
            assert agree(parameter.grad, values[key], 1e-4), key
        pavrm.zero_grad()

    logit = pavrm(**inputs)
    assert agree(logit, values["logit"], 1e-5) and agree(logit.sigmoid(), values["reward"], 1e-5)
    loss = bce_loss(logit, values["labels"])
    assert agree(loss.view(1), values["bce"], 1e-5)
    loss.backward()
    gradients_agree("bce")

    logit_other = pavrm(**other)
    assert agree(logit_other, values["logit_other"], 1e-5)
    loss = bradley_terry_loss(pavrm(**inputs), logit_other)
    assert agree(loss.view(1), values["bt"], 1e-5)
    loss.backward()
    gradients_agree("bt")

    inputs["x"].grad = None
    loss = reward_loss(pavrm(**inputs))
    assert agree(loss.view(1), values["refl"], 1e-5)
    loss.backward()
    assert agree(inputs["x"].grad, values["grad_x_refl"], 1e-4)


def test_a_clip_scores_the_same_alone_and_in_a_batch():
    pavrm = PAVRM(tiny(), num_blocks=2)
    x, t = draw((3, 16, 2, 4, 4), 1), torch.tensor([100.0, 500.0, 900.0])
    context = [draw((n, 8), 2 + n) for n in (3, 1, 5)]
    together = pavrm(x, t, context)
    alone = torch.cat([pavrm(x[i:i + 1], t[i:i + 1], context[i:i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_gradient_lives_at_a_large_logit():
    """Through a sigmoid in bf16 it would be exactly zero here."""
    logit = torch.tensor([8.0], requires_grad=True)
    bce_loss(logit, torch.tensor([1.0])).backward()
    assert -5e-4 < logit.grad.item() < -1e-4


def test_losses_of_labels_and_pairs_by_hand():
    logits, labels = torch.tensor([[0.0, 2.0], [-1.0, 5.0]]), torch.tensor([[1.0, math.nan], [0.0, 1.0]])
    terms = [math.log(2), 0.0, math.log(1 + math.exp(-1)), math.log(1 + math.exp(-5))]
    assert bce_loss(logits, labels, reduction="none").flatten().tolist() == pytest.approx(terms)
    assert bce_loss(logits, labels).item() == pytest.approx(sum(terms) / 3)  # over the labels that are there
    better, worse = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    terms = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))]
    assert bradley_terry_loss(better, worse, reduction="none").tolist() == pytest.approx(terms)
    assert bradley_terry_loss(better, worse).item() == pytest.approx(sum(terms) / 2)


def test_a_missing_label_has_no_gradient():
    logits = torch.tensor([0.0, 2.0, -1.0], requires_grad=True)
    bce_loss(logits, torch.tensor([1.0, math.nan, 0.0])).backward()
    assert logits.grad.tolist() == pytest.approx([-0.25, 0, 1 / (1 + math.e) / 2])


def test_reward_loss_by_hand():
    assert reward_loss(torch.tensor([0.0, 100.0])).item() == pytest.approx(0.1 * (1.5 + 1.0) / 2)
    assert reward_loss(torch.tensor([0.0, 2.0]), 3, "logit").item() == pytest.approx(3 * -1.0)
    loss = reward_loss(torch.tensor([0.0, 2.0]), 1, "log_sigmoid").item()
    assert loss == pytest.approx((math.log(2) + math.log(1 + math.exp(-2))) / 2)
    gradients = {}
    for form in ("hinge", "log_sigmoid", "logit"):  # where the reward is low, high
        logit = torch.tensor([-9.0, 9.0], requires_grad=True)
        reward_loss(logit, 1, form).backward()
        gradients[form] = (-2 * logit.grad).tolist()
    assert gradients["hinge"] == pytest.approx([1.2e-4, 1.2e-4], rel=0.05)
    assert gradients["log_sigmoid"] == pytest.approx([1, 1.2e-4], rel=0.05) and gradients["logit"] == [1, 1]


def test_measures_by_hand():
    logit, label = torch.tensor([2.0, 1.0, -1.0, -2.0, 3.0]), torch.tensor([1, 0, 1, 0, 1])
    measures = classification_measures(logit, label)
    assert measures["accuracy"] == pytest.approx(3 / 5)
    assert measures["precision"] == measures["recall"] == pytest.approx(2 / 3) == measures["f1"]
    assert measures["auc"] == pytest.approx(5 / 6)  # of 3 x 2 pairs only (-1, 1) is in the wrong order
    tie = classification_measures(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 0, 0]))
    assert tie["auc"] == pytest.approx(0.75)
    assert classification_measures(logit, torch.ones(5))["auc"] is None and classification_measures(logit, torch.zeros(5))["f1"] == 0


def test_calibration_error_by_hand():
    """Bins of a tenth: 0.62 and 0.68 share one, of which half are good; 0.95 is alone and good; 0.05 is alone and good."""
    rewards, label = torch.tensor([0.62, 0.68, 0.95, 0.05]), torch.tensor([1, 0, 1, 1])
    measures = classification_measures(rewards.logit(), label)
    assert measures["ece"] == pytest.approx(2 / 4 * abs(0.65 - 0.5) + 1 / 4 * 0.05 + 1 / 4 * 0.95, abs=1e-5)
    certain = classification_measures(torch.tensor([90.0, -90.0]), torch.tensor([1, 0]))  # a reward of 1 is in the last bin
    assert certain["ece"] == pytest.approx(0) and certain["accuracy"] == 1


def test_pairs_are_measured_by_their_order():
    class Two:
        entries = [{"labels": {"physics_quality": value}} for value in (1, 0, 0, None)]

    pavrm, logits = PAVRM(tiny(), 1, ["physics_quality"]), torch.tensor([1.0, 0.5, 2.0, 9.0]).view(4, 1, 1)
    measures = measure(logits, Two, [0, 1, 2, 3], pavrm, [600], pairs=[(0, 1), (0, 2)])
    loss = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(1))) / 2
    assert measures == {"physics_quality": {600: pytest.approx({"pair_accuracy": 0.5, "auc": 0.5, "loss": loss})}}
    assert measure(logits, Two, [3], pavrm, [600]) == {}


# ---------------------------------------------------------------------------------------------- heads

def test_several_queries_by_hand():
    """Each query attends by itself, in eight heads; what they get, and they themselves, are averaged."""
    torch.manual_seed(0)
    pool, tokens = QueryAttention(16, num_queries=3), draw((2, 5, 16), 1)
    torch.nn.init.normal_(pool.multihead_attn.in_proj_bias), torch.nn.init.normal_(pool.multihead_attn.out_proj.bias)
    q, k, v = (F.linear(x, weight, bias) for x, weight, bias in zip(
        (pool.queries, tokens, tokens), pool.multihead_attn.in_proj_weight.chunk(3), pool.multihead_attn.in_proj_bias.chunk(3)))
    found, weights = torch.zeros(2, 3, 16), torch.zeros(2, 3, 5)
    for head in range(8):
        part = slice(2 * head, 2 * head + 2)
        attention = (q[:, part] @ k[..., part].transpose(1, 2) / 2 ** 0.5).softmax(-1)             # (2, 3, 5)
        found[..., part], weights = attention @ v[..., part], weights + attention / 8
    expected = (pool.multihead_attn.out_proj(found) + pool.queries).mean(1)
    assert torch.allclose(pool(tokens), expected, atol=1e-5)
    assert torch.allclose(pool.attend(tokens)[1].mean((1, 2)), weights.mean(1), atol=1e-5)
    assert torch.allclose(pool.attend(tokens)[1].mean((1, 2)).sum(1), torch.ones(2))


@pytest.mark.parametrize("pool, num_queries, pooled", [
    ("mean", 1, lambda pavrm, tokens: tokens.mean(1)), ("max", 1, lambda pavrm, tokens: tokens.max(1).values),
    ("query", 3, lambda pavrm, tokens: pavrm.query_attention(tokens))])
def test_pools(tmp_path, pool, num_queries, pooled):
    pavrm = PAVRM(tiny(), 2, pool=pool, num_queries=num_queries)
    with torch.no_grad():
        logit = pavrm(**INPUTS)
        tokens = pavrm.dit.features(**INPUTS, num_blocks=2)
        hidden = F.relu(pavrm.mlp.fc2(F.relu(pavrm.mlp.fc1(pooled(pavrm, tokens)))))
        assert torch.allclose(logit, pavrm.mlp.fc3(hidden).squeeze(1), atol=1e-6) and logit.shape == (2,)
        pavrm.save_pretrained(tmp_path / "reward")
        loaded = PAVRM.from_pretrained(tmp_path / "reward")
        assert torch.equal(loaded(**INPUTS), logit) and loaded.settings == {"pool": pool, "num_queries": num_queries}


def test_each_label_has_a_head_of_its_own(tmp_path):
    """Over shared tokens: in the order that is asked for, also after saving; the first label's is the published one."""
    pavrm = PAVRM(tiny(), 1, ["physics_quality", "text_alignment", "blur_quality"])
    with torch.no_grad():
        three = pavrm(**INPUTS, tasks=pavrm.tasks)
        assert three.shape == (2, 3) and torch.equal(pavrm(**INPUTS), three[:, 0])
        assert torch.equal(pavrm(**INPUTS, tasks=["blur_quality", "physics_quality"]), three[:, [2, 0]])
        pavrm.save_pretrained(tmp_path / "reward")
        assert torch.equal(PAVRM.from_pretrained(tmp_path / "reward")(**INPUTS, tasks=pavrm.tasks), three)
    names = {name for name in pavrm.state_dict() if not name.startswith("dit.")}
    assert {"query_attention.queries", "mlp.fc3.bias", "other_heads.text_alignment.mlp.fc3.bias"} < names and len(names) == 3 * 11


def test_tasks_and_weights():
    pavrm = PAVRM(tiny(), 1, ["physics_quality", "text_alignment"])
    assert parse_tasks(None, pavrm) == {"physics_quality": 1.0} == parse_tasks(["physics_quality"], pavrm)
    assert parse_tasks(["text_alignment=0.3", "physics_quality"], pavrm) == {"text_alignment": 0.3, "physics_quality": 1.0}
    with pytest.raises(InputError, match="--task beauty is no label of this reward model, which has physics_quality, text_alignment"):
        parse_tasks(["beauty"], pavrm)
    with pytest.raises(InputError, match="--task text_alignment=much has no number"):
        parse_tasks(["text_alignment=much"], pavrm)


def test_save_and_load(tmp_path):
    pavrm = PAVRM(tiny(), num_blocks=2, tasks=["human_quality"])
    pavrm.save_pretrained(tmp_path / "reward")
    loaded = PAVRM.from_pretrained(tmp_path / "reward")
    assert loaded.tasks == ["human_quality"] and len(loaded.dit.blocks) == 2
    inputs = dict(x=draw((1, 16, 2, 4, 4), 1), t=torch.tensor([500.0]), context=[draw((3, 8), 2)])
    assert torch.equal(pavrm(**inputs), loaded(**inputs))
    half = PAVRM.from_pretrained(tmp_path / "reward", dtype=torch.bfloat16)
    assert half(**inputs).dtype == torch.float32 and half.mlp.fc1.weight.dtype == torch.float32


def test_a_transformer_is_no_reward_model(tmp_path):
    tiny().save_pretrained(tmp_path / "dit")
    with pytest.raises(InputError, match="does not describe a reward model"):
        PAVRM.from_pretrained(tmp_path / "dit")
    with pytest.raises(InputError, match="holds no reward model"):
        PAVRM.from_pretrained(tmp_path / "nothing")


# ---------------------------------------------------------------------------------------------- the command

@pytest.fixture
def score(tmp_path, monkeypatch):
    """score(output, *flags): run the command on the CPU in an empty directory; returns its scores.json."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to(ROOT / "demo")

    def run(output, *flags):
        try:
            main([*flags, "--output", output])
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return files.read_json(Path(output, "scores.json"))

    return run


def index_of(clips, path, **changes):
    """An index of some of the demo's held-out clips: good ones have even numbers, poor ones odd."""
    found = [json.loads(line) for line in (ROOT / "demo/val/index.jsonl").read_text().splitlines()]
    good, poor = ([entry for entry in found if label(entry["labels"], "motion_quality") == value] for value in (1, 0))
    entries = [(poor if i % 2 else good)[i // 2] | changes for i in clips]
    lines = [json.dumps(entry | {"file": str(ROOT / "demo/val" / entry["file"])}) for entry in entries]
    Path(path).write_text("\n".join(lines))
    return path


def by_name(result):
    return {row["name"]: [row["reward"], *row["rewards"]["motion_quality"]] for row in result["scores"]}


def agrees(a, b):
    return a.keys() == b.keys() and all(a[name] == pytest.approx(b[name], abs=1e-5) for name in a)


def test_scores_do_not_depend_on_batch_size_or_order(score, capsys):
    first = score("a", "--data", index_of([0, 1, 2, 5], "clips.jsonl"), "--batch_size", "1")
    scores = by_name(first)
    assert len(scores) == 4 and first["timesteps"] == [201, 400, 600, 800] and len({round(row[0], 4) for row in scores.values()}) == 4
    assert all(row[0] == pytest.approx(sum(row[1:]) / 4) and 0 < row[0] < 1 for row in scores.values())  # the mean over timesteps
    printed = capsys.readouterr().out
    assert all(f"{row[0]:.3f}  {name}  '" in printed for name, row in scores.items())
    assert agrees(by_name(score("b", "--data", "clips.jsonl", "--batch_size", "3")), scores)
    assert agrees(by_name(score("c", "--data", index_of([5, 2, 0, 1], "other.jsonl"))), scores)
    one = by_name(score("d", "--data", index_of([2], "one.jsonl"), "--timesteps", "600", "201"))
    (name, (_, at_600, at_201)), = one.items()
    assert [at_201, at_600] == pytest.approx([scores[name][1], scores[name][3]], abs=1e-5)


def test_measures_of_labelled_clips(score, capsys):
    result = score("a", "--data", index_of([0, 1, 2, 5], "clips.jsonl"), "--timesteps", "201", "800")
    entries = [json.loads(line) for line in Path("clips.jsonl").read_text().splitlines()]
    good = {entry["source_id"]: label(entry["labels"], "motion_quality") for entry in entries}
    assert set(good.values()) == {0, 1}
    for place, t in enumerate(("201", "800")):
        right = [(row[1 + place] > 0.5) == good[name] for name, row in by_name(result).items()]
        assert result["measures"]["motion_quality"][t]["accuracy"] == sum(right) / 4
    assert "motion_quality, timestep  201:  accuracy" in capsys.readouterr().out
    unlabelled = score("b", "--data", index_of([0, 1], "none.jsonl", labels={}))
    assert "measures" not in unlabelled and "timestep" not in capsys.readouterr().out


def test_a_weighted_reward(score):
    torch.manual_seed(0)
    PAVRM(WanModel.from_pretrained("demo/model"), 1, ["physics_quality", "text_alignment"]).save_pretrained("two")
    flags = ["--reward", "two", "--task", "text_alignment=0.3", "physics_quality=2"]
    result = score("a", "--data", index_of([0, 1], "clips.jsonl"), *flags)
    for row in result["scores"]:
        physics, text = (sum(row["rewards"][name]) / 4 for name in ("physics_quality", "text_alignment"))
        assert row["reward"] == pytest.approx(2 * physics + 0.3 * text, abs=1e-5)
    assert list(result["measures"]) == ["physics_quality"]  # the demo's clips have no other of the two


def moving_square(path, step):
    video = torch.full((17, 64, 64, 3), 40, dtype=torch.uint8)
    for t in range(17):
        video[t, 20:36, 4 + step * t:20 + step * t] = torch.tensor([200, 60, 30], dtype=torch.uint8)
    write_video(path, video)
    return path


def test_videos_alone_and_by_two_processes(score, capsys):
    """Three videos, shared by two processes: the same scores, and the same heat maps."""
    videos = [moving_square(f"{name}.mp4", step) for name, step in [("still", 0), ("slow", 1), ("fast", 2)]]
    flags = ["--video", *videos, "--prompt", "a red square moves right slowly", "--attention"]
    alone = score("one", *flags)
    assert [row["name"] for row in alone["scores"]] == ["still", "slow", "fast"] and "measures" not in alone
    assert "reward" in alone["reward_model"] and capsys.readouterr().out.count("'a red square moves right slowly'") == 3
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run([*torchrun, reward.__file__, *flags, "--output", "two"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert agrees(by_name(files.read_json("two/scores.json")), by_name(alone))
    for video in videos:
        maps = [read_video(f"{output}/attention_{video}") for output in ("one", "two")]
        assert maps[0].shape == (17, 64, 64, 3) and (maps[0].float() - maps[1].float()).abs().mean() < 0.5
        assert (maps[0].float() - read_video(video).float()).abs().max() > 60  # something is drawn over it
    assert agrees({"slow": by_name(score("three", "--video", "slow.mp4", "--prompt", "a red square moves right slowly"))["slow"]},
                  {"slow": by_name(alone)["slow"]})


def test_the_heat_map_lies_where_the_query_looks(monkeypatch):
    """One latent frame is four frames of video (the first is one), one token a square of 16 pixels."""
    pavrm = PAVRM(WanModel.from_pretrained(ROOT / "demo/model"), 1)
    token = torch.tensor([16 * 2 + 4 * 1 + 3])  # of the third latent frame, second row, last column
    monkeypatch.setattr(QueryAttention, "attend", lambda self, tokens: (None, F.one_hot(token, tokens.shape[1]).float()[:, None, None]))
    clip = {"latents": draw((16, 5, 8, 8), 0), "condition": None, "clip": None, "text_short": draw((3, 64), 1),
            "entry": {"source_id": "a", "shape": (16, 5, 8, 8)}}
    black = torch.zeros(17, 64, 64, 3, dtype=torch.uint8)
    hot = attention_video(pavrm, pavrm.query_attention, clip, black, [600], 0, "cpu")[..., 0] > 150  # (T, H, W)
    assert hot.flatten(1).any(1).nonzero().flatten().tolist() == [5, 6, 7, 8]
    rows, columns = hot[5].nonzero().unbind(1)
    assert 16 <= rows.min() and rows.max() < 32 and 48 <= columns.min() and hot[5, 24, 56]


def test_a_pool_without_a_query_looks_nowhere(score):
    PAVRM(WanModel.from_pretrained("demo/model"), 1, pool="mean").save_pretrained("mean")
    with pytest.raises(InputError, match="--attention shows where a query looks, and this reward model pools without one"):
        score("a", "--video", moving_square("a.mp4", 1), "--prompt", "a square", "--reward", "mean", "--attention")


@pytest.mark.parametrize("flags, message", [
    ([], "there is nothing to score, or too much; give either --video or --data"),
    (["--data", "demo/val/index.jsonl", "--video", "a.mp4"], "give either --video or --data"),
    (["--video", "a.mp4", "b.mp4"], "2 videos have 0 prompts; give one --prompt for all, or one each"),
    (["--video", "a.mp4", "--prompt", "a", "b"], "1 videos have 2 prompts"),
    (["--video", "a.mp4", "--prompt", "a"], "a.mp4 does not exist"),
    (["--data", "demo/val/index.jsonl", "--task", "beauty"], "--task beauty is no label"),
    (["--data", "demo/val/index.jsonl", "--reward", "demo/model"], "does not describe a reward model"),
])
def test_what_cannot_be_scored(score, flags, message):
    with pytest.raises(InputError, match=message):
        score("a", *flags)


@pytest.mark.parametrize("num_queries", [1, 3])
def test_published_files_are_converted(score, num_queries, capsys):
    """A directory with two blocks and no head under a config.json that counts three, and two files without prefixes."""
    pavrm = PAVRM(tiny(), 2, num_queries=num_queries)
    fill_({name: tensor for name, tensor in pavrm.state_dict().items() if not name.startswith("dit.")}, 5)
    config = pavrm.dit.config.official()
    assert config["num_layers"] == 3 and not any(name.startswith(("head.", "blocks.2")) for name in pavrm.dit.state_dict())
    files.save_weights("transformer", pavrm.dit.state_dict(), config)
    torch.save(pavrm.query_attention.state_dict(), "query_attention.pth"), torch.save(pavrm.mlp.state_dict(), "mlp.pth")
    main(["--convert", "transformer", "query_attention.pth", "mlp.pth", "--reward", "converted"])
    assert capsys.readouterr().out == "the reward model is in converted\n"
    loaded = PAVRM.from_pretrained("converted")
    assert len(loaded.dit.blocks) == 2 and loaded.tasks == ["motion_quality"]
    with torch.no_grad():
        assert torch.equal(loaded(**INPUTS), pavrm(**INPUTS))
    torch.save({f"mlp.{name}": tensor for name, tensor in pavrm.mlp.state_dict().items()}, "mlp.pth")
    with pytest.raises(InputError, match="mlp.pth is a checkpoint of another model: fc1.weight is missing"):
        main(["--convert", "transformer", "query_attention.pth", "mlp.pth", "--reward", "other"])
