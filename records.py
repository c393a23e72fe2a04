"""What a run keeps in its directory: run.json, log.jsonl and checkpoints, and how it goes on from there.

    OUTPUT/run.json        the arguments, the commit, the versions
    OUTPUT/log.jsonl       one line a step, and one an evaluation
    OUTPUT/checkpoints/    step_000200/, ...: all that resuming needs, the newest two
"""
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm import tqdm

from files import InputError, is_main, read_json, remove, write_json, written_whole
from parallel import share

KEPT_CHECKPOINTS = 2


# ---------------------------------------------------------------------------------------------- checkpoints

def check_run(args):
    """Refuse numbers that make no run, what would lose a run's checkpoints or resume it as another run, and batches that the
    processes cannot share."""
    for name, smallest in [("steps", 1), ("batch_size", 1), ("accumulation", 1), ("num_queries", 1), ("gradient_steps", 1),
                           ("num_blocks", 1), ("lora_rank", 0), ("ema", 0), ("warmup", 0), ("shift", 1e-3), ("sft_ratio", 1e-3),
                           ("rwr_temperature", 1e-6), ("samples", 0), ("sample_every", 0), ("save_every", 1), ("eval_every", 1)]:
        value = getattr(args, name, None)
        if value is not None and (value < smallest or name == "ema" and value > 1):
            raise InputError(f"--{name} {value} is not possible; give {'0 to 1' if name == 'ema' else f'{smallest} or more'}")
    share(range(args.batch_size))
    found = checkpoints(args.output)
    if found and not args.resume:
        raise InputError(f"{args.output} already holds a run; continue it with --resume, or choose another --output")
    if args.resume:
        if not found:
            raise InputError(f"{args.output} holds no complete checkpoint to resume; start without --resume")
        before = read_json(Path(args.output, "run.json"))["arguments"]
        free = ["resume", "output"] + ["steps"] * (args.lr_schedule == "constant")  # what may change within a run
        changed = [name for name, value in vars(args).items()
                   if before.get(name) != value and name not in free and not name.endswith("_every")]
        if changed:
            raise InputError(f"--resume with another {' and '.join('--' + name for name in changed)} than "
                             f"{args.output}/run.json has would be another run; use the same, or another --output")
    dist.barrier()  # all have looked before one writes


def checkpoints(output):
    """{step: directory} of the complete checkpoints of a run: their names appear last, by a rename."""
    found = ((re.fullmatch(r"step_(\d+)", path.name), path) for path in Path(output, "checkpoints").glob("step_*"))
    return {int(match[1]): path for match, path in found if match}


def state_of(model, optimizer, ema):
    """All that has a state. Frozen parameters have none: they are read from where they came from."""
    options = StateDictOptions(ignore_frozen_params=True)
    weights, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": optimizer_state, "ema": ema.average if ema else {}}


def save_checkpoint(output, step, model, optimizer, ema=None):
    """Write what resuming needs, whole or not at all: trained weights, their average, the optimizer's state, each rank its part.

    Nothing else has a state: learning rates, data order and random draws are functions of the step.
    """
    directory = Path(output, "checkpoints", f"step_{step:06d}")
    beside = directory.with_name(f".{directory.name}.new")
    state = state_of(model, optimizer, ema)
    if is_main():
        remove(beside)
    dist.barrier()
    try:
        dcp.save(state, checkpoint_id=beside)
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


def load_checkpoint(output, model, optimizer, ema=None):
    """Load the newest complete checkpoint in place; returns its step, 0 where there is none."""
    found = checkpoints(output)
    if not found:
        return 0
    state = state_of(model, optimizer, ema)
    try:
        dcp.load(state, checkpoint_id=found[max(found)])
    except CheckpointException as error:
        reasons = "; ".join(sorted({str(reason) for reason, _ in error.failures.values()}))
        raise InputError(f"the checkpoint {found[max(found)]} is damaged ({reasons}); remove it to go on from the one before") from None
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                   options=StateDictOptions(ignore_frozen_params=True, strict=False))
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
        """Write one line; values that are dicts go to the file alone."""
        now = time.time()
        seconds, self.started = now - self.started, now
        if not is_main():
            return
        values = {"step": step, **values, "seconds": round(seconds, 3), "gigabytes": round(peak_memory(self.device), 3)}
        self.write(values)
        self.say(f"{step:>{len(str(self.steps))}}/{self.steps}  " + "  ".join(
            f"{name} {value:>9.4g}" if isinstance(value, float) else f"{name} {value!s:>3}"
            for name, value in values.items() if name != "step" and not isinstance(value, dict)))

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
