"""One process or several, whatever shares what: the same losses, gradients and weights. And how sequences are shared."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import files
import sequence
import train_pavrm
import train_prfl
from test_train import flags_of, numbers, read_log, run, steps, write_index
from testdata.golden import draw

pytest_plugins = ["test_train"]  # the world
STEPS = 5
# Bradley-Terry cancels the gradient of a bias whose unit both clips of a pair pass: Adam makes steps of the learning rate of
# what rounding leaves. So its head learns at the published rate, at which these steps are too small to matter.
RUNS = {"pavrm": (train_pavrm, []), "pavrm_bt": (train_pavrm, ["--loss", "bt", "--head_lr", "1e-5"]), "pavrm_lora": (train_pavrm, ["--lora_rank", "4"]),
        "prfl": (train_prfl, []), "prfl_lora": (train_prfl, ["--lora_rank", "4", "--lora_targets", "q", "o", "ffn.0"])}
MESHES = {"dp2": (2, []), "sp2": (2, ["--sp", "2"]), "replicate2": (2, ["--dp_replicate", "2"]),
          "dp4": (4, []), "sp4": (4, ["--sp", "4"]), "dp2_sp2": (4, ["--sp", "2"]), "replicate2_shard2": (4, ["--dp_replicate", "2"]),
          "replicate2_sp2": (4, ["--dp_replicate", "2", "--sp", "2"])}

DRIVER = """
import importlib, json, os, sys
import torch.distributed as dist
import records
records.Checkpoints.save = lambda *_: None  # resuming is tested elsewhere
for name, port, flags in json.load(open("jobs.json")):
    os.environ["MASTER_PORT"] = str(port)
    importlib.import_module(name).main(flags)
    dist.destroy_process_group()
"""


def spawn(processes, jobs):
    """Run [(script, flags)] one after the other, each in all of `processes` processes; returns what they printed."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in jobs]
    files.write_json("jobs.json", [(script.__name__, each.getsockname()[1], flags) for (script, flags), each in zip(jobs, sockets)])
    for each in sockets:
        each.close()
    Path("driver.py").write_text(DRIVER)
    ranks = [subprocess.Popen([sys.executable, "driver.py"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                                   "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"})
             for rank in range(processes)]
    printed = [rank.communicate(timeout=900)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(printed)[-4000:]
    return printed


@pytest.fixture
def odd_world(world):
    """The world with clips of 9 tokens: 2 and 4 ranks need padding, and of 4 ranks one has nothing else."""
    for i, line in enumerate(world):
        with files.open_safetensors(f"clips/{i}.safetensors") as clip:
            tensors = {name: clip.get_tensor(name) for name in clip.keys()}
        files.write_safetensors(f"clips/{i}.safetensors", {**tensors, "latents": draw((16, 3, 2, 6), 10 + i)})
        line |= {"shape": [16, 3, 2, 6], "pair_id": f"pair {i // 2}"}
    write_index(world)


def flags(name, output, mesh=()):
    script, own = RUNS[name]
    quick = ["--eval_timesteps", "600"] if script is train_pavrm else []
    return flags_of(script, output, "--steps", str(STEPS), "--batch_size", "4", *quick, *own, *mesh)


def compare(meshes, runs):
    """Train with each mesh and with one process; losses, gradient norms, rewards and the trained weights must agree."""
    for name in runs:
        run(RUNS[name][0], name, *flags(name, name))
    for processes in sorted({MESHES[mesh][0] for mesh in meshes}):
        spawn(processes, [(RUNS[name][0], flags(name, f"{mesh}_{name}", MESHES[mesh][1]))
                          for mesh in meshes if MESHES[mesh][0] == processes for name in runs])
    for mesh in meshes:
        for name in runs:
            one, many = (steps(numbers(read_log(output))) for output in (name, f"{mesh}_{name}"))
            assert len(one) == len(many) == STEPS
            for a, b in zip(one, many):
                a, b = ({key: value for key, value in line.items() if isinstance(value, float)} for line in (a, b))
                assert b == pytest.approx(a, rel=1e-4, abs=1e-7), (mesh, name)
            result = "reward" if RUNS[name][0] is train_pavrm else "model"
            one, many = (load_file(next(Path(output, result).glob("*.safetensors"))) for output in (name, f"{mesh}_{name}"))
            assert one.keys() == many.keys()
            largest = max(weight.abs().max() for weight in one.values())
            for key in one:
                if key.endswith("in_proj_bias"):  # the keys' bias moves all logits of a query alike: its true gradient is zero
                    parts = [weights[key].chunk(3) for weights in (one, many)]
                    one[key], many[key] = (torch.cat([part[0], part[2]]) for part in parts)
                assert (one[key] - many[key]).abs().max() <= 1e-4 * largest, (mesh, name, key)


def test_clips_and_tokens_are_shared_alike(odd_world):
    compare(["dp2_sp2"], ["pavrm", "prfl_lora"])


@pytest.mark.full
def test_every_mesh(odd_world):
    compare(MESHES, RUNS)
