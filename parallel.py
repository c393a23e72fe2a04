"""Everything about running on one process or many: groups, sharding, learning rates, averages, random draws.

A script runs the same way alone (`python train_prfl.py`) and under torchrun, on CPU and on CUDA.
"""
import argparse
import hashlib
import math
import os
import shlex
import signal
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from files import InputError


# ---------------------------------------------------------------------------------------------- processes

class Parser(argparse.ArgumentParser):
    """Flags, their defaults in --help, and files of flags: `@recipes/prfl_t2v_14B_480P.args`, # begins a comment."""

    def __init__(self, description):
        super().__init__(description=description, fromfile_prefix_chars="@", formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)


def start():
    """Join the processes that torchrun started, or stand alone. Returns this process's device."""
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"there are more processes than the {torch.cuda.device_count()} GPUs here; lower --nproc_per_node")
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def run(main):
    """Run a script's main(): an error in the input, or of the disk, ends it with one sentence and exit code 1.

    It ends at once then, without waiting for the other processes: they may never come. torchrun stops those.
    """
    try:
        code = main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def share(batch):
    """This rank's part of a batch: (position in the whole batch, item) pairs."""
    ranks = dist.get_world_size()
    if len(batch) % ranks:
        raise InputError(f"--batch_size {len(batch)} cannot be shared equally by {ranks} processes; use a multiple of {ranks}")
    size = len(batch) // ranks
    first = dist.get_rank() * size
    return [(first + i, batch[first + i]) for i in range(size)]


def deal(count):
    """This rank's numbers out of range(count), for work that is shared out one by one: (number, counts) pairs.

    All ranks get equally many, so that they meet in the same collectives. Where that is too many, the last number
    comes up again, on another rank: that one does the work too, but it does not count.
    """
    numbers = range(dist.get_rank(), count + -count % dist.get_world_size(), dist.get_world_size())
    return [(min(n, count - 1), n < count) for n in numbers]


def mean(values):
    """Mean of a tensor's values over all ranks, as a Python number; every rank has equally many."""
    total = values.detach().double().mean().cpu()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


# ---------------------------------------------------------------------------------------------- sharding

def shard(model, blocks, float32, device):
    """Shard a model's parameters over all ranks (FSDP2): each block, each part that computes in float32, then the rest.

    On CUDA, parameters are gathered in bf16 for compute, and gradients are reduced in float32. `float32` lists the
    modules that are gathered in float32 instead: time embedding, heads. Inputs are never cast, since modulation and
    rotary angles are float32.
    """
    # FSDP2 warns of outputs that are views, because an in-place write would lose their gradient; we have none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    bf16 = torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in float32:
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def clip_gradients(parameters, max_norm):
    """Scale the gradients to a norm of at most `max_norm`, after backward; returns the norm before, a number.

    Raises on all ranks alike where the norm is not finite, before the optimizer could spread it.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    norm = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()
    if not norm < float("inf"):
        raise InputError(f"the gradient norm is {norm}; lower the learning rate or look at this step's clips")
    return norm


def learning_rate_factor(step, args):
    """What the learning rate is multiplied with at a step, counted from 0: a linear warm-up, then constant or falling to 0."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    done = (step - args.warmup) / (args.steps - args.warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[args.lr_schedule]


class EMA:
    """The exponential moving average of a model's trained parameters: average = decay * average + (1 - decay) * parameter."""

    def __init__(self, model, decay):
        self.model, self.decay = model, decay
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}  # float32 shards

    @torch.no_grad()
    def update(self):
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1 - self.decay)

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
