"""Time and peak memory of the stages, with random weights of the official sizes.

    python bench.py encode decode --size 832x480 --frames 17  # the VAE, on the CPU or the GPU
    python bench.py forward prfl --dit 1.3B --size 832x480    # one forward without gradient; one PRFL step at k = 2

The last line is JSON. Peak memory on a CPU is the process's, so measure one stage and size a run there.
"""
import argparse
import json
import statistics
import time

import torch

import parallel
import records
from data import parse_size, read_video, to_tensor
from model import WanConfig, WanModel
from reward import PAVRM, reward_loss
from solver import UniPC
from train_prfl import rewarded_steps, sft_loss
from vae import WanVAE

SIZES = {"tiny": dict(dim=112, ffn_dim=320, num_heads=4, num_layers=6, freq_dim=64, text_len=32, text_dim=64),
         "1.3B": dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, freq_dim=256),
         "14B": dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, freq_dim=256)}


def measure(function, device, repeats):
    """Median seconds, their spread, and peak GB, after one call to warm up where there is more than one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if repeats > 1:
        function()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "spread": max(seconds) - min(seconds), "gigabytes": records.peak_memory(device)}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_dit(name, dtype, device):
    """A transformer of that size with small random weights, made where it will stay."""
    with torch.device("meta"):
        model = WanModel(WanConfig(model_type="t2v", in_dim=16, out_dim=16, **SIZES[name]))
    model = model.to(dtype).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure time and peak memory.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=["encode", "decode", "forward", "prfl"], help="what to measure")
    parser.add_argument("--dit", default="tiny", choices=SIZES, help="size of the transformer")
    parser.add_argument("--size", type=parse_size, default="64x64", help="width x height")
    parser.add_argument("--frames", type=int, default=17, help="1 + 4n video frames")
    parser.add_argument("--video", help="a real clip for the VAE (default: noise)")
    parser.add_argument("--vae_dim", type=int, default=96, help="width of the VAE; 96 is the official one")
    parser.add_argument("--k", type=int, default=2, help="rollout steps without gradient before the rewarded one")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; the median counts. One call is not warmed up")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    (width, height), frames = args.size, args.frames
    latent_shape = (1, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
    results = {}

    if {"encode", "decode"} & set(args.stages):
        vae = WanVAE(dim=args.vae_dim).to(device).requires_grad_(False)
    if "encode" in args.stages:
        video = to_tensor(read_video(args.video, frames=frames, size=args.size))[None] if args.video else torch.rand(1, 3, frames, height, width)
        video = video.to(device)
        results["encode"] = measure(lambda: vae.encode(video), device, args.repeats)
    if "decode" in args.stages:
        results["decode"] = measure(lambda: vae.decode(torch.zeros(latent_shape, device=device)), device, args.repeats)

    if {"forward", "prfl"} & set(args.stages):
        model = random_dit(args.dit, dtype, device)
        x, texts = torch.randn(latent_shape, device=device), [torch.randn(20, model.config.text_dim, device=device, dtype=dtype)]
        t = torch.tensor([500.0], device=device)
    if "forward" in args.stages:
        with torch.no_grad():
            results["forward"] = measure(lambda: model(x, t, texts), device, args.repeats)
    if "prfl" in args.stages:
        pavrm = PAVRM(random_dit(args.dit, dtype, device), num_blocks=min(8, model.config.num_layers // 2)).to(device).requires_grad_(False)

        def prfl_step():
            sft_loss(lambda x, t: model(x, t, texts), x, torch.randn_like(x), torch.tensor([0.5], device=device), t).backward()
            model.zero_grad()
            (_, _, logit, _), = rewarded_steps(lambda x, t: model(x, t, texts), lambda x, t: pavrm(x, t, texts), UniPC(40, 5.0),
                                               torch.randn_like(x), [args.k])
            reward_loss(logit).backward()
            model.zero_grad()
        results[f"prfl step, k = {args.k}, without the optimizer"] = measure(prfl_step, device, args.repeats)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for stage, row in results.items():
        a_frame = f", {row['seconds'] / frames:.3f} s a frame" if stage in ("encode", "decode") else ""
        print(f"{stage}: {row['seconds']:.3f} s (spread {row['spread']:.3f}){a_frame}, peak {row['gigabytes']:.2f} GB")
    print(json.dumps({"device": name, "torch": torch.__version__, "size": [width, height], "frames": frames, "dit": args.dit, **results}))


if __name__ == "__main__":
    parallel.run(main)
