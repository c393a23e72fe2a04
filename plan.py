"""What a run will need, computed from its flags and not measured: memory a GPU by part, operations, the floor in seconds.

    python bench.py --plan prfl @recipes/prfl_t2v_14B_720P.args --gpus 8 --sp 4 --size 1280x720
    python bench.py --plan pavrm --dit 14B --gpus 8 --batch_size 8 --checkpoint_blocks --gpu H100
    python bench.py --plan fits          # the smallest number of GPUs on which training fits

All flags of train_prfl.py or train_pavrm.py are understood. Models are built without weights. 1 GB is 1e9 bytes. The last
line is JSON. Blocks are reckoned as they run without --compile, which holds less. Not counted: evaluation (decoding samples),
the CUDA context, NCCL's buffers, gaps of the allocator; for these, 5 % of the GPU is left free.
"""
import argparse
import json
import math
from collections import Counter
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

import train_pavrm
import train_prfl
from data import parse_size
from files import InputError
from lora import add_lora, adapters
from model import WanConfig, WanModel
from reward import PAVRM
from vae import WanVAE

LARGE = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, freq_dim=256)
SIZES = {"tiny": dict(dim=112, ffn_dim=320, num_heads=4, num_layers=6, freq_dim=64, text_len=32, text_dim=64),
         "1.3B": dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, freq_dim=256),
         "14B": LARGE, "14B-I2V": dict(LARGE, model_type="i2v", in_dim=36)}

# Memory in GB, then TFLOP/s in bf16 of matrix products, attention forward and attention backward. H200's rates are what good
# kernels reach there; the others' are H200's times the ratio of the peaks in the data sheets (989, 312, 362, 165), not measured.
GPUS = {"H200": (141, 750, 600, 500), "H100": (80, 750, 600, 500), "A100": (80, 237, 189, 158),
        "L40S": (48, 275, 220, 183), "RTX4090": (24, 125, 100, 83)}
USABLE = 0.95


def size_config(name):
    """The configuration of a size in SIZES."""
    return WanConfig(**{"model_type": "t2v", "in_dim": 16, "out_dim": 16, **SIZES[name]})


def latent_shape(size, frames):
    """(C, F, H, W) of a clip's latents. size: (width, height)."""
    return 16, 1 + (frames - 1) // 4, size[1] // 8, size[0] // 8


def token_count(size, frames):
    return math.prod(latent_shape(size, frames)[1:]) // 4


def kept_blocks(config):
    """Blocks of a PAVRM, where no flag says it."""
    return min(8, config.num_layers // 2)


def image_tokens(config):
    return config.use_clip * (514 if config.model_type == "flf2v" else 257)


# ---------------------------------------------------------------------------------------------- operations

def flops(model, tokens, backward=False, checkpoint=True, save_attention=False):
    """Operations on one clip of `tokens` tokens: {linear, attention, attention_backward}, 2 for a multiply and add.

    model: a WanModel or a PAVRM, on any device. Matrix products and attention only. `backward` adds the gradients of all
    inputs and of the weights that are trained, and with `checkpoint` the blocks' second forward. The products of a reward's few
    queries with the tokens are left out: a thousandth of a block.
    """
    dit = getattr(model, "dit", model)
    config, total = dit.config, Counter(linear=0, attention=0, attention_backward=0)
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv3d)):
            continue
        rows = (image_tokens(config) if "_img" in name or "img_emb" in name else
                config.text_len if "text_embedding" in name or ".cross_attn.k" in name or ".cross_attn.v" in name else
                tokens if ".blocks." in f".{name}" or "patch" in name or name == "head.head" else 1)
        again = checkpoint and ".blocks." in f".{name}"
        total["linear"] += 2 * rows * layer.weight.numel() * (1 + backward * (1 + layer.weight.requires_grad + again))
    attention = 4 * tokens * (tokens + config.text_len + image_tokens(config)) * config.dim * len(dit.blocks)
    total["attention"] = attention * (1 + (backward and checkpoint and not save_attention))
    total["attention_backward"] = backward * 2.5 * attention  # five products of the forward's size instead of two, as in flash attention
    return total


def backward_options(args):
    """The options of `flops` for a gradient, from a script's flags."""
    return dict(backward=True, checkpoint=args.checkpoint_blocks, save_attention=args.save_attention)


def times(count, factor):
    return Counter({name: value * factor for name, value in count.items()})


def floor(count, gpu):
    """Seconds on a GPU of GPUS, one process, at its rates."""
    _, linear, attention, attention_backward = GPUS[gpu]
    return (count["linear"] / linear + count["attention"] / attention + count["attention_backward"] / attention_backward) / 1e12


# ---------------------------------------------------------------------------------------------- memory

def block_memory(block, config, tokens, clips=1, itemsize=2, bf16_residual=False, sp=1, fused_norm=True):
    """Bytes of a block with gradient: (what its forward keeps for its backward, besides its input and weights, what comes to
    that at most while backward runs). All of Block.forward's lines, in order; `tokens` are this rank's, `itemsize` is that of the
    compute dtype, fused_norm is RMSNorm as on CUDA (elsewhere it keeps its result too where its weight is trained)."""
    def learns(name):  # the layer needs its input for the gradient of its weight
        layer = block.get_submodule(name)
        return layer.weight.requires_grad or hasattr(layer, "lora_A")

    D, F, c, heads = config.dim, config.ffn_dim, itemsize, config.num_heads
    trained = block.modulation.requires_grad
    norm = 4 * D + (4 * D if trained and not fused_norm else 0)  # RMSNorm's float32 input
    per_token = [
        bf16_residual * 4 * D,                                 # norm1: float32 copy of its input
        trained * 4 * D,                                       # norm1's result, for the gradient of the scale
        any(learns(f"self_attn.{name}") for name in "qkv") * c * D,
        2 * norm,                                              # norm_q, norm_k
        4 * c * D + 4 * heads,                                 # q, k, v, result and logarithms of sums of attention
        (sp > 1) * 2 * c * D,                                  # q and k before rotation: v lies in one piece with them
        (sp > 1 and learns("self_attn.o")) * c * D,            # attention's result, back with its tokens
        trained * c * D,                                       # o's result, for the gate
        4 * D,                                                 # x, norm3's input
        learns("cross_attn.q") * c * D,
        norm,                                                  # norm_q
        2 * c * D + 4 * heads,                                 # q and result of cross-attention
        config.use_clip * (c * D + 4 * heads),                 # and of that to image tokens
        (config.use_clip and learns("cross_attn.o")) * c * D,  # the sum of both
        4 * D,                                                 # x, norm2's input
        trained * 4 * D,
        learns("ffn.0") * c * D,
        c * F,                                                 # GELU's input
        learns("ffn.2") * c * F,                               # GELU's result
        trained * c * D,                                       # ffn's result, for the gate
        sum(c * layer.lora_A.out_features for name, layer in adapters(block).items() if name[-2:] not in (".k", ".v") or "self" in name),
        9 * 4,                                                 # mean and 1 / deviation of the norms
    ]
    angles = 8 * tokens * sp * D // heads                      # cos + i sin, for q and for k; with sp of all tokens
    text = config.text_len * (learns("cross_attn.k") * norm + 2 * c * D + sum(  # its keys and values
        c * layer.lora_A.out_features for name, layer in adapters(block).items() if name in ("cross_attn.k", "cross_attn.v")))
    if config.use_clip:
        text += image_tokens(config) * (learns("cross_attn.k_img") * norm + 2 * c * D)
    saved = clips * (tokens * sum(per_token) + text) + angles
    # Backward begins with the FFN: the residual stream's gradient and its products with gate and result, then, GELU's two
    # gradients, when ffn's and GELU's results are free again.
    working = max(trained * 12 * D, 4 * D + 2 * c * F - (trained * c * D + learns("ffn.2") * c * F))
    return saved, clips * tokens * working


def forward_memory(config, tokens, clips=1, itemsize=2):
    """Bytes at most that a block holds without gradient, besides its input: while q and k are rotated, or in the FFN."""
    return clips * tokens * max((15 + 4 * itemsize) * config.dim, (8 + itemsize) * config.dim + 2 * itemsize * config.ffn_dim)


class Weights:
    """Numbers of a model's weights: `trained` (float32), `frozen` (in the compute dtype), `frozen32` (float32: time embedding,
    heads), those of a `block`, and of the `rest` that is gathered all the time."""

    def __init__(self, model):
        dit = getattr(model, "dit", model)
        heads = model.heads if hasattr(model, "dit") else [model.head]
        exempt = {p for module in (dit.time_embedding, dit.time_projection, *heads) for p in module.parameters()}
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad and p not in exempt)
        self.frozen32 = sum(p.numel() for p in exempt if not p.requires_grad)
        self.block = sum(p.numel() for p in dit.blocks[0].parameters())
        self.block_trained = max(sum(p.numel() for p in block.parameters() if p.requires_grad) for block in dit.blocks)
        self.blocks = self.block * len(dit.blocks)
        self.rest = self.trained + self.frozen + self.frozen32 - self.blocks - sum(p.numel() for p in exempt)


@lru_cache(maxsize=8)
def build(script, config, lora, lora_targets, blocks, task, pool, num_queries, train_blocks):
    config = WanConfig(**dict(config))
    with torch.device("meta"):
        dit, kept = WanModel(config), blocks or kept_blocks(config)
        pavrm = PAVRM(WanModel(config) if script == "prfl" else dit, kept, task, pool, num_queries)
    if script == "pavrm":
        dit.requires_grad_(False)
        for number, block in enumerate(dit.blocks):
            block.requires_grad_(train_blocks is None or number in train_blocks)
    if lora:
        add_lora(dit, lora, lora, lora_targets)
    if script == "pavrm":
        return pavrm, None, Weights(pavrm), None
    return dit, pavrm.requires_grad_(False), Weights(dit), Weights(pavrm)


@lru_cache
def vae_weights():
    with torch.device("meta"):
        return sum(p.numel() for p in WanVAE().parameters())


def models(script, args, config):
    """The models of a run, on the meta device, and their numbers of weights: trained model, frozen PAVRM or None, both Weights."""
    own = (None, ["motion_quality"], "query", 1, None)  # the PAVRM of train_prfl.py: as published
    if script == "pavrm":
        own = (args.num_blocks, args.task, args.pool, args.num_queries, args.train_blocks)
    *built, weights, judging = build(script, tuple(vars(config).items()), args.lora_rank, tuple(args.lora_targets),
                                     *(tuple(value) if isinstance(value, list) else value for value in own))
    judged = script == "prfl" and args.reward != "none" and (args.phases != ["sft"] or args.samples and args.sample_every)
    return (*built, weights, judging) if judged else (built[0], None, weights, None)


def clips_a_group(script, args, gpus):
    """Clips that a group of --sp GPUs works on at once."""
    if gpus % args.sp or gpus % args.dp_replicate:
        raise InputError(f"{gpus} GPUs do not go with --sp {args.sp} and --dp_replicate {args.dp_replicate}; use what divides them")
    if args.batch_size * args.sp % gpus:
        raise InputError(f"--batch_size {args.batch_size} cannot be shared equally by {gpus // args.sp} groups of {args.sp} GPUs; "
                         f"use a multiple of {gpus // args.sp}")
    return args.batch_size * args.sp // gpus * (2 if script == "pavrm" and args.loss == "bt" else 1)


def memory(script, args, config, gpus, gpu, size, frames):
    """Memory of a run of train_{script}.py with the flags `args`, bytes a GPU:
    ({moment: {part: bytes}}, {part: bytes in the CPU's memory}, total of the worst moment)."""
    clips, shards = clips_a_group(script, args, gpus), gpus // args.dp_replicate
    if config.num_heads % args.sp:
        raise InputError(f"--sp {args.sp} does not divide the model's {config.num_heads} heads; use one that does")
    trained_model, judge, weights, judging = models(script, args, config)
    tokens = -(-token_count(size, frames) // args.sp)
    c = 4 if args.compute_dtype == "float32" else 2
    residual = 2 if args.bf16_residual else 4
    options = dict(clips=clips, itemsize=c, bf16_residual=args.bf16_residual, sp=args.sp)
    one = clips * tokens * config.dim  # values of a residual stream

    # What lies there all the time. Frozen float32 weights are few: the time embedding's and the heads'.
    static = {"trained weights, float32": 4 * weights.trained / shards,
              "frozen weights": (c * weights.frozen + 4 * weights.frozen32) / shards,
              "reward model": (c * judging.frozen + 4 * judging.frozen32) / shards if judge else 0,
              "gradients": 4 * weights.trained / shards, "optimizer": 8 * weights.trained / shards}
    if script == "prfl" and args.kl_weight and not args.lora_rank:
        static["weights as they were"] = c * (weights.trained + weights.frozen) / shards
    average = {"average (EMA)": 4 * weights.trained / shards if args.ema else 0}
    cpu = {}
    if "weights" in args.offload:
        static, cpu = {}, static
    if "ema" in args.offload:
        average, cpu = {}, cpu | average
    static |= average

    def kept(dit, steps=1):
        """Bytes (on the GPU, on the CPU) that a model keeps for its blocks' backward before that begins."""
        number = len(dit.blocks) * steps
        if not args.checkpoint_blocks:
            return steps * sum(block_memory(block, config, tokens, **options)[0] + residual * one for block in dit.blocks), 0
        attention = number * (c * one + 4 * clips * tokens * config.num_heads) * 2 if args.save_attention else 0
        if "inputs" in args.offload:  # one in use, one on its way; pinned memory comes in powers of two
            return 2 * residual * one + attention, number * 2 ** math.ceil(math.log2(residual * one))
        return (number * residual - steps * (residual - c)) * one + attention, 0  # the first block's input is in the compute dtype

    def backward(dit):
        block = max(dit.blocks, key=lambda block: block.modulation.requires_grad)
        saved, working = block_memory(block, config, tokens, **options)
        return saved + working if args.checkpoint_blocks else working

    # FSDP gathers a block in the compute dtype while the one before it runs; of trained ones the gradients, one block's
    # in that dtype and two blocks' in float32, are on their way to the ranks. A single process has but copies of its own.
    ahead, reduced = (3, 2) if shards > 1 else (1 + ("weights" in args.offload), 1)
    buffers = ahead * c * weights.block + c * weights.rest + (c + 4 * reduced) * weights.block_trained
    other = 4 * vae_weights() * (script == "prfl" and bool(args.samples and args.sample_every)) + 10 * 4 * clips * math.prod(
        latent_shape(size, frames)) + clips * config.text_len * (config.text_dim + config.dim) * c
    dit = getattr(trained_model, "dit", trained_model)
    steps = args.gradient_steps if script == "prfl" else 1
    kept_gpu, kept_cpu = kept(dit, steps)
    moments = {"backward": {"gathered weights": buffers, "block inputs": kept_gpu, "a block's backward": backward(dit)}}
    if script == "prfl":
        # The head's saved values wait until the reward's backward is done. The reward's pool holds a float32 copy of the tokens
        # and its gradient: less than the block after it.
        head = (4 + 8 * dit.head.modulation.requires_grad + 2 * args.bf16_residual) * one
        taken = c * (weights.trained + weights.frozen)
        gathered = args.gather == "yes" or (args.gather == "auto" and gpus > args.dp_replicate and "weights" not in args.offload
                                            and taken < GPUS[gpu][0] * 1e9 / 4)  # as parallel.gathers
        everything = c * (weights.blocks + weights.rest)
        guided = 2 if args.rollout_guidance != 1 else 1
        if "reward" in args.phases:
            if guided == 2:
                kept_gpu, kept_cpu = kept(dit, 2 * steps)
                moments["backward"]["block inputs"] = kept_gpu
            own_gpu, own_cpu = kept(judge.dit)
            shared = 2 * residual * one if "inputs" in args.offload else 0  # the buffers on the GPU
            kept_cpu += own_cpu
            moments["reward's backward"] = {"gathered weights": ahead * c * judging.block + c * (weights.rest + judging.rest),
                                            "block inputs": kept_gpu + own_gpu - shared, "a block's backward": backward(judge.dit),
                                            "generator's head": head}
            moments["rollout"] = {"gathered weights": everything if gathered else ahead * c * weights.block + c * weights.rest,
                                  "a block's forward": forward_memory(config, tokens, clips, c) + residual * one}
    if kept_cpu:
        cpu["block inputs, pinned"] = kept_cpu
    for name, parts in moments.items():
        moments[name] = {part: value for part, value in {**static, **parts, "other": other}.items() if value}
    return moments, {part: value for part, value in cpu.items() if value}, max(sum(parts.values()) for parts in moments.values())


def operations(script, args, config, gpus, size, frames):
    """{part of a micro-step: operations a GPU}, as `flops` counts them."""
    (model, judge, *_), tokens, share = models(script, args, config), token_count(size, frames), clips_a_group(script, args, gpus) / args.sp
    options = backward_options(args)
    forward, gradient = flops(model, tokens), flops(model, tokens, **options)
    if script == "pavrm":
        return {"gradient step": times(gradient, share)}
    parts = {}
    if "reward" in args.phases:
        guided = 2 if args.rollout_guidance != 1 else 1
        ks, n = train_prfl.rewardable(args.k, args.rollout_steps), args.rewards_per_rollout
        # The rollout goes as far as the largest of n different k; on average, for one, to their mean.
        k = sum(max(k - args.gradient_steps + 1, 0) * math.comb(i, n - 1) for i, k in enumerate(ks)) / math.comb(len(ks), n)
        parts = {f"rollout, {k:g} steps": times(forward, k * guided),
                 "gradient step": times(gradient, n * args.gradient_steps * guided), "reward": times(flops(judge, tokens, **options), n)}
        if args.kl_weight:
            parts["start model"] = times(forward, n * args.gradient_steps * guided)
    for phase in args.phases:
        if phase != "reward":
            parts[phase] = times(gradient, args.sft_ratio) + (times(flops(judge, tokens), args.sft_ratio) if phase == "rwr" else Counter())
    return {name: times(count, share) for name, count in parts.items()}


# ---------------------------------------------------------------------------------------------- commands

def fits():
    """The table of the smallest number of GPUs that PRFL fits on, as Markdown lines; all of it computed."""
    kinds = ("RTX4090", "L40S", "H100", "H200")
    lines = ["| 81 frames, computed | " + " | ".join(f"{GPUS[gpu][0]} GB" for gpu in kinds) + " |", "|---" * (1 + len(kinds)) + "|"]
    for dit in ("1.3B", "14B"):
        for what, rank in (("LoRA of rank 128", 128), ("full", 0)):
            for size in ((832, 480), (1280, 720)):
                cells = [smallest(dit, rank, size, gpu) for gpu in kinds]
                lines.append(f"| {dit}, {what}, {size[0]}x{size[1]} | " + " | ".join(cells) + " |")
    return lines


def smallest(dit, rank, size, gpu, frames=81):
    """The smallest number of GPUs that PRFL fits on, the flags it takes there besides --checkpoint_blocks and --gather no, and
    the GB a GPU; then, if that is less, the smallest number with the weights offloaded as well, and the GB of CPU memory a GPU."""
    config, found = size_config(dit), []
    for offloads in (([], ["inputs"]), (["inputs", "weights"],)):
        tries = ((gpus, offload, sp) for gpus in (1, 2, 4, 8, 16, 32, 64) for offload in offloads for sp in (1, 2, 4, 8)
                 if gpus % sp == 0 and config.num_heads % sp == 0)
        for gpus, offload, sp in tries:
            flags = (["--sp", str(sp)] if sp > 1 else []) + (["--offload", *offload] if offload else [])
            given = ["--checkpoint_blocks", "--lora_rank", str(rank), "--batch_size", str(gpus // sp), "--gather", "no"]
            args = train_prfl.parse_args([*given, *flags])
            _, cpu, total = memory("prfl", args, config, gpus, gpu, size, frames)
            if fits_on(total, gpu) and not (found and gpus >= found[0][0]):
                held = f"{total / 1e9:.0f} GB" + (f", {sum(cpu.values()) / 1e9:.0f} GB CPU" if cpu else "")
                found.append((gpus, " ".join([str(gpus), *([f"`{' '.join(flags)}`"] if flags else []), f"({held})"])))
                break
    return "; ".join(text for _, text in found) or "more than 64"


def fits_on(total, gpu):
    return total <= USABLE * GPUS[gpu][0] * 1e9


def main(argv):
    parser = argparse.ArgumentParser(prog="bench.py", description="Compute a training run's memory and floors; other flags are "
                                     "those of train_prfl.py or train_pavrm.py.", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--plan", required=True, choices=["prfl", "pavrm", "fits"], help="the script, or the table of what fits where")
    parser.add_argument("--dit", choices=SIZES, help="size of the transformer in place of --model's; None: --model's, or of the "
                        "official model of that name")
    parser.add_argument("--size", type=parse_size, default="832x480", help="width x height of the clips")
    parser.add_argument("--frames", type=int, default=81, help="1 + 4n video frames")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs, of all machines together")
    parser.add_argument("--gpu", default="H200", choices=GPUS, help="their kind")
    own, rest = parser.parse_known_args(argv)
    if own.plan == "fits":
        lines = fits()
        print("\n".join(lines))
        return print(json.dumps({"computed": True, "fits": lines}))
    args = {"prfl": train_prfl, "pavrm": train_pavrm}[own.plan].parse_args(rest)
    name = Path(args.model).name
    if own.dit:
        config = size_config(own.dit)
    elif Path(args.model).is_dir():
        config = WanModel.on_meta(args.model).config
    elif "14B" in name or "1.3B" in name:
        config = size_config("1.3B" if "1.3B" in name else "14B-I2V" if "I2V" in name else "14B")
    else:
        raise InputError(f"{args.model} is no directory and no official model; give --dit")
    run = own.size, own.frames
    moments, cpu, total = memory(own.plan, args, config, own.gpus, own.gpu, *run)
    counts = operations(own.plan, args, config, own.gpus, *run)
    seconds = {part: floor(count, own.gpu) for part, count in counts.items()}
    counts = {part: sum(count.values()) for part, count in counts.items()}

    print(f"{own.plan} of {own.dit or args.model} on {own.gpus} {own.gpu}, {own.size[0]}x{own.size[1]} x {own.frames} frames, "
          f"{token_count(*run)} tokens; each {args.sp} GPUs have {clips_a_group(own.plan, args, own.gpus)} clips at once. "
          f"All computed, nothing measured.")
    print(f"\n{'GB a GPU':28}" + "".join(f"{moment:>20}" for moment in moments))
    for part in dict.fromkeys(part for parts in moments.values() for part in parts):
        print(f"{part:28}" + "".join(f"{parts.get(part, 0) / 1e9:20.2f}" for parts in moments.values()))
    print(f"{'total':28}" + "".join(f"{sum(parts.values()) / 1e9:20.2f}" for parts in moments.values()))
    for part, value in cpu.items():
        print(f"CPU: {part:23}{value / 1e9:20.2f}")
    print(f"{'fits' if fits_on(total, own.gpu) else 'does not fit'}: {total / 1e9:.1f} of {USABLE * GPUS[own.gpu][0]:.0f} usable GB")
    print(f"\n{'a micro-step, a GPU':28}{'PFLOP':>20}{'floor, seconds':>20}")
    for part in counts:
        print(f"{part:28}{counts[part] / 1e15:20.3f}{seconds[part]:20.2f}")
    print(f"{'total':28}{sum(counts.values()) / 1e15:20.3f}{sum(seconds.values()):20.2f}")
    print(json.dumps({"computed": True, "gpu": own.gpu, "gpus": own.gpus, "fits": fits_on(total, own.gpu), "bytes": moments,
                      "cpu_bytes": cpu, "operations": counts, "floor_seconds": seconds}))
