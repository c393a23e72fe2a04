"""One process or many: groups, sharding, learning rates, random draws.

A script runs the same way alone (`python train_prfl.py`) and under torchrun, on CPU and on CUDA.

Ranks form data groups of `--sp` ranks each. A data group works on its own clips, and its ranks share the
tokens of a clip (sequence.py). Weights are sharded over all ranks. With `--dp_replicate` R the ranks form R
equal groups, each of which holds all weights.
"""
import hashlib
import math
import os
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

import gpu
import memory
import sequence
import watch
from files import InputError

# ------------------------------------------------------------------------------ processes

def start(sp=1, minutes=24 * 60.0, deterministic=False):
    """Join the processes that torchrun started, or stand alone. Returns this process's device (gpu.start).

    A process waits `minutes` for the others: --timeout in training, a day where each works alone for long.
    """
    device = gpu.start(deterministic)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes), **alone)
    dist.distributed_c10d.default_pg_timeout = timedelta(minutes=minutes)  # for later groups, FSDP2's too
    watch.start()
    gpu.check_own(device)

    ranks = dist.get_world_size()
    if sp < 1 or ranks % sp:
        raise InputError(f"--sp {sp} does not divide the {ranks} processes; use a divisor")
    sequence.group = None
    if sp > 1:
        sequence.group = init_device_mesh(device.type, (ranks // sp, sp)).get_group(1)
    return device


def data_ranks():
    """The number of data groups."""
    return dist.get_world_size() // sequence.size()


def share(batch):
    """This rank's part of a batch: (position in the whole batch, item) pairs."""
    groups = data_ranks()
    if len(batch) % groups:
        who = "processes" if sequence.size() == 1 else f"groups of --sp {sequence.size()} processes"
        raise InputError(f"--batch_size {len(batch)} cannot be shared equally by {groups} {who}; "
                         f"use a multiple of {groups}")
    size = len(batch) // groups
    first = dist.get_rank() // sequence.size() * size
    return [(first + i, batch[first + i]) for i in range(size)]


def shard_indices(count):
    """This rank's part of range(count), for work that is shared item by item: (index, counts) pairs.

    All ranks get equally many, so that they meet in the same collectives. If the work does not divide, the
    last index is given to several ranks: each does the work, but it counts on one of them only. Of the ranks
    that share a clip's tokens, all do the work, and only the first one's result counts.
    """
    groups = data_ranks()
    indices = range(dist.get_rank() // sequence.size(), count + -count % groups, groups)
    return [(min(i, count - 1), i < count and sequence.rank() == 0) for i in indices]


def mean(values):
    """Mean of a tensor's values over all ranks, as a Python number; every rank has equally many."""
    total = values.detach().double().mean().cpu()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


# ------------------------------------------------------------------------------ sharding

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def compute_dtype(args, device):
    return DTYPES[args.compute_dtype or ("bf16" if device.type == "cuda" else "float32")]


def shard(model, dit, heads, device, args):
    """Compile the blocks of a model's transformer `dit` and shard the model over the ranks (FSDP2).

    Each block is a unit of its own. So is each module that computes in float32: the time embedding and
    `heads`, the modules at the end. The rest is the last unit. Trained weights are float32; they are gathered
    in --compute_dtype, and their gradients are reduced in float32. Frozen weights are stored in
    --compute_dtype. Inputs are never cast, since modulation and rotary angles are float32. Weights that are
    on the meta device get their memory later.
    """
    ranks = dist.get_world_size()
    num_heads = dit.config.num_heads
    float32 = [dit.time_embedding, dit.time_projection, *heads]
    dtype = compute_dtype(args, device)
    if args.dp_replicate < 1 or ranks % args.dp_replicate:
        raise InputError(f"--dp_replicate {args.dp_replicate} does not divide the {ranks} processes; "
                         f"use a divisor")
    if num_heads % sequence.size():
        raise InputError(f"--sp {sequence.size()} does not divide the {num_heads} heads of the model; "
                         f"use a divisor")

    exempt = {parameter for module in float32 for parameter in module.parameters()}
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter not in exempt:
            parameter.data = parameter.data.to(dtype)

    if args.dp_replicate == 1:
        mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    else:
        shape = (args.dp_replicate, ranks // args.dp_replicate)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    offload = OffloadPolicy()
    if offloads(model, args):
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy32 = MixedPrecisionPolicy(cast_forward_inputs=False)

    if memory.compiles(args, device):
        memory.check_compiler(device)
        torch._dynamo.config.recompile_limit = 256
        for block in dit.blocks:
            memory.compile_block(block, args.save_attention)
    # FSDP2 warns about outputs that are views: an in-place write would lose its gradient. There is none here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in float32:
        fully_shard(module, mesh=mesh, offload_policy=offload, mp_policy=policy32)
    for block in dit.blocks:
        fully_shard(block, mesh=mesh, offload_policy=offload, mp_policy=policy)
    return fully_shard(model, mesh=mesh, offload_policy=offload, mp_policy=policy)


def offloads(model, args):
    """Whether a model's weights are in CPU memory between uses: every model's, or those of frozen ones."""
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    return "weights" in args.offload or ("reward" in args.offload and frozen)


def storage(model, args, device):
    """Where a sharded model's weights are between uses."""
    return torch.device("cpu") if offloads(model, args) else device


def gathers(args, model, device):
    """Whether a model's weights stay gathered during a rollout: faster, where memory is plentiful.

    True if they take less than a quarter of the GPU's memory, and neither weights nor inputs are offloaded.
    """
    has_all = dist.get_world_size() == args.dp_replicate  # each rank has all weights anyway
    if has_all or {"inputs", "weights"} & set(args.offload):
        return False
    if device.type != "cuda":
        return True
    taken = sum(parameter.numel() for parameter in model.parameters()) * compute_dtype(args, device).itemsize
    return taken < torch.cuda.get_device_properties(device).total_memory / 4


@contextmanager
def rollout(model, gathered):
    """`with rollout(policy, True):` no gradient, and each block's weights stay gathered from step to step."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
    for part in parts:
        part.set_reshard_after_forward(not gathered, recurse=False)
    try:
        with torch.no_grad():
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


# ------------------------------------------------------------------------------ optimization

def clip_gradients(parameters, max_norm):
    """Scale the gradients to a norm of at most `max_norm`; returns the norm they had, a number."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()


def learning_rate_factor(step, args):
    """The factor of the learning rate at a step (from 0): a linear warm-up, then constant or falling."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    done = (step - args.warmup) / (args.steps - args.warmup)
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return factors[args.lr_schedule]


# ------------------------------------------------------------------------------ random draws

def generator(*key):
    """A CPU generator that depends on its key alone, such as (seed, micro_step, place in the batch, purpose).

    So a draw is the same after resuming, for any number of ranks, and on any device.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def uniform(*key):
    """One number in [0, 1)."""
    return torch.rand((), generator=generator(*key), dtype=torch.float64).item()


def noise(shape, *key):
    """Standard normal float32 noise."""
    return torch.randn(shape, generator=generator(*key))
