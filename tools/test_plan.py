"""The plan's formulas give known figures; the commands answer."""
import json

import pytest
import torch
import torch.distributed as dist

import parallel
import train_pavrm
import train_prfl
from files import InputError
from testdata.helpers import ROOT
from tools import bench, floors, plan, run_memory

P480, P720 = (832, 480), (1280, 720)
RECIPES = sorted(path.stem for path in ROOT.glob("recipes/*_14B_*.args"))
FIXED = ("trained weights, float32", "reward model", "gradients", "optimizer", "average (EMA)")


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def run_of(dit, *flags, gpus=1, gpu="H200", size=P720, script=train_prfl):
    """The plan of a run with activation checkpointing, 81 frames."""
    args = script.parse_args(["--activation_checkpointing", *flags])
    name = script.__name__.removeprefix("train_")
    return plan.Run(name, args, floors.size_config(dit), gpus, gpu, size, 81)


# ------------------------------------------------------------------------------ memory of a run

def test_known_weights():
    """GB of 14B in bf16, and of its PAVRM; all weights are counted once."""
    run = run_of("14B", "--batch_size", "1")
    assert 2 * plan.numel(run.model.parameters()) / 1e9 == pytest.approx(28.6, rel=0.01)
    assert 2 * plan.numel(run.judge.dit.parameters()) / 1e9 == pytest.approx(6.1, rel=0.02)
    assert run.weights.all == plan.numel(run.model.parameters()) and run.weights.frozen == 0
    assert run.judging.all == plan.numel(run.judge.parameters()) and run.judging.trained == 0


def test_known_memory_of_lora():
    """GB of 14B at 720P x 81 frames on one GPU; a block's input is 0.774 GB."""
    flags = ["--lora_rank", "128", "--batch_size", "1", "--bf16_residual"]
    run = run_of("14B", *flags)
    moments, cpu, total = plan.memory(run)
    assert moments["backward"]["block inputs"] / 1e9 == pytest.approx(40 * 0.774, rel=0.01)
    assert moments["reward's backward"]["block inputs"] / 1e9 == pytest.approx(48 * 0.774, rel=0.01)
    assert 90e9 < total < 110e9 and list(cpu) == ["copy for a checkpoint"]

    offload = ["--offload", "inputs", "reward"]
    moments, cpu, least = plan.memory(run_of("14B", *flags, *offload))
    assert least < 56e9 < plan.memory(run_of("14B", *flags[:-1], *offload))[2] < 62e9
    assert cpu["block inputs, pinned"] / 1e9 == pytest.approx(48 * 0.774, rel=0.01)
    assert cpu["reward model"] / 1e9 == pytest.approx(6.9, rel=0.02)
    assert moments["decoding"]["VAE's decoder"] / 1e9 == pytest.approx(16.7, rel=0.01)
    assert plan.memory(run_of("14B", *flags, *offload, "--no-compile"))[2] > least + 2e9


def test_known_memory_of_full_training():
    """GB of 14B at 720P x 81 frames on eight GPUs."""
    def backward(*flags):
        run = run_of("14B", "--batch_size", "1", "--sp", "8", *flags, gpus=8)
        return plan.memory(run)[0]["backward"]

    full = backward("--samples", "0")
    parts = ("trained weights, float32", "reward model", "gradients", "optimizer", "block inputs")
    assert 8 * sum(full[part] for part in parts) / 1e9 == pytest.approx(297, rel=0.02)
    assert full["gathered weights"] / 1e9 == pytest.approx(5, abs=1)
    assert sum(full.values()) / 1e9 < 48
    assert backward("--dp_replicate", "2")["optimizer"] == 2 * full["optimizer"]


def memory(*flags, **options):
    """plan.memory of 1.3B at 480P on two H100."""
    return plan.memory(run_of("1.3B", *flags, **{"gpus": 2, "gpu": "H100", "size": P480, **options}))


def test_what_is_offloaded_is_in_cpu_memory():
    moments, cpu, _ = memory("--ema", "0.99")
    copied = {part: value for part, value in cpu.items() if part == "copy for a checkpoint"}
    assert cpu == copied and all(part in moments["backward"] for part in FIXED)
    trained = moments["backward"]["optimizer"] + moments["backward"]["trained weights, float32"]
    assert sum(copied.values()) == trained + moments["backward"]["average (EMA)"]
    offloaded, cpu, _ = memory("--ema", "0.99", "--offload", "weights", "ema")
    for part in FIXED:
        assert cpu[part] == moments["backward"][part] and part not in offloaded["backward"]
    _, cpu, _ = memory("--ema", "0.99", "--offload", "ema")
    assert list(cpu) == ["copy for a checkpoint", "average (EMA)"]
    offloaded, cpu, _ = memory("--kl_weight", "1", "--offload", "reward")
    assert list(cpu) == ["copy for a checkpoint", "reward model", "weights as they were"]
    assert "trained weights, float32" in offloaded["backward"]


def test_options_that_need_more():
    least = memory()[2]
    assert memory("--kl_weight", "1")[2] > least and memory("--save_attention")[2] > least
    assert memory("--gradient_steps", "2")[2] > least and memory("--rollout_guidance", "5")[2] > least
    args = train_prfl.parse_args([])  # without activation checkpointing
    run = plan.Run("prfl", args, floors.size_config("1.3B"), 2, "H100", P480, 81)
    assert plan.memory(run)[2] > 3 * least


def test_moments_are_those_of_the_phases():
    assert list(memory()[0]) == ["backward", "reward's backward", "rollout", "decoding"]
    moments = memory("--phases", "sft", "--samples", "0")[0]
    assert list(moments) == ["backward"] and "reward model" not in moments["backward"]
    assert "reward model" in memory("--phases", "sft")[0]["backward"]  # its samples are scored
    assert "reward model" not in memory("--phases", "sft", "--reward", "none")[0]["backward"]
    assert "reward model" in memory("--phases", "rwr", "--samples", "0")[0]["backward"]
    assert list(memory(script=train_pavrm)[0]) == ["backward"]


@pytest.mark.parametrize("dit, flags, gpus, gpu, gathered", [
    ("1.3B", [], 2, "H100", True),                           # 2.8 of 80 GB
    ("14B", [], 2, "H100", False),                           # 28.6 is more than a quarter of 80
    ("14B", [], 2, "H200", True),                            # and less than a quarter of 141
    ("1.3B", [], 1, "H100", False),                          # one process has all weights anyway
    ("1.3B", ["--dp_replicate", "2"], 2, "H100", False),     # so has each of these
    ("1.3B", ["--offload", "inputs"], 2, "H100", False),     # memory is scarce
    ("1.3B", ["--offload", "weights"], 2, "H100", False),
    ("14B", ["--compute_dtype", "float32"], 2, "H200", False)])
def test_gathered_weights_during_a_rollout(dit, flags, gpus, gpu, gathered, monkeypatch):
    """The plan follows the rule of training, on a GPU of that size."""
    run = run_of(dit, *flags, gpus=gpus, gpu=gpu)
    assert run_memory.gathers(run) is gathered
    monkeypatch.setattr(dist, "get_world_size", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: type("GPU", (), {"total_memory": floors.GPUS[gpu]["memory"] * 1e9}))
    assert parallel.gathers(run.args, run.model, torch.device("cuda")) is gathered

    blocks = 2 * run.weights.blocks * (2 if run.itemsize == 4 else 1)
    weights = plan.memory(run)[0]["rollout"]["gathered weights"]
    assert (weights >= blocks) is gathered


# ------------------------------------------------------------------------------ the commands

@pytest.mark.parametrize("name", RECIPES)
def test_plan_of_every_recipe(name, capsys):
    bench.main(["--plan", name.split("_")[0], f"@{ROOT}/recipes/{name}.args", "--gpus", "8", "--sp", "4",
                "--size", "1280x704" if name.endswith("720P") else "832x480"])
    result = last_line(capsys)
    assert result["computed"] and result["fits"]
    assert all(seconds > 0 for seconds in result["floor_seconds"].values())


def test_plan_of_a_directory(capsys):
    bench.main(["--plan", "prfl", "--model", str(ROOT / "demo/model"), "--size", "64x64", "--frames", "17",
                "--gpu", "RTX4090"])
    assert last_line(capsys)["fits"]


@pytest.mark.parametrize("model, width", [("Wan2.1-T2V-1.3B", 1536), ("models/Wan2.1-T2V-14B", 5120)])
def test_official_models_are_known_by_name(model, width):
    config = plan.config_of(model, None)
    assert (config.dim, config.model_type) == (width, "t2v")
    assert plan.config_of("Wan2.1-I2V-14B-720P", None).use_clip and plan.config_of(model, "tiny").dim == 112


def test_table_of_what_fits():
    """The documentation has this table."""
    lines = plan.fits()
    assert len(lines) == 10 and not any("more than" in line for line in lines[2:])
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    assert any("\n".join(lines) in page.read_text() for page in pages)


@pytest.mark.parametrize("flags, message", [
    (["--gpus", "8"], "multiple of 8"),
    (["--gpus", "8", "--sp", "3"], "--sp 3 and --dp_replicate 1 do not both divide 8 GPUs"),
    (["--gpus", "16", "--sp", "16", "--batch_size", "1"], "40 heads"),
    (["--model", "nowhere"], "give --dit"),
    (["--reward", "mine.py"], "--reward is mine.py"),
    (["--reward", "none"], "--reward is none")])
def test_plans_that_cannot_be(flags, message):
    with pytest.raises(InputError, match=message):
        plan.main(["--plan", "prfl", "--model", "Wan2.1-T2V-14B", *flags])


def test_the_table_has_no_flags():
    with pytest.raises(InputError, match="--plan fits has no other flags"):
        plan.main(["--plan", "fits", "--gpus", "8"])
