"""Does a run survive being killed? Kill one repeatedly, resume it, and compare it with an undisturbed run.

    python -m tools.crash    # 20 kills of train_prfl.py in two processes, about ten minutes on two cores

A kill is SIGKILL at a random moment, during saves too: to both processes, or to one, and then the other has
to end by itself with one sentence. After each kill, every checkpoint that exists must be readable. In the
end, log and weights must be those of the undisturbed run, bit by bit. Then both runs continue in one and in
two processes: the first losses after a change must agree to 1e-6.
"""
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cli

from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from files import InputError
from records import checkpoints

ROOT = Path(__file__).parent.parent
FLAGS = ["--model", ROOT / "demo/model", "--reward", ROOT / "demo/reward",
         "--data", ROOT / "demo/train/index.jsonl", "--batch_size", "2", "--accumulation", "1",
         "--solver_steps", "4", "--samples", "0", "--lr", "1e-4", "--ema", "0.9", "--timeout", "20",
         "--save_every", "2"]
NO_END = 10 ** 6  # steps of a run that is going to be killed


# ------------------------------------------------------------------------------ runs

def free_port():
    """A port below those that the system hands out: another process could get one of those at any time."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def start(output, steps, processes=2):
    """The processes of a run, resumed if it has a checkpoint; what they print goes to `output`.txt.

    There is no torchrun, which would pass signals on and end the others.
    """
    everywhere = {**os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train_prfl.py", *FLAGS, "--output", output, "--steps", str(steps)]
    if checkpoints(output):
        command.append("--resume")
    ranks = []
    with open(f"{output}.txt", "w") as printed:
        for rank in range(processes):
            env = {**everywhere, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, stdout=printed, stderr=printed, env=env))
    return ranks


def finish(output, steps, processes=2):
    """Run to the end; returns the lines of its log, see `log_of`."""
    codes = [rank.wait() for rank in start(output, steps, processes)]
    if any(codes):
        raise InputError(f"{output} failed: {printed_by(output)}")
    return log_of(output)


def printed_by(output):
    return Path(f"{output}.txt").read_text()[-2000:]


def log_of(output):
    """The complete lines of a run's log, without what may differ: seconds and memory."""
    path = Path(output, "log.jsonl")
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            values = json.loads(line)
            lines.append({name: values[name] for name in values if name not in ("seconds", "gigabytes")})
    return lines


# ------------------------------------------------------------------------------ kills

def kill(output, moments):
    """Start the run, let it make a step, kill it at a random moment. Returns the last step in its log.

    The first run is only killed when it has a checkpoint, so that there is something to resume.
    """
    before = len(log_of(output))
    ranks = start(output, NO_END)
    deadline = time.time() + 1800
    while not checkpoints(output) or len(log_of(output)) <= before:
        if time.time() > deadline or any(rank.poll() is not None for rank in ranks):
            for rank in ranks:
                rank.kill()
            raise InputError(f"{output} ended or hung before it was killed: {printed_by(output)}")
        time.sleep(0.02)
    time.sleep(moments.uniform(0, 3))

    victims = moments.choice([ranks, ranks[:1], ranks[1:]])
    for rank in victims:
        rank.kill()
    for rank in ranks:
        rank.wait(timeout=1800)
    if victims != ranks and "error: another process has ended" not in printed_by(output):
        raise InputError(f"the surviving process did not say why it ended: {printed_by(output)}")
    check_files(output)
    return max((line["step"] for line in log_of(output)), default=0)


def check_files(output):
    """Every checkpoint that exists can be read in full."""
    for directory in checkpoints(output).values():
        dcp_to_torch_save(directory, f"{output}.pt")
    for file in Path(output).rglob("*.safetensors"):
        load_file(file)


def bytes_of(output):
    files = sorted(Path(output).rglob("*.safetensors"))
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def crash(kills, seed=0, reshard=True):
    """Do all of it in the current directory; raises InputError if anything is lost."""
    # The run cannot end before it is killed: it has no last step until the last kill.
    moments = random.Random(seed)
    steps = 1
    for number in range(1, kills + 1):
        reached = kill("killed", moments)
        steps = max(steps, reached + 1)
        newest = max(checkpoints("killed"), default=0)
        print(f"kill {number} at step {reached}; the newest checkpoint is of step {newest}", flush=True)
    killed = finish("killed", steps)
    whole = finish("whole", steps)
    if killed != whole or bytes_of("killed") != bytes_of("whole"):
        raise InputError("the killed run differs from the whole one; compare killed/ and whole/")

    # One run continues in one process and the other in two; then the other way round.
    for processes in (1, 2) if reshard else ():
        steps += 1
        one = finish("whole", steps, processes)[-1]
        other = finish("killed", steps, 3 - processes)[-1]
        for name in ("sft_loss", "reward_loss", "reward"):
            if abs(one[name] - other[name]) > 1e-6 * abs(one[name]):
                raise InputError(f"step {steps}: {name} is {one[name]} in {processes} process(es) and "
                                 f"{other[name]} in {3 - processes}")


def main():
    parser = cli.Parser("Kill a training run again and again, resume it, and compare it with an undisturbed "
                        "one.")
    parser.prog = "python -m tools.crash"
    parser.add_argument("--kills", type=cli.whole(0), default=20, help="number of kills")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="seed of the moments at which they come")
    args = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="crash-")
    os.chdir(directory)
    crash(args.kills, args.seed)
    print(f"{args.kills} kills: log and weights are the same as without; one process and two agree after "
          f"resharding")
    shutil.rmtree(directory)


if __name__ == "__main__":
    cli.run(main)
