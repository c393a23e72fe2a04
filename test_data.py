"""Video in and out, the list and its linter, encoding with tiny random models, the dataset and its order."""
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import av
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors import safe_open

import data
from clip import CLIPVisionModel
from data import Clips, Order, condition_input, encode_clips, label, read_list, read_video, write_video
from files import InputError, write_safetensors
from t5 import UMT5Encoder, encode_prompts
from vae import WanVAE

torch.set_num_threads(1)  # everything here is tiny: more threads only get in each other's way

COLOURS = torch.tensor([[250, 20, 20], [20, 240, 30], [10, 30, 250], [255, 255, 255], [0, 0, 0], [200, 120, 40]],
                       dtype=torch.uint8)


def coloured(count, height=32, width=48):
    """uint8 (count, H, W, 3): frame i is all of colour i, so that a decoded frame tells which one it was."""
    return COLOURS[torch.arange(count) % len(COLOURS)][:, None, None].expand(count, height, width, 3)


def which(video):
    """For each frame the number of the colour that its middle has."""
    middle = video[:, video.shape[1] // 2, video.shape[2] // 2].int()  # (T, 3)
    distance = (middle[:, None] - COLOURS.int()).abs().amax(-1)  # (T, colours)
    assert distance.amin(1).max() < 8
    return distance.argmin(1).tolist()


def write_otherwise(path, video, codec="libx264", rotation=0):
    """A video in another container or codec than ours."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        stream.set_display_rotation(rotation)
        for picture in video.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


@pytest.fixture
def clip(tmp_path):
    write_video(tmp_path / "a.mp4", coloured(12))
    return tmp_path / "a.mp4"


# ---------------------------------------------------------------------------------------------- video

def test_a_video_comes_back_as_it_was_written(clip):
    video = read_video(clip)
    assert video.shape == (9, 32, 48, 3) and video.dtype == torch.uint8  # 12 frames, cut to 1 + 4 * 2
    assert (video.int() - coloured(9).int()).abs().max() < 8
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.codec_context.colorspace, stream.average_rate, stream.frames) == (1, 16, 12)
    assert clip.read_bytes().index(b"moov") < clip.read_bytes().index(b"mdat")  # a browser can start at once
    assert [path.name for path in clip.parent.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("rate, expected", [
    (16, [0, 1, 2, 3, 4, 5, 0, 1, 2]), (32, [0, 2, 4, 0, 2]), (8, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
    (24, [0, 1, 3, 4, 0]), (30000 / 1001, [0, 1, 3, 5, 1])])
def test_at_each_time_the_frame_is_taken_that_is_shown_then(tmp_path, rate, expected):
    write_video(tmp_path / "a.mp4", coloured(12), fps=rate)
    frames = [which(read_video(tmp_path / "a.mp4", fps=16, frames=n)) for n in (1, 5, len(expected))]
    assert frames == [expected[:1], expected[:5], expected]


def test_rounded_timestamps_do_not_repeat_frames(tmp_path):
    write_otherwise(tmp_path / "a.mkv", coloured(6))  # an mkv stamps in milliseconds: 0, 63, 125, 188, ...
    assert which(read_video(tmp_path / "a.mkv")) == [0, 1, 2, 3, 4]


def test_the_clip_is_scaled_to_cover_the_size_and_cut_around_the_centre(tmp_path):
    video = torch.zeros(5, 64, 192, 3, dtype=torch.uint8)
    video[:, :, 64:128] = 255  # the middle third is white
    write_video(tmp_path / "a.mp4", video)
    assert read_video(tmp_path / "a.mp4", size=(32, 32)).float().mean() > 250
    wide = read_video(tmp_path / "a.mp4", size=(96, 16))[0].float().mean(-1)  # scaled to 96 x 32, 16 rows of it
    assert wide[:, 36:60].min() > 240 and wide[:, :28].max() < 15 and wide[:, 68:].max() < 15
    upscaled = read_video(tmp_path / "a.mp4", size=(80, 160))
    assert upscaled.shape == (5, 160, 80, 3) and upscaled.float().mean() > 250


def test_a_video_that_was_filmed_upright_is_read_upright(tmp_path):
    video = torch.zeros(5, 32, 48, 3, dtype=torch.uint8)
    video[:, :, 24:] = 255
    write_otherwise(tmp_path / "a.mp4", video, rotation=90)  # shown turned counterclockwise: the right half is up
    upright = read_video(tmp_path / "a.mp4").float()
    assert upright.shape == (5, 48, 32, 3) and upright[:, :20].mean() > 240 and upright[:, 28:].mean() < 15


def test_damaged_and_short_files_are_named(clip, tmp_path):
    write_video(tmp_path / "noise.mp4", torch.randint(256, (12, 32, 48, 3), dtype=torch.uint8))
    whole = (tmp_path / "noise.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:len(whole) * 2 // 3])
    with av.open(str(tmp_path / "noise.mp4")) as container:
        position = [packet.pos for packet in container.demux(video=0)][6]
    (tmp_path / "hole.mp4").write_bytes(whole[:position] + bytes(400) + whole[position + 400:])
    write_otherwise(tmp_path / "whole.avi", torch.randint(256, (48, 128, 128, 3), dtype=torch.uint8), "mpeg4")
    whole = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "last.avi").write_bytes(whole[:len(whole) * 95 // 100])  # its header does not tell the length
    (tmp_path / "text.mp4").write_text("this is no video " * 99)
    (tmp_path / "empty.mp4").touch()
    write_video(tmp_path / "short.mp4", coloured(3))
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name, message in [("cut.mp4", "stops after|damaged"), ("hole.mp4", "damaged"), ("last.avi", "damaged"),
                          ("text.mp4", "no video"), ("empty.mp4", "no video"), ("sound.mp4", "no video stream"),
                          ("missing.mp4", "does not exist"), ("short.mp4", "3 frames at 16 fps and needs 5")]:
        with pytest.raises(InputError, match=message) as error:
            read_video(tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(InputError, match="12 frames at 16 fps and needs 81"):
        read_video(clip, frames=81)
    with pytest.raises(InputError, match="1 \\+ 4n"):
        read_video(clip, frames=8)
    assert len(read_video(tmp_path / "cut.mp4", frames=1)) == 1  # the part that is needed is there


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(InputError, match="33x32 .*even"):
        write_video(tmp_path / "a.mp4", coloured(5, width=33))
    assert not list(tmp_path.iterdir())


def test_tensors_and_bytes_are_inverse():
    video = torch.arange(256, dtype=torch.uint8).reshape(4, 8, 8, 1).expand(4, 8, 8, 3)
    tensor = data.to_tensor(video)
    assert tensor.shape == (3, 4, 8, 8) and (tensor.min(), tensor.max()) == (-1, 1)
    assert torch.equal(data.to_uint8(tensor), video)
    assert data.to_uint8(torch.tensor([-1.7, 1.7]).view(1, 2, 1, 1)).flatten().tolist() == [0, 255]


@pytest.mark.parametrize("codec, name, layout", [("png", "50%d.png", "rgb24"), ("mjpeg", "a.jpg", "yuvj444p")])
def test_pictures_are_read(tmp_path, codec, name, layout):
    picture = coloured(1).clone()
    picture[:, :, 24:] = COLOURS[1]
    with open(tmp_path / name, "wb") as file, av.open(file, "w", format="image2pipe") as container:
        stream = container.add_stream(codec)
        stream.width, stream.height, stream.pix_fmt = 48, 32, layout
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture[0].numpy())))
        container.mux(stream.encode())
    image = data.read_image(tmp_path / name)
    assert image.shape == (3, 32, 48)
    assert (image[:, 5, 5] - data.to_tensor(picture)[:, 0, 5, 5]).abs().max() < 0.03
    assert (image[:, 5, 45] - data.to_tensor(picture)[:, 0, 5, 45]).abs().max() < 0.03
    assert data.read_image(tmp_path / name, (16, 16)).shape == (3, 16, 16)


# ---------------------------------------------------------------------------------------------- annotations

def test_the_three_kinds_of_list_give_the_same_entries(tmp_path):
    clips = [{"source_id": "one", "video_path": "v/a.mp4", "short_caption": "s", "long_caption": "l",
              "physics_quality": "good", "human_quality": 0, "blur_quality": None, "pair_id": 0},
             {"video": "/far/b.mp4", "prompt": "p, q", "text_alignment": 1}]
    (tmp_path / "a.json").write_text(json.dumps(clips))
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(clip) for clip in clips))
    (tmp_path / "a.csv").write_text("\ufeffvideo,source_id,short_caption,long_caption,prompt,physics_quality,"
                                    "human_quality,text_alignment,pair_id\nv/a.mp4,one,s,l,,good,poor,,0\n"
                                    '/far/b.mp4,,,,"p, q",,,1.0,\n', encoding="utf-8")
    none = dict.fromkeys(data.LABELS)
    expected = [{"source_id": "one", "video_path": str(tmp_path / "v/a.mp4"), "short_caption": "s",
                 "long_caption": "l", "labels": none | {"physics_quality": 1, "human_quality": 0}, "pair_id": "0"},
                {"source_id": "b", "video_path": "/far/b.mp4", "short_caption": "p, q",
                 "long_caption": "p, q", "labels": none | {"text_alignment": 1}, "pair_id": None}]
    for name, lines in [("a.json", (1, 2)), ("a.jsonl", (1, 3)), ("a.csv", (2, 3))]:
        assert read_list(tmp_path / name) == [{"line": line} | entry for line, entry in zip(lines, expected)]


def test_captions_stand_in_for_each_other(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"video": "a", "long_caption": "l", "short_caption": " "},
                                                 {"video": "b", "short_caption": "s", "long_caption": None}]))
    assert [(entry["short_caption"], entry["long_caption"]) for entry in read_list(tmp_path / "a.json")] == [
        ("l", "l"), ("s", "s")]


@pytest.mark.parametrize("name, content, message", [
    ("a.json", b"[{]", "a.json is not valid JSON"), ("a.json", b'{"video": "a.mp4"}', "no list"),
    ("a.json", b'["a.mp4"]', "one object"), ("a.jsonl", b'{}\n{"video"\n', "line 2 is not valid JSON"),
    ("a.csv", b"video,prompt\n", "no list"), ("a.csv", b"\xff\xfe", "UTF-8"), ("a.csv", None, "does not exist"),
    ("a.txt", b"", ".json, .jsonl or .csv")])
def test_a_list_that_cannot_be_read_is_reported(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_list(tmp_path / name)


def test_motion_quality_is_physics_and_human():
    cases = {(1, 1): 1, (1, 0): 0, (0, 1): 0, (0, 0): 0, (0, None): 0, (None, 0): 0, (1, None): None,
             (None, 1): None, (None, None): None, ("maybe", 1): None}
    for (physics, human), expected in cases.items():
        assert label({"physics_quality": physics, "human_quality": human}, "motion_quality") is expected
    assert label({"blur_quality": 0}, "blur_quality") == 0 and label({}, "blur_quality") is None
    with pytest.raises(InputError, match="sharpness is no task"):
        label({}, "sharpness")


def test_the_linter_prints_all_faults_and_the_balance(clip, tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("no video")
    write_video(tmp_path / "short.mp4", coloured(3))
    good = {"video_path": "a.mp4", "short_caption": "c", "physics_quality": 1, "human_quality": 1}
    (tmp_path / "a.json").write_text(json.dumps([
        good | {"source_id": "fine"}, good | {"source_id": "gone", "video_path": "gone.mp4"},
        good | {"source_id": "text", "video_path": "text.mp4"},
        good | {"source_id": "short", "video_path": "short.mp4"},
        good | {"source_id": "mute", "short_caption": " "},
        good | {"source_id": "unsure", "physics_quality": "maybe"},
        good | {"source_id": "typo", "fysics_quality": 1},
        good | {"source_id": "nested", "labels": {"blurr_quality": 1}},
        good | {"source_id": "half", "human_quality": None},
        good | {"source_id": "fine", "physics_quality": "poor"},
        good | {"source_id": "no", "video_path": None}, good | {"source_id": "up/../on"}]))
    assert data.main(["--check", str(tmp_path / "a.json"), "--task", "motion_quality"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for number, words in enumerate([
            "line 2 (gone): ... does not exist", "line 3 (text): ... no video", "line 4 (short): ... 3 frames",
            "line 5 (mute): ... empty", "line 6 (unsure): ... physics_quality is 'maybe'",
            "line 6 (unsure): ... motion_quality is not annotated",
            "line 7 (typo): ... fysics_quality is no label",
            "line 8 (nested): ... blurr_quality is no label", "line 9 (half): ... motion_quality is not annotated",
            "line 10 (fine): ... line 1 too", "line 11 (no): ... video_path is missing",
            "line 12 (up/../on): ... cannot name a file"]):
        start, words = words.split("... ")
        assert lines[number].startswith(start) and words in lines[number]
    assert lines[12] == "12 clips, 12 faults"
    assert [lines[i].split() for i in (14, 15, 18)] == [
        ["physics_quality", "10", "1", "1"], ["human_quality", "11", "0", "1"], ["motion_quality", "9", "1", "2"]]
    (tmp_path / "a.json").write_text(json.dumps([good]))
    assert data.main(["--check", str(tmp_path / "a.json")]) == 0
    assert data.main(["--check", str(tmp_path / "a.json"), "--frames", "13"]) == 1
    assert data.main(["--check", str(tmp_path / "a.json"), "--task", "blur_quality"]) == 1


# ---------------------------------------------------------------------------------------------- encoding

@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """{model type: directory} with tiny random weights in the official layout."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    t2v = root / "t2v"
    (t2v / "google/umt5-xxl").mkdir(parents=True)
    torch.save(WanVAE(dim=4).state_dict(), t2v / data.VAE_FILE)
    torch.save(UMT5Encoder(300, 16, 16, 32, 2, 2).state_dict(), t2v / data.T5_FILE)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red ball rolls left", "two balls bounce", "the cat sat", "镜头切换", "镜头晃动"]),
        model_prefix=str(t2v / "google/umt5-xxl/spiece"), vocab_size=300, hard_vocab_limit=False,
        byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2)
    (t2v / "config.json").write_text(json.dumps({"model_type": "t2v", "text_len": 32}))
    for kind in ("i2v", "flf2v"):
        (root / kind).mkdir()
        for file in t2v.iterdir():
            (root / kind / file.name).symlink_to(file)
        (root / kind / "config.json").unlink()
        (root / kind / "config.json").write_text(json.dumps({"model_type": kind, "text_len": 32}))
        state = CLIPVisionModel(8, 4, 80, 1, 2, 8).state_dict()
        torch.save(state, root / kind / data.CLIP_FILE)
    return {kind: root / kind for kind in ("t2v", "i2v", "flf2v")}


@pytest.fixture
def entries(tmp_path):
    write_video(tmp_path / "a.mp4", coloured(6))
    write_video(tmp_path / "b.mp4", coloured(6, height=48, width=32).flip(0))
    (tmp_path / "clips.json").write_text(json.dumps([
        {"video_path": "b.mp4", "short_caption": "a red ball", "physics_quality": 1},
        {"video_path": "a.mp4", "short_caption": "two balls", "long_caption": "two balls bounce",
         "pair_id": "p"}]))
    return read_list(tmp_path / "clips.json")


SETTINGS = {"size": (48, 32), "frames": 5, "fps": 16, "device": "cpu"}


def test_clips_are_encoded_for_each_kind_of_model(models, entries, tmp_path):
    for kind, tokens in [("t2v", None), ("i2v", 5), ("flf2v", 10)]:
        clips = Clips(encode_clips(entries, models[kind], tmp_path / kind, **SETTINGS))
        clips.check()
        upright, wide = clips.load(0), clips.load(1)
        assert (upright["latents"].shape, wide["latents"].shape) == ((16, 2, 6, 4), (16, 2, 4, 6))
        encoder = data.Encoder(models[kind], "cpu")
        video = data.to_tensor(read_video(entries[1]["video_path"], frames=5))[None]
        assert torch.equal(wide["latents"], encoder.video_encoder.encode(video)[0])
        short, long = encode_prompts(*encoder.text_encoder, ["two balls", "two balls bounce"])
        assert torch.equal(wide["text_short"], short) and torch.equal(wide["text_long"], long)
        assert wide["text_short"].dtype == torch.bfloat16 and wide["latents"].dtype == torch.float32
        assert torch.equal(upright["text_short"], upright["text_long"])
        if kind == "t2v":
            assert wide["condition"] is None and wide["clip"] is None
        else:
            given = video.clone()
            given[:, :, 1:(5 if kind == "i2v" else 4)] = 0
            assert torch.equal(wide["condition"], encoder.video_encoder.encode(given)[0])
            assert wide["clip"].shape == (tokens, 80) and wide["clip"].dtype == torch.bfloat16
            first = encoder.image_encoder(video[:, :, 0])[0]
            assert torch.allclose(wide["clip"][:5].float(), first, atol=0.02, rtol=0.02)
        prefix = {"t2v": "", "i2v": "镜头晃动，", "flf2v": "镜头切换，镜头晃动，"}[kind]
        empty, negative = encode_prompts(*encoder.text_encoder, ["", prefix + data.NEGATIVE_PROMPT])
        assert torch.equal(clips.prompts["empty"], empty) and torch.equal(clips.prompts["negative"], negative)
        assert empty.shape == (1, 16)


def test_the_two_experts_of_wan22_share_one_encoder(tmp_path):
    (tmp_path / "low_noise_model").mkdir()
    (tmp_path / "low_noise_model/config.json").write_text('{"model_type": "i2v"}')
    encoder = data.Encoder(tmp_path, "cpu")
    assert (encoder.given, encoder.has_clip, encoder.text_len) == ([0], False, 512)
    assert encoder.negative_prompt == data.NEGATIVE_PROMPT


def test_the_index_says_what_was_encoded_in_the_order_of_the_list(models, entries, tmp_path):
    index = encode_clips(entries, models["i2v"], tmp_path / "out", **SETTINGS)
    first, second = [json.loads(line) for line in index.read_text().splitlines()]
    assert (first["source_id"], second["source_id"], second["pair_id"]) == ("b", "a", "p")
    assert first["labels"] == dict.fromkeys(data.LABELS) | {"physics_quality": 1}
    assert (first["shape"], first["fps"], first["frames"], first["model_type"]) == ([16, 2, 6, 4], 16, 5, "i2v")
    assert first["file"] == "clips/b.safetensors" and first["short_caption"] == "a red ball"
    assert first["hashes"] == {"vae": data.fast_hash(models["i2v"] / data.VAE_FILE),
                               "t5": data.fast_hash(models["i2v"] / data.T5_FILE),
                               "clip": data.fast_hash(models["i2v"] / data.CLIP_FILE)}
    assert not (tmp_path / "out/clips").joinpath(".b.safetensors.new").exists()


def test_clips_are_encoded_alike_alone_and_together(models, entries, tmp_path):
    alone, together = (Clips(encode_clips(entries, models["i2v"], tmp_path / f"{n}", batch_size=n, **SETTINGS)) for n in (1, 2))
    for i in range(len(entries)):
        a, b = alone.load(i), together.load(i)
        for name in ("latents", "condition", "text_short", "text_long"):
            assert torch.allclose(a[name].float(), b[name].float(), atol=1e-5), name


def test_what_is_done_is_not_done_again(models, entries, tmp_path, monkeypatch):
    output, done = tmp_path / "out", []
    encode = data.Encoder.encode

    def counted(self, videos, captions):
        if len(done) == 1 and not output.joinpath("index.jsonl").exists() and "crash" not in done:
            done.append("crash")
            raise KeyboardInterrupt
        done.append(captions[0][0])
        return encode(self, videos, captions)

    monkeypatch.setattr(data.Encoder, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        encode_clips(entries, models["t2v"], output, **SETTINGS)
    assert not (output / "index.jsonl").exists()
    encode_clips(entries, models["t2v"], output, **SETTINGS)
    assert done == ["a red ball", "crash", "two balls"]
    with safe_open(output / "clips/a.safetensors", "pt") as tensors:
        before = tensors.get_tensor("latents")

    monkeypatch.setattr(data, "UMT5Encoder", None)  # nothing to do: no model is loaded
    entries[0]["labels"]["physics_quality"] = 0  # a changed label is only written down; settings are remembered
    clips = Clips(encode_clips(entries, models["t2v"], output, device="cpu"))
    assert len(done) == 3 and clips.entries[0]["labels"]["physics_quality"] == 0
    monkeypatch.undo()
    monkeypatch.setattr(data.Encoder, "encode", counted)

    entries[0]["short_caption"] = "the cat"  # another caption, another video: encoded again
    write_video(entries[1]["video_path"], coloured(6).flip(0))
    clips = Clips(encode_clips(entries, models["t2v"], output, **SETTINGS))
    assert done[3:] == ["the cat", "two balls"]
    assert not torch.equal(clips.load(1)["latents"], before)


def test_one_directory_holds_one_setting(models, entries, tmp_path):
    encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS)
    before = (tmp_path / "out/index.jsonl").read_bytes()
    for model, change, words in [("t2v", {"size": (32, 32)}, "size"), ("t2v", {"frames": 1}, "frames"),
                                 ("t2v", {"fps": 8}, "fps"), ("i2v", {}, "model_type and hashes")]:
        with pytest.raises(InputError, match=f"was encoded with other {words};"):
            encode_clips(entries, models[model], tmp_path / "out", **SETTINGS | change)
    assert (tmp_path / "out/index.jsonl").read_bytes() == before
    for file in (tmp_path / "out/clips").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="prompts.safetensors was encoded with other frames"):
        encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS | {"frames": 1})


def test_faults_stop_before_anything_is_encoded(models, entries, tmp_path):
    entries[1]["video_path"] = str(tmp_path / "gone.mp4")
    entries[0]["labels"]["human_quality"] = "maybe"
    with pytest.raises(InputError, match="(?s)2 faults.*line 1 .*'maybe'.*line 2 .*gone.mp4 does not exist"):
        encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="multiples of 16"):
        encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS | {"size": (40, 32)})
    (tmp_path / "config.json").write_text('{"model_type": "ti2v"}')
    with pytest.raises(InputError, match="is a ti2v model"):
        encode_clips(entries, tmp_path, tmp_path / "out", **SETTINGS)


def test_several_ranks_share_the_work(models, entries, tmp_path, monkeypatch):
    alone = encode_clips(entries, models["t2v"], tmp_path / "alone", **SETTINGS).read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    encode_clips(entries, models["t2v"], tmp_path / "shared", **SETTINGS)
    assert [file.name for file in (tmp_path / "shared").glob("**/*") if file.is_file()] == ["a.safetensors"]
    moment = (tmp_path / "shared/clips/a.safetensors").stat().st_mtime_ns
    monkeypatch.setenv("RANK", "0")
    assert encode_clips(entries, models["t2v"], tmp_path / "shared", **SETTINGS).read_bytes() == alone
    assert (tmp_path / "shared/clips/a.safetensors").stat().st_mtime_ns == moment

    def late(seconds):  # rank 0 waits for a clip that another rank has not written yet
        stored.rename(tmp_path / "shared/clips/a.safetensors")
    stored = (tmp_path / "shared/clips/a.safetensors").rename(tmp_path / "stored")
    monkeypatch.setattr(time, "sleep", late)
    assert encode_clips(entries, models["t2v"], tmp_path / "shared", **SETTINGS).read_bytes() == alone
    assert not stored.exists()


def test_weights_that_give_nan_are_reported(models, entries, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in models["t2v"].iterdir():
        (broken / file.name).symlink_to(file)
    state = torch.load(broken / data.VAE_FILE)
    state["conv1.bias"] = state["conv1.bias"] * float("nan")
    (broken / data.VAE_FILE).unlink()
    torch.save(state, broken / data.VAE_FILE)
    with pytest.raises(InputError, match="b.mp4 gave latents that are NaN"):
        encode_clips(entries, broken, tmp_path / "out", **SETTINGS)


def test_the_command_encodes_and_reports_in_one_sentence(models, entries, tmp_path, capsys):
    flags = ["--list", str(tmp_path / "clips.json"), "--model", str(models["t2v"]),
             "--output", str(tmp_path / "out")]
    assert not data.main([*flags, "--size", "48x32", "--frames", "5"])
    assert len(Clips(tmp_path / "out/index.jsonl")) == 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, data.__file__, *flags, "--frames", "81"],
                             env=environment, capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------- the dataset

def write_index(folder, tensors, **entry):
    write_safetensors(folder / "a.safetensors", tensors)
    entry = {"file": "a.safetensors", "source_id": "a", "short_caption": "s", "long_caption": "l", "pair_id": None,
             "labels": {"physics_quality": 1}, "shape": [16, 2, 4, 6], "model_type": "i2v"} | entry
    (folder / "index.jsonl").write_text(json.dumps(entry) + "\n")
    return Clips(folder / "index.jsonl")


def good_tensors():
    return {"latents": torch.randn(16, 2, 4, 6), "condition": torch.randn(16, 2, 4, 6), "clip": torch.randn(5, 80),
            "text_short": torch.randn(3, 8), "text_long": torch.randn(4, 8)}


def test_a_clip_that_cannot_be_used_is_named(tmp_path):
    tensors = good_tensors()
    clips = write_index(tmp_path, tensors)
    clips.check()
    loaded = clips.load(0)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert loaded["entry"] is clips.entries[0]

    def refused(message, clips, headers=True):
        for use in [lambda: clips.load(0), clips.check][:1 + headers]:  # check() sees what the headers tell
            with pytest.raises(InputError, match=message) as error:
                use()
            assert "clip a: " in str(error.value)

    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-10])
    refused("a.safetensors is damaged", clips)
    (tmp_path / "a.safetensors").unlink()
    refused("a.safetensors does not exist", clips)
    for name, value in [("latents", float("nan")), ("text_long", float("inf"))]:
        bad = tensors[name].clone()
        bad.view(-1)[3] = value
        refused(f"a.safetensors has NaN or infinite {name}", write_index(tmp_path, tensors | {name: bad}), False)
    refused("of the wrong shape", write_index(tmp_path, tensors, shape=[16, 2, 4, 4]))
    for name, shape in [("latents", (16, 3, 4, 6)), ("condition", (16, 1, 4, 6)), ("text_short", (1, 3, 8))]:
        refused(f"{name} of the wrong shape", write_index(tmp_path, tensors | {name: torch.zeros(shape)}))
    tensors.pop("condition")
    refused("condition is missing in .*a.safetensors", write_index(tmp_path, tensors))
    assert write_index(tmp_path, tensors, model_type="t2v").load(0)["condition"] is None
    with pytest.raises(InputError, match="physics_quality is 'maybe'"):
        write_index(tmp_path, tensors, labels={"physics_quality": "maybe"})
    with pytest.raises(InputError, match="prompts.safetensors does not exist"):
        clips.prompts
    for content in ("", '{"video": "a.mp4"}'):
        (tmp_path / "index.jsonl").write_text(content)
        with pytest.raises(InputError, match="no index of encoded clips"):
            Clips(tmp_path / "index.jsonl")


def test_clips_are_selected_by_what_they_are_annotated_for(tmp_path):
    write_index(tmp_path, good_tensors())
    entry = json.loads((tmp_path / "index.jsonl").read_text())
    labels = [{"physics_quality": 1, "human_quality": 1}, {"human_quality": 1}, {"physics_quality": 0}, {}]
    (tmp_path / "index.jsonl").write_text("\n".join(json.dumps(entry | {"labels": given}) for given in labels))
    clips = Clips(tmp_path / "index.jsonl")
    assert len(clips) == 4
    tasks = ("motion_quality", "human_quality", "blur_quality")
    assert [clips.select(task) for task in tasks] == [[0, 2], [0, 1], []]


def test_published_data_is_read_as_it_is(tmp_path, models, monkeypatch):
    rng = np.random.default_rng(0)
    shapes = {"latents": (1, 16, 2, 4, 6), "f1_black": (1, 16, 2, 4, 6), "masked": (1, 20, 2, 4, 6),
              "imgclip": (2, 5, 8), "short": (1, 3, 8), "long": (1, 4, 8)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    (tmp_path / "latents").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / f"latents/{name}.npy", array)
    metas = [{"source_id": "one", "short_caption": "s", "long_caption": "l", "physics_quality": "good",
              "human_quality": None, "vae_latent_path": "latents/latents.npy",
              "f1_black_path": "latents/f1_black.npy", "imgclip_path": "latents/imgclip.npy",
              "textshort_path": "latents/short.npy", "textlong_path": "latents/long.npy"},
             {"prompt": "p", "latents_path": str(tmp_path / "latents/latents.npy"),
              "image_embeds": "latents/imgclip.npy", "latents_condition_path": "latents/masked.npy",
              "text_en_path": "latents/long.npy"},
             {"source_id": "three", "video_vae_latent_path": "../latents/latents.npy",  # or beside the meta
              "save_textshort_path": "../latents/short.npy"}]
    (tmp_path / "meta").mkdir()
    for number, meta in enumerate(metas):
        (tmp_path / f"meta/{number}.json").write_text(json.dumps(meta))
    (tmp_path / "data.list").write_text("meta/0.json\nmeta/1.json\n\n" + str(tmp_path / "meta/2.json") + "\n")
    monkeypatch.chdir(tmp_path)  # metas name their arrays as seen from where the code ran
    clips = Clips(tmp_path / "data.list")
    clips.check()
    one, two, three = (clips.load(i) for i in range(3))
    for clip in (one, two, three):
        assert np.array_equal(clip["latents"], arrays["latents"][0])
    assert np.array_equal(one["condition"], arrays["f1_black"][0])
    assert two["condition"].shape == (20, 2, 4, 6) and three["condition"] is None and three["clip"] is None
    assert one["clip"].shape == (10, 8) and np.array_equal(one["clip"][5:], arrays["imgclip"][1])
    assert [len(clip["text_short"]) for clip in (one, two, three)] == [3, 4, 3]
    assert [len(clip["text_long"]) for clip in (one, two, three)] == [4, 4, 3]
    assert one["entry"]["labels"] == dict.fromkeys(data.LABELS) | {"physics_quality": 1}
    assert (one["entry"]["long_caption"], one["entry"]["shape"]) == ("l", (16, 2, 4, 6))
    assert (two["entry"]["short_caption"], two["entry"]["source_id"]) == ("p", "1")
    assert Clips(["meta/0.json", "meta/2.json"]).load(1)["entry"]["source_id"] == "three"

    assert data.main(["--list", "data.list", "--model", str(models["t2v"])]) == 0
    assert clips.prompts["empty"].shape == (1, 16)

    np.save(tmp_path / "latents/short.npy", np.array([{"an": "object"}], dtype=object))
    with pytest.raises(InputError, match="clip one: .*short.npy is damaged or no array"):
        clips.load(0)
    (tmp_path / "latents/long.npy").unlink()
    with pytest.raises(InputError, match="(?s)3 of 3 clips.*clip 1: .*long.npy does not exist"):
        clips.check()
    whole = (tmp_path / "latents/latents.npy").read_bytes()
    (tmp_path / "latents/latents.npy").write_bytes(whole[:-8])
    with pytest.raises(InputError, match="latents.npy is damaged"):
        Clips("data.list")
    (tmp_path / "meta/0.json").write_text("{}")
    with pytest.raises(InputError, match="0.json names no latents"):
        Clips("data.list")


def test_the_mask_marks_the_given_frames():
    condition = torch.randn(2, 16, 3, 4, 6)
    i2v, flf2v = condition_input(condition, "i2v"), condition_input(condition, "flf2v")
    assert i2v.shape == flf2v.shape == (2, 20, 3, 4, 6)
    assert torch.equal(i2v[:, 4:], condition) and torch.equal(flf2v[:, 4:], condition)
    assert i2v[0, :4, :, 0, 0].tolist() == [[1, 0, 0]] * 4
    assert flf2v[1, :4, :, 3, 5].tolist() == [[1, 0, 0]] * 3 + [[1, 0, 1]]
    assert condition_input(i2v, "i2v") is i2v
    with pytest.raises(InputError, match="t2v model takes no condition"):
        condition_input(condition, "t2v")


def test_a_batch_holds_what_the_model_takes():
    samples = [good_tensors() | {"entry": {"source_id": name}} for name in "ab"]

    text_dim = samples[0]["text_short"].shape[1]

    def collate(model_type, use_clip=False):
        return data.collate(samples, SimpleNamespace(model_type=model_type, use_clip=use_clip, text_dim=text_dim), "cpu")

    latents, condition = collate("t2v")
    assert torch.equal(latents[1], samples[1]["latents"]) and condition == {}
    assert collate("i2v")[1].keys() == {"y"}
    condition = collate("flf2v", use_clip=True)[1]
    expected = torch.stack([samples[0]["condition"], samples[1]["condition"]])
    assert torch.equal(condition["y"], condition_input(expected, "flf2v"))
    assert torch.equal(condition["clip_fea"], torch.stack([samples[0]["clip"], samples[1]["clip"]]))
    samples[1]["clip"] = None
    with pytest.raises(InputError, match="clip b was encoded without clip, which this i2v model needs"):
        collate("i2v", use_clip=True)
    samples[0]["condition"] = None
    with pytest.raises(InputError, match="clip a was encoded without condition"):
        collate("i2v")


def test_each_epoch_draws_every_clip_in_a_new_order():
    shapes = [(16, 2, 4, 6)] * 7 + [[16, 2, 6, 4]] * 4 + [(16, 1, 4, 6)]
    order = Order(shapes, batch_size=3, seed=5)
    assert order.batches_per_epoch == 3 + 2 + 1
    epochs = [[order[6 * epoch + i] for i in range(6)] for epoch in range(4)]
    for batches in epochs:
        assert all(len(batch) == 3 for batch in batches)
        assert all(len({tuple(shapes[i]) for i in batch}) == 1 for batch in batches)
        drawn = [i for batch in batches for i in batch]
        assert set(drawn) == set(range(12))
        assert sorted(drawn.count(i) for i in range(7)) == [1] * 5 + [2] * 2  # nine places for seven clips
        assert drawn.count(11) == 3
    assert len({str(batches) for batches in epochs}) == 4
    assert len({[11 in batch for batch in batches].index(True) for batches in epochs}) > 1  # batches are shuffled
    again = Order(shapes, batch_size=3, seed=5)
    assert again[17] == epochs[2][5] and [again[i] for i in range(6)] == epochs[0]  # from the number alone
    assert [Order(shapes, 3, seed=6)[i] for i in range(6)] != epochs[0]


def test_an_order_may_leave_clips_out():
    order = Order([(1,)] * 9, batch_size=2, seed=0, subset=[1, 4, 6, 8])
    assert order.batches_per_epoch == 2 and sorted(order[0] + order[1]) == [1, 4, 6, 8]
    with pytest.raises(InputError, match="no clip is left"):
        Order([(1,)], batch_size=2, seed=0, subset=[])
