"""The bench runs every stage at a small size; the plan's formulas give known figures, and what PyTorch itself counts."""
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import bench
import plan
import sequence
import train_prfl
from files import InputError
from lora import add_lora
from memory import block_runner
from model import Block, WanConfig, WanModel
from reward import PAVRM
from test_recipes import NAMES

ROOT = Path(__file__).parent
SMALL = dict(model_type="t2v", dim=96, ffn_dim=256, num_heads=4, num_layers=3, freq_dim=32, in_dim=16, out_dim=16, text_len=16, text_dim=32)
P480, P720 = (832, 480), (1280, 720)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def prfl(*flags):
    return train_prfl.parse_args(["--checkpoint_blocks", *flags])


def of_size(dit):
    """A transformer and its PAVRM, on the meta device."""
    model, pavrm, *_ = plan.models("prfl", prfl(), plan.size_config(dit))
    return model, pavrm


# ---------------------------------------------------------------------------------------------- the bench

@pytest.mark.parametrize("flags", ["--k 0 2", "--lora_rank 4 --checkpoint_blocks --offload inputs weights --bf16_residual "
                                   "--compute_dtype bf16 --k 1"])
def test_every_stage(flags, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        bench.main(f"forward gradient reward prfl pavrm encode decode sample --size 32x32 --frames 5 --vae_dim 4 --repeats 1 "
                   f"--rollout_steps 4 {flags}".split())
    finally:
        dist.destroy_process_group()
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["size"] == [32, 32] and result["frames"] == 5
    steps = [f"prfl, sft and reward, k = {k}" for k in result["k"]]
    for stage in ("forward", "gradient", "reward", "pavrm", "encode", "decode", "sample, 4 steps, guidance 5", *steps):
        assert result[stage]["seconds"] > 0 and result[stage]["gigabytes"] > 0, stage
        assert ("tflops" in result[stage]) == (stage not in ("encode", "decode"))
        assert "share of the floor" not in result[stage]  # a CPU has no floor here
    if len(steps) == 2:
        first, last = (result[step]["seconds"] for step in steps)
        assert result["prfl, mean step, extrapolated"] == pytest.approx(first + (last - first) / 2)  # the mean of 0, 1 and 2 is 1
        assert "mean step: t(k=0) + 1 * (t(k=2) - t(k=0)) / 2 = " in out


@pytest.mark.parametrize("phases, labels", [("sft", ["prfl, sft"]), ("reward", ["prfl, reward, k = 0", "prfl, reward, k = 1"])])
def test_phases_by_themselves(phases, labels, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        bench.main(f"prfl --size 32x32 --frames 5 --repeats 1 --rollout_steps 4 --k 0 1 --phases {phases}".split())
    finally:
        dist.destroy_process_group()
    result = last_line(capsys)
    assert [key for key in result if key.startswith("prfl, ") and "extrapolated" not in key] == labels


def test_profile():
    x = torch.randn(1, 2, 64, 32)
    shares = bench.profile(lambda: (F.scaled_dot_product_attention(x, x, x) @ x.transpose(2, 3)).exp(), torch.device("cpu"))
    assert sum(shares[group] for group in ("matrix products", "attention", "rest")) == pytest.approx(1)
    assert shares["matrix products"] > 0 and shares["attention"] > 0 and "of the rest: aten::exp" in shares


def test_the_script_for_a_gpu_runs(tmp_path):
    """One group of it; all of them take half a minute."""
    output = {"SMALL": "1", "PYTHON": sys.executable, "OUTPUT": str(tmp_path / "bench.jsonl"), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(["bash", ROOT / "bench_gpu.sh", "vae"], env={**os.environ, **output}, check=True, capture_output=True)
    assert json.loads((tmp_path / "bench.jsonl").read_text())["encode"]["seconds"] > 0


def test_out_of_memory_is_recorded(capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(bench.STAGES, "forward", full)
    try:
        bench.main(["forward", "--repeats", "1"])
    finally:
        dist.destroy_process_group()
    assert last_line(capsys)["forward"] == {"error": "out of GPU memory"}


# ---------------------------------------------------------------------------------------------- operations

def test_known_floors():
    """PFLOP and seconds on an H200 of the official sizes, 81 frames."""
    backward = dict(backward=True)
    (large, judge), (small, _) = of_size("14B"), of_size("1.3B")
    tokens480, tokens720 = plan.token_count(P480, 81), plan.token_count(P720, 81)
    assert (tokens480, tokens720) == (32760, 75600)
    for model, tokens, options, petaflop, seconds in [
            (large, tokens720, {}, 6.5, 10.3), (large, tokens480, {}, 1.68, 2.5), (small, tokens720, {}, 1.25, None),
            (small, tokens480, {}, 0.28, 0.44), (large, tokens720, backward, 28.5, 49), (judge, tokens720, backward, 5.3, 9)]:
        count = plan.flops(model, tokens, **options)
        assert sum(count.values()) / 1e15 == pytest.approx(petaflop, rel=0.03)
        assert seconds is None or plan.floor(count, "H200") == pytest.approx(seconds, rel=0.04)
    parts = plan.operations("prfl", prfl("--batch_size", "1"), plan.size_config("14B"), 1, P720, 81)
    assert list(parts) == ["rollout, 19 steps", "gradient step", "reward", "sft"]
    assert sum(parts["rollout, 19 steps"].values()) / 1e15 == pytest.approx(124, rel=0.03)
    assert sum(plan.floor(count, "H200") for count in parts.values()) == pytest.approx(302, rel=0.03)
    shared = plan.operations("prfl", prfl("--batch_size", "2", "--sp", "4"), plan.size_config("14B"), 8, P720, 81)
    assert sum(shared["sft"].values()) == pytest.approx(sum(parts["sft"].values()) / 4)


def test_rollouts_of_several_rewards():
    """Of n different k the largest counts: of 0, 1, 2 two at a time it is 1, 2 or 2."""
    def named(*flags):
        args = prfl("--batch_size", "1", "--rollout_steps", "4", *flags)
        return list(plan.operations("prfl", args, WanConfig(**SMALL), 1, (64, 64), 5))[0]
    assert named() == "rollout, 1 steps" and named("--rewards_per_rollout", "2") == "rollout, 1.66667 steps"
    assert named("--k", "2", "--gradient_steps", "2") == "rollout, 1 steps"


@pytest.mark.parametrize("trained", ["nothing", "all", "adapters", "reward"])
def test_operations_are_those_that_run(trained):
    """As PyTorch counts them while a checkpointed model runs; of the CPU's attention it has to be told."""
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    attention = {getattr(torch.ops.aten, kernel): lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
                 getattr(torch.ops.aten, f"{kernel}_backward"): lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])}
    model = WanModel(WanConfig(**SMALL))
    if trained == "adapters":
        add_lora(model, 8, 8)
    if trained == "reward":
        model = PAVRM(model, 2).requires_grad_(False)
    getattr(model, "dit", model).run_block = block_runner(prfl(), torch.device("cpu"))
    x = torch.randn(1, 16, 2, 16, 24).requires_grad_(trained == "reward")
    with FlopCounterMode(display=False, custom_mapping=attention) as counter, torch.no_grad() if trained == "nothing" else nullcontext():
        out = model(x, torch.tensor([500.0]), [torch.randn(5, 32)])
        out.sum().backward() if trained != "nothing" else None
    count = plan.flops(model, 192, backward=trained != "nothing")
    # With adapters the first block's input takes no gradient, here a third of what all inputs take.
    assert sum(count.values()) == pytest.approx(counter.get_total_flops(), rel=0.03 if trained == "adapters" else 0.015)


# ---------------------------------------------------------------------------------------------- memory

@pytest.mark.parametrize("trained", ["all", "adapters", "nothing"])
@pytest.mark.parametrize("case", ["plain", "bf16_residual", "image", "sp", "ffn"])
def test_what_a_block_keeps_for_backward(trained, case, monkeypatch):
    """The formula against the bytes that autograd saves of a bf16 block, each storage counted once, weights and input not."""
    dim, tokens, clips = 256, 384, 2
    config = WanConfig(**{**SMALL, "dim": dim, "ffn_dim": 704, "text_len": 32, "use_clip": case == "image"})
    block = Block(config).bfloat16()
    if trained != "all":
        block.requires_grad_(False)
    if trained == "adapters":
        holder = torch.nn.Module()
        holder.blocks = torch.nn.ModuleList([block])
        add_lora(holder, 16, 16, ["ffn.0", "ffn.2"] if case == "ffn" else ["q", "k", "v", "o"])
        block.bfloat16()  # adapters compute in bf16, as FSDP gathers them
    sp = 2 if case == "sp" else 1
    if sp == 2:  # the exchange with the other rank gets what it sends: of the same size
        monkeypatch.setattr(sequence, "size", lambda: 2)
        monkeypatch.setattr(dist, "all_to_all_single", lambda received, sent, group=None: received.copy_(sent))
    learns = trained == "all"
    x = torch.randn(clips, tokens, dim, requires_grad=True)
    x = x.bfloat16() if case == "bf16_residual" else x
    six, text = torch.randn(clips, 1, 6, dim, requires_grad=learns), torch.randn(clips, 32, dim, dtype=torch.bfloat16, requires_grad=learns)
    image = torch.randn(clips, 257, dim, dtype=torch.bfloat16) if case == "image" else None
    rotary = [torch.randn(tokens * sp, 1, dim // config.num_heads // 2) for _ in range(2)]
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, six, text, *[image] * (image is not None), *rotary, *block.parameters())}
    saved, alive = Counter(), []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in given:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # else its memory could be another's
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, six, text, image, rotary)
    computed, _ = plan.block_memory(block, config, tokens, clips, bf16_residual=case == "bf16_residual", sp=sp, fused_norm=False)
    assert computed == pytest.approx(saved.total(), rel=0.02)


def test_known_memory():
    """GB of 14B at 720P x 81 frames."""
    config, (model, judge) = plan.size_config("14B"), of_size("14B")
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * weights / 1e9 == pytest.approx(28.6, rel=0.01)
    assert 2 * sum(parameter.numel() for parameter in judge.dit.parameters()) / 1e9 == pytest.approx(6.1, rel=0.02)

    def parts(*flags, gpus=1, name="backward"):
        return plan.memory("prfl", prfl(*flags), config, gpus, "H200", P720, 81)[0][name]

    lora = ["--lora_rank", "128", "--batch_size", "1", "--bf16_residual", "--gather", "no"]
    assert parts(*lora)["block inputs"] / 1e9 == pytest.approx(40 * 0.774, rel=0.01)
    assert parts(*lora, name="reward's backward")["block inputs"] / 1e9 == pytest.approx(48 * 0.774, rel=0.01)
    for block in (model.blocks[0], judge.dit.blocks[0]):
        assert 11 < plan.block_memory(block, config, 75600)[0] / 1e9 < 24
    one, away = (plan.memory("prfl", prfl(*lora, *flags), config, 1, "H200", P720, 81) for flags in ([], ["--offload", "inputs"]))
    assert 90e9 < one[2] < 110e9 and 60e9 < away[2] < 72e9
    assert not one[1] and away[1] == {"block inputs, pinned": 48 * 2 ** 30}  # 0.774e9 bytes, rounded up

    full = parts("--batch_size", "1", "--sp", "8", "--samples", "0", gpus=8)
    shards = sum(full[part] for part in ("trained weights, float32", "reward model", "gradients", "optimizer", "block inputs"))
    assert 8 * shards / 1e9 == pytest.approx(297, rel=0.02) and full["gathered weights"] / 1e9 == pytest.approx(5, abs=1)
    assert sum(full.values()) / 1e9 < 48
    copies = parts("--batch_size", "1", "--sp", "8", "--dp_replicate", "2", gpus=8)
    assert copies["optimizer"] == 2 * full["optimizer"]


def test_memory_of_options():
    """Each moves what it should, and nothing is lost on the way to the CPU."""
    config = plan.size_config("1.3B")

    def memory(*flags, gpus=2):
        return plan.memory("prfl", train_prfl.parse_args(["--checkpoint_blocks", *flags]), config, gpus, "H100", P480, 81)

    plain, offloaded = memory("--ema", "0.99"), memory("--ema", "0.99", "--offload", "weights", "ema")
    fixed = ("trained weights, float32", "reward model", "gradients", "optimizer", "average (EMA)")
    assert all(offloaded[1][part] == plain[0]["backward"][part] and part not in offloaded[0]["backward"] for part in fixed)
    assert memory("--gather", "yes")[0]["rollout"]["gathered weights"] > 5 * memory("--gather", "no")[0]["rollout"]["gathered weights"]
    assert memory("--kl_weight", "1")[2] > memory()[2] and memory("--save_attention")[2] > memory()[2]
    assert memory("--phases", "sft", "--samples", "0")[0].keys() == {"backward"}
    unchecked = plan.memory("prfl", train_prfl.parse_args([]), config, 2, "H100", P480, 81)[2]
    assert unchecked > 4 * memory()[2]


# ---------------------------------------------------------------------------------------------- the command

@pytest.mark.parametrize("name", NAMES)
def test_plan_of_every_recipe(name, capsys):
    bench.main(["--plan", name.split("_")[0], f"@{ROOT}/recipes/{name}.args", "--gpus", "8", "--sp", "4",
                "--size", "1280x720" if name.endswith("720P") else "832x480"])
    result = last_line(capsys)
    assert result["computed"] and result["fits"] and all(seconds > 0 for seconds in result["floor_seconds"].values())


def test_plan_of_a_directory(capsys):
    bench.main(["--plan", "prfl", "--model", str(ROOT / "demo/model"), "--size", "64x64", "--frames", "17", "--gpu", "RTX4090"])
    assert last_line(capsys)["fits"]


def test_table_of_what_fits():
    """Where the README has the table, it has this one."""
    lines, readme = plan.fits(), (ROOT / "README.md").read_text()
    assert len(lines) == 10 and not any("more than" in line for line in lines[2:])
    assert lines[0] not in readme or "\n".join(lines) in readme


@pytest.mark.parametrize("flags, message", [
    (["--gpus", "8"], "multiple of 8"), (["--gpus", "8", "--sp", "3"], "do not go with --sp 3"),
    (["--gpus", "16", "--sp", "16", "--batch_size", "1"], "40 heads"), (["--model", "nowhere"], "give --dit")])
def test_plans_that_cannot_be(flags, message):
    with pytest.raises(InputError, match=message):
        plan.main(["--plan", "prfl", "--model", "Wan2.1-T2V-14B", *flags])
