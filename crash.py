"""Does a run survive being killed? Kill one again and again, go on with --resume, compare with a run that nobody touched.

    python crash.py                # 20 kills of a run of train_prfl.py in two processes, six to ten minutes on two cores

A kill is SIGKILL at a random moment, during saves too: to both processes, or to one, and then the other has to end by
itself with one sentence. After each, every file that is there must be whole. In the end log and weights must be those of
the undisturbed run, bit by bit. Then both go on in one or in two processes: the first losses after a change must agree to 1e-6.
"""
import argparse
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

from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from files import InputError
from parallel import run
from records import checkpoints

ROOT = Path(__file__).parent
FLAGS = ["--model", ROOT / "demo/model", "--reward", ROOT / "demo/reward", "--data", ROOT / "demo/train/index.jsonl", "--batch_size", "2",
         "--accumulation", "1", "--rollout_steps", "4", "--samples", "0", "--lr", "1e-4", "--ema", "0.9", "--timeout", "2"]


def free_port():
    """Below those that the system hands out, which another process might get in the meantime."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def start(output, steps, *flags, processes=2):
    """A run's processes, without torchrun between us and them; what they print goes to `output`.txt."""
    port = free_port()
    everywhere = {**os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train_prfl.py", *FLAGS, "--output", output, "--steps", str(steps), *flags]
    with open(f"{output}.txt", "w") as printed:
        return [subprocess.Popen(command, stdout=printed, stderr=printed, env={**everywhere, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                for rank in range(processes)]


def finish(output, steps, *flags, processes=2):
    """Run to the end; returns the lines of its log, without what may differ: seconds and memory."""
    if any([rank.wait() for rank in start(output, steps, *flags, processes=processes)]):
        raise InputError(f"{output} failed: {Path(f'{output}.txt').read_text()[-2000:]}")
    return log_of(output)


def log_of(output):
    path = Path(output, "log.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    return [{name: value for name, value in line.items() if name not in ("seconds", "gigabytes")} for line in lines]


def resume(output):
    return ["--resume"] if checkpoints(output) else []


def kill(output, steps, moments):
    """Start the run, let it make a step, kill it at a random moment; returns the step it was seen to reach, or None at its end."""
    before = len(log_of(output))
    ranks = start(output, steps, "--save_every", "2", *resume(output))
    began = time.time()
    while len(log_of(output)) == before and all(rank.poll() is None for rank in ranks) and time.time() - began < 60:
        time.sleep(0.02)
    time.sleep(moments.uniform(0, 3))
    if all(rank.poll() == 0 for rank in ranks):
        return None
    victims = moments.choice([ranks, ranks[:1], ranks[1:]])
    for rank in victims:
        rank.kill()
    for rank in ranks:
        rank.wait(timeout=150)
    survivors = [rank for rank in ranks if rank not in victims]
    said = Path(f"{output}.txt").read_text()
    if survivors and "error: another process has ended" not in said:
        raise InputError(f"the process that was left did not say why it ended: {said[-2000:]}")
    check_files(output)
    return max((line["step"] for line in log_of(output)), default=0)


def check_files(output):
    """Every checkpoint that is there can be read in full."""
    for directory in checkpoints(output).values():
        dcp_to_torch_save(directory, f"{output}.pt")
    for file in Path(output).rglob("*.safetensors"):
        load_file(file)


def bytes_of(output):
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(Path(output).rglob("*.safetensors"))}


def crash(kills, steps, seed=0, reshard=True):
    """Do all of it in the current directory; raises InputError where something is lost. Returns how many kills there were."""
    moments = random.Random(seed)
    whole = finish("whole", steps, "--save_every", "2")
    done = 0
    while done < kills:
        reached = kill("killed", steps, moments)
        if reached is None:
            break
        done += 1
        print(f"kill {done} at step {reached} of {steps}; the newest checkpoint is of step {max(checkpoints('killed'), default=0)}", flush=True)
    killed = finish("killed", steps, "--save_every", "2", *resume("killed"))
    if killed != whole or bytes_of("killed") != bytes_of("whole"):
        raise InputError("the killed run is not the whole one; look at killed/ and whole/")

    # The whole run goes on in one process, then in two again, the other one the other way round.
    for processes in (1, 2) if reshard else ():
        steps += 1
        one, other = (finish(output, steps, "--resume", processes=count)[-1] for output, count in (("whole", processes), ("killed", 3 - processes)))
        for name in ("sft_loss", "reward_loss", "reward"):
            if abs(one[name] - other[name]) > 1e-6 * abs(one[name]):
                raise InputError(f"step {steps}: {name} is {one[name]} resumed by one and {other[name]} by the other number of processes")
    return done


def main():
    parser = argparse.ArgumentParser(description="Kill a run and resume it.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often")
    parser.add_argument("--steps", type=int, default=150, help="iterations of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="crash-")
    os.chdir(directory)
    done = crash(args.kills, args.steps, args.seed)
    print(f"{done} kills, and the same log and weights as without; resharding from 2 to 1 and from 1 to 2 processes agrees")
    shutil.rmtree(directory)


if __name__ == "__main__":
    run(main)
