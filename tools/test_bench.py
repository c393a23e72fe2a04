"""The bench runs every stage at a small size and says what it measured. No test depends on the times."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from files import InputError
from testdata.helpers import ROOT
from tools import bench, floors

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


@pytest.fixture
def run(capsys, monkeypatch):
    """run("forward --repeats 1"): the bench on the CPU; what it prints, and its last line read."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(command):
        try:
            bench.main(command.split())
        finally:
            dist.destroy_process_group()
        out = capsys.readouterr().out
        return out, json.loads(out.splitlines()[-1])
    return run


# ------------------------------------------------------------------------------ the stages

@pytest.mark.parametrize("flags", [
    "--k 0 2",
    "--lora_rank 4 --activation_checkpointing --offload inputs weights --bf16_residual --compute_dtype bf16 "
    "--k 1"])
def test_every_stage(flags, run):
    _, result = run(f"forward gradient reward prfl pavrm encode decode sample --size 32x32 --frames 5 "
                    f"--vae_dim 4 --repeats 1 --solver_steps 4 {flags}")
    assert result["size"] == [32, 32] and result["frames"] == 5
    steps = [f"prfl, sft and reward, k = {k}" for k in result["k"]]
    others = ["forward", "gradient", "reward", "pavrm", "encode", "decode", "sample, 4 steps, guidance 5"]
    for stage in steps + others:
        assert result[stage]["seconds"] > 0 and result[stage]["gigabytes"] > 0, stage
        assert ("tflops" in result[stage]) == (stage not in ("encode", "decode"))
        assert "share of the floor" not in result[stage]  # a CPU has no floor here
    assert ("prfl, mean step, extrapolated" in result) == (len(steps) == 2)
    assert not {"resume", "timeout", "stages"} & set(result)


@pytest.mark.parametrize("phases, labels", [
    ("sft", ["prfl, sft"]),
    ("reward", ["prfl, reward, k = 0", "prfl, reward, k = 1"])])
def test_phases_by_themselves(phases, labels, run):
    _, result = run(f"prfl --size 32x32 --frames 5 --repeats 1 --solver_steps 4 --k 0 1 --phases {phases}")
    assert [key for key in result if key.startswith("prfl, ") and "extrapolated" not in key] == labels


def test_steps_do_the_work_that_they_stand_for(run, monkeypatch):
    """Forwards and updates of a step at k = 2: k in the rollout, one judged, one for the SFT phase."""
    calls = []
    walk, reward_loss, sft_loss = bench.rewarded_step, bench.reward_loss, bench.sft_loss

    def counted(name, function):
        def wrapped(*inputs, **options):
            calls.append(name)
            return function(*inputs, **options)
        return wrapped
    monkeypatch.setattr(bench, "rewarded_step", counted("rollout", walk))
    monkeypatch.setattr(bench, "reward_loss", counted("reward", reward_loss))
    monkeypatch.setattr(bench, "sft_loss", counted("sft", sft_loss))
    monkeypatch.setattr(bench.parallel, "clip_gradients", lambda *_: calls.append("update"))
    monkeypatch.setattr(bench.WanModel, "forward", counted("forward", bench.WanModel.forward))
    run("prfl --size 32x32 --frames 5 --repeats 1 --solver_steps 4 --k 2")
    assert calls == ["sft", "forward", "update", "rollout", *["forward"] * 3, "reward", "update"]


def test_calls_of_a_measurement():
    calls = []
    for repeats, warmup, expected in [(1, 0, 1), (3, 1, 4), (3, 2, 5), (1, 1, 2)]:
        calls.clear()
        row = bench.measure(lambda: calls.append(None), torch.device("cpu"), repeats, warmup)
        assert len(calls) == expected and set(row) == {"seconds", "spread", "gigabytes"}


def test_the_median_and_the_spread_count(monkeypatch):
    clock = iter([0, 3, 10, 11, 20, 27])  # made-up seconds: calls of 3, 1 and 7
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    row = bench.measure(lambda: None, torch.device("cpu"), 3, warmup=0)
    assert (row["seconds"], row["spread"]) == (3, 6)


def test_out_of_memory_is_recorded(run, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError
    monkeypatch.setitem(bench.STAGES, "prfl", full)
    out, result = run("prfl forward --repeats 1 --size 32x32 --frames 5")
    assert result["prfl"] == {"error": "out of GPU memory"} and "prfl: out of GPU memory; try" in out
    assert "forward" in result and "prfl, mean step, extrapolated" not in result


@pytest.mark.full
def test_the_script_for_a_gpu_runs(tmp_path):
    """One group of it; all of them take half a minute."""
    settings = {"SMALL": "1", "PYTHON": sys.executable, "OUTPUT": str(tmp_path / "bench.jsonl"),
                "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(["bash", ROOT / "tools/bench_gpu.sh", "vae"], env={**os.environ, **settings}, cwd=tmp_path,
                   check=True, capture_output=True)
    assert json.loads((tmp_path / "bench.jsonl").read_text())["encode"]["seconds"] > 0


def test_the_flags_of_the_script_for_a_gpu_exist():
    """All its commands, at full size."""
    dry = 'bench() { echo "bench $*"; }'
    script = (ROOT / "tools/bench_gpu.sh").read_text()
    script = script.replace("\nfor group in", f"\n{dry}\nfor group in").replace('cd "$(dirname "$0")/.."', "")
    done = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True,
                          env={**os.environ, "OUTPUT": "/dev/null", "SMALL": ""})
    commands = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("bench ")]
    assert len(commands) == 10
    for words in commands:
        bench.parse_args(words)


# ------------------------------------------------------------------------------ differences of measurements

def seconds(value, spread=0.0):
    return {"seconds": value, "spread": spread, "gigabytes": 1.0}


@pytest.mark.parametrize("first, last, expected", [
    (seconds(2), seconds(3), 11.5),                    # at k = 19, from k = 0 and 2
    (seconds(2), seconds(1.5), None),                  # noise: two more forwards cannot take less
    (seconds(2), seconds(2), None),
    (seconds(2, 0.6), seconds(2.5, 0.1), None),        # by less than the first one's spread
    (seconds(2, 0.1), seconds(2.5, 0.6), None),        # by less than the other one's
    (seconds(2, 0.3), seconds(2.5, 0.4), 6.75)])
def test_extrapolation(first, last, expected):
    assert bench.extrapolate(first, last, 0, 2, 19) == expected


def test_no_extrapolation_to_negative_seconds():
    """From k = 30 and 38 back to 19."""
    assert bench.extrapolate(seconds(2), seconds(10), 30, 38, 19) is None
    assert bench.extrapolate(seconds(20), seconds(28), 30, 38, 19) == pytest.approx(9)


@pytest.mark.parametrize("times, said, kept", [
    ((2.0, 3.0), "mean step: t(k=0) + 19 * (t(k=2) - t(k=0)) / 2 = 11.500 s, extrapolated", 11.5),
    ((3.0, 2.0), "mean step: the difference between k = 0 and k = 2 is within the noise", None)])
@pytest.mark.parametrize("order", [["0", "2"], ["2", "0"]])
def test_what_is_said_of_the_mean_step(times, said, kept, order):
    args = bench.parse_args(["prfl", "--phases", "reward", "--k", *order])
    results = {f"prfl, reward, k = {k}": seconds(value) for k, value in zip((0, 2), times, strict=True)}
    lines = []
    bench.add_mean_step(results, args, lines.append)
    assert len(lines) == 1 and lines[0].startswith(said)
    assert results["prfl, mean step, extrapolated"] == kept


@pytest.mark.parametrize("flags", ["--phases sft", "--k 2", "--k 0 3"])
def test_no_mean_step_without_two_measurements(flags):
    results, lines = {"prfl, sft and reward, k = 0": seconds(1)}, []
    bench.add_mean_step(results, bench.parse_args(f"prfl {flags}".split()), lines.append)
    assert list(results) == ["prfl, sft and reward, k = 0"] and not lines


def test_rates():
    """A tenth of the floor's rate on a GPU that it knows; a process of two does half of the operations."""
    count = {"linear": 750e12, "attention": 0, "attention_backward": 0}
    assert bench.rates(count, 10, 1, "H200") == {
        "tflops": 75, "floor, computed": 1, "share of the floor": pytest.approx(0.1)}
    assert bench.rates(count, 10, 2, None) == {"tflops": 37.5}
    row = {**seconds(10), **bench.rates(count, 10, 1, "H200")}
    said = bench.describe("forward", row, 81)
    assert said.startswith("forward: 10.000 s (spread 0.000), peak 1.00 GB, 75 TFLOP/s, 10% of the floor")
    assert bench.describe("encode", seconds(34), 17).endswith("peak 1.00 GB, 2.000 s per frame")


# ------------------------------------------------------------------------------ the profile

def row(key, taken, kind=CPU, annotation=False):
    """A row of a profiler's table; what it launched elsewhere counts a thousand times as much."""
    return SimpleNamespace(key=key, device_type=kind, is_user_annotation=annotation,
                           self_device_time_total=taken if kind == CUDA else 1000 * taken,
                           self_cpu_time_total=taken if kind == CPU else 1000 * taken)


@pytest.mark.parametrize("name, group", [
    ("aten::mm", "matrix products"), ("aten::addmm", "matrix products"), ("aten::bmm", "matrix products"),
    ("aten::linear", "matrix products"), ("aten::mkldnn_convolution", "matrix products"),
    ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "matrix products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16>", "matrix products"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
    ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
    ("aten::exp", "rest"), ("aten::mul", "rest"), ("triton_poi_fused_gelu_1", "rest"),
    ("ncclDevKernel_AllGather_RING_LL", "rest"), ("aten::mm_like", "rest")])
def test_groups_of_a_profile(name, group):
    assert bench.group_of(name) == group


def test_shares_of_a_profile():
    """A made-up table: what is annotated or belongs to the other device does not count."""
    rows = [row("aten::mm", 30), row("aten::mm", 20), row("aten::addmm", 10), row("flash_attention", 15),
            row("aten::exp", 9), row("aten::mul", 8), row("aten::add", 5), row("aten::copy_", 3),
            row("forward", 500, annotation=True), row("nvjet_a", 1, CUDA), row("triton_b", 3, CUDA)]
    assert bench.shares(rows, cuda=False) == pytest.approx({
        "matrix products": 0.6, "attention": 0.15, "rest": 0.25, "of the rest: aten::exp": 0.09,
        "of the rest: aten::mul": 0.08, "of the rest: aten::add": 0.05})
    assert bench.shares(rows, cuda=True) == pytest.approx({
        "matrix products": 0.25, "attention": 0, "rest": 0.75, "of the rest: triton_b": 0.75})


def test_operators_that_a_profile_counts(monkeypatch):
    """Those that ran, by name."""
    names = []
    monkeypatch.setattr(bench, "shares", lambda rows, cuda: names.extend(row.key for row in rows))
    x = torch.randn(1, 2, 8, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    bench.profile(lambda: (attention(x, x, x) @ x.transpose(2, 3)).exp(), torch.device("cpu"))
    assert "aten::exp" in names
    assert {"matrix products", "attention", "rest"} == {bench.group_of(name) for name in names}


def test_a_profile_in_the_result(run):
    out, result = run("forward --size 32x32 --frames 5 --repeats 1 --profile")
    shares = result["forward"]["profile"]
    assert sum(shares[group] for group in (*bench.GROUPS, "rest")) == pytest.approx(1)
    assert "\n  attention " in out


@pytest.mark.parametrize("name, gpu", [
    ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GeForce RTX 4090", "RTX4090"),
    ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA L40S", "L40S"), ("NVIDIA T4", None)])
def test_gpus_are_known_by_name(name, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert bench.device_name(torch.device("cuda")) == (name, gpu) and (gpu is None or gpu in floors.GPUS)


@pytest.mark.parametrize("words, message", [
    ("prfl --k 3 --solver_steps 4", "--k 3 does not fit 4 solver steps; k is 0 to 2"),
    ("--plan prfl --dit tiny --size 24x32", "--size 24x32 does not fit the model; give multiples of 16")])
def test_what_cannot_be_measured_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        bench.main(words.split())


def test_plan_has_its_own_flags(capsys):
    for words in (["--plan", "prfl"], ["--plan=prfl"]):
        with pytest.raises(SystemExit) as end:
            bench.main([*words, "--help"])
        assert end.value.code == 0 and "--gpus" in capsys.readouterr().out
