"""The tiny world: pixels tell its truth, a seed always draws the same clip, committed files fit together."""
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import data
import demo
import sample
import train_pavrm
import train_prfl
from annotations import list_faults, read_list, video_faults
from clips import Clips, label_of
from encode import Encoder
from model import WanModel
from reward import PAVRM
from t5 import SPIECE_FILE, T5_FILE, Tokenizer
from testdata.golden import draw, fill_
from vae import VAE_FILE, WanVAE
from video import read_video

torch.set_num_threads(1)  # everything here is tiny, and more threads are slower

COMMITTED = Path(demo.__file__).parent / "demo"


# ------------------------------------------------------------------------------ clips and truth

@pytest.mark.parametrize("fault", [None, *demo.FAULTS])
def test_each_fault_is_told_from_pixels(fault):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        words = demo.draw_words(rng)
        assert demo.good_motion(demo.draw_clip(rng, words, fault)) == (fault is None), (seed, words)


def test_the_truth_agrees_with_the_labels_of_drawn_clips():
    clips = [demo.single(seed) for seed in range(200)]
    assert [demo.good_motion(video) for _, _, video, _, _ in clips] == [fault is None for *_, fault in clips]
    count = {fault: sum(clip[-1] == fault for clip in clips) for fault in (None, *demo.FAULTS)}
    assert 70 < count[None] < 130 and min(count.values()) > 10


def test_a_pair_is_one_caption_well_and_badly():
    for seed in range(20):
        good, bad = demo.pair(seed)
        assert good[1] == bad[1] and good[0] != bad[0] and good[3] == bad[3]
        assert demo.good_motion(good[2]) and not demo.good_motion(bad[2])


def test_the_truth_knows_faults_that_are_not_drawn():
    video = demo.pair(0)[0][2]
    assert demo.good_motion(video) and demo.good_motion(video[::-1])  # the other way is as good
    ground = np.broadcast_to(np.uint8([24, 24, 32]), video.shape)
    gone = video.copy()
    gone[9] = ground[9]
    twice = demo.pair(1)[0][2]
    shape = np.abs(video.astype(int) - ground).max(-1, keepdims=True) > 20
    two = np.where(shape, video, np.roll(twice, 24, axis=2))
    dot = ground.copy()
    for frame in range(17):
        dot[frame, 30:35, 10 + 2 * frame:15 + 2 * frame] = 255
    black, white, jumps_back = np.zeros_like(video), np.full_like(video, 255), video[np.r_[0:8, 0:9]]
    for bad in (ground, gone, two, dot, black, white, jumps_back):
        assert not demo.good_motion(bad)


def test_a_clip_shows_what_its_words_say():
    for seed in range(30):
        _, _, video, words, _ = demo.pair(seed)[0]
        assert video.shape == (17, 64, 64, 3) and video.dtype == np.uint8
        shape = np.abs(video.astype(int) - [24, 24, 32]).max(-1) > 20  # (T, H, W)
        (x0, y0), (x1, y1) = (np.argwhere(shape[t]).mean(0)[::-1] for t in (0, 1))
        along = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[words["direction"]]
        step = np.array(along) * {"slowly": 1, "quickly": 2}[words["speed"]]  # pixels per frame
        assert np.allclose([x1 - x0, y1 - y0], step, atol=0.3), words
        channel = np.argmax(np.median(video[0][shape[0]], axis=0))
        assert channel == ["red", "green", "blue"].index(words["colour"])
        # The filled part of the surrounding rectangle is 1, pi / 4 or 1 / 2, less the soft edge.
        places = np.argwhere(shape[0])
        height, width = places.max(0) - places.min(0) + 1
        filled = shape[0].sum() / (height * width)
        lowest, highest = {"square": (0.9, 1), "disc": (0.7, 0.85), "triangle": (0, 0.65)}[words["shape"]]
        assert lowest < filled <= highest, words


def test_a_seed_always_draws_the_same_clip():
    clips = [demo.single(seed) for seed in range(20)]
    for seed, (_, _, video, words, fault) in enumerate(clips):
        _, _, video_again, *rest = demo.single(seed)
        assert np.array_equal(video, video_again) and rest == [words, fault]
    assert len({video.tobytes() for _, _, video, _, _ in clips}) == 20


def test_captions():
    words = dict(colour="red", shape="disc", direction="left", speed="slowly", fault="torn")
    assert demo.captions(words) == ("a red disc moves left slowly",
                                    "a red disc moves left slowly across a dark ground, keeping its shape")


def test_clips_on_disk_have_true_labels(tmp_path):
    clips = [demo.single(seed) for seed in range(100, 116)] + demo.pair(5)
    demo.make_clips(tmp_path, clips)
    entries = read_list(tmp_path / "clips.json")
    assert not any(list_faults(entries))
    assert not any(video_faults(entry, demo.FRAMES, demo.FPS)[0] for entry in entries)
    labels = [label_of(entry["labels"], "motion_quality") for entry in entries]
    assert {0, 1} == set(labels) == {entry["labels"]["human_quality"] for entry in entries}
    for (source_id, pair_id, _, words, fault), entry, good in zip(clips, entries, labels, strict=True):
        assert (entry["source_id"], entry["pair_id"]) == (source_id, pair_id)
        assert (entry["short_caption"], entry["long_caption"]) == demo.captions(words)
        assert entry["labels"]["physics_quality"] == (fault not in ("frozen", "jitter"))
        video = read_video(entry["video_path"]).numpy()
        assert demo.good_motion(video) == bool(good), words  # after compression too


# ------------------------------------------------------------------------------ the models

def test_folding_the_latents_scale_changes_their_numbers_and_no_picture():
    vae = WanVAE(dim=4).requires_grad_(False)
    fill_(vae.state_dict(), 0)
    video = draw((10, 3, 5, 16, 16), 1)
    before, decoded = vae.encode(video), vae.decode(vae.encode(video))
    demo.fold_latent_scale(vae, video)
    after = vae.encode(video)
    mean, std = after.mean((0, 2, 3, 4)), after.std((0, 2, 3, 4))
    assert mean.abs().max() < 1e-4 and (std - 1).abs().max() < 1e-4
    assert (before.std((0, 2, 3, 4)) - 1).abs().max() > 0.3  # before, they were different
    assert torch.allclose(vae.decode(after), decoded, atol=1e-4 * decoded.abs().max().item())


def test_the_text_encoder_tells_all_captions_apart(tmp_path):
    demo.make_text_encoder(tmp_path)
    tokenizer = Tokenizer(tmp_path / SPIECE_FILE, demo.CONFIG.text_len)
    words = [dict(colour=c, shape=s, direction=d, speed=v) for c in demo.COLOURS for s in demo.SHAPES
             for d in demo.DIRECTIONS for v in demo.SPEEDS]
    ids = [tokenizer.encode(caption) for each in words for caption in demo.captions(each)]
    assert len(words) == 72 and len({tuple(row) for row in ids}) == 144
    assert not any(3 in row for row in ids)  # nothing is unknown
    assert max(map(len, ids)) < demo.CONFIG.text_len  # nothing is cut
    before = (tmp_path / T5_FILE).stat().st_size
    demo.make_text_encoder(tmp_path)
    assert (tmp_path / T5_FILE).stat().st_size == before


def test_before_and_after_side_by_side(tmp_path):
    videos = [np.full((17, 64, 64, 3), 10 * n, np.uint8) for n in range(16)]
    demo.side_by_side(videos, videos[::-1], tmp_path)
    video = read_video(tmp_path / "before_after.mp4", fps=8)
    assert video.shape == (17, 256, 528, 3)
    places = [(32, 32), (32, 96), (224, 224), (32, 304)]
    assert [round(video[0, y, x].float().mean().item(), -1) for y, x in places] == [0, 10, 150, 150]
    with av.open(str(tmp_path / "before_after.png")) as picture:
        stream = picture.streams.video[0]
        assert (stream.width, stream.height) == (2 * 5 * 64 + 16, 8 * 64)


def test_the_demos_flags_are_the_scripts_flags(monkeypatch):
    monkeypatch.chdir(COMMITTED.parent)  # where demo.py runs the scripts
    assert train_pavrm.parse_args(demo.PAVRM_FLAGS).steps == 400
    assert train_pavrm.parse_args([*demo.PAVRM_FLAGS, "--steps", "1200"]).steps == 1200
    args = train_prfl.parse_args(demo.PRFL_FLAGS)
    assert (args.steps, args.solver_steps, args.sample_guidance, args.rollout_guidance) == (100, 12, 1, 1)


def test_building_uses_flags_that_exist(tmp_path, monkeypatch):
    """Run `build` up to the transformer, and parse the flags of its training."""
    parsed = []

    def command(script, *words):
        if script == "train_prfl.py":
            parsed.append(train_prfl.parse_args([str(word) for word in words]))
            raise KeyboardInterrupt

    for name in ("train_vae", "make_clips", "encode", "make_text_encoder"):
        monkeypatch.setattr(demo, name, lambda *_: None)
    monkeypatch.setattr(demo, "command", command)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo/model").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        demo.build()
    assert (parsed[0].phases, parsed[0].skip_poor, parsed[0].steps) == (["sft"], "none", demo.LEGS[0][1])
    written = json.loads((tmp_path / "demo/model/sampling.json").read_text())
    assert written == json.loads((COMMITTED / "model/sampling.json").read_text())
    assert json.loads((tmp_path / "demo/model/config.json").read_text()) == demo.CONFIG.official()


def test_the_table_by_hand():
    values = {"before": torch.tensor([0.0, 0.2, 0.4, 0.2]), "after": torch.tensor([0.5, 0.7, 0.9, 0.7])}
    row, change, error = demo.table_row("reward", values)
    assert row == "| reward | 0.200 ± 0.082 | 0.700 ± 0.082 | 0.500 ± 0.000 |"
    assert change == pytest.approx(0.5) and error == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------ what is committed

def test_the_committed_model_loads():
    encoder = Encoder(COMMITTED / "model", "cpu")
    assert json.loads((COMMITTED / "model/sampling.json").read_text())["size"] == [demo.SIZE, demo.SIZE]
    assert WanModel.from_pretrained(COMMITTED / "model").config == demo.CONFIG
    video = torch.from_numpy(np.stack([demo.single(seed)[2] for seed in range(4)]))  # (4, T, H, W, 3)
    video = video.permute(0, 4, 1, 2, 3) / 127.5 - 1
    vae = WanVAE.from_pretrained(COMMITTED / "model" / VAE_FILE)
    latents = vae.encode(video)
    assert latents.shape == (4, 16, 5, 8, 8) and abs(latents.std() - 1) < 0.2 and abs(latents.mean()) < 0.2
    assert (vae.decode(latents) - video).abs().mean() < 0.05
    short, long = encoder.text(demo.captions(demo.single(0)[3]))
    assert short.shape[1] == demo.TEXT_DIM and len(short) < len(long)


def test_the_committed_reward_model_loads():
    pavrm = PAVRM.from_pretrained(COMMITTED / "reward")
    assert list(pavrm.labels) == ["motion_quality"] and pavrm.dit.config.text_dim == demo.TEXT_DIM
    logit = pavrm(torch.zeros(1, 16, 5, 8, 8), torch.tensor([500.0]), [torch.zeros(3, demo.TEXT_DIM)])
    assert logit.isfinite().all()


@pytest.mark.parametrize("part", ["train", "val"])
def test_the_committed_clips_are_those_of_the_committed_model(part):
    clips = Clips(COMMITTED / part / "index.jsonl")
    clips.check()
    assert {label_of(entry["labels"], "motion_quality") for entry in clips.entries} == {0, 1}
    assert clips.load(0)["latents"].shape == (16, 5, 8, 8)
    assert clips.prompts["negative"].shape[1] == demo.TEXT_DIM
    hashes = Encoder(COMMITTED / "model", "cpu").settings()["hashes"]
    assert all(entry.get("hashes") == hashes for entry in clips.entries)


def test_the_committed_videos_have_no_faults(tmp_path):
    flags = ["--check", str(COMMITTED / "clips/clips.json"), "--label", "motion_quality",
             "--model", str(COMMITTED / "model"), "--output", str(tmp_path / "new")]
    assert data.main(flags) == 0


def test_every_script_runs_without_a_flag_on_what_is_committed():
    scripts = [(train_pavrm, "model train val"), (train_prfl, "model reward data"), (sample, "model")]
    for script, names in scripts:
        for name in names.split():
            value = getattr(script.parse_args([]), name)
            for path in value if isinstance(value, list) else [value]:
                assert (COMMITTED.parent / path).exists(), (script.__name__, name)


def test_what_is_committed_is_small():
    assert sum(file.stat().st_size for file in COMMITTED.rglob("*") if file.is_file()) <= 8e6
