"""What a run will need, computed from its flags and not measured: memory per GPU by part, operations, and a
floor in seconds.

    python -m tools.bench --plan prfl @recipes/prfl_t2v_14B_720P.args --gpus 8 --sp 4 --size 1280x704
    python -m tools.bench --plan pavrm --dit 14B --gpus 8 --batch_size 8 --activation_checkpointing --gpu H100
    python -m tools.bench --plan fits    # the smallest number of GPUs on which training fits

All flags of train_prfl.py or train_pavrm.py are understood. Models are built without weights. 1 GB is 1e9
bytes. The last line is JSON. Blocks are compiled, as on any GPU without --no-compile. Not counted: the CUDA
context, NCCL's buffers, gaps of the allocator. 5 % of the GPU is left free for these.
"""
import json
import math
from functools import lru_cache
from pathlib import Path

import cli

import torch

import train_pavrm
import train_prfl
from files import InputError
from lora import add_lora
from memory import compiles
from model import WanConfig, WanModel
from reward import PAVRM
from tools import floors
from tools.floors import GPUS, USABLE
from tools.run_memory import memory

# ------------------------------------------------------------------------------ models

class Weights:
    """Numbers of a model's weights, by how they are stored.

    trained         float32
    frozen          in the compute dtype
    frozen32        float32: frozen time embedding and heads
    block, blocks   of one block, of all
    block_trained   of one block, trained
    rest            outside blocks, time embedding and heads: gathered all the time
    """

    def __init__(self, model):
        dit = getattr(model, "dit", model)
        heads = model.heads if hasattr(model, "dit") else [model.head]
        exempt = set()
        for module in (dit.time_embedding, dit.time_projection, *heads):
            exempt.update(module.parameters())

        self.trained, self.frozen, self.frozen32 = 0, 0, 0
        for parameter in model.parameters():
            if parameter.requires_grad:
                self.trained += parameter.numel()
            elif parameter in exempt:
                self.frozen32 += parameter.numel()
            else:
                self.frozen += parameter.numel()
        self.all = self.trained + self.frozen + self.frozen32

        self.block = numel(dit.blocks[0].parameters())
        self.blocks = self.block * len(dit.blocks)
        self.block_trained = max(numel(p for p in block.parameters() if p.requires_grad)
                                 for block in dit.blocks)
        self.rest = self.all - self.blocks - numel(exempt)


def numel(parameters):
    return sum(parameter.numel() for parameter in parameters)


@lru_cache(maxsize=8)
def build_prfl(config, lora_rank, lora_targets):
    """(policy, its frozen PAVRM, Weights of both) of a run of train_prfl.py, on the meta device.

    config: the items of a WanConfig. The PAVRM is as published.
    """
    config = WanConfig(**dict(config))
    with torch.device("meta"):
        policy = WanModel(config)
        pavrm = PAVRM(WanModel(config), floors.kept_blocks(config))
    if lora_rank:
        add_lora(policy, lora_rank, lora_rank, lora_targets)
    pavrm.requires_grad_(False)
    return policy, pavrm, Weights(policy), Weights(pavrm)


@lru_cache(maxsize=8)
def build_pavrm(config, lora_rank, lora_targets, num_blocks, labels, pool, num_queries, train_blocks):
    """(PAVRM, its Weights) of a run of train_pavrm.py, likewise."""
    config = WanConfig(**dict(config))
    with torch.device("meta"):
        dit = WanModel(config)
        pavrm = PAVRM(dit, num_blocks or floors.kept_blocks(config), labels, pool, num_queries)
    dit.requires_grad_(False)
    for number, block in enumerate(dit.blocks):
        block.requires_grad_(train_blocks is None or number in train_blocks)
    if lora_rank:
        add_lora(dit, lora_rank, lora_rank, lora_targets)
    return pavrm, Weights(pavrm)


class Run:
    """A run of train_{script}.py with the flags `args` on that many GPUs, and the numbers that follow.

    Its model and its frozen reward model (`judge`, or None) are on the meta device.
    """

    def __init__(self, script, args, config, gpus, gpu, size, frames):
        self.script, self.args, self.config = script, args, config
        self.gpus, self.gpu, self.size, self.frames = gpus, gpu, size, frames
        self.clips = clips_per_group(script, args, gpus)  # at once
        self.shards = gpus // args.dp_replicate           # GPUs that hold one copy of the weights together
        if config.num_heads % args.sp:
            raise InputError(f"--sp {args.sp} does not divide the model's {config.num_heads} heads; "
                             f"use a divisor")
        self.compiled = compiles(args, torch.device("cuda"))
        self.itemsize = 4 if args.compute_dtype == "float32" else 2
        self.residual_itemsize = 2 if args.bf16_residual else 4
        self.tokens = math.ceil(floors.token_count(size, frames) / args.sp)  # of a clip, on one GPU
        self.stream = self.clips * self.tokens * config.dim                  # values of a residual stream

        self.sampling = script == "prfl" and args.samples > 0 and args.sample_every > 0
        self.judge, self.judging = None, None
        items, targets = tuple(vars(config).items()), tuple(args.lora_targets)
        if script == "pavrm":
            train_blocks = None if args.train_blocks is None else tuple(args.train_blocks)
            self.model, self.weights = build_pavrm(
                items, args.lora_rank, targets, args.num_blocks, tuple(args.labels), args.pool,
                args.num_queries, train_blocks)
            self.gradient_steps = 1
        else:
            self.model, pavrm, self.weights, judging = build_prfl(items, args.lora_rank, targets)
            self.gradient_steps = args.gradient_steps
            if args.phases != ["sft"] or (self.sampling and args.reward != "none"):
                self.judge, self.judging = pavrm, judging
                if args.reward == "none" or args.reward.endswith(".py"):
                    raise InputError(f"--plan needs a PAVRM as the reward, and --reward is {args.reward}; "
                                     f"leave it out to plan with one")
        self.dit = getattr(self.model, "dit", self.model)


def clips_per_group(script, args, gpus):
    """Clips that a group of --sp GPUs works on at once."""
    if gpus % args.sp or gpus % args.dp_replicate:
        raise InputError(f"--sp {args.sp} and --dp_replicate {args.dp_replicate} do not both divide {gpus} "
                         f"GPUs; use divisors")
    groups = gpus // args.sp
    if args.batch_size % groups:
        raise InputError(f"--batch_size {args.batch_size} cannot be shared equally by {groups} groups of "
                         f"{args.sp} GPUs; use a multiple of {groups}")
    pairs = script == "pavrm" and args.loss == "bt"
    return args.batch_size // groups * (2 if pairs else 1)


# ------------------------------------------------------------------------------ what fits where

def fits():
    """The table of the smallest number of GPUs that PRFL fits on, computed, as lines of Markdown."""
    kinds = ("RTX4090", "L40S", "H100", "H200")
    sizes = [f"{GPUS[gpu]['memory']} GB" for gpu in kinds]
    lines = ["| 81 frames, computed | " + " | ".join(sizes) + " |", "|---" * (1 + len(kinds)) + "|"]
    for dit in ("1.3B", "14B"):
        for what, rank in (("LoRA of rank 128", 128), ("full", 0)):
            for size in ((832, 480), (1280, 720)):
                cells = [smallest(dit, rank, size, gpu) for gpu in kinds]
                lines.append(f"| {dit}, {what}, {size[0]}x{size[1]} | " + " | ".join(cells) + " |")
    return lines


def smallest(dit, rank, size, gpu, frames=81):
    """A cell of that table: the smallest number of GPUs, the flags that this number needs besides
    --activation_checkpointing, and the GB per GPU. Then, if that is less, the smallest number with the
    weights offloaded as well."""
    gpus, text = first_that_fits(dit, rank, size, gpu, frames, [[], ["inputs", "reward"]])
    fewer, offloaded = first_that_fits(dit, rank, size, gpu, frames, [["inputs", "weights"]])
    cells = []
    if gpus:
        cells.append(text)
    if fewer and (not gpus or fewer < gpus):
        cells.append(offloaded)
    return "; ".join(cells) or "more than 64"


def first_that_fits(dit, rank, size, gpu, frames, offloads):
    """(GPUs, text) of the first combination that fits, or (None, ""): fewest GPUs first, then `offloads`."""
    config = floors.size_config(dit)
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        for offload in offloads:
            for sp in (1, 2, 4, 8):
                if gpus % sp or config.num_heads % sp:
                    continue
                flags = ["--sp", str(sp)] if sp > 1 else []
                if offload:
                    flags += ["--offload", *offload]
                args = train_prfl.parse_args(["--activation_checkpointing", "--lora_rank", str(rank),
                                              "--batch_size", str(gpus // sp), *flags])
                _, cpu, total = memory(Run("prfl", args, config, gpus, gpu, size, frames))
                if not fits_on(total, gpu):
                    continue
                needs = f"{total / 1e9:.0f} GB"
                if cpu:
                    needs += f", {sum(cpu.values()) / 1e9:.0f} GB CPU"
                shown = f" `{' '.join(flags)}`" if flags else ""
                return gpus, f"{gpus}{shown} ({needs})"
    return None, ""


def fits_on(total, gpu):
    return total <= USABLE * GPUS[gpu]["memory"] * 1e9


# ------------------------------------------------------------------------------ the command

def parse_args(argv):
    """(the plan's own flags, those of the training script)."""
    parser = cli.Parser("Compute a training run's memory and floors. All flags of train_prfl.py or "
                        "train_pavrm.py are understood besides these.")
    parser.prog, parser.allow_abbrev = "python -m tools.bench", False
    add = parser.add_argument
    add("--plan", required=True, choices=["prfl", "pavrm", "fits"],
        help="the training script; fits: a table of the smallest number of GPUs on which training fits")
    add("--dit", choices=floors.SIZES,
        help="size of the transformer (default: that of the directory or of the official model that --model "
             "names)")
    add("--size", type=cli.parse_size, default="832x480", help="width x height of the clips")
    add("--frames", type=cli.FRAMES, default=81, help="video frames of a clip, 1 + 4 n")
    add("--gpus", type=cli.whole(1, 100_000), default=1, help="number of GPUs, of all machines together")
    add("--gpu", default="H200", choices=GPUS, help="kind of GPU")
    own, rest = parser.parse_known_args(argv)
    if own.plan == "fits" and len(argv) > 2:
        raise InputError("--plan fits has no other flags; leave them out")
    return own, rest


def config_of(model, dit):
    """The configuration of a size, or of --model: a directory, or an official model's name."""
    if dit:
        return floors.size_config(dit)
    if Path(model).is_dir():
        return WanModel.on_meta(model).config
    name = Path(model).name
    if "1.3B" in name:
        return floors.size_config("1.3B")
    if "14B" in name:
        return floors.size_config("14B-I2V" if "I2V" in name else "14B")
    raise InputError(f"{model} is neither a directory nor an official model's name; give --dit")


def main(argv):
    own, rest = parse_args(argv)
    if own.plan == "fits":
        lines = fits()
        print("\n".join(lines))
        print(json.dumps({"computed": True, "fits": lines}))
        return

    # ---- compute
    script = {"prfl": train_prfl, "pavrm": train_pavrm}[own.plan]
    args = script.parse_args(rest)
    run = Run(own.plan, args, config_of(args.model, own.dit), own.gpus, own.gpu, own.size, own.frames)
    moments, cpu, total = memory(run)
    counts, seconds = {}, {}
    for part, count in floors.operations(run).items():
        counts[part] = sum(count.values())
        seconds[part] = floors.floor(count, own.gpu)

    # ---- print
    print(f"{own.plan} of {own.dit or args.model} on {own.gpus} {own.gpu}, {own.size[0]}x{own.size[1]} x "
          f"{own.frames} frames, {floors.token_count(own.size, own.frames)} tokens; --sp {args.sp}, clips "
          f"per group: {run.clips}. All computed, nothing measured.")
    print_memory(moments, cpu)
    verdict = "fits" if fits_on(total, own.gpu) else "does not fit"
    print(f"{verdict}: {total / 1e9:.1f} of {USABLE * GPUS[own.gpu]['memory']:.0f} usable GB")
    print(f"\n{'per GPU and micro-step':30}{'PFLOP':>20}{'floor, seconds':>20}")
    for part in counts:
        print(f"{part:30}{counts[part] / 1e15:20.3f}{seconds[part]:20.2f}")
    print(f"{'total':30}{sum(counts.values()) / 1e15:20.3f}{sum(seconds.values()):20.2f}")
    print(json.dumps({"computed": True, "gpu": own.gpu, "gpus": own.gpus, "fits": fits_on(total, own.gpu),
                      "bytes": moments, "cpu_bytes": cpu, "operations": counts, "floor_seconds": seconds}))


def print_memory(moments, cpu):
    """A table of the parts of memory at each moment, in GB."""
    print(f"\n{'GB per GPU':30}" + "".join(f"{moment:>20}" for moment in moments))
    names = {}  # of all parts, in order
    for parts in moments.values():
        names.update(parts)
    for name in names:
        print(f"{name:30}" + "".join(f"{parts.get(name, 0) / 1e9:20.2f}" for parts in moments.values()))
    print(f"{'total':30}" + "".join(f"{sum(parts.values()) / 1e9:20.2f}" for parts in moments.values()))
    for name, value in cpu.items():
        print(f"CPU: {name:25}{value / 1e9:20.2f}")
