"""Time, peak memory and rate of the stages, measured, with random weights of the official sizes.

    python -m tools.bench forward gradient reward prfl pavrm --dit 1.3B --size 832x480 --frames 81 \\
        --activation_checkpointing
    python -m tools.bench prfl --dit 14B --size 1280x704 --frames 81 --lora_rank 128 \\
        --activation_checkpointing --offload inputs --k 0 2
    python -m tools.bench encode decode --size 832x480 --frames 17   # the VAE, on the CPU or the GPU
    torchrun --nproc_per_node=8 -m tools.bench gradient --dit 14B --sp 4 ...
    python -m tools.bench --plan prfl @recipes/prfl_t2v_14B_720P.args  # computed, not measured: plan.py

    forward        no gradient, frozen weights
    gradient       the SFT loss, forward and backward
    reward         the frozen PAVRM, and the gradient of its input
    prfl, pavrm    a whole step, with clipping and AdamW
    sample         from noise to latents
    encode, decode the VAE

Models are sharded, compiled, checkpointed and offloaded by the code and the flags of training. Floors and
operations are computed by floors.py. The last line is JSON. On a CPU, peak memory is that of the process
since its start, so measure one stage and one size per run there.
"""
import gc
import json
import re
import statistics
import sys
import time
from functools import partial

import cli

import torch
import torch.distributed as dist

import parallel
import records
from lora import add_lora
from memory import block_runner, compiles
from model import WanModel
from reward import PAVRM, bce_loss, reward_loss
from solver import UniPC, guided, walk
from tools import floors, plan
from train_prfl import rewardable, rewarded_step, sft_loss
from vae import WanVAE
from video import read_video, to_tensor

# Names of kernels and operators; what matches none is the rest.
GROUPS = {
    "attention": "attention|attn|flash|fmha|sdpa",
    "matrix products": "gemm|nvjet|cutlass|xmma|cublas|splitK|conv|::(addmm|mm|bmm|linear)$",
}


# ------------------------------------------------------------------------------ measuring

def measure(function, device, repeats, warmup):
    """{seconds: median, spread: largest - smallest, gigabytes: peak} of some calls, after `warmup` others."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "spread": max(seconds) - min(seconds),
            "gigabytes": records.peak_memory(device)}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(function, device):
    """Shares of a call's time on the device, see `shares`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        synchronize(device)
    return shares(profiler.key_averages(), device.type == "cuda")


def shares(rows, cuda):
    """{group: share of the time} of a profiler's rows, and the same for the three largest of the rest.

    On a GPU its kernels count, compiled ones too, and not the operators that launched them.
    """
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    groups = {name: {} for name in (*GROUPS, "rest")}
    for row in rows:
        if row.is_user_annotation or row.device_type != kind:
            continue
        group = groups[group_of(row.key)]
        taken = row.self_device_time_total if cuda else row.self_cpu_time_total
        group[row.key] = group.get(row.key, 0) + taken
    total = sum(sum(group.values()) for group in groups.values())
    result = {name: sum(group.values()) / total for name, group in groups.items()}
    rest = groups["rest"]
    for name in sorted(rest, key=rest.get, reverse=True)[:3]:
        result[f"of the rest: {name[:60]}"] = rest[name] / total
    return result


def group_of(name):
    """The group of GROUPS that a kernel or an operator belongs to, or "rest"."""
    for group, pattern in GROUPS.items():
        if re.search(pattern, name):
            return group
    return "rest"


def extrapolate(first, last, k_first, k_last, k):
    """Seconds at k, on the line through two results of `measure` at k_first < k_last.

    None if that says nothing: the second took no longer than the first by more than their spreads, or the
    line falls below zero before it comes to k.
    """
    difference = last["seconds"] - first["seconds"]
    if difference <= max(first["spread"], last["spread"]):
        return None
    seconds = first["seconds"] + (k - k_first) * difference / (k_last - k_first)
    return seconds if seconds > 0 else None


# ------------------------------------------------------------------------------ models and inputs

def randomize(model, dit, heads, device, args):
    """Shard a model that is on the meta device as training does, and give it small random weights where they
    will stay."""
    parallel.shard(model, dit, heads, device, args)
    model.to_empty(device=parallel.storage(model, args, device))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(std=0.02)
    dit.run_block = block_runner(args, device)
    return model


def random_policy(args, device, frozen=False):
    with torch.device("meta"):
        model = WanModel(floors.size_config(args.dit))
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_rank, args.lora_targets)
    if frozen:
        model.requires_grad_(False)
    return randomize(model, model, [model.head], device, args)


def random_pavrm(args, device, frozen):
    config = floors.size_config(args.dit)
    with torch.device("meta"):
        model = PAVRM(WanModel(config), floors.kept_blocks(config))
    if frozen:
        model.requires_grad_(False)
    else:  # as train_pavrm.py: blocks and heads, or adapters and heads
        model.dit.requires_grad_(False)
        if args.lora_rank:
            add_lora(model.dit, args.lora_rank, args.lora_rank, args.lora_targets)
        else:
            model.dit.blocks.requires_grad_(True)
    return randomize(model, model.dit, model.heads, device, args)


class Inputs:
    """A clip of random numbers: latents x (1, 16, F, H, W), noise, and functions of (x, t) that know its
    condition."""

    def __init__(self, args, device):
        torch.manual_seed(0)  # processes that share a clip see the same
        config = floors.size_config(args.dit)
        shape = (1, *floors.latent_shape(args.size, args.frames))
        self.tokens = floors.token_count(args.size, args.frames)
        self.x = torch.randn(shape, device=device)
        self.noise = torch.randn(shape, device=device)
        self.sigma = torch.tensor([0.5], device=device)
        self.t = torch.tensor([500.0], device=device)
        words = 100 if config.text_len > 100 else 20
        self.texts = [torch.randn(words, config.text_dim, device=device)]
        self.condition = {}
        if config.in_dim > 16:
            self.condition["y"] = torch.randn(1, config.in_dim - 16, *shape[2:], device=device)
        if config.use_clip:
            self.condition["clip_fea"] = torch.randn(1, 257, 1280, device=device)

    def function(self, model):
        return lambda x, t, negative=False: model(x, t, self.texts, **self.condition)

    def sft(self, velocity):
        return sft_loss(velocity, self.x, self.noise, self.sigma, self.t)


def updater(model, args, device):
    """The end of a step: clip the gradients, step AdamW, drop the gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-6, betas=(0.9, 0.999), weight_decay=0.01,
                                  fused=device.type == "cuda")

    def update():
        parallel.clip_gradients(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return update


# ------------------------------------------------------------------------------ the stages
# Each returns {label: (what is timed, its operations on one clip or None)}.

def forward(args, device):
    model, inputs = random_policy(args, device, frozen=True), Inputs(args, device)
    velocity = inputs.function(model)

    @torch.no_grad()
    def run():
        velocity(inputs.x, inputs.t)
    return {"forward": (run, floors.flops(model, inputs.tokens))}


def sample(args, device):
    model, inputs = random_policy(args, device, frozen=True), Inputs(args, device)
    velocity = guided(inputs.function(model), args.guidance)

    @torch.no_grad()
    def run():
        walk(velocity, inputs.noise, UniPC(args.solver_steps, 5.0))
    forwards = args.solver_steps * (2 if args.guidance != 1 else 1)
    count = floors.times(floors.flops(model, inputs.tokens), forwards)
    return {f"sample, {args.solver_steps} steps, guidance {args.guidance:g}": (run, count)}


def gradient(args, device):
    model, inputs = random_policy(args, device), Inputs(args, device)

    def run():
        inputs.sft(inputs.function(model)).backward()
        model.zero_grad()
    return {"gradient": (run, floors.flops(model, inputs.tokens, **floors.backward_options(args)))}


def reward(args, device):
    model, inputs = random_pavrm(args, device, frozen=True), Inputs(args, device)
    judge = inputs.function(model)

    def run():
        x = inputs.x.clone().requires_grad_()
        reward_loss(judge(x, inputs.t)).backward()
    return {"reward": (run, floors.flops(model, inputs.tokens, **floors.backward_options(args)))}


def pavrm(args, device):
    model, inputs = random_pavrm(args, device, frozen=False), Inputs(args, device)
    judge, update = inputs.function(model), updater(model, args, device)
    label = torch.ones(1, device=device)

    def run():
        bce_loss(judge(inputs.x, inputs.t), label).backward()
        update()
    return {"pavrm": (run, floors.flops(model, inputs.tokens, **floors.backward_options(args)))}


def prfl(args, device):
    policy, judge = random_policy(args, device), random_pavrm(args, device, frozen=True)
    inputs, update = Inputs(args, device), updater(policy, args, device)
    rollout = partial(parallel.rollout, policy, parallel.gathers(args, policy, device))

    def run(k):
        if "sft" in args.phases:
            inputs.sft(inputs.function(policy)).backward()
            update()
        if "reward" in args.phases:
            _, logit, _ = rewarded_step(inputs.function(policy), inputs.function(judge),
                                        UniPC(args.solver_steps, 5.0), inputs.noise, k, rollout=rollout)
            reward_loss(logit).backward()
            update()

    options = floors.backward_options(args)
    count = floors.times(floors.flops(policy, inputs.tokens, **options), len(args.phases))
    if args.phases == ["sft"]:
        return {"prfl, sft": (partial(run, 0), count)}
    count += floors.flops(judge, inputs.tokens, **options)
    once = floors.flops(policy, inputs.tokens)
    phases = " and ".join(args.phases)
    return {f"prfl, {phases}, k = {k}": (partial(run, k), count + floors.times(once, k)) for k in args.k}


def encode(args, device):
    vae = WanVAE(dim=args.vae_dim).to(device).requires_grad_(False)
    if args.video:
        video = to_tensor(read_video(args.video, frames=args.frames, size=args.size))
    else:
        width, height = args.size
        video = torch.rand(3, args.frames, height, width)
    return {"encode": (partial(vae.encode, video[None].to(device)), None)}


def decode(args, device):
    vae = WanVAE(dim=args.vae_dim).to(device).requires_grad_(False)
    latents = torch.zeros(1, *floors.latent_shape(args.size, args.frames), device=device)
    return {"decode": (partial(vae.decode, latents), None)}


STAGES = {stage.__name__: stage for stage in (forward, gradient, reward, prfl, pavrm, encode, decode, sample)}


# ------------------------------------------------------------------------------ the command

def parse_args(argv=None):
    parser = cli.Parser("Measure time and peak memory of the stages, with random weights. With --plan it "
                        "computes instead and has other flags: --plan prfl --help shows them.")
    parser.prog = "python -m tools.bench"
    parser.add_argument("stages", nargs="+", choices=STAGES, help="what to measure")

    add = parser.add_argument_group("sizes").add_argument
    add("--dit", default="tiny", choices=floors.SIZES, help="size of the transformer")
    add("--size", type=cli.parse_size, default="64x64", help="width x height of the clip")
    add("--frames", type=cli.FRAMES, default=17, help="video frames of the clip, 1 + 4 n")
    add("--lora_rank", type=cli.whole(0, 10_000), default=0,
        help="rank of LoRA adapters, which train beside frozen weights; 0 trains the weights")
    add("--lora_targets", nargs="+", default=["q", "k", "v", "o"], help="linear layers that get adapters")
    add("--vae_dim", type=cli.whole(1, 512), default=96, help="width of the VAE; officially 96")
    add("--video", help="a video for encode (default: noise)")

    add = parser.add_argument_group("method").add_argument
    add("--phases", nargs="+", default=["sft", "reward"], choices=["sft", "reward"],
        help="phases of a step of prfl")
    add("--k", type=cli.whole(0, 998), nargs="+", default=[0, 2],
        help="rollout steps without gradient in prfl; each is a measurement of its own, and the step at the "
             "mean k of training is extrapolated from the smallest and the largest")
    add("--solver_steps", type=cli.SOLVER_STEPS, default=40,
        help="solver steps from noise to a clip, of prfl and sample")
    add("--guidance", type=cli.GUIDANCE, default=5.0,
        help="classifier-free guidance of sample, which takes two forwards per step; 1 is none")

    add = parser.add_argument_group("measuring").add_argument
    add("--repeats", type=cli.whole(1), default=5, help="timed calls; their median counts")
    add("--warmup", type=cli.whole(0),
        help="calls before the timed ones (default: 1, or 0 with --repeats 1 where blocks are not compiled)")
    add("--profile", action="store_true",
        help="show the shares of matrix products, attention and the rest in one more call")
    cli.add_execution(parser)
    return parser.parse_args(argv)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] == "--plan" for word in argv):
        return plan.main(argv)
    args = parse_args(argv)
    if "prfl" in args.stages and "reward" in args.phases:
        rewardable([str(k) for k in args.k], args.solver_steps)  # refuses a k that does not fit
    device = parallel.start(args.sp, args.timeout, args.deterministic)
    name, gpu = device_name(device)
    say = print if dist.get_rank() == 0 else lambda line: None
    if args.warmup is None:
        args.warmup = int(args.repeats > 1 or compiles(args, device))

    # ---- measure one stage after the other
    results = {}
    for stage in args.stages:
        measured = function = None
        try:
            measured = STAGES[stage](args, device)
            for label, (function, count) in measured.items():
                row = results[label] = measure(function, device, args.repeats, args.warmup)
                if count:
                    row.update(rates(count, row["seconds"], args.sp, gpu))
                say(describe(label, row, args.frames))
                if args.profile:
                    row["profile"] = profile(function, device)
                    parts = [f"{part} {share:.1%}" for part, share in row["profile"].items()]
                    say("  " + ", ".join(parts))
        except torch.OutOfMemoryError:
            results[stage] = {"error": "out of GPU memory"}
            say(f"{stage}: out of GPU memory; try --offload inputs, --activation_checkpointing, --lora_rank "
                f"or --sp")
        measured = function = None
        gc.collect()  # the models too: they are in reference cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- training draws k from 0 .. solver_steps - 2: extrapolate to the step at the mean k
    add_mean_step(results, args, say)

    # ---- everything again as one line of JSON
    run = {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
           "processes": dist.get_world_size()}
    flags = {flag: value for flag, value in vars(args).items() if flag not in ("stages", "timeout")}
    say(json.dumps({**run, **flags, **results}))


def device_name(device):
    """The device's name, and which of floors.GPUS it is (None: another)."""
    if device.type != "cuda":
        return f"CPU, {torch.get_num_threads()} threads", None
    name = torch.cuda.get_device_name(device)
    known = [gpu for gpu in floors.GPUS if gpu in name.replace(" ", "")]
    return name, known[0] if known else None


def rates(count, seconds, sp, gpu):
    """What the operations of a clip, shared by `sp` processes, say about its seconds."""
    found = {"tflops": sum(count.values()) / sp / seconds / 1e12}
    if gpu:
        found["floor, computed"] = floors.floor(count, gpu) / sp
        found["share of the floor"] = found["floor, computed"] / seconds
    return found


def describe(label, row, frames):
    """A result as one line."""
    line = f"{label}: {row['seconds']:.3f} s (spread {row['spread']:.3f}), peak {row['gigabytes']:.2f} GB"
    if "tflops" in row:
        line += f", {row['tflops']:.3g} TFLOP/s"
    else:
        line += f", {row['seconds'] / frames:.3f} s per frame"
    if "share of the floor" in row:
        line += (f", {row['share of the floor']:.0%} of the floor's rate "
                 f"({row['floor, computed']:.2f} s, computed)")
    return line


def add_mean_step(results, args, say):
    """Add PRFL's step at the mean k, extrapolated from the smallest and the largest k that were measured."""
    first, last = min(args.k), max(args.k)
    phases = " and ".join(args.phases)
    rows = [results.get(f"prfl, {phases}, k = {k}") for k in (first, last)]
    if first == last or None in rows:
        return
    mean = (args.solver_steps - 2) / 2
    seconds = extrapolate(*rows, first, last, mean)
    results["prfl, mean step, extrapolated"] = seconds
    if seconds is None:
        say(f"mean step: the difference between k = {first} and k = {last} is within the noise; give more "
            f"--repeats, or values of --k that are further apart")
    else:
        say(f"mean step: t(k={first}) + {mean - first:g} * (t(k={last}) - t(k={first})) / {last - first} = "
            f"{seconds:.3f} s, extrapolated")


if __name__ == "__main__":
    cli.run(main)
