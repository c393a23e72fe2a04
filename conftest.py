"""Fixtures that several test files need. Plain helpers are in testdata/helpers.py."""
import copy
import json
import shutil
import signal

import pytest
import torch
import torch.distributed as dist

import files
from annotations import read_list
from testdata.golden import draw
from testdata.helpers import ROOT, SHAPE, brightening, fill_pavrm, tiny, write_index
from video import write_video


@pytest.fixture(scope="session")
def world_files(tmp_path_factory):
    """A directory with a tiny model, a reward model and eight encoded clips, and the lines of their index."""
    root = tmp_path_factory.mktemp("world")
    tiny().save_pretrained(root / "model")
    fill_pavrm(tiny().config, 2, 3, 4).save_pretrained(root / "reward")
    states = {name: draw((2, 8), i).bfloat16() for i, name in enumerate(["empty", "negative"])}
    files.write_safetensors(root / "clips/prompts.safetensors", states)
    lines = []
    for i in range(8):
        files.write_safetensors(root / f"clips/{i}.safetensors",
                                {"latents": draw(SHAPE, 10 + i),
                                 "text_short": draw((2, 8), 20 + i).bfloat16(),
                                 "text_long": draw((5, 8), 30 + i).bfloat16()})
        lines.append({"file": f"{i}.safetensors", "source_id": str(i), "short_caption": "a",
                      "long_caption": "b", "labels": {"physics_quality": i % 2, "human_quality": 1},
                      "shape": list(SHAPE), "fps": 16})
    return root, lines


@pytest.fixture
def world(world_files, tmp_path, monkeypatch):
    """A copy of `world_files`, which is the current directory during the test. The value: the index's lines.

    Everything runs on the CPU, whatever the machine has.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    root, lines = world_files
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    lines = copy.deepcopy(lines)
    write_index(lines)
    yield lines
    for number in (signal.SIGTERM, signal.SIGUSR1):  # the training scripts take these over
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def quick(world, monkeypatch):
    """The world without checkpoints, which cost time and have no part in most tests."""
    monkeypatch.setattr("records.Checkpoints.save", lambda *_: None)
    return world


@pytest.fixture
def pairs(quick):
    """The quick world with four pairs: 1 is better than 0, 3 better than 2, ..."""
    for i, line in enumerate(quick):
        line["pair_id"] = f"pair {i // 2}"
    write_index(quick)
    return quick


@pytest.fixture
def several_labels(quick):
    """The quick world with three labels (`helpers.SEVERAL`), the second and third missing on some clips."""
    for i, line in enumerate(quick):
        line["labels"]["text_alignment"] = [1, None, 0][i % 3]
        line["labels"]["blur_quality"] = [None, None, 0, 1][i % 4]
    write_index(quick)
    return quick


# ------------------------------------------------------------------------------ the models that encode

@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """{model type: directory} with a tiny random VAE, text encoder and image encoder in the official layout.

    The tests of encoding and of sampling use them.
    """
    import sentencepiece

    from clip import CLIP_FILE, CLIPVisionModel
    from t5 import SPIECE_FILE, T5_FILE, UMT5Encoder
    from vae import VAE_FILE, WanVAE

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    t2v = root / "t2v"
    (t2v / SPIECE_FILE).parent.mkdir(parents=True)
    torch.save(WanVAE(dim=4).state_dict(), t2v / VAE_FILE)
    torch.save(UMT5Encoder(300, 16, 16, 32, 2, 2).state_dict(), t2v / T5_FILE)
    sentences = ["a red ball rolls left", "two balls bounce", "the cat sat", "镜头切换", "镜头晃动"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str((t2v / SPIECE_FILE).with_suffix("")),
        vocab_size=300, hard_vocab_limit=False, byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        minloglevel=2)
    (t2v / "config.json").write_text(json.dumps({"model_type": "t2v", "text_len": 32}))
    for kind in ("i2v", "flf2v"):
        (root / kind).mkdir()
        for file in t2v.iterdir():
            if file.name != "config.json":
                (root / kind / file.name).symlink_to(file)
        (root / kind / "config.json").write_text(json.dumps({"model_type": kind, "text_len": 32}))
        torch.save(CLIPVisionModel(8, 4, 80, 1, 2, 8).state_dict(), root / kind / CLIP_FILE)
    return {kind: root / kind for kind in ("t2v", "i2v", "flf2v")}


@pytest.fixture
def entries(tmp_path):
    """A list of two clips, b upright and a wide; its file is clips.json."""
    write_video(tmp_path / "a.mp4", brightening(6))
    write_video(tmp_path / "b.mp4", brightening(6, height=48, width=32).flip(0))
    (tmp_path / "clips.json").write_text(json.dumps([
        {"video_path": "b.mp4", "short_caption": "a red ball", "physics_quality": 1},
        {"video_path": "a.mp4", "short_caption": "two balls", "long_caption": "two balls bounce",
         "pair_id": "p"}]))
    return read_list(tmp_path / "clips.json")
