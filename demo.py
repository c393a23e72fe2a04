"""The tiny world: a world small enough to train in on a laptop, with a known truth about good motion.

A clip shows one coloured shape that moves across a dark ground: 17 frames of 64 x 64. A known part of the clips moves
badly (frozen, jittering, torn or changing its shape), so labels are truth, and `good_motion` measures the same from
pixels alone, which no model ever sees.
"""
import argparse
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import sentencepiece
import torch
from einops import rearrange
from torch import nn
from tqdm import trange

import parallel
from data import T5_FILE, VAE_FILE, Clips, to_uint8, write_video
from files import InputError, remove, write_json, written_whole
from model import WanConfig, WanModel
from reward import PAVRM
from score import REWARD_TIMESTEPS
from solver import TrainingSchedule, UniPC, add_noise, walk
from t5 import UMT5Encoder
from vae import MEAN, STD, WanVAE

SIZE, FRAMES, FPS = 64, 17, 16
GROUND = np.array([24, 24, 32]) / 255
COLOURS = {"red": (230, 60, 50), "green": (70, 200, 90), "blue": (80, 130, 240)}
SHAPES = ("disc", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 1.0, "quickly": 2.0}  # pixels a frame
TEXT_DIM = 64
FAULTS = ("frozen", "jitter", "torn", "morph")
CONFIG = WanConfig(model_type="t2v", dim=112, ffn_dim=320, freq_dim=64, in_dim=16, out_dim=16, num_heads=4, num_layers=6,
                   text_len=32, text_dim=TEXT_DIM)

LEGS = [(1e-3, 2750), (3e-4, 750), (6e-5, 500)]  # learning rate and steps of the transformer's training
PAIRS, HELD_OUT, SAMPLES = 448, 48, 64
PAVRM_FLAGS = "--steps 400 --batch_size 32 --lr 2e-4 --head_lr 5e-4 --eval_every 400 --save_every 400".split()
# The published reward weight is 0.1. Here 1 does better, and 10 shows reward hacking: see the README.
PRFL_FLAGS = ("--steps 100 --batch_size 16 --accumulation 1 --lr 1e-4 --reward_weight 1 --rollout_steps 12 --guidance 1 "
              "--sample_every 50 --save_every 100").split()


# ---------------------------------------------------------------------------------------------- clips

def mask(shape, x, y, radius):
    """Coverage (SIZE, SIZE) in [0, 1] of a shape centred at (x, y), its edge one pixel soft."""
    v, u = np.mgrid[:SIZE, :SIZE] + 0.5
    u, v = u - x, v - y
    if shape == "disc":
        outside = np.hypot(u, v) - radius
    elif shape == "square":
        outside = np.maximum(abs(u), abs(v)) - 0.89 * radius  # about the disc's area
    else:
        outside = np.maximum(v - 0.67 * radius, abs(u) * 0.894 - v * 0.447 - 0.67 * radius)
    return np.clip(0.5 - outside, 0, 1)


def draw_words(rng):
    return {name: str(rng.choice(list(choices))) for name, choices in
            [("colour", COLOURS), ("shape", SHAPES), ("direction", DIRECTIONS), ("speed", SPEEDS)]}


def draw_clip(rng, words, fault=None):
    """One clip of these words (colour, shape, direction, speed) as uint8 (FRAMES, SIZE, SIZE, 3)."""
    colour, shape, direction, speed = words.values()
    radius = rng.uniform(8, 10)
    step = np.array(DIRECTIONS[direction]) * SPEEDS[speed]
    time = np.arange(FRAMES)[:, None] - (FRAMES - 1) / 2
    path = SIZE / 2 + rng.uniform(-4, 4, 2) + time * step             # (FRAMES, 2)
    radii, shapes, tear = np.full(FRAMES, radius), [shape] * FRAMES, np.zeros(FRAMES)
    if fault == "frozen":
        path[:] = path[rng.integers(FRAMES)]
    elif fault == "jitter":
        path += rng.choice([-1, 1], (FRAMES, 2)) * rng.uniform(2.5, 4.5, (FRAMES, 2))
    elif fault == "torn":  # the upper and the lower half part from each other
        tear = np.linspace(0, rng.choice([-1, 1]) * rng.uniform(7, 11), FRAMES)
    elif fault == "morph":  # the shape swells or shrinks while it turns into another
        radii = radius * np.linspace(1, rng.choice([0.55, 1.5]), FRAMES)
        other = rng.choice([s for s in SHAPES if s != shape])
        shapes = [shape] * (FRAMES // 2) + [other] * (FRAMES - FRAMES // 2)
    video = np.empty((FRAMES, SIZE, SIZE, 3))
    rows = np.arange(SIZE)[:, None] + 0.5
    for frame, (x, y) in enumerate(path):
        upper = mask(shapes[frame], x - tear[frame], y, radii[frame]) * (rows < y)
        lower = mask(shapes[frame], x + tear[frame], y, radii[frame]) * (rows >= y)
        cover = (upper + lower)[..., None]
        video[frame] = GROUND * (1 - cover) + np.array(COLOURS[colour]) / 255 * cover
    return (video * 255).round().astype(np.uint8)


def captions(words):
    short = "a {colour} {shape} moves {direction} {speed}".format(**words)
    return short, short + " across a dark ground, keeping its shape"


def single(seed):
    """The clip of a seed, half of which move badly: (source_id, pair_id, video, words, fault)."""
    rng = np.random.default_rng(seed)
    fault = str(rng.choice(FAULTS)) if rng.random() < 0.5 else None
    words = draw_words(rng)
    return str(seed), None, draw_clip(rng, words, fault), words, fault


def pair(seed):
    """Two clips of one caption, of which the second moves badly."""
    rng = np.random.default_rng(seed)
    words = draw_words(rng)
    return [(f"{seed}{side}", str(seed), draw_clip(rng, words, fault), words, fault)
            for side, fault in (("a", None), ("b", str(rng.choice(FAULTS))))]


# ---------------------------------------------------------------------------------------------- the truth

def good_motion(video):
    """Whether the shape in a clip, uint8 (T, H, W, 3), moves well, told from its pixels alone.

    The shape is what differs from the ground; per frame its area, its centre and its spread about the centre are
    measured. Good: always there, goes somewhere, at a steady pace, keeps its size, stays in one piece. Each threshold
    lies between the good clips and the nearest bad ones, as they are drawn: displacement 16 against 0 pixels,
    unsteadiness 0 against 8.7, area ratio 1 against 1.6, spread 0.20 against 0.32.
    """
    distance = np.abs(video / 255.0 - GROUND).max(-1)                  # (T, H, W)
    weight = np.clip((distance - 0.15) / 0.25, 0, 1)                   # soft: 0 on the ground, 1 on the shape
    area = weight.sum((1, 2))                                          # (T,)
    if area.min() < 60:
        return False
    rows, columns = np.mgrid[:video.shape[1], :video.shape[2]]
    centre = np.stack([(weight * axis).sum((1, 2)) / area for axis in (columns, rows)], axis=1)      # (T, 2)
    away = (columns - centre[:, :1, None]) ** 2 + (rows - centre[:, 1:, None]) ** 2                  # (T, H, W)
    spread = (weight * away).sum((1, 2)) / area ** 2                   # about 0.16 for a disc, whatever its size
    steps = np.diff(centre, axis=0)
    moved = np.linalg.norm(centre[-1] - centre[0])
    unsteady = np.linalg.norm(steps - steps.mean(0), axis=1).max()
    return bool(moved > 8 and unsteady < 3 and area.max() / area.min() < 1.5 and spread.max() < 0.25)


# ---------------------------------------------------------------------------------------------- the models

def train_vae(path):
    """Train a small VAE on the clips, then scale its latents to mean 0 and standard deviation 1."""
    torch.manual_seed(0)
    vae = WanVAE(dim=6)
    for layer in vae.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):  # torch's own start is so small that training lingers at a plain ground
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)
    videos = torch.stack([torch.from_numpy(single(seed)[2]) for seed in range(1_000_000, 1_001_000)])
    generator = torch.Generator().manual_seed(0)

    def batch(count, frames, size):
        """Random crops in space and time (count, 3, frames, size, size) in [-1, 1]."""
        crops = []
        for _ in range(count):
            i, t, y, x = (int(torch.randint(n, (1,), generator=generator)) for n in
                          (len(videos), FRAMES - frames + 1, SIZE - size + 1, SIZE - size + 1))
            crops.append(videos[i, t:t + frames, y:y + size, x:x + size])
        return torch.stack(crops).permute(0, 4, 1, 2, 3) / 127.5 - 1

    # Small crops first, for speed. Long clips last, or colours drift on the walk through time.
    short = [(8, 5, 32)] * 1950 + [(6, 9, 40)] * 520 + [(2, FRAMES, SIZE)] * 130
    long = [(3, FRAMES, 48)] * 357 + [(2, FRAMES, SIZE)] * 63
    for shapes, lr in [(short, 3e-3), (long, 1.5e-3)]:
        optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        progress = trange(len(shapes), desc="VAE", disable=None)
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, step / 50) * (0.01 + 0.99 * math.cos(math.pi / 2 * step / len(shapes)) ** 2)
            video = batch(*shapes[step])
            z = vae.encode(video)
            decoded = vae.decode(z + 0.05 * torch.randn(z.shape, generator=generator))  # noise: neighbours decode alike
            error = (decoded - video).abs()
            loss = error.mean() + (error ** 2).mean() + 1e-4 * (z ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            if step % 20 == 0:
                progress.set_postfix(error=f"{error.mean().item():.4f}")
        fold_latent_scale(vae, batch(64, FRAMES, SIZE))
    save_pth(vae, path)


@torch.no_grad()
def fold_latent_scale(vae, video):
    """Fold the latents' own mean m and deviation s into conv1 and conv2, so that `encode` gives (z - m) / s.

    `encode` fixes the official statistics (MEAN, STD), which suit the official weights only.
    """
    z = torch.cat([vae.encode(clips) for clips in video.split(8)])
    m, s = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    # conv1 gives u = z std + mean and shall give u' = (z - m) / s std + mean; conv2 undoes that on its input.
    vae.conv1.weight[:16] /= s.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:16] = (vae.conv1.bias[:16] - mean - m * std) / s + mean
    offset = mean + m * std - s * mean
    vae.conv2.bias += vae.conv2.weight.flatten(1) @ offset
    vae.conv2.weight *= s.view(1, -1, 1, 1, 1)


def make_text_encoder(directory):
    """A sentencepiece model trained on all captions, and a small random umT5 that stays as it is."""
    words = [dict(colour=c, shape=s, direction=d, speed=v) for c in COLOURS for s in SHAPES for d in DIRECTIONS for v in SPEEDS]
    spiece = directory / "google/umt5-xxl/spiece.model"
    spiece.parent.mkdir(parents=True, exist_ok=True)
    with open(spiece, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([caption for w in words for caption in captions(w)]), model_writer=file, vocab_size=120,
            model_type="bpe", hard_vocab_limit=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, normalization_rule_name="identity",
            minloglevel=2)
    torch.manual_seed(0)
    encoder = UMT5Encoder(vocab_size=sentencepiece.SentencePieceProcessor(model_file=str(spiece)).vocab_size(), dim=TEXT_DIM,
                          dim_attn=TEXT_DIM, dim_ffn=2 * TEXT_DIM, num_heads=4, num_layers=2)
    save_pth(encoder, directory / T5_FILE)


def save_pth(module, path):
    """A state dict in bf16, as the official .pth files are."""
    with written_whole(path) as beside:
        torch.save({name: tensor.detach().bfloat16() for name, tensor in module.state_dict().items()}, beside)


def encode(clips, output):
    """Encode a directory's clips, as a user would."""
    command("data.py", "--list", clips / "clips.json", "--output", output, "--batch_size", 8)


def make_clips(directory, clips):
    """Videos of the clips that `single` or `pair` drew, and their clips.json."""
    entries = []
    for source_id, pair_id, video, words, fault in clips:
        write_video(directory / f"{source_id}.mp4", torch.from_numpy(video), FPS)
        short, long = captions(words)
        entries.append({"source_id": source_id, "video_path": f"{source_id}.mp4", "short_caption": short, "long_caption": long,
                        "physics_quality": int(fault not in ("frozen", "jitter")),
                        "human_quality": int(fault not in ("torn", "morph")), "pair_id": pair_id})
    write_json(directory / "clips.json", entries)


def make_data(output, pairs, held_out):
    """Draw and encode that many pairs of clips to train on, and the next ones to evaluate with."""
    for part, seeds in [("train", range(pairs)), ("val", range(10_000, 10_000 + held_out))]:
        make_clips(output / "clips" / part, [clip for seed in seeds for clip in pair(seed)])
        encode(output / "clips" / part, output / part)


# ---------------------------------------------------------------------------------------------- the demo

def command(*words):
    """Run one of the scripts as a user would, and show the command."""
    print("\n$ python " + " ".join(map(str, words)), flush=True)
    if subprocess.run([sys.executable, *map(str, words)], cwd=Path(__file__).parent).returncode:
        sys.exit(f"error: {words[0]} failed; its own message is above")


@torch.no_grad()
def sample(transformer, texts):
    """Latents (N, 16, 5, 8, 8) of one video a prompt, each with its own seed; `texts` are the prompts' states."""
    model = WanModel.from_pretrained(transformer)
    noise = torch.stack([torch.randn(16, 5, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(len(texts))])
    parts = []
    for i in trange(0, len(texts), 32, desc="sampling", leave=False, disable=None):
        parts.append(walk(lambda x, t: model(x, t, texts[i:i + 32]), noise[i:i + 32], UniPC(20, 5.0)))
    return torch.cat(parts)


@torch.no_grad()
def rewards(pavrm, latents, texts):
    """The reward of each clip (N,): mean over noise levels, each clip with its own fixed noise."""
    schedule, scores = TrainingSchedule(5.0), []
    noise = torch.stack([torch.randn(16, 5, 8, 8, generator=torch.Generator().manual_seed(1000 + i)) for i in range(len(texts))])
    for t in REWARD_TIMESTEPS:
        x = add_noise(latents, noise, schedule.near(t))
        scores.append(pavrm(x, torch.full((len(x),), float(t)), texts).sigmoid())
    return torch.stack(scores).mean(0)


def side_by_side(before, after, output):
    """A video, and a picture of every fourth frame: the same prompts and seeds, before on the left, after on the right."""
    def grid(videos):  # 16 videos (T, H, W, 3) -> (T, 4 H, 4 W, 3)
        return rearrange(np.stack(videos[:16]), "(r c) t h w d -> t (r h) (c w) d", r=4)

    gap = np.full((FRAMES, 4 * SIZE, 16, 3), 255, np.uint8)
    both = np.concatenate([grid(before), gap, grid(after)], axis=2)
    write_video(output / "before_after.mp4", torch.from_numpy(both), fps=8)
    rows = [np.concatenate([*a[::4], np.full((SIZE, 16, 3), 255, np.uint8), *b[::4]], axis=1) for a, b in zip(before[:8], after[:8])]
    av.VideoFrame.from_ndarray(np.concatenate(rows)).save(output / "before_after.png")


def run(output):
    """The whole method on the tiny world: data, PAVRM, PRFL, samples before and after, a table."""
    started = time.time()
    make_data(output, PAIRS, HELD_OUT)
    command("train_pavrm.py", "--train", output / "train/index.jsonl", "--val", output / "val/index.jsonl",
            "--output", output / "pavrm", *PAVRM_FLAGS)
    command("train_prfl.py", "--data", output / "train/index.jsonl", "--reward", output / "pavrm/reward",
            "--output", output / "prfl", *PRFL_FLAGS)

    # The same prompts and seeds before and after. There are 72 captions in all, so the seeds are new, the prompts are not.
    print("\nsampling before and after", flush=True)
    held_out = Clips(output / "val/index.jsonl")
    texts = [held_out.load(i)["text_long"] for i in range(SAMPLES)]
    vae, pavrm = WanVAE.from_pretrained(f"demo/model/{VAE_FILE}"), PAVRM.from_pretrained(output / "pavrm/reward")
    reward, good, videos = {}, {}, {}
    for name, transformer in [("before", "demo/model"), ("after", output / "prfl/model")]:
        latents = sample(transformer, texts)
        with torch.no_grad():
            videos[name] = [to_uint8(video).numpy() for part in latents.split(8) for video in vae.decode(part)]
        reward[name] = rewards(pavrm, latents, texts)
        good[name] = torch.tensor([good_motion(video) for video in videos[name]]).float()
    side_by_side(videos["before"], videos["after"], output)

    def row(title, values):
        change, n = values["after"] - values["before"], len(texts)
        cells = [f"{v.mean():.3f} ± {v.std() / n ** 0.5:.3f}" for v in (values["before"], values["after"], change)]
        return f"| {title} | " + " | ".join(cells) + " |", change.mean().item(), (change.std() / n ** 0.5).item()

    reward_row, reward_change, reward_error = row("reward (PAVRM)", reward)
    good_row, good_change, _ = row("good motion (true, from pixels)", good)
    table = "\n".join([f"| {len(texts)} prompts and seeds | before | after PRFL | change |", "|---|---|---|---|", reward_row, good_row])
    (output / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\nmean ± standard error; {time.time() - started:.0f} seconds in all; "
          f"look at {output}/before_after.mp4 and .png")
    if reward_change < 2 * reward_error:
        raise InputError("the reward rose by less than two standard errors; the demo has failed")
    if good_change < 0:
        raise InputError("the true share of good motion fell; the demo has failed")


def build():
    """Make everything under demo/ again: hours on two cores."""
    directory, work = Path("demo/model"), Path("outputs/build")
    if work.exists():
        raise InputError(f"{work} is left over from an earlier build; delete it")
    make_text_encoder(directory)
    train_vae(directory / VAE_FILE)
    write_json(directory / "sampling.json", {"size": [SIZE, SIZE], "frames": FRAMES, "fps": FPS, "steps": 20, "shift": 5.0,
                                             "guidance": 1.0, "prompt": ["a red disc moves left slowly"]})
    torch.manual_seed(0)
    WanModel(CONFIG).save_pretrained(work / "start")
    write_json(directory / "config.json", CONFIG.official())
    make_clips(work / "clips", map(single, range(10_000, 13_072)))
    encode(work / "clips", work / "data")
    start = work / "start"
    for leg, (lr, steps) in enumerate(LEGS):
        command("train_prfl.py", "--model", start, "--data", work / "data/index.jsonl", "--output", work / f"dit{leg}",
                "--phases", "sft", "--good", "none", "--lr", lr, "--steps", steps, "--batch_size", 32, "--accumulation", 1,
                "--shift", 3, "--sample_every", 0, "--save_every", 1000)
        start = work / f"dit{leg}/model"
    WanModel.from_pretrained(start).save_pretrained(work / "dit", dtype=torch.bfloat16)
    shutil.copy(work / "dit/diffusion_pytorch_model.safetensors", directory)

    # What the scripts run on without flags: eight videos, 64 encoded clips, and a reward model.
    for part in ("clips", "train", "val"):
        remove(Path("demo", part))
    make_clips(Path("demo/clips"), map(single, range(8)))
    for part, seeds in [("train", range(24)), ("val", range(10_000, 10_008))]:
        make_clips(work / part, [clip for seed in seeds for clip in pair(seed)])
        encode(work / part, Path("demo", part))
    make_data(work / "pairs", 1500, 96)
    command("train_pavrm.py", "--train", work / "pairs/train/index.jsonl", "--val", work / "pairs/val/index.jsonl",
            "--output", work / "pavrm", *PAVRM_FLAGS, "--steps", 1200, "--save_every", 1200)
    PAVRM.from_pretrained(work / "pavrm/reward").save_pretrained("demo/reward", dtype=torch.bfloat16)


def main():
    parser = argparse.ArgumentParser(description="Train and compare on the tiny world.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default="outputs/demo", help="directory of the demo's clips, runs, table and pictures")
    parser.add_argument("--build", action="store_true", help="make the tiny world's weights and data under demo/ again (hours)")
    args = parser.parse_args()
    if args.build:
        build()
    else:
        if args.output.exists() and not (args.output / "clips/train").is_dir():
            raise InputError(f"{args.output} was not made by the demo and would be replaced; choose another --output")
        remove(args.output)
        run(args.output)


if __name__ == "__main__":
    parallel.run(main)
