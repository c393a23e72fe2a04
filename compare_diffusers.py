"""Speed of our transformer against the diffusers port of Wan, with the same weights: first that both compute the same, then time.

    pip install diffusers
    python compare_diffusers.py tiny middle --threads 1 2
    python compare_diffusers.py middle --dtypes float32 bfloat16 --compile --repeats 5

Both take turns in one process, so that other load meets both alike; where there is much, compare the minima.
In bfloat16 diffusers keeps the residual stream in bfloat16 too, ours in float32. The last line is JSON.
"""
import argparse
import json
import re
import statistics
import time

import torch

import parallel
from bench import profile, synchronize
from files import InputError
from model import WanConfig, WanModel

SIZES = {"tiny": dict(dim=128, ffn_dim=384, num_heads=4, num_layers=6, freq_dim=64, text_len=32, text_dim=64),
         "middle": dict(dim=1024, ffn_dim=4096, num_heads=8, num_layers=8, freq_dim=256)}
LATENTS = {"tiny": (32, 16, 5, 8, 8), "middle": (1, 16, 5, 40, 40)}
NAMES = [  # the official checkpoint's names and those of diffusers
    (r"^(text|time)_embedding\.", r"condition_embedder.\1_embedder."), (r"embedder\.0", "embedder.linear_1"),
    (r"embedder\.2", "embedder.linear_2"), (r"^time_projection\.1", "condition_embedder.time_proj"),
    (r"^head\.head", "proj_out"), (r"^head\.modulation|modulation", "scale_shift_table"), (r"\.norm2", ".norm_of_ffn"),
    (r"\.norm3", ".norm2"), (r"\.norm_of_ffn", ".norm3"), (r"self_attn", "attn1"), (r"cross_attn", "attn2"),
    (r"(attn\d)\.([qkv])\.", r"\1.to_\2."), (r"(attn\d)\.o\.", r"\1.to_out.0."),
    (r"ffn\.0", "ffn.net.0.proj"), (r"ffn\.2", "ffn.net.2")]
JOBS = {"forward": torch.no_grad()(lambda run: run()), "forward+backward": lambda run: run().square().mean().backward()}


def diffusers_name(name):
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def make_pair(size, dtype, device):
    """Our model and that of diffusers with the same random weights."""
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise InputError("this comparison needs diffusers, which nothing else here does: pip install diffusers") from error
    config = WanConfig(model_type="t2v", in_dim=16, out_dim=16, **SIZES[size])
    ours = WanModel(config).to(device)
    theirs = WanTransformer3DModel(num_attention_heads=config.num_heads, attention_head_dim=config.dim // config.num_heads,
                                   text_dim=config.text_dim, freq_dim=config.freq_dim, ffn_dim=config.ffn_dim,
                                   num_layers=config.num_layers, eps=config.eps).to(device)
    theirs.load_state_dict({diffusers_name(name): tensor for name, tensor in ours.state_dict().items()})
    ours.to(dtype)
    for name, parameter in theirs.named_parameters():  # as its from_pretrained: some modules stay float32
        if not any(part in theirs._keep_in_fp32_modules for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return ours, theirs


def difference(a, b):
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


def check(ours, theirs, run_ours, run_theirs):
    """The largest differences over the largest value: (of the outputs, of the gradients of any parameter, that one's name)."""
    a, b = run_ours(), run_theirs()
    noise = torch.randn_like(a)
    (a * noise).sum().backward()
    (b * noise).sum().backward()
    parameters = dict(theirs.named_parameters())
    # Usually a bias of the text's keys: a shift of all keys hardly moves the softmax, so its gradient is what a cancellation leaves.
    worst = max((difference(p.grad, parameters[diffusers_name(name)].grad), name) for name, p in ours.named_parameters())
    ours.zero_grad()
    theirs.zero_grad()
    return difference(a, b), *worst


def take_turns(job, runs, repeats, device):
    """Seconds of every repeat of each of the runs, one after the other, after one that warms up."""
    seconds = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, row in zip(runs, seconds):
            synchronize(device)
            started = time.perf_counter()
            job(run)
            synchronize(device)
            row.append(time.perf_counter() - started)
    return [row[1:] for row in seconds]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Compare with diffusers.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("sizes", nargs="+", choices=SIZES, help="size of the transformer")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"], help="of the weights")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="time the blocks under torch.compile too")
    parser.add_argument("--profile", action="store_true", help="also shares of matrix products, attention and the rest of one more call")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each model; the median and the minimum count")
    args = parser.parse_args(argv)
    device, rows = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    torch.manual_seed(0)
    print("size    dtype     threads  compiled  pass              ours ms  diffusers ms  times as fast (median, minimum)")
    for size in args.sizes:
        for dtype in args.dtypes:
            ours, theirs = make_pair(size, getattr(torch, dtype), device)
            x = torch.randn(LATENTS[size], device=device)
            t = torch.linspace(100, 900, len(x), device=device)
            texts = torch.randn(len(x), ours.config.text_len, ours.config.text_dim, device=device).to(getattr(torch, dtype))
            runs = (lambda: ours(x, t, texts), lambda: theirs(x.to(texts.dtype), t, texts, return_dict=False)[0])
            output, gradient, worst = check(ours, theirs, *runs)
            print(f"{size:7} {dtype:9} largest difference over largest value: outputs {output:.1e}, gradients {gradient:.1e} ({worst})")
            for whose, run in zip(("ours", "diffusers"), runs) if args.profile else ():
                torch.set_num_threads(args.threads[0])
                for name, job in JOBS.items():
                    shares = profile(lambda job=job, run=run: job(run), device)
                    print(f"{size:7} {dtype:9} {whose}, {name}: " + ", ".join(f"{group} {share:.1%}" for group, share in shares.items()))
            for compiled in [False, True] if args.compile else [False]:
                if compiled:
                    for block in [*ours.blocks, *theirs.blocks]:
                        block.compile()
                for threads in args.threads:
                    torch.set_num_threads(threads)
                    for name, job in JOBS.items():
                        a, b = take_turns(job, runs, args.repeats, device)
                        ms_a, ms_b = statistics.median(a) * 1000, statistics.median(b) * 1000
                        rows.append({"size": size, "dtype": dtype, "threads": threads, "compiled": compiled, "pass": name,
                                     "ours_ms": ms_a, "diffusers_ms": ms_b, "speedup": ms_b / ms_a, "minima": min(b) / min(a)})
                        print(f"{size:7} {dtype:9} {threads:7}  {str(compiled):8}  {name:16} {ms_a:8.1f}  {ms_b:12.1f}  "
                              f"{ms_b / ms_a:13.2f} {min(b) / min(a):8.2f}", flush=True)
    print(json.dumps({"torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    parallel.run(main)
