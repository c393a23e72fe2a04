"""Everything about running on one process or many: groups, sharding, learning rates, averages, random draws.

A script runs the same way alone (`python train_prfl.py`) and under torchrun, on CPU and on CUDA.

Ranks form data groups of `--sp` ranks each. A data group works on its own clips, and its ranks share a clip's tokens
(sequence.py). Weights are sharded over all ranks, or with `--dp_replicate` R over each of R equal parts of them.
"""
import argparse
import hashlib
import math
import os
import shlex
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

import sequence
from files import InputError


# ---------------------------------------------------------------------------------------------- processes

# Flags that do not change what is computed: a run may go on with others of them.
EXECUTION = ["sp", "dp_replicate", "compile", "checkpoint_blocks", "save_attention", "offload", "gather", "resume", "keep", "timeout"]


class Parser(argparse.ArgumentParser):
    """Flags, their defaults in --help, and files of flags: `@recipes/prfl_t2v_14B_480P.args`, # begins a comment."""

    def __init__(self, description):
        super().__init__(description=description, fromfile_prefix_chars="@", formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def add_execution(self, save_every):
        """The flags of both training scripts that say how it is computed; a run may go on with others of them."""
        group = self.add_argument_group("where and how it is computed")
        group.add_argument("--sp", type=int, default=1, help="ranks that share a clip's tokens; the model's heads must be a multiple")
        group.add_argument("--dp_replicate", type=int, default=1, help="copies of the weights, each sharded over equally many ranks; "
                           "1 takes least memory")
        group.add_argument("--compile", action="store_true", help="compile the blocks (torch.compile)")
        group.add_argument("--checkpoint_blocks", action="store_true", help="keep only the blocks' inputs for backward and compute the "
                           "rest again: a third slower, and what large models need")
        group.add_argument("--save_attention", action="store_true", help="with --checkpoint_blocks: keep attention's results too")
        group.add_argument("--offload", nargs="+", default=[], choices=["inputs", "weights", "ema"], help="what is kept in CPU memory: "
                           "the blocks' inputs (with --checkpoint_blocks); weights, gradients and optimizer state, a block's weights "
                           "coming as it runs; the average")
        group.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output")
        group.add_argument("--save_every", type=int, default=save_every, help="steps between checkpoints; there is one at the end too")
        group.add_argument("--export_every", type=int, default=0, help="steps between results in the official layout, in OUTPUT/exports; "
                           "0: at the end alone")
        group.add_argument("--keep", type=int, default=2, help="checkpoints that are kept, the newest")
        group.add_argument("--timeout", type=float, default=10, help="minutes after which a rank gives up waiting for the others")
        numbers = self.add_argument_group("how precisely")
        numbers.add_argument("--compute_dtype", choices=["float32", "bf16"], help="of matrix products and attention, and of frozen "
                             "weights; None: bf16 on a GPU, float32 on a CPU")
        numbers.add_argument("--bf16_residual", action="store_true", help="round the residual stream to bf16 between blocks, which "
                             "halves the memory of the blocks' inputs; officially it is float32")


def start(sp=1, minutes=24 * 60.0):
    """Join the processes that torchrun started, or stand alone. Returns this process's device.

    A process waits `minutes` for the others: a day where each works by itself for long, --timeout in training.
    """
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"there are more processes than the {torch.cuda.device_count()} GPUs here; lower --nproc_per_node")
        torch.cuda.set_device(device)
        # cuDNN's attention is the fastest on Hopper; where it does not run, the next in the list does.
        kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        global _attention
        _attention = sdpa_kernel(kernels, set_priority=True)  # kept: when it is collected, the old order is back
        _attention.__enter__()
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    torch.distributed.distributed_c10d.default_pg_timeout = timedelta(minutes=minutes)  # of the groups below, and FSDP2's
    ranks = dist.get_world_size()
    if sp < 1 or ranks % sp:
        raise InputError(f"--sp {sp} does not divide the {ranks} processes; use one that does")
    sequence.group = init_device_mesh(device.type, (ranks // sp, sp)).get_group(1) if sp > 1 else None
    return device


def run(main):
    """Run a script's main(): an error in the input, of the disk, or of another process ends it with one sentence and exit code 1.

    It ends at once then, without waiting for the other processes: they may never come. torchrun stops those.
    """
    try:
        code = main()
    except (InputError, OSError) as error:
        message = str(error)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        message = "another process has ended or hangs, and this one has stopped waiting; look for its message, then --resume"
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(code)
    if int(os.environ.get("RANK", 0)):
        # Mostly all fail alike, and rank 0 says it. If not, nobody stops this process while it waits.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def describe(args, model, device):
    """For the log: how the processes are used, and which attention kernel PyTorch takes."""
    heads = model.config.num_heads // sequence.size()
    shape, dtype = (1, 256, heads, model.config.dim // model.config.num_heads), compute_dtype(args, device)
    q = torch.empty(shape, dtype=dtype, device=device).transpose(1, 2).requires_grad_()
    ranks = dist.get_world_size()
    several = f"{ranks} processes (copies of the weights: {args.dp_replicate}, processes a clip: {sequence.size()})"
    return f"{several if ranks > 1 else '1 process'} on {device.type}, {SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower().replace('_', ' ')}"


def data_ranks():
    return dist.get_world_size() // sequence.size()


def share(batch):
    """This rank's part of a batch: (position in the whole batch, item) pairs."""
    groups = data_ranks()
    if len(batch) % groups:
        raise InputError(f"--batch_size {len(batch)} cannot be shared equally by {groups} processes; use a multiple of {groups}"
                         if sequence.size() == 1 else
                         f"--batch_size {len(batch)} cannot be shared equally by {groups} groups of --sp {sequence.size()} processes; "
                         f"use a multiple of {groups}")
    size = len(batch) // groups
    first = dist.get_rank() // sequence.size() * size
    return [(first + i, batch[first + i]) for i in range(size)]


def deal(count):
    """This rank's numbers out of range(count), for work that is shared out one by one: (number, counts) pairs.

    All ranks get equally many, so that they meet in the same collectives. Where that is too many, the last number
    comes up again, on another rank: that one does the work too, but it does not count. Of the ranks that share a
    clip's tokens, all do the work and the first one's counts.
    """
    groups = data_ranks()
    numbers = range(dist.get_rank() // sequence.size(), count + -count % groups, groups)
    return [(min(n, count - 1), n < count and sequence.rank() == 0) for n in numbers]


def mean(values):
    """Mean of a tensor's values over all ranks, as a Python number; every rank has equally many."""
    total = values.detach().double().mean().cpu()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


# ---------------------------------------------------------------------------------------------- sharding

def compute_dtype(args, device):
    chosen = args.compute_dtype or ("bf16" if device.type == "cuda" else "float32")
    return {"bf16": torch.bfloat16, "float32": torch.float32}[chosen]


def shard(model, blocks, float32, device, args):
    """Compile a model's blocks and shard its parameters over the ranks (FSDP2): each block, each part that computes in
    float32, then the rest.

    Trained weights are float32; they are gathered in --compute_dtype, and gradients are reduced in float32. Frozen ones are
    kept in --compute_dtype. `float32` lists the modules that stay float32: time embedding, heads. Inputs are never cast,
    since modulation and rotary angles are float32. The model is still on the meta device and has no memory.
    """
    ranks, heads, dtype = dist.get_world_size(), blocks[0].self_attn.num_heads, compute_dtype(args, device)
    if args.dp_replicate < 1 or ranks % args.dp_replicate:
        raise InputError(f"--dp_replicate {args.dp_replicate} does not divide the {ranks} processes; use one that does")
    if heads % sequence.size():
        raise InputError(f"--sp {sequence.size()} does not divide the model's {heads} heads; use one that does")
    exempt = {parameter for module in float32 for parameter in module.parameters()}
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter not in exempt:
            parameter.data = parameter.data.to(dtype)
    # FSDP2 warns of outputs that are views, because an in-place write would lose their gradient; we have none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

    shape = (ranks,) if args.dp_replicate == 1 else (args.dp_replicate, ranks // args.dp_replicate)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape):])
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if "weights" in args.offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    torch._dynamo.config.recompile_limit = 64  # a graph for each resolution, with and without gradient, frozen or trained
    for block in blocks if args.compile else ():
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    for module in float32:
        fully_shard(module, mesh=mesh, offload_policy=offload, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for block in blocks:
        fully_shard(block, mesh=mesh, offload_policy=offload, mp_policy=policy)
    return fully_shard(model, mesh=mesh, offload_policy=offload, mp_policy=policy)


def storage(args, device):
    """Where a sharded model's weights lie between uses."""
    return torch.device("cpu") if "weights" in args.offload else device


def gathers(args, model, device):
    """Whether --gather keeps a model's weights gathered during rollouts."""
    if args.gather == "auto" and dist.get_world_size() == args.dp_replicate:
        return False  # each rank has all of them anyway, and would only hold them twice
    if args.gather == "auto" and device.type == "cuda":
        taken = sum(parameter.numel() for parameter in model.parameters()) * compute_dtype(args, device).itemsize
        return taken < torch.cuda.get_device_properties(device).total_memory / 4 and "weights" not in args.offload
    return args.gather != "no"


@contextmanager
def rollout(model, gathered):
    """`with rollout(policy, True):` no gradient, and the weights stay gathered from step to step rather than a block at a time."""
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


# ---------------------------------------------------------------------------------------------- optimization

def clip_gradients(parameters, max_norm):
    """Scale the gradients to a norm of at most `max_norm`, after backward; returns the norm before, a number."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()


def learning_rate_factor(step, args):
    """What the learning rate is multiplied with at a step, counted from 0: a linear warm-up, then constant or falling to 0."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    done = (step - args.warmup) / (args.steps - args.warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[args.lr_schedule]


class EMA:
    """The exponential moving average of a model's trained parameters: average = decay * average + (1 - decay) * parameter."""

    def __init__(self, model, args):
        self.model, self.decay = model, args.ema
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}  # float32 shards
        if "ema" in args.offload:
            self.average = {name: average.cpu() for name, average in self.average.items()}

    @torch.no_grad()
    def update(self):
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.to(self.average[name].device), 1 - self.decay)

    @contextmanager
    def swapped(self):
        """`with ema.swapped():` the model has the averaged parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        self.model.reshard()  # FSDP2 may still hold gathered parameters of the last forward, and would go on with those
        for name, parameter in self.parameters.items():
            own = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(own)


# ---------------------------------------------------------------------------------------------- random draws

def generator(*key):
    """A CPU generator that depends on its key alone: (seed, step, sample, purpose).

    A draw is therefore the same on resuming, for any number of ranks, and on any device.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def uniform(*key):
    """One number in [0, 1)."""
    return torch.rand((), generator=generator(*key), dtype=torch.float64).item()


def noise(shape, *key):
    """Standard normal float32 noise."""
    return torch.randn(shape, generator=generator(*key))
