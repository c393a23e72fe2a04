"""Time, peak memory and rate of the stages, measured, with random weights of the official sizes.

    python bench.py forward gradient reward prfl pavrm --dit 1.3B --size 832x480 --frames 81 --checkpoint_blocks
    python bench.py prfl --dit 14B --size 1280x720 --frames 81 --lora_rank 128 --checkpoint_blocks --offload inputs --k 0 2
    python bench.py encode decode --size 832x480 --frames 17     # the VAE, on the CPU or the GPU
    torchrun --nproc_per_node=8 bench.py gradient --dit 14B --sp 4 ...
    python bench.py --plan prfl @recipes/prfl_t2v_14B_720P.args  # computed instead of measured: plan.py

forward: no gradient, frozen weights; gradient: the SFT loss forward and backward; reward: the frozen PAVRM and its input's
gradient; prfl, pavrm: a whole step with clipping and AdamW; sample: from noise to latents. Models are sharded, compiled,
checkpointed and offloaded by the same code and flags as in training (--resume, --save_every and --keep have no effect here).
Floors and operations are computed by plan.py. The last line is JSON. Peak memory on a CPU is that of the process since it
began, so measure one stage and size a run there.
"""
import gc
import json
import re
import statistics
import sys
import time
from functools import partial

import torch
import torch.distributed as dist

import parallel
import plan
import records
from data import parse_size, read_video, to_tensor
from lora import add_lora
from memory import block_runner
from model import WanModel
from reward import PAVRM, bce_loss, reward_loss
from solver import UniPC, guided, walk
from train_prfl import rewarded_steps, sft_loss
from vae import WanVAE


# Names of kernels and operators; what matches none is the rest.
GROUPS = {"attention": "attention|attn|flash|fmha|sdpa",
          "matrix products": "gemm|nvjet|cutlass|xmma|cublas|splitK|conv|::(addmm|mm|bmm|linear)$"}


def measure(function, device, repeats, warmup=None):
    """Median seconds, their spread (largest - smallest), and peak GB, after `warmup` calls (None: one where there are repeats)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(int(repeats > 1) if warmup is None else warmup):
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


def profile(function, device):
    """Shares of a call's time on the device: matrix products, attention, the rest; and the three largest of the rest."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + cuda * [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        synchronize(device)
    groups = {name: {} for name in (*GROUPS, "rest")}
    for row in profiler.key_averages():
        # On a GPU its kernels count, compiled ones too, and not the operators that launched them.
        if row.is_user_annotation or cuda != (row.device_type == torch.autograd.DeviceType.CUDA):
            continue
        group = next((name for name, pattern in GROUPS.items() if re.search(pattern, row.key)), "rest")
        groups[group][row.key] = groups[group].get(row.key, 0) + (row.self_device_time_total if cuda else row.self_cpu_time_total)
    total = sum(sum(group.values()) for group in groups.values())
    largest = sorted(groups["rest"], key=groups["rest"].get, reverse=True)[:3]
    return {**{name: sum(group.values()) / total for name, group in groups.items()},
            **{f"of the rest: {name[:60]}": groups["rest"][name] / total for name in largest}}


# ---------------------------------------------------------------------------------------------- models and inputs

def randomize(model, dit, float32, device, args):
    """Shard a model that is on the meta device as training does, and give it small random weights where they will stay."""
    parallel.shard(model, dit.blocks, [dit.time_embedding, dit.time_projection, *float32], device, args)
    model.to_empty(device=parallel.storage(args, device))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(std=0.02)
    dit.run_block = block_runner(args, device)
    return model


def random_policy(args, device, frozen=False):
    with torch.device("meta"):
        model = WanModel(plan.size_config(args.dit))
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_rank, args.lora_targets)
    if frozen:
        model.requires_grad_(False)
    return randomize(model, model, [model.head], device, args)


def random_pavrm(args, device, frozen):
    with torch.device("meta"):
        model = PAVRM(WanModel(plan.size_config(args.dit)), plan.kept_blocks(plan.size_config(args.dit)))
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
    """A clip of random numbers: latents x (1, 16, F, H, W), noise, and the functions of (x, t) that know its condition."""

    def __init__(self, args, device):
        torch.manual_seed(0)  # ranks that share a clip see the same
        config = plan.size_config(args.dit)
        shape, self.tokens = (1, *plan.latent_shape(args.size, args.frames)), plan.token_count(args.size, args.frames)
        self.x, self.noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
        self.sigma, self.t = torch.tensor([0.5], device=device), torch.tensor([500.0], device=device)
        self.texts = [torch.randn(100 if config.text_len > 100 else 20, config.text_dim, device=device)]
        self.condition = {"y": torch.randn(1, config.in_dim - 16, *shape[2:], device=device)} if config.in_dim > 16 else {}
        if config.use_clip:
            self.condition["clip_fea"] = torch.randn(1, 257, 1280, device=device)

    def function(self, model):
        return lambda x, t, negative=False: model(x, t, self.texts, **self.condition)

    def sft(self, velocity):
        return sft_loss(velocity, self.x, self.noise, self.sigma, self.t)


def updater(model, args, device):
    """What ends a step: the gradients clipped, AdamW, the gradients gone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-6, betas=(0.9, 0.999), weight_decay=0.01, fused=device.type == "cuda")

    def update():
        parallel.clip_gradients(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return update


# ---------------------------------------------------------------------------------------------- the stages
# Each returns {label: (what is timed, its operations on one clip or None)}.

def forward(args, device):
    model, inputs = random_policy(args, device, frozen=True), Inputs(args, device)
    return {"forward": (torch.no_grad()(lambda: inputs.function(model)(inputs.x, inputs.t)), plan.flops(model, inputs.tokens))}


def sample(args, device):
    model, inputs = random_policy(args, device, frozen=True), Inputs(args, device)
    forwards = args.rollout_steps * (2 if args.guidance != 1 else 1)
    run = torch.no_grad()(lambda: walk(guided(inputs.function(model), args.guidance), inputs.noise, UniPC(args.rollout_steps, 5.0)))
    count = plan.times(plan.flops(model, inputs.tokens), forwards)
    return {f"sample, {args.rollout_steps} steps, guidance {args.guidance:g}": (run, count)}


def gradient(args, device):
    model, inputs = random_policy(args, device), Inputs(args, device)

    def run():
        inputs.sft(inputs.function(model)).backward()
        model.zero_grad()
    return {"gradient": (run, plan.flops(model, inputs.tokens, **plan.backward_options(args)))}


def reward(args, device):
    model, inputs = random_pavrm(args, device, frozen=True), Inputs(args, device)

    def run():
        reward_loss(inputs.function(model)(inputs.x.clone().requires_grad_(), inputs.t)).backward()
    return {"reward": (run, plan.flops(model, inputs.tokens, **plan.backward_options(args)))}


def pavrm(args, device):
    model, inputs = random_pavrm(args, device, frozen=False), Inputs(args, device)
    update = updater(model, args, device)

    def run():
        bce_loss(inputs.function(model)(inputs.x, inputs.t), torch.ones(1, device=device)).backward()
        update()
    return {"pavrm": (run, plan.flops(model, inputs.tokens, **plan.backward_options(args)))}


def prfl(args, device):
    policy, judge, inputs = random_policy(args, device), random_pavrm(args, device, frozen=True), Inputs(args, device)
    update, rollout = updater(policy, args, device), partial(parallel.rollout, policy, parallel.gathers(args, policy, device))
    options = plan.backward_options(args)
    once, step = plan.flops(policy, inputs.tokens), plan.flops(policy, inputs.tokens, **options)

    def run(k):
        if "sft" in args.phases:
            inputs.sft(inputs.function(policy)).backward()
            update()
        if "reward" in args.phases:
            for _, _, logit, _ in rewarded_steps(inputs.function(policy), inputs.function(judge), UniPC(args.rollout_steps, 5.0),
                                                 inputs.noise, [k], rollout=rollout):
                reward_loss(logit).backward()
            update()
    count = plan.times(step, len(args.phases))
    if args.phases == ["sft"]:
        return {"prfl, sft": (partial(run, 0), count)}
    count += plan.flops(judge, inputs.tokens, **options)
    return {f"prfl, {' and '.join(args.phases)}, k = {k}": (partial(run, k), count + plan.times(once, k)) for k in args.k}


def encode(args, device):
    vae, (width, height) = WanVAE(dim=args.vae_dim).to(device).requires_grad_(False), args.size
    video = torch.rand(3, args.frames, height, width)
    if args.video:
        video = to_tensor(read_video(args.video, frames=args.frames, size=args.size))
    return {"encode": (partial(vae.encode, video[None].to(device)), None)}


def decode(args, device):
    vae = WanVAE(dim=args.vae_dim).to(device).requires_grad_(False)
    return {"decode": (partial(vae.decode, torch.zeros(1, *plan.latent_shape(args.size, args.frames), device=device)), None)}


STAGES = {stage.__name__: stage for stage in (forward, gradient, reward, prfl, pavrm, encode, decode, sample)}


def parse_args(argv=None):
    parser = parallel.Parser("Measure time and peak memory of the stages, with random weights. --plan prfl computes instead.")
    parser.add_argument("stages", nargs="+", choices=STAGES, help="what to measure")
    parser.add_argument("--dit", default="tiny", choices=plan.SIZES, help="size of the transformer")
    parser.add_argument("--size", type=parse_size, default="64x64", help="width x height")
    parser.add_argument("--frames", type=int, default=17, help="1 + 4n video frames")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; the median counts")
    parser.add_argument("--warmup", type=int, help="calls before them; None: one, or none with --repeats 1. With --compile give at least 1")
    parser.add_argument("--profile", action="store_true", help="also shares of matrix products, attention and the rest, of one more call")
    parser.add_argument("--phases", nargs="+", default=["sft", "reward"], choices=["sft", "reward"], help="prfl: the phases of a step")
    parser.add_argument("--k", type=int, nargs="+", default=[0, 2], help="prfl: rollout steps without gradient, a measurement each; from "
                        "the first and the last of them the step of the mean k is extrapolated")
    parser.add_argument("--rollout_steps", type=int, default=40, help="solver steps of prfl and sample")
    parser.add_argument("--guidance", type=float, default=5.0, help="sample: classifier-free guidance, two forwards a step; 1 is none")
    parser.add_argument("--lora_rank", type=int, default=0, help="train adapters of this rank, weights frozen; 0 trains all")
    parser.add_argument("--lora_targets", nargs="+", default=["q", "k", "v", "o"], help="linear layers with adapters")
    parser.add_argument("--gather", default="auto", choices=["auto", "yes", "no"], help="keep the weights gathered in prfl's rollout")
    parser.add_argument("--video", help="a real clip for encode; None: noise")
    parser.add_argument("--vae_dim", type=int, default=96, help="width of the VAE; 96 is the official one")
    parser.add_execution(save_every=0)
    return parser.parse_args(argv)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--plan" in argv:
        return plan.main(argv)
    args = parse_args(argv)
    device = parallel.start(args.sp, args.timeout)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    gpu = next((gpu for gpu in plan.GPUS if gpu in name.replace(" ", "")), None)
    say = print if dist.get_rank() == 0 else lambda line: None
    results = {}
    for stage in args.stages:
        try:
            for label, (function, count) in STAGES[stage](args, device).items():
                row = results[label] = measure(function, device, args.repeats, args.warmup)
                line = f"{label}: {row['seconds']:.3f} s (spread {row['spread']:.3f}), peak {row['gigabytes']:.2f} GB"
                if count:
                    row["tflops"] = sum(count.values()) / args.sp / row["seconds"] / 1e12
                    line += f", {row['tflops']:.3g} TFLOP/s"
                else:
                    line += f", {row['seconds'] / args.frames:.3f} s a frame"
                if count and gpu:
                    row["floor, computed"] = plan.floor(count, gpu) / args.sp
                    row["share of the floor"] = row["floor, computed"] / row["seconds"]
                    line += f", {row['share of the floor']:.0%} of the floor's rate ({row['floor, computed']:.2f} s, computed)"
                say(line)
                if args.profile:
                    row["profile"] = profile(function, device)
                    say("  " + ", ".join(f"{name} {share:.1%}" for name, share in row["profile"].items()))
        except torch.OutOfMemoryError:
            results[stage] = {"error": "out of GPU memory"}
            say(f"{stage}: out of GPU memory; try --offload inputs, --checkpoint_blocks, --lora_rank or --sp")
        function = None
        gc.collect()  # and with it the models, which hold themselves in circles
        if device.type == "cuda":
            torch.cuda.empty_cache()
    seconds = [results[label]["seconds"] for label in results if label.startswith("prfl, ")]
    if len(seconds) == len(args.k) > 1 and "reward" in args.phases:
        first, last, more = args.k[0], args.k[-1], (args.rollout_steps - 2) / 2 - args.k[0]  # k is drawn from 0 .. steps - 2
        results["prfl, mean step, extrapolated"] = mean = seconds[0] + more * (seconds[-1] - seconds[0]) / (last - first)
        say(f"mean step: t(k={first}) + {more:g} * (t(k={last}) - t(k={first})) / {last - first} = {mean:.3f} s, extrapolated")
    say(json.dumps({"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "processes": dist.get_world_size(),
                    **{key: value for key, value in vars(args).items() if key not in ("stages", "resume", "save_every", "keep", "timeout")},
                    **results}))


if __name__ == "__main__":
    parallel.run(main)
