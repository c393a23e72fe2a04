"""Memory of a planned run (plan.Run), by moment and part. Computed from shapes, not measured."""
import math
from functools import lru_cache

import torch

from tools import floors
from tools.block_memory import block_memory, compiled_memory, forward_memory
from tools.floors import GPUS
from vae import WanVAE


def memory(run):
    """Memory of a Run, in bytes per GPU: ({moment: {part: bytes}}, {part: bytes in CPU memory}, total of the
    worst moment)."""
    lasting, cpu = lasting_memory(run)
    forwards = run.gradient_steps
    with_reward = run.script == "prfl" and "reward" in run.args.phases
    if with_reward and run.args.rollout_guidance != 1:
        forwards *= 2  # with the prompt and with the negative prompt
    inputs, pinned = kept_inputs(run, run.dit, forwards)

    moments = {"backward": {
        "gathered weights": gathered_block(run, run.weights) + run.itemsize * run.weights.rest
                            + reduced_gradients(run),
        "block inputs": inputs,
        "a block's backward": backward_memory(run, run.dit)}}
    if with_reward:
        of_judge, pinned_by_judge = kept_inputs(run, run.judge.dit)
        pinned += pinned_by_judge
        moments["reward's backward"] = reward_moment(run, inputs + of_judge)
        moments["rollout"] = rollout_moment(run)
    if run.sampling:
        moments["decoding"] = {"VAE's decoder": decoding_memory(run)}

    if pinned:
        cpu["block inputs, pinned"] = pinned
    for moment, parts in moments.items():
        parts = {**lasting, **parts, "other": other_memory(run)}
        moments[moment] = {part: value for part, value in parts.items() if value}
    return moments, cpu, max(sum(parts.values()) for parts in moments.values())


def lasting_memory(run):
    """What is there all the time: ({part: bytes on the GPU}, {part: bytes in CPU memory})."""
    args, weights, judging, shards, c = run.args, run.weights, run.judging, run.shards, run.itemsize
    # The frozen float32 weights, few of them, are the time embedding's and the heads'.
    sharded = {"trained weights, float32": 4 * weights.trained / shards,
               "frozen weights": (c * weights.frozen + 4 * weights.frozen32) / shards,
               "reward model": 0,
               "gradients": 4 * weights.trained / shards,
               "optimizer": 8 * weights.trained / shards}
    if run.judge:
        sharded["reward model"] = (c * judging.frozen + 4 * judging.frozen32) / shards
    if run.script == "prfl" and args.kl_weight and not args.lora_rank:
        sharded["weights as they were"] = c * (weights.trained + weights.frozen) / shards
    average = {"average (EMA)": 4 * weights.trained / shards if args.ema else 0}

    # What a checkpoint holds is copied to the CPU, where a thread writes it.
    copied = (12 + 4 * bool(args.ema)) * weights.trained / shards
    gpu, cpu = {}, {"copy for a checkpoint": copied}
    in_cpu = {"weights": sharded, "ema": average, "reward": ["reward model", "weights as they were"]}
    away = [part for flag in args.offload for part in in_cpu.get(flag, [])]
    for part, value in {**sharded, **average}.items():
        if value:
            (cpu if part in away else gpu)[part] = value
    return gpu, cpu


def block_bytes(run, block):
    """(kept for backward, needed in backward besides) of one block, in bytes."""
    options = dict(clips=run.clips, itemsize=run.itemsize, sp=run.args.sp)
    if run.compiled:
        return compiled_memory(block, run.config, run.tokens, **options)
    return block_memory(block, run.config, run.tokens, bf16_residual=run.args.bf16_residual, **options)


def kept_inputs(run, dit, forwards=1):
    """What `forwards` forwards of a transformer keep until backward begins: (bytes on the GPU, in CPU
    memory)."""
    args, number = run.args, len(dit.blocks) * forwards
    block_input = run.residual_itemsize * run.stream
    if not args.activation_checkpointing:
        saved = sum(block_bytes(run, block)[0] for block in dit.blocks)
        return forwards * saved + number * block_input, 0

    attention = 0
    if args.save_attention:  # results and log-sums, of self-attention and one or two cross-attentions
        result = run.itemsize * run.stream + 4 * run.clips * run.tokens * run.config.num_heads
        attention = (2 + run.config.use_clip) * number * result
    if "inputs" in args.offload:  # one in use, one on its way
        return 2 * block_input + attention, number * block_input
    return number * block_input + attention, 0


def backward_memory(run, dit):
    """Bytes of one block's backward: with checkpointing, its second forward's too."""
    block = max(dit.blocks, key=lambda block: block.modulation.requires_grad)
    saved, working = block_bytes(run, block)
    return saved + working if run.args.activation_checkpointing else working


def gathered_block(run, weights):
    """Bytes of the block weights that are gathered at once.

    FSDP gathers blocks ahead, in the compute dtype. A process that has all weights only makes a copy of its
    own, and one more if they come from the CPU.
    """
    if run.shards > 1:
        ahead = 3
    else:
        offloaded = ["weights", "reward"] if weights is run.judging else ["weights"]
        ahead = 2 if set(offloaded) & set(run.args.offload) else 1
    return ahead * run.itemsize * weights.block


def reduced_gradients(run):
    """Bytes of gradients on their way to their ranks: one block's in the compute dtype, two blocks' in
    float32."""
    blocks = 2 if run.shards > 1 else 1
    return (run.itemsize + 4 * blocks) * run.weights.block_trained


def gathers(run):
    """Whether the policy's weights stay gathered during a rollout: the rule of parallel.gathers."""
    if {"inputs", "weights"} & set(run.args.offload) or run.shards == 1:
        return False
    return run.itemsize * run.weights.all < GPUS[run.gpu]["memory"] * 1e9 / 4


def reward_moment(run, inputs):
    """The parts of memory during the reward's backward. `inputs`: kept for both models' blocks."""
    c, dit = run.itemsize, run.dit
    if "inputs" in run.args.offload:  # both models use the same buffers on the GPU
        inputs -= 2 * run.residual_itemsize * run.stream
    # What the generator's head saved waits until the reward's backward is done. The reward's pool holds a
    # float32 copy of the tokens and its gradient: less than the block after it.
    head = 4 + 2 * run.args.bf16_residual
    if dit.head.modulation.requires_grad:
        head += 8
    return {"gathered weights": gathered_block(run, run.judging) + c * (run.weights.rest + run.judging.rest),
            "block inputs": inputs,
            "a block's backward": backward_memory(run, run.judge.dit),
            "generator's head": head * run.stream}


def rollout_moment(run):
    """The parts of memory during the rollout, without gradient."""
    c, weights = run.itemsize, run.weights
    blocks = c * weights.blocks if gathers(run) else gathered_block(run, weights)
    forward = forward_memory(run.config, run.tokens, run.clips, c) + run.residual_itemsize * run.stream
    return {"gathered weights": blocks + c * weights.rest, "a block's forward": forward}


def decoding_memory(run):
    """The most bytes that decoding one sample takes, counted over all operations of WanVAE.decode."""
    width, height = run.size
    return width * height * (17_078 + 50 * floors.latent_shape(run.size, run.frames)[1])


@lru_cache
def vae_weights():
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in WanVAE().parameters())


def other_memory(run):
    """Bytes of the VAE that decodes samples, latents and text."""
    config = run.config
    vae = 4 * vae_weights() if run.sampling else 0
    latents = 10 * 4 * run.clips * math.prod(floors.latent_shape(run.size, run.frames))
    text = run.clips * config.text_len * (config.text_dim + config.dim) * run.itemsize
    return vae + latents + text
