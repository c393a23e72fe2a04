"""The tiny world of fuzz.py: its commands, each right as it stands, and the files that they read."""
import io
import json
import os
import random
import sys
from contextlib import redirect_stdout
from typing import NamedTuple
from unittest import mock

import av
import numpy as np
import sentencepiece
import torch
import torch.distributed as dist

import data
import demo
import files
import label
import lora
import monitor  # noqa: F401  imported once, before the forks
import plot
import sample
import score
import train_pavrm
import train_prfl
from clip import CLIP_FILE, CLIPVisionModel
from t5 import SPIECE_FILE, T5_FILE, UMT5Encoder
from testdata.golden import draw
from testdata.helpers import brightening, fill_pavrm, fill_vae, lora_pairs, tiny, write_lora
from tools import bench
from video import write_video

SCRIPTS = {"train_prfl": train_prfl, "train_pavrm": train_pavrm, "sample": sample, "score": score,
           "data": data, "label": label, "plot": plot, "lora": lora, "bench": bench, "demo": demo}


class Command(NamedTuple):
    """A command of the world. Its results begin with one of `writes`; it must change no other file."""
    line: str
    writes: tuple = ("out",)

    @property
    def argv(self):
        return self.line.split()


PRFL = ("--model t2v --reward reward --data clips/index.jsonl --skip_poor none --batch_size 2 "
        "--accumulation 1 --solver_steps 2 --steps 1 --output out")
RESUME = f"{PRFL} --samples 1 --output run --steps 2 --resume"
PAVRM = ("--model t2v --train clips/index.jsonl --val clips/index.jsonl --batch_size 2 --steps 1 "
         "--num_blocks 1 --eval_timesteps 600 --output out")
BENCH = "--dit tiny --size 32x32 --frames 5 --repeats 1"
COMMANDS = {
    "train_prfl": Command(f"{PRFL} --samples 0"),
    "train_prfl samples": Command(f"{PRFL} --samples 1 --sample_every 1"),
    "train_prfl lora": Command(f"{PRFL} --samples 0 --lora_rank 2 --lora_targets q "
                               "--lora_from lora/q.safetensors"),
    "train_prfl rwr": Command(f"{PRFL} --samples 0 --phases rwr"),
    "train_prfl sharded": Command(f"{PRFL} --samples 0 --model sharded"),
    "train_prfl published": Command(f"{PRFL} --samples 0 --data published/p.list"),
    "train_prfl resume": Command(f"{RESUME} --sample_every 0", ("run",)),
    "train_prfl resume samples": Command(f"{RESUME} --sample_every 1", ("run",)),
    "train_pavrm": Command(PAVRM),
    "train_pavrm pairs": Command(f"{PAVRM} --loss bt --batch_size 1"),
    "train_pavrm lora": Command(f"{PAVRM} --lora_rank 2"),
    "sample": Command("--model t2v"),
    "sample image": Command("--model i2v --image image.png"),
    "sample best": Command("--model t2v --reward reward --best_of 2 --drop_at 1"),
    "sample prompts": Command("--model t2v --prompts prompts.txt"),
    "sample output": Command("--model t2v --output out"),
    "sample many": Command("--model t2v --output made --count 2", ("made",)),
    "score": Command("--data clips/index.jsonl --reward reward --timesteps 600 --output out"),
    "score video": Command("--video a.mp4 --prompt ball --model t2v --reward reward --timesteps 600 "
                           "--output out"),
    "score convert": Command("--convert t2v convert/query.pth convert/mlp.pth --reward out"),
    "data": Command("--list list.json --model t2v --output out"),
    "data image": Command("--list list.json --model i2v --output out"),
    "data jsonl": Command("--list list.jsonl --model t2v --output out"),
    "data csv": Command("--list list.csv --model t2v --output out"),
    "data again": Command("--list list.json --model t2v --output encoded", ("encoded",)),
    "data check": Command("--check list.json --label physics_quality --model t2v --frames 5"),
    "label": Command("list.json --port 0", ("list.json",)),
    "plot": Command("run", ("run/dashboard.png",)),
    "plot pavrm": Command("pavrm", ("pavrm/dashboard.png",)),
    "plot scores": Command("scores/scores.json", ("scores/scores.png",)),
    "lora": Command("--merge t2v lora/q.safetensors=0.5 --output out"),
    "bench": Command(f"forward {BENCH}"),
    "bench lora": Command(f"gradient {BENCH} --lora_rank 2"),
    "bench prfl": Command(f"prfl {BENCH} --k 0 --solver_steps 2"),
    "bench sample": Command(f"sample {BENCH} --solver_steps 2"),
    "bench encode": Command(f"encode {BENCH} --vae_dim 4 --video a.mp4"),
    "bench plan": Command("--plan prfl --dit 1.3B"),
    "demo": Command("--output out"),
}


def script_of(command):
    return SCRIPTS[command.split()[0]]


# ------------------------------------------------------------------------------ files

def read_document(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


def write_document(path, value):
    if path.suffix == ".jsonl" and isinstance(value, list):
        path.write_text("".join(json.dumps(line) + "\n" for line in value))
    else:
        path.write_text(json.dumps(value))


def make_world(root):
    """Write tiny models, clips, lists and runs into the directory `root`."""
    torch.manual_seed(0)
    torch.cuda.is_available = lambda: False
    make_models(root)
    make_clips(root)
    make_runs(root)


def make_models(root):
    """Models for text and for images, one in several files, a reward model, and its published form."""
    sizes = {"text_dim": 16, "text_len": 32, "num_layers": 1}
    models = {"t2v": tiny(**sizes), "i2v": tiny(**sizes, model_type="i2v", in_dim=36, use_clip=False)}
    for kind, model in models.items():
        model.save_pretrained(root / kind)
        fill_vae(root / kind)
        torch.save(UMT5Encoder(300, 16, 16, 32, 2, 2).state_dict(), root / kind / T5_FILE)
        (root / kind / SPIECE_FILE).parent.mkdir(parents=True)
        files.write_json(root / kind / "sampling.json",
                         {"size": [48, 32], "frames": 5, "fps": 16, "solver_steps": 2, "shift": 5.0,
                          "guidance": 2.0, "prompt": ["a red ball"], "negative_prompt": "grey"})
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a red ball rolls left", "two balls bounce"]), vocab_size=300,
            model_prefix=str((root / kind / SPIECE_FILE).with_suffix("")), hard_vocab_limit=False,
            byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2)
    torch.save(CLIPVisionModel(8, 4, 80, 1, 2, 8).state_dict(), root / "i2v" / CLIP_FILE)
    with mock.patch("files.SHARD_BYTES", 200_000):
        models["t2v"].save_pretrained(root / "sharded")
    layers = ["blocks.0.self_attn.q", "blocks.0.cross_attn.q"]
    (root / "lora").mkdir()
    write_lora(root / "lora/q.safetensors", lora_pairs(layers, root / "t2v", rank=2))
    pavrm = fill_pavrm(models["t2v"].config, 1, 3, 4)
    pavrm.save_pretrained(root / "reward")
    (root / "convert").mkdir()
    torch.save(pavrm.query_attention.state_dict(), root / "convert/query.pth")
    torch.save(pavrm.mlp.state_dict(), root / "convert/mlp.pth")


def make_clips(root):
    """Two clips, a pair: encoded, in our form and in the published one; as videos with lists of them."""
    states = {name: draw((2, 16), i).bfloat16() for i, name in enumerate(["empty", "negative"])}
    lines, entries, metas = [], [], []
    for i, name in enumerate("ab"):
        tensors = {"latents": draw((16, 2, 4, 4), 10 + i), "text_short": draw((2, 16), 20 + i).bfloat16(),
                   "text_long": draw((5, 16), 30 + i).bfloat16()}
        files.write_safetensors(root / f"clips/{name}.safetensors", tensors)
        entry = {"source_id": name, "short_caption": "a ball", "long_caption": "a red ball", "pair_id": "p"}
        labels = {"physics_quality": i, "human_quality": 1}
        lines.append({"file": f"{name}.safetensors", **entry, "labels": labels, "shape": [16, 2, 4, 4],
                      "fps": 16, "frames": 5, "size": [32, 32]})
        entries.append({"video_path": f"{name}.mp4", **entry, **labels})
        metas.append({**entry, **labels, "vae_latent_path": f"{name}_latents.npy",
                      "textshort_path": f"{name}_short.npy", "textlong_path": f"{name}_long.npy"})
        (root / "published").mkdir(exist_ok=True)
        for part in ("latents", "text_short", "text_long"):
            np.save(root / f"published/{name}_{part.removeprefix('text_')}.npy", tensors[part][None].float())
        write_video(root / f"{name}.mp4", brightening(12))
        files.write_json(root / f"published/{name}.json", metas[-1])
    for folder in ("clips", "published"):
        files.write_safetensors(root / folder / "prompts.safetensors", states)
    for path, value in [("clips/index.jsonl", lines), ("list.json", entries), ("list.jsonl", entries)]:
        write_document(root / path, value)
    rows = [",".join(entries[0]), *(",".join(map(str, entry.values())) for entry in entries)]
    (root / "list.csv").write_text("\n".join(rows) + "\n")
    (root / "published/p.list").write_text("a.json\nb.json\n")
    (root / "random.bin").write_bytes(random.Random(0).randbytes(1000))
    (root / "prompts.txt").write_text("a red ball\ntwo balls\n")
    av.VideoFrame.from_ndarray(brightening(2)[1].numpy()).save(root / "image.png")


def make_runs(root):
    """What the scripts write: a run that can go on, one of PAVRM, scores, videos, encoded clips."""
    os.chdir(root)
    for script, line in [(train_prfl, f"{PRFL} --samples 1 --sample_every 1 --output run --save_every 1"),
                         (train_pavrm, f"{PAVRM} --output pavrm"),
                         (score, "--data clips/index.jsonl --reward reward --output scores"),
                         (sample, "--model t2v --output made"),
                         (data, "--list list.json --model t2v --output encoded"),
                         (plot, "run scores/scores.json"), (bench, f"sample {BENCH} --solver_steps 2")]:
        sys.argv = [f"{script.__name__}.py"]
        with redirect_stdout(io.StringIO()):
            script.main(line.split())
        if dist.is_initialized():
            dist.destroy_process_group()
    for name in ("run/model", "run/dashboard.png", "pavrm/checkpoints", "pavrm/reward"):  # no case needs them
        files.remove(root / name)
    (root.parent / "modules").write_text("\n".join(sys.modules))  # what they have imported on their way
