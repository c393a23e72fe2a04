"""When another process dies, this one ends with one sentence, though it is blocked; otherwise it goes on."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_prfl
import watch
from testdata.helpers import ROOT, flags_of

# Each case in processes of its own; all cases run at once. A blocked process is in C, as when it waits for a
# kernel of NCCL: no signal handler of Python runs and no collective fails there.
DRIVER = """
import ctypes, json, os, signal, sys, time
import torch.distributed as dist
import cli, parallel, records, train_prfl, watch
from files import InputError

def die_or_block(dies):
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    ctypes.CDLL(None).pause()

def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.02)

def rank_0_dies():
    parallel.start()
    die_or_block(rank == 0)

def rank_1_dies():
    parallel.start()
    die_or_block(rank == 1)

def rank_1_fails():
    parallel.start()
    if rank == 1:
        raise InputError("no such clip")
    die_or_block(False)

class TakesLong:
    def __del__(self, sleep=time.sleep):
        sleep(2)

def rank_1_has_a_fault():
    global left_to_the_end
    parallel.start()
    if rank == 1:
        left_to_the_end = TakesLong()  # Python ends slowly, and the thread comes back meanwhile
        raise ValueError("fault")
    die_or_block(False)

def both_fail():  # and rank 0 ends while rank 1 still lets it speak first
    parallel.start()
    sleep = time.sleep
    cli.time.sleep = lambda seconds: (open("rank 1 waits", "w"), sleep(seconds))
    if rank == 0:
        while not os.path.exists("rank 1 waits"):
            sleep(0.02)
    raise InputError(f"no clip {rank}")

def rank_1_takes_longer():
    parallel.start()
    time.sleep(2 * rank)

def rank_1_is_slow():  # so slow that even its thread stands still; the driver continues it
    parallel.start()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        open("rank 1 goes on", "w")
    wait_for("rank 1 goes on")

def training():
    records.Log.__call__ = lambda *_, **__: die_or_block(rank == 3)
    train_prfl.main(json.load(open("flags.json")))

ranks, *cases = sys.argv[1:]
children = {}
for case in cases:
    for rank in range(int(ranks)):
        if child := os.fork():
            children[child] = case, rank
            continue
        signal.alarm(120)  # it has hung
        os.dup2(os.open(f"{case} {rank}.txt", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks}
        dist.init_process_group("gloo", init_method="file://" + os.path.abspath(f"{case} store"), rank=rank,
                                world_size=int(ranks))
        dist.init_process_group = lambda *_, **__: None
        watch.GRACE = 0.1
        cli.run(globals()[case])
codes = {case: {} for case in cases}
while children:
    child, status = os.waitpid(-1, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        time.sleep(3)
        os.kill(child, signal.SIGCONT)
    else:
        case, rank = children.pop(child)
        codes[case][rank] = os.waitstatus_to_exitcode(status)
json.dump(codes, open("codes.json", "w"))
"""
CASES = re.findall(r"^def (\w*rank_\w+|both_fail)\(\)", DRIVER, re.M)
KILLED = (-9, [])
GONE = (1, [f"error: {watch.GONE}"])
WELL = (0, [])


def ends(directory, ranks, *cases):
    """{case: [(exit code, errors) of each rank]}."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", DRIVER, str(ranks), *cases], cwd=directory, env=env, check=True)
    found = {}
    for case, codes in json.loads(Path(directory, "codes.json").read_text()).items():
        found[case] = []
        for rank in range(ranks):
            said = Path(directory, f"{case} {rank}.txt").read_text()
            errors = re.findall(r"^error: .*|\w+Error: .*|^terminate called.*", said, re.M)
            found[case].append((codes[str(rank)], errors))
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ends(tmp_path_factory.mktemp("watch"), 2, *CASES)


def test_a_process_that_dies_ends_the_other(two):
    assert two["rank_0_dies"] == [KILLED, GONE]
    assert two["rank_1_dies"] == [GONE, KILLED]


def test_who_fails_has_the_say(two):
    """Its own message comes, also where the other has ended before; who only waited for it says so."""
    assert two["rank_1_fails"] == [GONE, (1, ["error: no such clip"])]
    assert two["rank_1_has_a_fault"] == [GONE, (1, ["ValueError: fault"])]  # and a traceback, but no abort
    assert two["both_fail"] == [(1, ["error: no clip 0"]), (1, ["error: no clip 1"])]


def test_a_normal_end_is_no_death(two):
    assert two["rank_1_takes_longer"] == [WELL, WELL]


def test_a_slow_process_is_not_dead(two):
    assert two["rank_1_is_slow"] == [WELL, WELL]


@pytest.mark.full
def test_a_process_dies_in_training(quick, tmp_path):
    """Two copies of the weights, each clip shared by two ranks; three of four are blocked."""
    flags = flags_of(train_prfl, "run", "--sp", "2", "--dp_replicate", "2", "--batch_size", "2")
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    assert ends(tmp_path, 4, "training")["training"] == [GONE, GONE, GONE, KILLED]
