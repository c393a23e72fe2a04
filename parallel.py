"""Everything about running on one process or many: groups, sharding, checkpoints, random draws, the log.

A script runs the same way alone (`python train_prfl.py`) and under torchrun, on CPU and on CUDA.
"""
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from files import InputError, is_main, read_json, remove, write_json, written_whole

KEPT_CHECKPOINTS = 2


# ---------------------------------------------------------------------------------------------- processes

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


# ---------------------------------------------------------------------------------------------- checkpoints

def check_run(args):
    """Refuse what would lose a run's checkpoints, or resume it as another run, or cannot be shared by the processes."""
    share(range(args.batch_size))
    found = checkpoints(args.output)
    if found and not args.resume:
        raise InputError(f"{args.output} already holds a run; continue it with --resume, or choose another --output")
    if args.resume:
        if not found:
            raise InputError(f"{args.output} holds no complete checkpoint to resume; start without --resume")
        before = read_json(Path(args.output, "run.json"))["arguments"]
        changed = [name for name, value in vars(args).items() if before.get(name) != value
                   and name not in ("resume", "output", "steps") and not name.endswith("_every")]
        if changed:
            raise InputError(f"--resume with another {' and '.join('--' + name for name in changed)} than "
                             f"{args.output}/run.json has would be another run; use the same, or another --output")
    dist.barrier()  # all have looked before one writes


def checkpoints(output):
    """{step: directory} of the complete checkpoints of a run: their names appear last, by a rename."""
    found = ((re.fullmatch(r"step_(\d+)", path.name), path) for path in Path(output, "checkpoints").glob("step_*"))
    return {int(match[1]): path for match, path in found if match}


def save_checkpoint(output, step, model, optimizer):
    """Write what resuming needs, whole or not at all: the float32 weights and the optimizer's state, each rank its part.

    Nothing else has a state: learning rates, data order and random draws are functions of the step.
    """
    directory = Path(output, "checkpoints", f"step_{step:06d}")
    beside = directory.with_name(f".{directory.name}.new")
    weights, state = get_state_dict(model, optimizer)
    if is_main():
        remove(beside)
    dist.barrier()
    try:
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=beside)
    except BaseException as error:
        if is_main():
            remove(beside)
        if not isinstance(error, CheckpointException):
            raise
        reasons = [reason for reason, _ in error.failures.values()]
        if any(isinstance(reason, KeyboardInterrupt) for reason in reasons):
            raise KeyboardInterrupt from None
        reasons = "; ".join(sorted({str(reason) for reason in reasons}))
        raise OSError(f"the checkpoint {directory} could not be written ({reasons}); earlier ones are untouched") from None
    if is_main():
        remove(directory)  # of a run that went on from an earlier step
        beside.rename(directory)
        for old in sorted(checkpoints(output))[:-KEPT_CHECKPOINTS]:
            remove(checkpoints(output)[old])
    dist.barrier()


def load_checkpoint(output, model, optimizer):
    """Load the newest complete checkpoint in place; returns its step, 0 where there is none."""
    found = checkpoints(output)
    if not found:
        return 0
    weights, state = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": state}
    dcp.load(content, checkpoint_id=found[max(found)])
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    return max(found)


# ---------------------------------------------------------------------------------------------- the log

class Log:
    """One aligned line a step on the screen, and the same as a line of JSON in log.jsonl, by the main process."""

    def __init__(self, output, args, steps, first_step, device):
        self.steps, self.device, self.path, self.started = steps, device, Path(output, "log.jsonl"), time.time()
        if not is_main():
            return
        with written_whole(self.path) as beside:
            beside.write_text("".join(kept_lines(self.path, first_step)))
        git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else None
        write_json(Path(output, "run.json"), {"arguments": vars(args), "commit": commit, "torch": torch.__version__,
                                              "processes": dist.get_world_size(), "device": str(device)})

    def __call__(self, step, **values):
        """Write one line. Numbers that a step has in common with all others come first: step, seconds, memory."""
        now = time.time()
        seconds, self.started = now - self.started, now
        if not is_main():
            return
        values = {"step": step, **values, "seconds": round(seconds, 3), "gigabytes": round(peak_memory(self.device), 3)}
        self.write(values)
        self.say(f"{step:>{len(str(self.steps))}}/{self.steps}  " + "  ".join(
            f"{name} {value:>8.4f}" if isinstance(value, float) else f"{name} {value!s:>3}"
            for name, value in values.items() if name != "step"))

    def write(self, values):
        """A line of JSON in log.jsonl."""
        if is_main():
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")

    def say(self, line):
        """A line on the screen, above any progress bar."""
        if is_main():
            tqdm.write(line)
            sys.stdout.flush()

    def pause(self):
        """The next step's time and memory begin now: saving and sampling are no part of a step."""
        self.started = time.time()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def kept_lines(path, first_step):
    """The lines of a log that stay when a run goes on after `first_step` steps: what comes later will be done again."""
    if not first_step or not path.exists():
        return
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= first_step:  # the last line may be torn
            yield line


def peak_memory(device):
    """GB: the most that was held on the GPU since the step began, or by this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
