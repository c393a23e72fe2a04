"""Sizes, GPUs, operations, and the least time that they take.

A floor is the time of all matrix products and of attention at a GPU's rates, with nothing in between. It is
computed from shapes alone, not measured.
"""
import math
from collections import Counter

from torch import nn

import train_prfl
from files import InputError
from model import WanConfig

LARGE = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, freq_dim=256)
SIZES = {
    "tiny": dict(dim=112, ffn_dim=320, num_heads=4, num_layers=6, freq_dim=64, text_len=32, text_dim=64),
    "1.3B": dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, freq_dim=256),
    "14B": LARGE,
    "14B-I2V": dict(LARGE, model_type="i2v", in_dim=36),
}

# Memory in GB, and rates in bf16 in TFLOP/s. The rates of the H200 are what good kernels reach on it. The
# others are not measured: they scale the H200's by the data sheets' peaks (989; 312, 362 and 165).
GPUS = {
    "H200":    dict(memory=141, linear=750, attention=600, attention_backward=500),
    "H100":    dict(memory=80, linear=750, attention=600, attention_backward=500),
    "A100":    dict(memory=80, linear=237, attention=189, attention_backward=158),
    "L40S":    dict(memory=48, linear=275, attention=220, attention_backward=183),
    "RTX4090": dict(memory=24, linear=125, attention=100, attention_backward=83),
}
USABLE = 0.95  # share of a GPU's memory that a plan may fill


# ------------------------------------------------------------------------------ sizes

def size_config(name):
    """The configuration of a size in SIZES."""
    return WanConfig(**{"model_type": "t2v", "in_dim": 16, "out_dim": 16, **SIZES[name]})


def latent_shape(size, frames):
    """(C, F, H, W) of a clip's latents. size: (width, height)."""
    return 16, 1 + (frames - 1) // 4, size[1] // 8, size[0] // 8


def token_count(size, frames):
    """Tokens of a clip; a token is a patch of 1 x 2 x 2 latents."""
    if size[0] % 16 or size[1] % 16:
        raise InputError(f"--size {size[0]}x{size[1]} does not fit the model; give multiples of 16")
    return math.prod(latent_shape(size, frames)[1:]) // 4


def kept_blocks(config):
    """Blocks of a PAVRM if no flag says otherwise."""
    return min(8, config.num_layers // 2)


def image_tokens(config):
    """Tokens of the first image (of both, with flf2v) in cross-attention."""
    if not config.use_clip:
        return 0
    return 514 if config.model_type == "flf2v" else 257


# ------------------------------------------------------------------------------ operations

def flops(model, tokens, backward=False, checkpoint=True, save_attention=False):
    """Operations on one clip of `tokens` tokens: {linear, attention, attention_backward}, 2 per multiply-add.

    model: a WanModel or a PAVRM, on any device. Only matrix products and attention count. `backward` adds the
    gradients of all inputs and of the trained weights, and with `checkpoint` the blocks' second forward. The
    products of a reward model's few queries with the tokens are left out: a thousandth of a block.
    """
    dit = getattr(model, "dit", model)
    config = dit.config

    linear = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv3d)):
            continue
        passes = 1
        if backward:
            passes += 1  # the gradient of the input
            passes += layer.weight.requires_grad
            passes += checkpoint and in_block(name)
        linear += 2 * rows(name, config, tokens) * layer.weight.numel() * passes

    keys = tokens + config.text_len + image_tokens(config)  # of self- and cross-attention
    forward = 4 * tokens * keys * config.dim * len(dit.blocks)
    again = backward and checkpoint and not save_attention
    # Backward takes five products of the forward's size instead of two, as in flash attention.
    return Counter(linear=linear, attention=forward * (2 if again else 1),
                   attention_backward=2.5 * forward if backward else 0)


def in_block(name):
    """Whether a module's name, in a WanModel or a PAVRM, lies in a block."""
    return ".blocks." in f".{name}"


def rows(name, config, tokens):
    """How many rows of one clip the layer `name` multiplies with its weight."""
    if "_img" in name or "img_emb" in name:
        return image_tokens(config)
    if "text_embedding" in name or ".cross_attn.k" in name or ".cross_attn.v" in name:
        return config.text_len
    if in_block(name) or "patch" in name or name == "head.head":
        return tokens
    return 1


def backward_options(args):
    """The options of `flops` for a gradient, from a script's flags."""
    return dict(backward=True, checkpoint=args.activation_checkpointing, save_attention=args.save_attention)


def times(count, factor):
    return Counter({name: value * factor for name, value in count.items()})


def floor(count, gpu):
    """Seconds on one GPU of GPUS, at its rates."""
    rates = GPUS[gpu]
    return sum(count[kind] / rates[kind] for kind in count) / 1e12


# ------------------------------------------------------------------------------ operations of a run

def operations(run):
    """{part of a micro-step: operations per GPU}, each as `flops` counts them, of a plan.Run."""
    args, tokens = run.args, token_count(run.size, run.frames)
    options = backward_options(args)
    forward = flops(run.model, tokens)
    gradient = flops(run.model, tokens, **options)
    if run.script == "pavrm":
        parts = {"gradient step": gradient}
    else:
        parts = prfl_operations(run, forward, gradient, tokens, options)
    share = run.clips / args.sp
    return {part: times(count, share) for part, count in parts.items()}


def prfl_operations(run, forward, gradient, tokens, options):
    """The same for one clip, all GPUs together. forward, gradient: operations of one pass of the policy."""
    args, parts = run.args, {}
    if "reward" in args.phases:
        guided = 2 if args.rollout_guidance != 1 else 1
        without_gradient = []  # steps of a rollout, for every k
        for k in train_prfl.rewardable(args.k, args.solver_steps):
            without_gradient.append(max(k - args.gradient_steps + 1, 0))
        steps = sum(without_gradient) / len(without_gradient)
        parts[f"rollout, {steps:g} steps"] = times(forward, steps * guided)
        parts["gradient step"] = times(gradient, args.gradient_steps * guided)
        parts["reward"] = flops(run.judge, tokens, **options)
        if args.kl_weight:
            parts["start model"] = times(forward, args.gradient_steps * guided)
    if "sft" in args.phases:
        parts["sft"] = gradient
    if "rwr" in args.phases:
        parts["rwr"] = gradient + flops(run.judge, tokens)
    return parts
