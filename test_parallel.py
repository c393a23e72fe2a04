"""One process or several: the same losses, gradients and weights. Memory, speed, precision."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import files
import parallel
import sequence
import train_pavrm
import train_prfl
from files import InputError
from model import WanModel
from testdata.golden import draw, fill_
from testdata.helpers import (
    SEVERAL,
    SHAPE,
    TINY,
    fill_vae,
    flags_of,
    flat,
    lora_pairs,
    numbers,
    read_log,
    run,
    spawn,
    steps,
    watched,
    weights_of,
    write_index,
    write_lora,
)
from video import read_video

HAS_CUDA = torch.cuda.is_available()

# ------------------------------------------------------------------------------ several processes

def test_one_process_or_two_with_options_of_every_kind(several_labels):
    """Losses, norms, rewards, measures and results are the same. Two processes also stop and resume once."""
    fill_vae("model")
    for i, line in enumerate(several_labels):
        line["pair_id"] = f"pair {i // 2}"
    write_index(several_labels)
    pairs = ["--loss", "bt", "--timesteps", "200", "500", "--num_queries", "2", "--eval_timesteps", "201"]
    labels = [*SEVERAL, "--accumulation", "2", "--ema", "0.5"]
    write_lora("style.safetensors", lora_pairs(["blocks.0.self_attn.q", "blocks.2.ffn.2", "head.head"]))
    write_lora("start.safetensors", lora_pairs(f"blocks.{i}.{part}_attn.{name}" for i in range(3)
                                               for part in ("self", "cross") for name in "qkvo"))
    adapters = ["--lora", "style.safetensors=0.5", "--lora_from", "start.safetensors",
                "--lora_rank", "3", "--ema", "0.5", "--kl_weight", "0.5", "--phases", "rwr", "reward",
                "--accumulation", "1", "--gradient_steps", "2", "--rollout_guidance", "2",
                "--solver_steps", "4", "--activation_checkpointing",
                "--samples", "1", "--sample_every", "3", "--sample_guidance", "1"]
    plain = ["--steps", "3", "--sample_every", "3", "--samples", "1", "--solver_steps", "4"]
    small = ["--batch_size", "2", "--steps", "3"]
    runs = {"bt": (train_pavrm, [*pairs, *small]), "labels": (train_pavrm, [*labels, *small]),
            "adapters": (train_prfl, [*adapters, *small]),
            "plain": (train_prfl, plain),  # with more processes than samples
            "plain_pavrm": (train_pavrm, ["--steps", "3", "--eval_timesteps", "201", "600"])}
    jobs = []
    for name, (script, flags) in runs.items():
        jobs.append((script, flags_of(script, f"two_{name}", *flags)))
        if name == "adapters":
            jobs[-1] = (script, [*jobs[-1][1], "--steps", "2"])
            jobs.append((script, flags_of(script, f"two_{name}", *flags, "--resume")))
    spawn(2, jobs)
    for name, (script, flags) in runs.items():
        one, two = numbers(run(script, name, *flags)), numbers(read_log(f"two_{name}"))
        if name == "adapters":  # the run that was stopped after two steps has sampled there too
            two = [line for line in two if "evaluation" not in line or line["step"] in (0, 3)]
        assert len(one) == len(two) and "evaluation" in two[-1], name
        for a, b in zip(one, two, strict=True):
            assert flat(b) == pytest.approx(flat(a), rel=1e-4, abs=1e-6), name
    measures = read_log("two_bt")[-1]["evaluation"]["motion_quality"]["201"]
    assert set(measures) == {"pair_accuracy", "auc", "loss"}
    for result in ("adapter.safetensors", "adapter_ema.safetensors", "model", "model_ema"):
        a, b = (weights_of(f"{output}/{result}") for output in ("adapters", "two_adapters"))
        assert a.keys() == b.keys()
        for name in a:  # AdamW's first steps are those of a sign: what is about zero may go either way
            assert (a[name] - b[name]).abs().mean() < 1e-3 * a[name].abs().mean(), name
    a, b = (read_video(f"{output}/samples/step_000003/0.mp4") for output in ("plain", "two_plain"))
    assert (a == b).float().mean() > 0.99


STEPS = 3
# Bradley-Terry cancels the gradient of a bias whose unit both clips of a pair pass: Adam then makes full
# steps in the direction of a rounding error. So its head learns at the published rate, which is small.
RUNS = {"pavrm": (train_pavrm, []),
        "pavrm_bt": (train_pavrm, ["--loss", "bt", "--head_lr", "1e-5"]),
        "pavrm_lora": (train_pavrm, ["--lora_rank", "4"]),
        "prfl": (train_prfl, []),
        "prfl_lora": (train_prfl, ["--lora_rank", "4", "--lora_targets", "q", "o", "ffn.0"])}
MESHES = {"dp2": (2, []),
          "sp2": (2, ["--sp", "2"]),
          "replicate2": (2, ["--dp_replicate", "2"]),
          "dp4": (4, []),
          "sp4": (4, ["--sp", "4"]),
          "dp2_sp2": (4, ["--sp", "2"]),
          "replicate2_shard2": (4, ["--dp_replicate", "2"]),
          "replicate2_sp2": (4, ["--dp_replicate", "2", "--sp", "2"])}


@pytest.fixture
def odd_world(quick):
    """The quick world with clips of 9 tokens: 2 and 4 ranks need padding, and one of 4 has nothing else."""
    for i, line in enumerate(quick):
        tensors = weights_of(f"clips/{i}.safetensors") | {"latents": draw((16, 3, 2, 6), 10 + i)}
        files.write_safetensors(f"clips/{i}.safetensors", tensors)
        line |= {"shape": [16, 3, 2, 6], "pair_id": f"pair {i // 2}"}
    write_index(quick)


def flags(name, output, mesh=()):
    script, own = RUNS[name]
    return flags_of(script, output, "--steps", str(STEPS), "--batch_size", "4", *own, *mesh)


def compare(meshes, runs):
    """Train with each mesh and with one process; losses, norms, rewards and trained weights must agree."""
    for name in runs:
        run(RUNS[name][0], name, *flags(name, name))
    for processes in sorted({MESHES[mesh][0] for mesh in meshes}):
        of_this_size = [mesh for mesh in meshes if MESHES[mesh][0] == processes]
        spawn(processes, [(RUNS[name][0], flags(name, f"{mesh}_{name}", MESHES[mesh][1]))
                          for mesh in of_this_size for name in runs])
    for mesh in meshes:
        for name in runs:
            one, many = (steps(numbers(read_log(output))) for output in (name, f"{mesh}_{name}"))
            assert len(one) == len(many) == STEPS
            for a, b in zip(one, many, strict=True):
                assert flat(b) == pytest.approx(flat(a), rel=1e-4, abs=1e-7), (mesh, name)
            result = "reward" if RUNS[name][0] is train_pavrm else "model"
            one, many = (weights_of(f"{output}/{result}") for output in (name, f"{mesh}_{name}"))
            assert one.keys() == many.keys()
            largest = max(weight.abs().max() for weight in one.values())
            for key in one:
                assert (one[key] - many[key]).abs().max() <= 1e-4 * largest, (mesh, name, key)


def test_clips_and_tokens_are_shared_alike(odd_world):
    compare(["dp2_sp2"], ["pavrm", "prfl_lora"])


@pytest.mark.full
def test_every_mesh(odd_world):
    compare(MESHES, RUNS)


def test_batch_size_that_cannot_be_shared(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert parallel.share([7, 8, 9, 6]) == [(2, 9), (3, 6)]
    assert parallel.shard_indices(5) == [(1, True), (3, True), (4, False)]
    with pytest.raises(InputError, match="--batch_size 3 cannot be shared equally by 2"):
        parallel.share([7, 8, 9])


# ------------------------------------------------------------------------------ sequences

def test_what_cannot_be_shared(world, monkeypatch):
    with pytest.raises(InputError, match="--sp 2 does not divide the 1 processes"):
        run(train_prfl, "run", "--sp", "2")
    with pytest.raises(InputError, match="--dp_replicate 3 does not divide the 1 processes"):
        run(train_prfl, "run", "--dp_replicate", "3")
    monkeypatch.setattr(sequence, "size", lambda: 3)
    monkeypatch.setattr(parallel, "data_ranks", lambda: 1)
    with pytest.raises(InputError, match="--sp 3 does not divide the 4 heads"):
        run(train_prfl, "run")


def test_tokens_are_split_with_padding(monkeypatch):
    x, parts, real = torch.arange(1.0, 6).view(1, 5, 1).expand(2, 5, 3), [], []
    monkeypatch.setattr(sequence, "size", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(sequence, "rank", lambda rank=rank: rank)
        parts.append(sequence.split(x))
        real.append(sequence.present(5, "cpu"))
    assert [part.shape for part in parts] == [(2, 2, 3)] * 4
    joined = torch.cat(parts, 1)
    assert torch.equal(joined[:, :5], x) and not joined[:, 5:].any()
    assert torch.cat(real).tolist() == [True] * 5 + [False] * 3


# ------------------------------------------------------------------------------ memory and speed

def test_weights_stay_gathered_during_a_rollout(world):
    parallel.start()
    with torch.device("meta"):
        policy = WanModel(TINY)
    parallel.shard(policy, policy, [policy.head], torch.device("cpu"), train_prfl.parse_args([]))
    policy.to_empty(device="cpu")
    fill_({name: tensor.to_local() for name, tensor in policy.state_dict().items()}, 0)
    x, inputs, results = draw((1, *SHAPE), 1), dict(t=torch.tensor([500.0]), context=[draw((3, 8), 2)]), []

    def sharded():
        return all(isinstance(parameter, DTensor) for parameter in policy.blocks.parameters())

    for gathered in (True, False):
        with parallel.rollout(policy, gathered):
            results += [policy(x, **inputs), policy(x, **inputs)]
            assert sharded() != gathered
        assert sharded()
        policy(x, **inputs).sum().backward()  # training goes on
    assert all(torch.equal(result, results[0]) and not result.requires_grad for result in results)


@pytest.mark.parametrize("flags, kind, memory, gathers", [
    ([], "cuda", 41e6, True),
    ([], "cuda", 39e6, False),                                   # they would take more than a quarter
    (["--offload", "weights"], "cuda", 41e6, False),
    (["--dp_replicate", "2"], "cuda", 41e6, False),              # each rank has all weights anyway
    (["--compute_dtype", "float32"], "cuda", 41e6, False),
    ([], "cpu", 0, True)])
def test_weights_stay_gathered_where_there_is_memory(monkeypatch, flags, kind, memory, gathers):
    """Ten megabytes of weights in bf16, on two processes: up to a quarter of the GPU's memory."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    gpu = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    model = torch.nn.Linear(5_000_000, 1, bias=False, device="meta")
    assert parallel.gathers(train_prfl.parse_args(flags), model, torch.device(kind)) == gathers


# ------------------------------------------------------------------------------ precision

def test_bf16_compute_stays_near_float32(quick):
    exact = steps(run(train_prfl, "exact", "--steps", "2"))
    for name, flags in [("rough", []), ("rougher", ["--bf16_residual"])]:
        rough = steps(run(train_prfl, name, "--steps", "2", "--compute_dtype", "bf16", *flags))
        for value in ("sft_loss", "reward_loss", "reward"):
            assert [line[value] for line in rough] == pytest.approx([line[value] for line in exact], rel=0.02)
        assert [line["sft_loss"] for line in rough] != [line["sft_loss"] for line in exact]


def test_what_is_kept_in_bf16(quick, monkeypatch):
    """Frozen weights are; trained ones, heads and time embedding are not, nor anything that is saved."""
    dtypes = []
    for name, flags in [("full", []), ("lora", ["--lora_rank", "4", "--activation_checkpointing"])]:
        flags = ["--steps", "1", "--compute_dtype", "bf16", *flags]
        _, models, _ = watched(monkeypatch, train_prfl, name, *flags)
        for model in models:
            dtypes.append({name: parameter.dtype for name, parameter in model.named_parameters()})
        assert {tensor.dtype for tensor in weights_of(f"{name}/model").values()} == {torch.float32}
    full, pavrm, adapted, _ = dtypes
    assert set(full.values()) == {torch.float32}
    assert pavrm["dit.blocks.0.ffn.0.weight"] == pavrm["dit.patch_embedding.weight"] == torch.bfloat16
    assert pavrm["mlp.fc1.weight"] == pavrm["dit.time_embedding.0.weight"] == torch.float32
    assert pavrm["query_attention.queries"] == torch.float32
    assert adapted["blocks.0.self_attn.q.weight"] == torch.bfloat16
    assert adapted["blocks.0.self_attn.q.lora_A.weight"] == torch.float32


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_training_on_cuda_in_bf16_stays_near_the_cpu(world, script, monkeypatch):
    on_cpu = steps(run(script, "cpu", "--steps", "3"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    on_gpu = steps(run(script, "gpu", "--steps", "3", "--activation_checkpointing"))
    for a, b in zip(on_gpu, on_cpu, strict=True):
        losses = [name for name in a if "loss" in name and "by_timestep" not in name]
        assert [a[name] for name in losses] == pytest.approx([b[name] for name in losses], rel=0.1)


# ------------------------------------------------------------------------------ learning rates, draws

def test_learning_rates_by_hand():
    def factors(schedule, warmup):
        args = SimpleNamespace(lr_schedule=schedule, warmup=warmup, steps=6)
        return [parallel.learning_rate_factor(step, args) for step in range(6)]

    assert factors("constant", 0) == [1] * 6
    assert factors("constant", 4) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert factors("linear", 2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert factors("cosine", 0) == pytest.approx([(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)])
    assert factors("cosine", 3) == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.75, 0.25])
    assert factors("linear", 8) == pytest.approx([(i + 1) / 8 for i in range(6)])  # a warm-up that never ends


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_the_learning_rate_in_the_log(world, monkeypatch, script):
    """It is the optimizer's, and advances once per step, whatever the number of updates; heads keep their
    ratio."""
    seen, step = [], torch.optim.AdamW.step

    def spy(self, *rest):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    flags = ["--steps", "4", "--lr", "1e-3", "--warmup", "2", "--lr_schedule", "linear"]
    if script is train_pavrm:
        flags += ["--head_lr", "3e-3"]
    else:
        flags += ["--solver_steps", "2", "--accumulation", "1"]
    log = steps(run(script, "run", *flags))
    expected = [0.5e-3, 1e-3, 1e-3, 0.5e-3]
    assert [line["lr"] for line in log] == pytest.approx(expected)
    if script is train_pavrm:
        assert seen[-4:] == [pytest.approx([lr, 3 * lr]) for lr in expected]
    else:
        assert seen[-8:] == [[pytest.approx(lr)] for lr in expected for _ in ("sft", "reward")]
    # A schedule that falls to 0 has its end.
    with pytest.raises(InputError, match="--resume with another --steps"):
        run(script, "run", *flags, "--steps", "8", "--resume")


def test_random_draws_depend_on_their_key_alone():
    assert torch.equal(parallel.noise((3,), 0, 1, 2, "noise"), parallel.noise((3,), 0, 1, 2, "noise"))
    draws = [parallel.uniform(seed, step, "k") for seed in range(20) for step in range(50)]
    assert len(set(draws)) == 1000 and abs(sum(draws) / 1000 - 0.5) < 0.05 and min(draws) < 0.01
