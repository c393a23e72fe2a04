"""The command: scores, measures, heat maps, conversion of published files, what is refused."""
import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import files
import score
from clips import label_of
from files import InputError
from model import WanModel
from reward import PAVRM, QueryAttention
from t5 import UMT5Encoder
from testdata.golden import draw, fill_
from testdata.helpers import ROOT, tiny, torchrun
from vae import WanVAE
from video import read_video, write_video


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(output, *flags): run the command on the CPU in a directory with demo/; returns its scores.json."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to(ROOT / "demo")

    def run(output, *flags):
        try:
            score.main([*flags, "--output", output])
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return files.read_json(Path(output, "scores.json"))

    return run


def index_of(clips, path, **changes):
    """Write an index of some of the demo's held-out clips: even numbers are good, odd numbers poor ones."""
    by_label = {1: [], 0: [], None: []}
    for line in (ROOT / "demo/val/index.jsonl").read_text().splitlines():
        entry = json.loads(line)
        entry["file"] = str(ROOT / "demo/val" / entry["file"])
        by_label[label_of(entry["labels"], "motion_quality")].append(entry)
    lines = [json.dumps(by_label[1 - i % 2][i // 2] | changes) for i in clips]
    Path(path).write_text("\n".join(lines))
    return path


def by_name(result):
    """{clip: [reward, reward at the first timestep, at the second, ...]} of a scores.json."""
    return {row["name"]: [row["reward"], *row["rewards"]["motion_quality"]] for row in result["scores"]}


def agree(a, b):
    return a.keys() == b.keys() and all(a[name] == pytest.approx(b[name], abs=1e-5) for name in a)


# ------------------------------------------------------------------------------ encoded clips

def test_scores_do_not_depend_on_batch_size_or_order(run, capsys):
    first = run("a", "--data", index_of([0, 1, 2, 5], "clips.jsonl"), "--batch_size", "1")
    scores = by_name(first)
    assert first["timesteps"] == [201, 400, 600, 800] and first["reward_model"] == "demo/reward"
    assert len(scores) == 4 and len({round(row[0], 4) for row in scores.values()}) == 4
    for reward, *at_timesteps in scores.values():
        assert reward == pytest.approx(sum(at_timesteps) / 4) and 0 < reward < 1
    printed = capsys.readouterr().out
    assert all(f"{row[0]:.3f}  {name}  '" in printed for name, row in scores.items())
    assert printed.splitlines()[-1] == "written: a/scores.json"

    assert agree(by_name(run("b", "--data", "clips.jsonl", "--batch_size", "3")), scores)
    assert agree(by_name(run("c", "--data", index_of([5, 2, 0, 1], "other.jsonl"))), scores)
    one = by_name(run("d", "--data", index_of([2], "one.jsonl"), "--timesteps", "600", "201"))
    (name, (_, at_600, at_201)), = one.items()
    assert [at_201, at_600] == pytest.approx([scores[name][1], scores[name][3]], abs=1e-5)
    assert not agree(by_name(run("e", "--data", "clips.jsonl", "--seed", "1")), scores)


def test_measures_of_labelled_clips(run, capsys):
    result = run("a", "--data", index_of([0, 1, 2, 5], "clips.jsonl"), "--timesteps", "201", "800")
    entries = [json.loads(line) for line in Path("clips.jsonl").read_text().splitlines()]
    good = {entry["source_id"]: label_of(entry["labels"], "motion_quality") for entry in entries}
    assert set(good.values()) == {0, 1}
    for place, t in enumerate(("201", "800")):
        right = [(row[1 + place] > 0.5) == good[name] for name, row in by_name(result).items()]
        assert result["measures"]["motion_quality"][t]["accuracy"] == sum(right) / 4
    assert "motion_quality, timestep  201:  accuracy" in capsys.readouterr().out
    unlabelled = run("b", "--data", index_of([0, 1], "none.jsonl", labels={}))
    assert "measures" not in unlabelled and "timestep" not in capsys.readouterr().out


def test_a_weighted_reward(run):
    torch.manual_seed(0)
    two = PAVRM(WanModel.from_pretrained("demo/model"), 1, ["physics_quality", "text_alignment"])
    two.save_pretrained("two")
    flags = ["--reward", "two", "--labels", "text_alignment=0.3", "physics_quality=2"]
    result = run("a", "--data", index_of([0, 1], "clips.jsonl"), *flags)
    for row in result["scores"]:
        physics, text = (sum(row["rewards"][name]) / 4 for name in ("physics_quality", "text_alignment"))
        assert row["reward"] == pytest.approx(2 * physics + 0.3 * text, abs=1e-5)
    assert list(result["measures"]) == ["physics_quality"]  # the demo's clips do not have the other label


def test_scores_are_drawn(run, capsys):
    pytest.importorskip("matplotlib")
    run("a", "--data", index_of([0, 1], "clips.jsonl"), "--timesteps", "201", "800", "--plot")
    assert Path("a/scores.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-1] == "written: a/scores.png"


# ------------------------------------------------------------------------------ videos

def moving_square(path, step):
    """Write a video of 17 frames in which a square moves to the right, `step` pixels per frame."""
    video = torch.full((17, 64, 64, 3), 40, dtype=torch.uint8)
    for t in range(17):
        video[t, 20:36, 4 + step * t:20 + step * t] = torch.tensor([200, 60, 30], dtype=torch.uint8)
    write_video(path, video)
    return path


def test_videos_by_one_process_and_by_two(run, capsys):
    """Two processes share three videos: the same scores, and the same heat maps."""
    videos = [moving_square(f"{name}.mp4", step) for name, step in [("still", 0), ("slow", 1), ("fast", 2)]]
    prompt = ["--prompt", "a red square moves right slowly"]
    flags = ["--video", *videos, *prompt, "--attention"]
    alone = run("one", *flags)
    assert [row["name"] for row in alone["scores"]] == ["still", "slow", "fast"] and "measures" not in alone
    assert capsys.readouterr().out.count("'a red square moves right slowly'") == 3

    torchrun(2, score.__file__, *flags, "--output", "two")
    assert agree(by_name(files.read_json("two/scores.json")), by_name(alone))
    for video in videos:
        one, two = (read_video(f"{output}/attention_{video}").float() for output in ("one", "two"))
        assert one.shape == (17, 64, 64, 3) and (one - two).abs().mean() < 0.5
        assert (one - read_video(video).float()).abs().max() > 60  # something is drawn over it

    slow = by_name(run("three", "--video", "slow.mp4", *prompt))
    assert agree(slow, {"slow": by_name(alone)["slow"]})  # with the same noise as among others


def test_videos_of_one_name_are_numbered(run):
    for directory, step in [("a", 0), ("b", 2)]:
        Path(directory).mkdir()
        moving_square(f"{directory}/square.mp4", step)
    moving_square("c.mp4", 1)
    flags = ["--video", "a/square.mp4", "b/square.mp4", "c.mp4", "--prompt", "one", "two", "three"]
    result = run("out", *flags, "--timesteps", "600")
    found = [(row["name"], row["prompt"]) for row in result["scores"]]
    assert found == [("square-1", "one"), ("square-2", "two"), ("c", "three")]


def test_what_encodes_leaves_memory_before_the_reward_model_is_loaded(run, monkeypatch):
    """The text encoder above all, which takes 11 GB."""
    made, alive = {}, []

    def watch(cls):
        load = cls.from_pretrained

        def watched(*args, **kwargs):
            if cls is PAVRM:
                alive.append({name: reference() for name, reference in made.items()})
            model = load(*args, **kwargs)
            made[cls.__name__] = weakref.ref(model)
            return model

        monkeypatch.setattr(cls, "from_pretrained", watched)

    for cls in (UMT5Encoder, WanVAE, PAVRM):
        watch(cls)
    gc.disable()  # so that reference counts alone decide
    try:
        run("a", "--video", moving_square("a.mp4", 1), "--prompt", "a square", "--timesteps", "600")
    finally:
        gc.enable()
    assert alive == [{"UMT5Encoder": None, "WanVAE": None}]


# ------------------------------------------------------------------------------ where the model looks

def test_the_heat_map_lies_where_the_query_looks(monkeypatch):
    """One latent frame is four frames of video (the first is one), one token a square of 16 pixels."""
    pavrm = PAVRM(WanModel.from_pretrained(ROOT / "demo/model"), 1)
    token = torch.tensor([16 * 2 + 4 * 1 + 3])  # of the third latent frame, second row, last column

    def attend(self, tokens):
        return None, F.one_hot(token, tokens.shape[1]).float()[:, None, None]

    monkeypatch.setattr(QueryAttention, "attend", attend)
    clip = {"latents": draw((16, 5, 8, 8), 0), "condition": None, "clip": None,
            "text_short": draw((3, 64), 1), "entry": {"source_id": "a", "shape": (16, 5, 8, 8)}}
    black = torch.zeros(17, 64, 64, 3, dtype=torch.uint8)
    heat = score.attention_video(pavrm, pavrm.query_attention, clip, black, [600], 0, "cpu")
    hot = heat[..., 0] > 150                                           # (T, H, W)
    assert hot.flatten(1).any(1).nonzero().flatten().tolist() == [5, 6, 7, 8]
    rows, columns = hot[5].nonzero().unbind(1)
    assert 16 <= rows.min() and rows.max() < 32 and 48 <= columns.min() and hot[5, 24, 56]


def test_a_pool_without_a_query_looks_nowhere(run):
    PAVRM(WanModel.from_pretrained("demo/model"), 1, pool="mean").save_pretrained("mean")
    flags = ["--video", moving_square("a.mp4", 1), "--prompt", "a", "--reward", "mean", "--attention"]
    with pytest.raises(InputError, match="--attention shows where a query looks, .* pools without one"):
        run("a", *flags)


# ------------------------------------------------------------------------------ refusals, conversion

@pytest.mark.parametrize("flags, message", [
    ([], "exactly one of two inputs is needed; give either --video or --data"),
    (["--data", "demo/val/index.jsonl", "--video", "a.mp4"], "give either --video or --data"),
    (["--video", "a.mp4", "b.mp4"], "2 videos have 0 prompts; give one --prompt for all, or one each"),
    (["--video", "a.mp4", "--prompt", "a", "b"], "1 videos have 2 prompts"),
    (["--video", "a.mp4", "--prompt", "a"], "a.mp4 does not exist"),
    (["--data", "demo/val/index.jsonl", "--labels", "beauty"], "--labels beauty: .* motion_quality"),
    (["--data", "demo/val/index.jsonl", "--reward", "demo/model"], "config.json: pavrm is missing; expected"),
    (["--data", "gone.jsonl"], "gone.jsonl does not exist"),
    (["--data", "demo/val/index.jsonl", "--attention"], "--attention needs each clip's video"),
    (["--convert", "transformer", "query.pth", "mlp.pth"], "--convert would replace the tiny world's reward"),
])
def test_what_cannot_be_scored(run, flags, message):
    with pytest.raises(InputError, match=message):
        run("a", *flags)
    assert not Path("a/scores.json").exists()


@pytest.mark.parametrize("num_queries", [1, 3])
def test_published_files_are_converted(run, num_queries, capsys):
    """A directory with two blocks and no head, whose config.json counts three; two files without prefixes."""
    inputs = dict(x=draw((2, 16, 2, 4, 4), 1), t=torch.tensor([500.0, 900.0]),
                  context=[draw((3, 8), 2), draw((5, 8), 3)])
    pavrm = PAVRM(tiny(), 2, num_queries=num_queries)
    fill_({name: tensor for name, tensor in pavrm.state_dict().items() if not name.startswith("dit.")}, 5)
    config = pavrm.dit.config.official()
    assert config["num_layers"] == 3
    assert not any(name.startswith(("head.", "blocks.2")) for name in pavrm.dit.state_dict())
    files.save_weights("transformer", pavrm.dit.state_dict(), config)
    torch.save(pavrm.query_attention.state_dict(), "query_attention.pth")
    torch.save(pavrm.mlp.state_dict(), "mlp.pth")
    score.main(["--convert", "transformer", "query_attention.pth", "mlp.pth", "--reward", "converted"])
    assert capsys.readouterr().out == "the reward model is in converted\n"
    loaded = PAVRM.from_pretrained("converted")
    assert len(loaded.dit.blocks) == 2 and loaded.labels == ["motion_quality"]
    with torch.no_grad():
        assert torch.equal(loaded(**inputs), pavrm(**inputs))

    torch.save({"queries": torch.zeros(3)}, "other.pth")
    with pytest.raises(InputError, match=r"other.pth: queries is .3.; expected a list of 2"):
        score.main(["--convert", "transformer", "other.pth", "mlp.pth", "--reward", "other"])
    torch.save({f"mlp.{name}": tensor for name, tensor in pavrm.mlp.state_dict().items()}, "mlp.pth")
    with pytest.raises(InputError, match="mlp.pth is a checkpoint of another model: fc1.weight is missing"):
        score.main(["--convert", "transformer", "query_attention.pth", "mlp.pth", "--reward", "other"])


def test_scores_that_are_not_finite_are_not_written(run, tmp_path):
    shutil.copytree(ROOT / "demo/reward", tmp_path / "reward")
    state = load_file(tmp_path / "reward/pavrm.safetensors")
    state["mlp.fc2.weight"] = torch.full_like(state["mlp.fc2.weight"], 3e38)  # finite, and too large
    save_file(state, tmp_path / "reward/pavrm.safetensors")
    with pytest.raises(InputError, match="clip .*: its scores are NaN or infinite; look at the weights"):
        run("out", "--data", index_of([0], "clips.jsonl"), "--reward", "reward")
    assert not (tmp_path / "out").exists()
