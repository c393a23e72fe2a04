"""Clips are encoded with tiny random models."""
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import annotations
import encode
from clip import CLIP_FILE
from clips import ANNOTATIONS, Clips
from encode import Encoder, encode_clips
from files import InputError, write_safetensors
from t5 import T5_FILE, encode_prompts
from testdata.helpers import brightening
from vae import VAE_FILE
from video import read_video, to_tensor, write_video

torch.set_num_threads(1)  # everything here is tiny: more threads only get in each other's way

SETTINGS = {"size": (48, 32), "frames": 5, "fps": 16, "device": "cpu"}


@pytest.fixture
def checked(monkeypatch):
    """The names of the videos that were decoded to be checked, in a list that grows."""
    names = []
    check = annotations.check_video

    def watched(path, *rest):
        names.append(Path(path).name)
        return check(path, *rest)

    monkeypatch.setattr(annotations, "check_video", watched)
    return names


@pytest.mark.parametrize("kind, tokens", [("t2v", None), ("i2v", 5), ("flf2v", 10)])
def test_clips_are_encoded_for_each_kind_of_model(models, entries, tmp_path, kind, tokens):
    clips = Clips(encode_clips(entries, models[kind], tmp_path / "out", **SETTINGS))
    clips.check()
    upright, wide = clips.load(0), clips.load(1)
    assert (upright["latents"].shape, wide["latents"].shape) == ((16, 2, 6, 4), (16, 2, 4, 6))
    encoder = Encoder(models[kind], "cpu")
    video = to_tensor(read_video(entries[1]["video_path"], frames=5))[None]
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
    empty, negative = encode_prompts(*encoder.text_encoder, ["", prefix + encode.NEGATIVE_PROMPT])
    assert torch.equal(clips.prompts["empty"], empty) and torch.equal(clips.prompts["negative"], negative)
    assert empty.shape == (1, 16)


def test_the_two_experts_of_wan22_share_one_encoder(tmp_path):
    (tmp_path / "low_noise_model").mkdir()
    (tmp_path / "low_noise_model/config.json").write_text('{"model_type": "i2v"}')
    encoder = Encoder(tmp_path, "cpu")
    assert (encoder.given, encoder.has_clip, encoder.text_len) == ([0], False, 512)
    assert encoder.negative_prompt == encode.NEGATIVE_PROMPT


def test_the_index_says_what_was_encoded_in_the_order_of_the_list(models, entries, tmp_path):
    index = encode_clips(entries, models["i2v"], tmp_path / "out", **SETTINGS)
    first, second = [json.loads(line) for line in index.read_text().splitlines()]
    assert (first["source_id"], second["source_id"], second["pair_id"]) == ("b", "a", "p")
    assert first["labels"] == dict.fromkeys(ANNOTATIONS) | {"physics_quality": 1}
    assert (first["shape"], first["fps"], first["frames"]) == ([16, 2, 6, 4], 16, 5)
    assert first["model_type"] == "i2v"
    assert first["file"] == "clips/b.safetensors" and first["short_caption"] == "a red ball"
    assert first["hashes"] == {"vae": encode.fast_hash(models["i2v"] / VAE_FILE),
                               "t5": encode.fast_hash(models["i2v"] / T5_FILE),
                               "clip": encode.fast_hash(models["i2v"] / CLIP_FILE)}
    assert not (tmp_path / "out/clips").joinpath(".b.safetensors.new").exists()


def test_clips_are_encoded_alike_alone_and_together(models, entries, tmp_path):
    alone = Clips(encode_clips(entries, models["i2v"], tmp_path / "1", batch_size=1, **SETTINGS))
    together = Clips(encode_clips(entries, models["i2v"], tmp_path / "2", batch_size=2, **SETTINGS))
    for i in range(len(entries)):
        a, b = alone.load(i), together.load(i)
        for name in ("latents", "condition", "text_short", "text_long"):
            assert torch.allclose(a[name].float(), b[name].float(), atol=1e-5), name


def test_what_is_done_is_not_done_again(models, entries, tmp_path, monkeypatch):
    output, done = tmp_path / "out", []
    real = Encoder.encode

    def counted(self, videos, captions):
        if len(done) == 1 and not output.joinpath("index.jsonl").exists() and "crash" not in done:
            done.append("crash")
            raise KeyboardInterrupt
        done.append(captions[0][0])
        return real(self, videos, captions)

    monkeypatch.setattr(Encoder, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        encode_clips(entries, models["t2v"], output, **SETTINGS)
    assert not (output / "index.jsonl").exists()
    encode_clips(entries, models["t2v"], output, **SETTINGS)
    assert done == ["a red ball", "crash", "two balls"]
    with safe_open(output / "clips/a.safetensors", "pt") as tensors:
        before = tensors.get_tensor("latents")

    monkeypatch.setattr(encode, "UMT5Encoder", None)  # nothing to do: no model is loaded
    entries[0]["labels"]["physics_quality"] = 0  # a new label is only written down; settings are remembered
    clips = Clips(encode_clips(entries, models["t2v"], output, device="cpu"))
    assert len(done) == 3 and clips.entries[0]["labels"]["physics_quality"] == 0
    monkeypatch.undo()
    monkeypatch.setattr(Encoder, "encode", counted)

    entries[0]["short_caption"] = "the cat"  # another caption, another video: encoded again
    write_video(entries[1]["video_path"], brightening(6).flip(0))
    clips = Clips(encode_clips(entries, models["t2v"], output, **SETTINGS))
    assert done[3:] == ["the cat", "two balls"]
    assert not torch.equal(clips.load(1)["latents"], before)


def test_only_what_is_not_encoded_yet_is_checked(models, entries, tmp_path, checked):
    encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS)
    assert checked == ["b.mp4", "a.mp4"]
    encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS)
    entries[1]["short_caption"] = "the cat"
    encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS)
    assert checked == ["b.mp4", "a.mp4", "a.mp4"]
    encode_clips(entries, models["t2v"], tmp_path / "elsewhere", **SETTINGS)
    assert checked[3:] == ["b.mp4", "a.mp4"]


def test_clips_that_are_encoded_already_may_have_faults_too(models, entries, tmp_path):
    """Their captions, labels, ids and paths are checked again."""
    encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS)
    before = (tmp_path / "out/index.jsonl").read_bytes()
    entries[0]["labels"]["physics_quality"] = "maybe"
    with pytest.raises(InputError, match="has 1 faults, nothing was encoded:\n  line 1 .*'maybe'"):
        encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS)
    Path(entries[1]["video_path"]).unlink()
    with pytest.raises(InputError, match="(?s)has 2 faults.*line 1 .*'maybe'.*line 2 .*a.mp4 does not exist"):
        encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS)
    assert (tmp_path / "out/index.jsonl").read_bytes() == before


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
    entries[0]["source_id"] = "long" * 99  # a name that no file can have
    with pytest.raises(InputError, match="(?s)3 faults.*line 1 .*cannot name a file"):
        encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="a size of 40x32 .* multiples of 16"):
        encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS | {"size": (40, 32)})
    (tmp_path / "config.json").write_text('{"model_type": "ti2v"}')
    with pytest.raises(InputError, match="is a ti2v model"):
        encode_clips(entries, tmp_path, tmp_path / "out", **SETTINGS)


@pytest.mark.parametrize("file, name, sentence", [
    (VAE_FILE, "conv1.weight", "b.mp4 gave latents that are NaN"),
    (T5_FILE, "norm.weight", "gave text states that are NaN")])
def test_weights_that_give_nan_are_reported(models, entries, tmp_path, file, name, sentence):
    """The weights themselves are finite, or they would not be loaded."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for other in models["t2v"].iterdir():
        (broken / other.name).symlink_to(other)
    state = torch.load(broken / file)
    state[name] = torch.full_like(state[name], 3e38)
    (broken / file).unlink()
    torch.save(state, broken / file)
    with pytest.raises(InputError, match=sentence):
        encode_clips(entries, broken, tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out/index.jsonl").exists()


def test_a_file_that_encoding_did_not_write_is_not_trusted(models, entries, tmp_path):
    index = encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS)
    file = tmp_path / "out/clips/a.safetensors"
    with safe_open(file, "pt") as tensors:
        header, rest = tensors.metadata(), {"text_short": tensors.get_tensor("text_short")}
    before = index.read_bytes()
    write_safetensors(file, rest, header)  # it says what it should, and has no latents: encoded again
    encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS)
    assert index.read_bytes() == before
    Clips(index).check()
    for said in ("{", "[]", '{"settings": 5}', '{"settings": {"size": "48x32", "frames": 5, "fps": 16}}'):
        write_safetensors(file, rest, {"made_from": said})
        with pytest.raises(InputError, match="the header of .*a.safetensors"):
            encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS)
    assert index.read_bytes() == before


def test_an_encoder_leaves_memory_when_it_is_not_needed(models):
    """At once: the text encoder takes 11 GB beside the models that come next."""
    encoder = Encoder(models["t2v"], "cpu")
    encoder.text(["two balls", "two balls"])
    text_encoder, tokenizer = encoder.text_encoder
    gone = weakref.ref(text_encoder)
    del text_encoder, tokenizer
    gc.disable()  # so that it must go without it
    try:
        del encoder.text_encoder
        assert gone() is None
        states = encoder.text(["two balls"])  # known: the model is not loaded again
        assert "text_encoder" not in encoder.__dict__ and states[0].shape[1] == 16

        encoder.text(["the cat sat"])
        gone = weakref.ref(encoder.text_encoder[0])
        del encoder
        assert gone() is None
    finally:
        gc.enable()


def test_the_states_of_a_prompt_are_kept_but_not_of_all(models, monkeypatch):
    encoded = []
    real = encode.encode_prompts
    monkeypatch.setattr(encode, "encode_prompts", lambda *a: encoded.append(a[2][0]) or real(*a))
    encoder = Encoder(models["t2v"], "cpu")
    prompts = [str(n) for n in range(1001)]
    first, again, *_ = encoder.text(["0", "0", *prompts[1:1000]])
    assert torch.equal(first, again) and first is not again and encoded == prompts[:1000]
    encoder.text(["1000", "0"])
    assert encoded[1000:] == ["1000", "0"] and len(encoder.states) == 1000


def test_odd_file_names_do_not_spoil_the_index(models, entries, tmp_path):
    """Names that are not UTF-8 reach Python with half characters."""
    odd = tmp_path / "caf\udce9"
    odd.mkdir()
    entries[0]["video_path"] = str(Path(entries[0]["video_path"]).rename(odd / "b.mp4"))
    clips = Clips(encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS))
    assert clips.entries[0]["video_path"] == str(odd / "b.mp4")
    entries[0]["source_id"] = "caf\udce9"
    with pytest.raises(InputError, match=r"line 1 \('caf\\udce9'\): source_id cannot name a file"):
        encode_clips(entries, models["t2v"], tmp_path / "out", **SETTINGS)
