"""The tiny world: a world small enough to train in on a laptop, with a known truth about good motion.

A clip shows one coloured shape that moves across a dark ground: 17 frames of 64 x 64. A known part of the clips moves
badly (frozen, jittering, torn or changing its shape), so labels are truth, and `good_motion` measures the same from
pixels alone, which no model ever sees.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

from vae import MEAN, STD, WanVAE

SIZE, FRAMES, FPS = 64, 17, 16
GROUND = np.array([24, 24, 32]) / 255
COLOURS = {"red": (230, 60, 50), "green": (70, 200, 90), "blue": (80, 130, 240)}
SHAPES = ("disc", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 1.0, "quickly": 2.0}  # pixels a frame
FAULTS = ("frozen", "jitter", "torn", "morph")


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


def draw_clip(rng, fault=None):
    """One clip as uint8 (FRAMES, SIZE, SIZE, 3), and its words: colour, shape, direction, speed."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    direction, speed = rng.choice(list(DIRECTIONS)), rng.choice(list(SPEEDS))
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
    words = dict(colour=str(colour), shape=str(shape), direction=str(direction), speed=str(speed), fault=fault)
    return (video * 255).round().astype(np.uint8), words


def captions(words):
    short = "a {colour} {shape} moves {direction} {speed}".format(**words)
    return short, short + " across a dark ground, keeping its shape"


def clip_of(seed, bad_share=0.5):
    """The clip of a seed, and its words."""
    rng = np.random.default_rng(seed)
    return draw_clip(rng, rng.choice(FAULTS) if rng.random() < bad_share else None)


# ---------------------------------------------------------------------------------------------- the models

def train_vae(path, steps=2600):
    """Train a small VAE on the clips, then scale its latents to mean 0 and standard deviation 1."""
    torch.manual_seed(0)
    vae = WanVAE(dim=6)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, i / 50) * (0.01 + 0.99 * math.cos(math.pi / 2 * i / steps) ** 2))
    videos = torch.stack([torch.from_numpy(clip_of(seed)[0]) for seed in range(1_000_000, 1_001_000)])
    generator = torch.Generator().manual_seed(0)

    def batch(count, frames, size):
        """Random crops in space and time (count, 3, frames, size, size) in [-1, 1]."""
        crops = []
        for _ in range(count):
            i, t, y, x = (int(torch.randint(n, (1,), generator=generator)) for n in
                          (len(videos), FRAMES - frames + 1, SIZE - size + 1, SIZE - size + 1))
            crops.append(videos[i, t:t + frames, y:y + size, x:x + size])
        return torch.stack(crops).permute(0, 4, 1, 2, 3) / 127.5 - 1

    progress = trange(steps, desc="VAE")
    for step in progress:
        done = step / steps  # small crops first, for speed; whole clips last, for the long walk through time
        video = batch(8, 5, 32) if done < 0.75 else batch(6, 9, 40) if done < 0.95 else batch(2, FRAMES, SIZE)
        z = vae.encode(video)
        decoded = vae.decode(z + 0.05 * torch.randn(z.shape, generator=generator))  # noise: neighbours decode alike
        error = (decoded - video).abs()
        loss = error.mean() + (error ** 2).mean() + 1e-3 * (z ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(error=f"{error.mean().item():.4f}")
        if step % 250 == 249:
            torch.save(vae.state_dict(), "/tmp/vae_wip.pth")
            print(step, error.mean().item(), flush=True)
    fold_latent_scale(vae, batch(64, FRAMES, SIZE))
    torch.save({name: tensor.bfloat16() for name, tensor in vae.state_dict().items()}, path)


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
