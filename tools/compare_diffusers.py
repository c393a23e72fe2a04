"""Speed of our transformer against the diffusers port of Wan, with the same weights: first that both compute
the same, then time.

    pip install diffusers
    python -m tools.compare_diffusers tiny middle --threads 1 2
    python -m tools.compare_diffusers middle --dtypes float32 bfloat16 --compile --repeats 5

Both take turns in one process, so that other load affects both alike; under heavy load, compare the minima.
In bfloat16, diffusers keeps the residual stream in bfloat16 too, ours is float32. The last line is JSON.
"""
import json
import re
import statistics
import time

import cli

import torch

import gpu
from files import InputError
from model import WanConfig, WanModel
from tools.bench import profile, synchronize

SIZES = {
    "tiny": dict(dim=128, ffn_dim=384, num_heads=4, num_layers=6, freq_dim=64, text_len=32, text_dim=64),
    "middle": dict(dim=1024, ffn_dim=4096, num_heads=8, num_layers=8, freq_dim=256),
}
LATENTS = {"tiny": (32, 16, 5, 8, 8), "middle": (1, 16, 5, 40, 40)}
NAMES = [  # the official checkpoint's names and those of diffusers; replaced one after the other
    (r"^(text|time)_embedding\.", r"condition_embedder.\1_embedder."),
    (r"embedder\.0", "embedder.linear_1"),
    (r"embedder\.2", "embedder.linear_2"),
    (r"^time_projection\.1", "condition_embedder.time_proj"),
    (r"^head\.head", "proj_out"),
    (r"^head\.modulation|modulation", "scale_shift_table"),
    (r"\.norm2", ".norm_of_ffn"),
    (r"\.norm3", ".norm2"),
    (r"\.norm_of_ffn", ".norm3"),
    (r"self_attn", "attn1"),
    (r"cross_attn", "attn2"),
    (r"(attn\d)\.([qkv])\.", r"\1.to_\2."),
    (r"(attn\d)\.o\.", r"\1.to_out.0."),
    (r"ffn\.0", "ffn.net.0.proj"),
    (r"ffn\.2", "ffn.net.2"),
]


@torch.no_grad()
def forward(run):
    run()


def forward_backward(run):
    run().square().mean().backward()


PASSES = {"forward": forward, "forward+backward": forward_backward}


# ------------------------------------------------------------------------------ the same model twice

def diffusers_name(name):
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def make_pair(size, dtype, device):
    """Our model and that of diffusers with the same random weights."""
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise InputError("diffusers is not installed, and only this comparison needs it; "
                         "run pip install diffusers") from error
    config = WanConfig(model_type="t2v", in_dim=16, out_dim=16, **SIZES[size])
    ours = WanModel(config).to(device)
    theirs = WanTransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.dim // config.num_heads,
        text_dim=config.text_dim, freq_dim=config.freq_dim, ffn_dim=config.ffn_dim,
        num_layers=config.num_layers, eps=config.eps).to(device)
    theirs.load_state_dict({diffusers_name(name): tensor for name, tensor in ours.state_dict().items()})
    ours.to(dtype)
    for name, parameter in theirs.named_parameters():  # as its from_pretrained: some modules stay float32
        if not any(part in theirs._keep_in_fp32_modules for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return ours, theirs


def difference(a, b):
    """The largest difference over the largest value."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


def check(ours, theirs, run_ours, run_theirs):
    """Largest relative differences: (of the outputs, of the gradients of any parameter, its name)."""
    a, b = run_ours(), run_theirs()
    noise = torch.randn_like(a)
    (a * noise).sum().backward()
    (b * noise).sum().backward()
    # The worst is usually a bias of the text's keys. A shift of all keys hardly moves the softmax, so this
    # gradient is what a cancellation leaves over.
    parameters = dict(theirs.named_parameters())
    gradients = []
    for name, parameter in ours.named_parameters():
        gradients.append((difference(parameter.grad, parameters[diffusers_name(name)].grad), name))
    ours.zero_grad()
    theirs.zero_grad()
    return difference(a, b), *max(gradients)


def take_turns(job, runs, repeats, device):
    """Seconds of every repeat of each of the runs, one after the other; a first repeat warms up."""
    seconds = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, row in zip(runs, seconds, strict=True):
            synchronize(device)
            started = time.perf_counter()
            job(run)
            synchronize(device)
            row.append(time.perf_counter() - started)
    return [row[1:] for row in seconds]


# ------------------------------------------------------------------------------ the command

def parse_args(argv=None):
    parser = cli.Parser("Compare the speed of the transformer with that of diffusers, with the same weights.")
    parser.prog = "python -m tools.compare_diffusers"
    add = parser.add_argument
    add("sizes", nargs="+", choices=SIZES, help="sizes of the transformer")
    add("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"],
        help="types of the weights")
    add("--threads", nargs="+", type=cli.whole(1, 1024), default=[1], help="numbers of CPU threads")
    add("--compile", action="store_true", help="time the blocks under torch.compile too")
    add("--profile", action="store_true",
        help="show the shares of matrix products, attention and the rest in one more call")
    add("--repeats", type=cli.whole(1), default=20,
        help="timed calls of each model; median and minimum are shown")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = gpu.start()
    torch.manual_seed(0)
    print("size    dtype     threads  compiled  pass              ours ms  diffusers ms  "
          "times as fast (median, minimum)")
    rows = []
    for size in args.sizes:
        for dtype in args.dtypes:
            rows += compare(size, dtype, args, device)
    print(json.dumps({"torch": torch.__version__, "rows": rows}))


def compare(size, dtype, args, device):
    """Check, profile and time both models at one size and precision. Returns the rows of the table."""
    # ---- the models and their inputs
    numbers = getattr(torch, dtype)
    ours, theirs = make_pair(size, numbers, device)
    x = torch.randn(LATENTS[size], device=device)
    t = torch.linspace(100, 900, len(x), device=device)
    texts = torch.randn(len(x), ours.config.text_len, ours.config.text_dim, device=device).to(numbers)

    def run_ours():
        return ours(x, t, texts)

    def run_theirs():
        return theirs(x.to(numbers), t, texts, return_dict=False)[0]

    # ---- the same numbers
    output, gradient, worst = check(ours, theirs, run_ours, run_theirs)
    print(f"{size:7} {dtype:9} largest difference over largest value: outputs {output:.1e}, "
          f"gradients {gradient:.1e} ({worst})")
    if args.profile:
        torch.set_num_threads(args.threads[0])
        for whose, run in (("ours", run_ours), ("diffusers", run_theirs)):
            for name, job in PASSES.items():
                shares = profile(lambda job=job, run=run: job(run), device)
                parts = [f"{group} {share:.1%}" for group, share in shares.items()]
                print(f"{size:7} {dtype:9} {whose}, {name}: " + ", ".join(parts))

    # ---- time
    rows = []
    for compiled in (False, True) if args.compile else (False,):
        if compiled:
            for block in [*ours.blocks, *theirs.blocks]:
                block.compile()
        for threads in args.threads:
            torch.set_num_threads(threads)
            for name, job in PASSES.items():
                a, b = take_turns(job, (run_ours, run_theirs), args.repeats, device)
                ours_ms, theirs_ms = statistics.median(a) * 1000, statistics.median(b) * 1000
                speedup, minima = theirs_ms / ours_ms, min(b) / min(a)
                print(f"{size:7} {dtype:9} {threads:7}  {str(compiled):8}  {name:16} {ours_ms:8.1f}  "
                      f"{theirs_ms:12.1f}  {speedup:13.2f} {minima:8.2f}", flush=True)
                rows.append({"size": size, "dtype": dtype, "threads": threads, "compiled": compiled,
                             "pass": name, "ours_ms": ours_ms, "diffusers_ms": theirs_ms, "speedup": speedup,
                             "minima": minima})
    return rows


if __name__ == "__main__":
    cli.run(main)
