"""The tiny world: small enough to train in on a laptop, and with a known truth about good motion.

A clip shows one coloured shape that moves across a dark ground: 17 frames of 64 x 64. Some clips are drawn so
that they move badly (frozen, jittering, torn or changing shape), so the labels are true. `good_motion`
measures the same from pixels alone; no model ever sees it.

    python demo.py             # the whole method: data, PAVRM, PRFL, samples before and after
    python demo.py --build     # make the files under demo/ again: hours
"""
import math
import shutil
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import cli

import av
import numpy as np
import sentencepiece
import torch
from einops import rearrange
from torch import nn
from tqdm import trange

from clips import Clips
from files import InputError, atomic_write, remove, write_json
from model import WanConfig, WanModel
from reward import PAVRM, REWARD_TIMESTEPS
from solver import TrainingSchedule, UniPC, add_noise, walk
from t5 import SPIECE_FILE, T5_FILE, UMT5Encoder
from vae import MEAN, STD, VAE_FILE, WanVAE
from video import to_uint8, write_video

SIZE, FRAMES, FPS = 64, 17, 16
GROUND = np.array([24, 24, 32]) / 255
COLOURS = {"red": (230, 60, 50), "green": (70, 200, 90), "blue": (80, 130, 240)}
SHAPES = ("disc", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 1.0, "quickly": 2.0}  # pixels per frame
TEXT_DIM = 64
FAULTS = ("frozen", "jitter", "torn", "morph")
CONFIG = WanConfig(model_type="t2v", dim=112, ffn_dim=320, freq_dim=64, in_dim=16, out_dim=16, num_heads=4,
                   num_layers=6, text_len=32, text_dim=TEXT_DIM)

LEGS = [(1e-3, 2750), (3e-4, 750), (6e-5, 500)]  # learning rate and steps of the transformer's training
PAIRS = 448    # of clips to train on
HELD_OUT = 48  # pairs to evaluate with
SAMPLES = 64   # videos before and after
PAVRM_FLAGS = ["@recipes/tiny_pavrm.args"]
PRFL_FLAGS = ["@recipes/tiny_prfl.args"]


# ------------------------------------------------------------------------------ clips

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
    words = {}
    choices = dict(colour=COLOURS, shape=SHAPES, direction=DIRECTIONS, speed=SPEEDS)
    for name, values in choices.items():
        words[name] = str(rng.choice(list(values)))
    return words


def draw_clip(rng, words, fault=None):
    """One clip of these words (colour, shape, direction, speed) as uint8 (FRAMES, SIZE, SIZE, 3)."""
    colour, shape, direction, speed = words.values()
    radius = rng.uniform(8, 10)
    step = np.array(DIRECTIONS[direction]) * SPEEDS[speed]
    moments = np.arange(FRAMES)[:, None] - (FRAMES - 1) / 2
    path = SIZE / 2 + rng.uniform(-4, 4, 2) + moments * step          # (FRAMES, 2)
    radii = np.full(FRAMES, radius)
    shapes = [shape] * FRAMES
    tear = np.zeros(FRAMES)                                            # of the two halves, in pixels
    if fault == "frozen":
        path[:] = path[rng.integers(FRAMES)]
    elif fault == "jitter":
        path += rng.choice([-1, 1], (FRAMES, 2)) * rng.uniform(2.5, 4.5, (FRAMES, 2))
    elif fault == "torn":  # the upper and the lower half move apart
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
    """The clip of a seed: (source_id, pair_id, video, words, fault). Half of the seeds have a fault."""
    rng = np.random.default_rng(seed)
    fault = str(rng.choice(FAULTS)) if rng.random() < 0.5 else None
    words = draw_words(rng)
    return str(seed), None, draw_clip(rng, words, fault), words, fault


def pair(seed):
    """Two clips with the same caption, as `single` returns them; the second moves badly."""
    rng = np.random.default_rng(seed)
    words = draw_words(rng)
    fault = str(rng.choice(FAULTS))
    good = (f"{seed}a", str(seed), draw_clip(rng, words), words, None)
    bad = (f"{seed}b", str(seed), draw_clip(rng, words, fault), words, fault)
    return [good, bad]


# ------------------------------------------------------------------------------ the truth

def good_motion(video):
    """Whether the shape in a clip, uint8 (T, H, W, 3), moves well, judged by its pixels alone.

    The shape is what differs from the ground. Its area, its centre and its spread about the centre are
    measured in every frame. Good: it is always there, moves on, has a steady pace, keeps its size and stays
    in one piece. Each threshold lies between the good clips and the nearest bad ones, as drawn: displacement
    16 and 0 pixels, unsteadiness 0 and 8.7, area ratio 1 and 1.6, spread 0.20 and 0.32.
    """
    distance = np.abs(video / 255.0 - GROUND).max(-1)                  # (T, H, W)
    weight = np.clip((distance - 0.15) / 0.25, 0, 1)                   # soft: 0 on the ground, 1 on the shape
    area = weight.sum((1, 2))                                          # (T,)
    if area.min() < 60:
        return False
    rows, columns = np.mgrid[:video.shape[1], :video.shape[2]]
    centre_x = (weight * columns).sum((1, 2)) / area                   # (T,)
    centre_y = (weight * rows).sum((1, 2)) / area                      # (T,)
    centre = np.stack([centre_x, centre_y], axis=1)                    # (T, 2)
    away = (columns - centre_x[:, None, None]) ** 2 + (rows - centre_y[:, None, None]) ** 2  # (T, H, W)
    spread = (weight * away).sum((1, 2)) / area ** 2                   # about 0.16 for a disc of any size
    steps = np.diff(centre, axis=0)
    moved = np.linalg.norm(centre[-1] - centre[0])
    unsteady = np.linalg.norm(steps - steps.mean(0), axis=1).max()
    return bool(moved > 8 and unsteady < 3 and area.max() / area.min() < 1.5 and spread.max() < 0.25)


# ------------------------------------------------------------------------------ the models

def train_vae(path):
    """Train a small VAE on the clips, then scale its latents to mean 0 and standard deviation 1."""
    torch.manual_seed(0)
    vae = WanVAE(dim=6)
    for layer in vae.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):  # torch's small weights would learn a plain ground only
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)
    videos = torch.stack([torch.from_numpy(single(seed)[2]) for seed in range(1_000_000, 1_001_000)])
    generator = torch.Generator().manual_seed(0)

    def batch(count, frames, size):
        """Random crops in space and time (count, 3, frames, size, size) in [-1, 1]."""
        crops = []
        limits = (len(videos), FRAMES - frames + 1, SIZE - size + 1, SIZE - size + 1)
        for _ in range(count):
            i, t, y, x = (int(torch.randint(limit, (1,), generator=generator)) for limit in limits)
            crops.append(videos[i, t:t + frames, y:y + size, x:x + size])
        return torch.stack(crops).permute(0, 4, 1, 2, 3) / 127.5 - 1

    # Small crops first, for speed. Long clips last; without them colours drift along time.
    short = [(8, 5, 32)] * 1950 + [(6, 9, 40)] * 520 + [(2, FRAMES, SIZE)] * 130
    long = [(3, FRAMES, 48)] * 357 + [(2, FRAMES, SIZE)] * 63
    for shapes, lr in [(short, 3e-3), (long, 1.5e-3)]:
        optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        progress = trange(len(shapes), desc="VAE", disable=None)
        for step in progress:
            decay = 0.01 + 0.99 * math.cos(math.pi / 2 * step / len(shapes)) ** 2
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, step / 50) * decay
            video = batch(*shapes[step])
            z = vae.encode(video)
            noise = 0.05 * torch.randn(z.shape, generator=generator)  # so that nearby latents decode alike
            decoded = vae.decode(z + noise)
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

    `encode` always uses the official statistics (MEAN, STD), which fit only the official weights.
    """
    z = torch.cat([vae.encode(clips) for clips in video.split(8)])
    m, s = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    # conv1 gives u = z std + mean. It must give u' = (z - m) / s std + mean, and conv2 must undo that.
    vae.conv1.weight[:16] /= s.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:16] = (vae.conv1.bias[:16] - mean - m * std) / s + mean
    offset = mean + m * std - s * mean
    vae.conv2.bias += vae.conv2.weight.flatten(1) @ offset
    vae.conv2.weight *= s.view(1, -1, 1, 1, 1)


def make_text_encoder(directory):
    """Make a sentencepiece model trained on all captions, and a small random umT5 that is never trained."""
    sentences = []
    for colour, shape, direction, speed in product(COLOURS, SHAPES, DIRECTIONS, SPEEDS):
        sentences += captions(dict(colour=colour, shape=shape, direction=direction, speed=speed))
    spiece = directory / SPIECE_FILE
    spiece.parent.mkdir(parents=True, exist_ok=True)
    with open(spiece, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, model_type="bpe", vocab_size=120,
            hard_vocab_limit=False, normalization_rule_name="identity", minloglevel=2,
            pad_id=0, eos_id=1, bos_id=2, unk_id=3)
    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(spiece)).vocab_size()
    torch.manual_seed(0)
    encoder = UMT5Encoder(vocab_size, dim=TEXT_DIM, dim_attn=TEXT_DIM, dim_ffn=2 * TEXT_DIM, num_heads=4,
                          num_layers=2)
    save_pth(encoder, directory / T5_FILE)


def save_pth(module, path):
    """Write a state dict in bf16, as the official .pth files are."""
    with atomic_write(path) as beside:
        torch.save({name: tensor.detach().bfloat16() for name, tensor in module.state_dict().items()}, beside)


def encode(clips, output):
    """Encode a directory's clips, as a user would."""
    command("data.py", "--list", clips / "clips.json", "--output", output, "--batch_size", 8)


def make_clips(directory, clips):
    """Write the videos of clips that `single` or `pair` drew, and their clips.json."""
    entries = []
    for source_id, pair_id, video, words, fault in clips:
        write_video(directory / f"{source_id}.mp4", torch.from_numpy(video), FPS)
        short, long = captions(words)
        entries.append({"source_id": source_id, "video_path": f"{source_id}.mp4",
                        "short_caption": short, "long_caption": long,
                        "physics_quality": int(fault not in ("frozen", "jitter")),
                        "human_quality": int(fault not in ("torn", "morph")), "pair_id": pair_id})
    write_json(directory / "clips.json", entries)


def make_data(output, pairs, held_out):
    """Draw and encode that many pairs of clips to train on, and the next ones to evaluate with."""
    for part, seeds in [("train", range(pairs)), ("val", range(10_000, 10_000 + held_out))]:
        make_clips(output / "clips" / part, [clip for seed in seeds for clip in pair(seed)])
        encode(output / "clips" / part, output / part)


# ------------------------------------------------------------------------------ the demo

def command(*words):
    """Run one of the scripts as a user would, and show the command."""
    words = [str(word) for word in words]
    print("\n$ python " + " ".join(words), flush=True)
    if subprocess.run([sys.executable, *words]).returncode:
        sys.exit(f"error: {words[0]} failed; its own message is above")


def noises(seeds):
    """Standard normal noise for latents, from one seed per clip: (N, 16, 5, 8, 8)."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(16, 5, 8, 8, generator=generator) for generator in generators])


@torch.no_grad()
def sample(transformer, texts):
    """Latents (N, 16, 5, 8, 8) of one video per prompt, each with its own seed. texts: prompt states."""
    model = WanModel.from_pretrained(transformer)
    noise = noises(range(len(texts)))
    parts = []
    for i in trange(0, len(texts), 32, desc="sampling", leave=False, disable=None):
        velocity = partial(model, context=texts[i:i + 32])
        parts.append(walk(velocity, noise[i:i + 32], UniPC(20, 5.0)))
    return torch.cat(parts)


@torch.no_grad()
def rewards(pavrm, latents, texts):
    """The reward of each clip (N,): its mean over noise levels, each clip with its own fixed noise."""
    schedule = TrainingSchedule(5.0)
    noise = noises(range(1000, 1000 + len(texts)))
    scores = []
    for t in REWARD_TIMESTEPS:
        x = add_noise(latents, noise, schedule.near(t))
        scores.append(pavrm(x, torch.full((len(x),), float(t)), texts).sigmoid())
    return torch.stack(scores).mean(0)


def side_by_side(before, after, output):
    """Write a video of 16 pairs, and a picture of 8: `before` is on the left, `after` on the right."""
    def grid(videos):  # 16 videos (T, H, W, 3) -> (T, 4 H, 4 W, 3)
        return rearrange(np.stack(videos[:16]), "(r c) t h w d -> t (r h) (c w) d", r=4)

    gap = np.full((FRAMES, 4 * SIZE, 16, 3), 255, np.uint8)
    both = np.concatenate([grid(before), gap, grid(after)], axis=2)
    write_video(output / "before_after.mp4", torch.from_numpy(both), fps=8)

    gap = np.full((SIZE, 16, 3), 255, np.uint8)
    rows = []
    for a, b in zip(before[:8], after[:8], strict=True):
        rows.append(np.concatenate([*a[::4], gap, *b[::4]], axis=1))
    av.VideoFrame.from_ndarray(np.concatenate(rows)).save(output / "before_after.png")


def run(output):
    """The whole method on the tiny world: data, PAVRM, PRFL, samples before and after, a table."""
    started = time.time()
    make_data(output, PAIRS, HELD_OUT)
    command("train_pavrm.py", "--train", output / "train/index.jsonl", "--val", output / "val/index.jsonl",
            "--output", output / "pavrm", *PAVRM_FLAGS)
    command("train_prfl.py", "--data", output / "train/index.jsonl", "--reward", output / "pavrm/reward",
            "--output", output / "prfl", *PRFL_FLAGS)

    # The same prompts and seeds before and after. The seeds are new; the prompts, of 72 captions, are not.
    print("\nsampling before and after", flush=True)
    held_out = Clips(output / "val/index.jsonl")
    texts = [held_out.load(i)["text_long"] for i in range(SAMPLES)]
    vae = WanVAE.from_pretrained(f"demo/model/{VAE_FILE}")
    pavrm = PAVRM.from_pretrained(output / "pavrm/reward")
    reward, good, videos = {}, {}, {}
    for name, transformer in [("before", "demo/model"), ("after", output / "prfl/model")]:
        latents = sample(transformer, texts)
        videos[name] = decode(vae, latents)
        reward[name] = rewards(pavrm, latents, texts)
        good[name] = torch.tensor([good_motion(video) for video in videos[name]]).float()
    side_by_side(videos["before"], videos["after"], output)

    reward_row, reward_change, reward_error = table_row("reward (PAVRM)", reward)
    good_row, good_change, _ = table_row("good motion (true, from pixels)", good)
    head = f"| {len(texts)} prompts and seeds | before | after PRFL | change |\n|---|---|---|---|"
    table = "\n".join([head, reward_row, good_row])
    (output / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\nmean ± standard error; {time.time() - started:.0f} seconds in all; "
          f"look at {output}/before_after.mp4 and .png")
    if reward_change < 2 * reward_error:
        raise InputError("the reward rose by less than two standard errors; the demo has failed")
    if good_change < 0:
        raise InputError("the true share of good motion fell; the demo has failed")


@torch.no_grad()
def decode(vae, latents):
    """Latents (N, 16, 5, 8, 8) -> list of N videos (FRAMES, SIZE, SIZE, 3) uint8."""
    videos = []
    for part in latents.split(8):
        videos += [to_uint8(video).numpy() for video in vae.decode(part)]
    return videos


def table_row(title, values):
    """A row of the table, the mean change and its standard error. values: {"before", "after": (N,)}."""
    before, after = values["before"], values["after"]
    change = after - before
    root = len(change) ** 0.5
    cells = [f"{v.mean():.3f} ± {v.std() / root:.3f}" for v in (before, after, change)]
    row = f"| {title} | {' | '.join(cells)} |"
    return row, change.mean().item(), (change.std() / root).item()


# ------------------------------------------------------------------------------ building

def build():
    """Make everything under demo/ again: hours on two cores."""
    directory, work = Path("demo/model"), Path("outputs/build")
    if work.exists():
        raise InputError(f"{work} is left over from an earlier build; delete it")
    make_text_encoder(directory)
    train_vae(directory / VAE_FILE)
    sampling = {"size": [SIZE, SIZE], "frames": FRAMES, "fps": FPS, "solver_steps": 20, "shift": 5.0,
                "guidance": 1.0, "prompt": ["a red disc moves left slowly"]}
    write_json(directory / "sampling.json", sampling)

    # The transformer, trained in legs with falling learning rates.
    torch.manual_seed(0)
    WanModel(CONFIG).save_pretrained(work / "start")
    write_json(directory / "config.json", CONFIG.official())
    make_clips(work / "clips", map(single, range(10_000, 13_072)))
    encode(work / "clips", work / "data")
    start = work / "start"
    for leg, (lr, steps) in enumerate(LEGS):
        command("train_prfl.py", "--model", start, "--data", work / "data/index.jsonl",
                "--output", work / f"dit{leg}", "--phases", "sft", "--skip_poor", "none",
                "--lr", lr, "--steps", steps, "--batch_size", 32, "--accumulation", 1, "--shift", 3,
                "--sample_every", 0, "--save_every", 1000)
        start = work / f"dit{leg}/model"
    WanModel.from_pretrained(start).save_pretrained(work / "dit", dtype=torch.bfloat16)
    shutil.copy(work / "dit/diffusion_pytorch_model.safetensors", directory)

    # What the scripts use without flags: eight videos, 64 encoded clips, and a reward model.
    for part in ("clips", "train", "val"):
        remove(Path("demo", part))
    make_clips(Path("demo/clips"), map(single, range(8)))
    for part, seeds in [("train", range(24)), ("val", range(10_000, 10_008))]:
        make_clips(work / part, [clip for seed in seeds for clip in pair(seed)])
        encode(work / part, Path("demo", part))
    make_data(work / "pairs", 1500, 96)
    command("train_pavrm.py", "--train", work / "pairs/train/index.jsonl",
            "--val", work / "pairs/val/index.jsonl", "--output", work / "pavrm", *PAVRM_FLAGS,
            "--steps", 1200, "--save_every", 1200)
    PAVRM.from_pretrained(work / "pavrm/reward").save_pretrained("demo/reward", dtype=torch.bfloat16)


def main():
    parser = cli.Parser("Train and compare on the tiny world.")
    parser.add_argument("--output", type=Path, default="outputs/demo",
                        help="directory of the demo's clips, runs, table and pictures")
    parser.add_argument("--build", action="store_true",
                        help="make the tiny world's weights and data under demo/ again (hours)")
    args = parser.parse_args()
    if args.build:
        build()
    else:
        if args.output.exists() and not (args.output / "clips/train").is_dir():
            raise InputError(f"{args.output} was not made by the demo and would be replaced; "
                             f"choose another --output")
        remove(args.output)
        run(args.output)


if __name__ == "__main__":
    cli.run(main)
