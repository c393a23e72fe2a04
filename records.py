"""What a run keeps in its directory, and how it continues from there.

    OUTPUT/run.json        the arguments, the commit, the versions
    OUTPUT/log.jsonl       one line per step, and one per evaluation
    OUTPUT/checkpoints/    step_000200/, ...: all that resuming needs, the newest ones (checkpoint_files.py)
    OUTPUT/lock            held by the run, so that a second one cannot write here
"""
import errno
import fcntl
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.attention import SDPBackend
from tqdm import tqdm

import sequence
from checkpoint_files import Writer, everywhere, not_finite, read_checkpoint, write_checksums
from files import InputError, atomic_write, is_main, parse_json, read_json, read_text, remove, write_json
from parallel import compute_dtype, share

# Flags that do not change what is computed: they may differ when a run is resumed.
EXECUTION = ["sp", "dp_replicate", "compile", "activation_checkpointing", "save_attention", "offload",
             "deterministic", "resume", "keep_checkpoints", "export_dtype", "timeout", "stop_if_hacked"]


# ------------------------------------------------------------------------------ before a run

def check_run(args):
    """Refuse flags that exclude each other, batches that the processes cannot share, and a run that would
    overwrite another or resume it as something else."""
    if not args.activation_checkpointing:
        needing = {"save_attention": args.save_attention, "offload inputs": "inputs" in args.offload}
        for flag, given in needing.items():
            if given:
                raise InputError(f"--{flag} needs --activation_checkpointing; add it, or leave --{flag} out")
    share(range(args.batch_size))

    found = checkpoints(args.output)
    results = [name for name in ("model", "reward") if Path(args.output, name).exists()]
    if (found or results) and not args.resume:
        raise InputError(f"{args.output} already holds a run, or its results; continue it with --resume, "
                         f"or choose another --output")
    if args.resume:
        if not found:
            raise InputError(f"{args.output} holds no complete checkpoint to resume; start without --resume")
        check_same(args, Path(args.output, "run.json"))
    dist.barrier()  # all have looked before one writes


def check_same(args, path):
    """Refuse to resume a run with flags that make it another one. `path`: the run.json of that run."""
    before = read_json(path, {"arguments": dict})["arguments"]
    unknown = sorted(set(vars(args)) ^ set(before))
    if unknown:
        flags = ", ".join(f"--{name}" for name in unknown[:6]) + ", ..." * (len(unknown) > 6)
        raise InputError(f"{path} was written by another version of this script, with other flags ({flags}); "
                         f"resume the run with that version, or start a new one in another --output")
    free = ["output", *EXECUTION]
    if args.lr_schedule == "constant":
        free.append("steps")
    changed = []
    for name, value in vars(args).items():
        if before[name] != value and name not in free and not name.endswith("_every"):
            changed.append(f"--{name}")
    if changed:
        raise InputError(f"--resume with another {' and '.join(changed)} than in {path} would be a different "
                         f"run; use the same values, or another --output")


def describe(args, model, device):
    """For the log: how the processes are used, and which attention kernel PyTorch takes."""
    ranks = dist.get_world_size()
    heads = model.config.num_heads // sequence.size()
    shape = (1, 256, heads, model.config.dim // model.config.num_heads)
    q = torch.empty(shape, dtype=compute_dtype(args, device), device=device).transpose(1, 2).requires_grad_()
    kernel = SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower().replace("_", " ")
    processes = "1 process"
    if ranks > 1:
        processes = (f"{ranks} processes (copies of the weights: {args.dp_replicate}, "
                     f"processes per clip: {sequence.size()})")
    return f"{processes} on {device.type}, {kernel}"


# ------------------------------------------------------------------------------ checkpoints

def checkpoints(output):
    """{step: directory} of the complete checkpoints of a run: their names appear last, by a rename."""
    found = {}
    for path in Path(output, "checkpoints").glob("step_*"):
        if match := re.fullmatch(r"step_(\d+)", path.name):
            found[int(match[1])] = path
    return found


def how_to_continue(found):
    """For messages: where --resume goes on from. `found`: the checkpoints that can be used."""
    if found:
        return f"--resume continues from step {max(found)}"
    return "there is no checkpoint to continue from, so start again without --resume"


def state_of(model, optimizer, ema):
    """All training state. Frozen parameters are left out; they are loaded from their original files."""
    options = StateDictOptions(ignore_frozen_params=True)
    weights, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": optimizer_state, "ema": ema.average if ema else {}}


class Checkpoints:
    """Saves and loads the trained weights, their average and the optimizer's state, while training goes on.

    Each rank writes its part, and any number of ranks may read them. There is no other state: learning
    rates, data order and random draws are functions of the step. A checkpoint is copied to CPU memory,
    written by a thread under another name, and appears whole by a rename.
    """

    def __init__(self, args, model, optimizer, ema=None):
        self.directory = Path(args.output, "checkpoints")
        self.keep = args.keep_checkpoints
        self.trained = (model, optimizer, ema)
        self.thread = ThreadPoolExecutor(1)
        self.pending = None
        # A group of its own: the thread's messages must not meet the training's.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(minutes=args.timeout))
        claim(args.output)
        for torn in self.directory.glob(".step_*.new") if is_main() else ():
            remove(torn)
        dist.barrier()

    def load(self):
        """Load the newest complete checkpoint in place; returns its step, 0 where there is none."""
        found = checkpoints(self.directory.parent)
        if not found:
            return 0
        newest = max(found)
        state = state_of(*self.trained)
        faults = read_checkpoint(state, found[newest])
        if faults:
            directory = found.pop(newest)
            raise InputError(f"the checkpoint {directory} is damaged ({'; '.join(faults[:3])}); remove it, "
                             f"then {how_to_continue(found)}")
        model, optimizer, _ = self.trained
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                       options=options)
        return newest

    def save(self, step):
        """Begin to write the state after `step` steps. Raises what went wrong with the checkpoint before, and
        refuses values that are not finite. Each rank reads its part once for that: 21 of a 14B's 171 GB on 8
        ranks, at a GPU's memory bandwidth, or 22 GB/s on one core."""
        self.finish()
        state = state_of(*self.trained)
        if found := everywhere(not_finite(state)):
            raise InputError(f"step {step}: {len(found)} of the tensors to save are not finite "
                             f"({', '.join(found[:3])}), and nothing was saved; start another run with a "
                             f"lower --lr; {self.again()}")
        beside = self.directory / f".step_{step:06d}.new"
        stager = DefaultStager(StagingOptions(False, False, False, False))  # copies, in this thread
        written = dcp.async_save(state, storage_writer=Writer(beside), async_stager=stager,
                                 process_group=self.group)
        self.pending = self.thread.submit(self._publish, written, beside)

    def _publish(self, written, beside):
        directory = beside.with_name(beside.name[1:-4])
        try:
            written.result()
            write_checksums(beside, self.group)
        except BaseException as error:
            if is_main():
                shutil.rmtree(beside, ignore_errors=True)  # others may still be writing there
            reasons = [error]
            if isinstance(error, CheckpointException):
                reasons = [reason for reason, _ in error.failures.values()]
            full = any(getattr(reason, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for reason in reasons)
            reasons = "; ".join(sorted({str(reason) for reason in reasons}))
            if "gloo" in reasons:
                raise RuntimeError(reasons) from None  # not the disk: another process has ended, says cli.run
            advice = how_to_continue(checkpoints(self.directory.parent))
            if full:
                raise OSError(f"the disk is full, and the checkpoint {directory} could not be written; make "
                              f"room in {self.directory}, then {advice}") from None
            raise OSError(f"the checkpoint {directory} could not be written ({reasons}); {advice}") from None
        if is_main():
            beside.rename(directory)
            found = checkpoints(self.directory.parent)
            for old in sorted(found)[:-self.keep]:  # renamed first: a kill could leave half of it
                remove(found[old].rename(self.directory / f".{found[old].name}.new"))

    def check(self):
        """Raise at once if writing has failed."""
        if self.pending and self.pending.done():
            self.finish()

    def finish(self):
        """Wait until the last checkpoint is whole."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def check_finite(self, norm, loss, step, losses, seed):
        """Stop all ranks alike where a step's gradient norm or loss is not finite, before the optimizer could
        spread it. Both are the same on all ranks.

        losses: (loss, this rank's clips, k or None) of each micro-step. The sentence names the clips whose
        loss is not finite, and the command that repeats the step: draws are functions of the seed, and
        resuming is exact.
        """
        if math.isfinite(norm) and math.isfinite(loss):
            return
        self.finish()
        places = []
        for value, clips, k in losses:
            if not value.isfinite():
                places.append(f"clip {' '.join(clips)}" + (f" at k {k}" if k is not None else ""))
        where = "; ".join(everywhere(places)) or "the backward pass overflows"
        raise InputError(f"step {step}: the loss is {loss} and the gradient norm {norm} ({where}; seed {seed}"
                         f"); look at these clips, or start another run with a lower --lr; {self.again()}")

    def again(self):
        """How to repeat the step that went wrong, for messages."""
        newest = max(checkpoints(self.directory.parent), default=0)
        return f"to see it again from step {newest} on: {command(newest)}"


def command(newest):
    """The command line that continues this run from its newest checkpoint."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    nodes = f"--nnodes={dist.get_world_size() // local} --rdzv_... " if dist.get_world_size() > local else ""
    launcher = f"torchrun {nodes}--nproc_per_node={local}" if "RANK" in os.environ else "python"
    resume = " --resume" if newest and "--resume" not in sys.argv else ""
    return f"{launcher} {shlex.join(sys.argv)}{resume}"


_lock = None  # the open file of this process's run


def claim(output):
    """Refuse a second run in one directory. The lock is released whenever and however the process ends."""
    global _lock
    if _lock:
        _lock.close()  # an earlier run of this process
    taken = [None]
    if is_main():
        Path(output).mkdir(parents=True, exist_ok=True)
        _lock = open(Path(output, "lock"), "a+")
        try:
            fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _lock.truncate(0)
            _lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            _lock.flush()
        except BlockingIOError:
            _lock.seek(0)
            taken = [_lock.read()]
    dist.broadcast_object_list(taken)
    if taken[0]:
        raise InputError(f"{output} is in use by another run ({taken[0]}); wait for it, "
                         f"or choose another --output")


# ------------------------------------------------------------------------------ how a run is stopped

_signals = []  # that have asked for a stop


def stop_on_signals(log):
    """From now on SIGTERM, and SIGUSR1 (Slurm's --signal), ask for a stop after the step.

    A second one ends the process as soon as Python runs, if it comes two seconds later or more: launchers may
    pass on one signal twice. Ctrl-C ends it at once, and says how to go on.
    """
    def end(number, frame):
        advice = how_to_continue(checkpoints(log.path.parent))
        if is_main():  # not print, which may be what was interrupted
            os.write(2, f"\nstopped by Ctrl-C after step {log.step}; {advice}\n".encode())
        os._exit(128 + number)

    def ask(number, frame):
        if _signals and time.time() > _signals[0][1] + 2:
            os._exit(128 + number)
        _signals.append((number, time.time()))
    _signals.clear()
    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGUSR1, ask)
    signal.signal(signal.SIGINT, end)


def stop_asked():
    """Whether any rank got such a signal, the same answer on all ranks: the signal's name, or None."""
    number = torch.tensor(_signals[0][0] if _signals else 0)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return signal.Signals(number.item()).name if number else None


# ------------------------------------------------------------------------------ the log

class Log:
    """One aligned line per step on the screen, and the same as JSON in log.jsonl; the main process writes."""

    def __init__(self, args, first_step, device):
        output = Path(args.output)
        self.step, self.steps = first_step, args.steps
        self.device = device
        self.path = output / "log.jsonl"
        self.started = time.time()
        self.thread = ThreadPoolExecutor(1)
        self.writing = []
        if not is_main():
            return
        with atomic_write(self.path) as beside:
            beside.write_text("".join(kept_lines(self.path, first_step)))
        commit = None
        if shutil.which("git"):
            git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        run = {"arguments": vars(args), "commit": commit, "torch": torch.__version__,
               "processes": dist.get_world_size(), "device": str(device)}
        write_json(output / "run.json", run)

    def __call__(self, step, **values):
        """Write one line; values that are dicts go to the file alone."""
        now = time.time()
        seconds, self.started = now - self.started, now
        self.step = step
        if not is_main():
            return
        values = {**values, "seconds": round(seconds, 3), "gigabytes": round(peak_memory(self.device), 3)}
        self.write({"step": step, **values})
        cells = [f"{step:>{len(str(self.steps))}}/{self.steps}"]
        for name, value in values.items():
            if isinstance(value, float):
                cells.append(f"{name} {value:>9.4g}")
            elif not isinstance(value, dict):
                cells.append(f"{name} {value!s:>3}")
        self.say("  ".join(cells))

    def write(self, values):
        """A line of JSON in log.jsonl."""
        if is_main():
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:
                raise OSError(f"{self.path} could not be written ({error.strerror}); make room, then "
                              f"{how_to_continue(checkpoints(self.path.parent))}") from None

    def say(self, line):
        """A line on the screen, above any progress bar."""
        if is_main():
            tqdm.write(line)
            sys.stdout.flush()

    def later(self, write, *inputs):
        """Call write(*inputs) in a thread, while training goes on; an error is raised by the next call, or by
        `finish`."""
        for done in [future for future in self.writing if future.done()]:
            self.writing.remove(done)
            done.result()
        self.writing.append(self.thread.submit(write, *inputs))

    def finish(self):
        """Wait until all is written."""
        while self.writing:
            self.writing.pop().result()

    def pause(self):
        """Start measuring the next step's time and memory: saving and sampling do not count."""
        self.started = time.time()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def kept_lines(path, first_step):
    """The lines of a log to keep when a run resumes after `first_step` steps; later steps are repeated."""
    if not first_step or not path.exists():
        return
    for number, line in enumerate(read_text(path).splitlines(keepends=True), 1):
        if line.endswith("\n"):  # the last line may be torn
            values = parse_json(line, f"{path}, line {number}", {"step": int})
            if values["step"] <= first_step:
                yield line


def peak_memory(device):
    """Peak memory in GB: of the GPU since the step began, or without one of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
