"""One process or several, whatever shares what: the same losses, gradients and weights. And how sequences are shared."""
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import files
import memory
import parallel
import records
import sequence
import train_pavrm
import train_prfl
from files import InputError
from model import WanModel
from solver import UniPC, walk
from test_model import TINY, tiny
from test_reward import fill_pavrm
from test_train import flags_of, numbers, read_log, run, steps, world, write_index  # noqa: F401 (world is a fixture)
from testdata.golden import draw, fill_

STEPS = 5
# Bradley-Terry cancels the gradient of a bias whose unit both clips of a pair pass: Adam makes steps of the learning rate of
# what rounding leaves. So its head learns at the published rate, at which these steps are too small to matter.
RUNS = {"pavrm": (train_pavrm, []), "pavrm_bt": (train_pavrm, ["--loss", "bt", "--head_lr", "1e-5"]), "pavrm_lora": (train_pavrm, ["--lora_rank", "4"]),
        "prfl": (train_prfl, []), "prfl_lora": (train_prfl, ["--lora_rank", "4", "--lora_targets", "q", "o", "ffn.0"])}
MESHES = {"dp2": (2, []), "sp2": (2, ["--sp", "2"]), "replicate2": (2, ["--dp_replicate", "2"]),
          "dp4": (4, []), "sp4": (4, ["--sp", "4"]), "dp2_sp2": (4, ["--sp", "2"]), "replicate2_shard2": (4, ["--dp_replicate", "2"]),
          "replicate2_sp2": (4, ["--dp_replicate", "2", "--sp", "2"])}

DRIVER = """
import importlib, json, os
import torch.distributed as dist
import records
records.Checkpoints.save = lambda *_: None  # resuming is tested elsewhere
dist.init_process_group("gloo")
dist.init_process_group = lambda *_, **__: None  # the processes stay together from run to run
for name, flags in json.load(open("jobs.json")):
    importlib.import_module(name).main(flags)
"""


def spawn(processes, jobs):
    """Run [(script, flags)] one after the other, each in all of `processes` processes."""
    files.write_json("jobs.json", [(script.__name__, flags) for script, flags in jobs])
    Path("driver.py").write_text(DRIVER)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", "driver.py"],
                          capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]


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
                assert (one[key] - many[key]).abs().max() <= 1e-4 * largest, (mesh, name, key)


def test_clips_and_tokens_are_shared_alike(odd_world):
    compare(["dp2_sp2"], ["pavrm", "prfl_lora"])


@pytest.mark.full
def test_every_mesh(odd_world):
    compare(MESHES, RUNS)


# ---------------------------------------------------------------------------------------------- sequences

def test_what_cannot_be_shared(world, monkeypatch):
    with pytest.raises(InputError, match="--sp 2 does not divide the 1 processes"):
        run(train_prfl, "run", "--sp", "2")
    with pytest.raises(InputError, match="--dp_replicate 3 does not divide the 1 processes"):
        run(train_prfl, "run", "--dp_replicate", "3")
    monkeypatch.setattr(sequence, "size", lambda: 3)
    monkeypatch.setattr(parallel, "data_ranks", lambda: 1)
    with pytest.raises(InputError, match="--sp 3 does not divide the model's 4 heads"):
        run(train_prfl, "run")


def test_tokens_are_split_with_padding(monkeypatch):
    x, parts, real = torch.arange(1.0, 6).view(1, 5, 1).expand(2, 5, 3), [], []
    monkeypatch.setattr(sequence, "size", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(sequence, "rank", lambda: rank)
        parts.append(sequence.split(x))
        real.append(sequence.present(5, "cpu"))
    assert [part.shape for part in parts] == [(2, 2, 3)] * 4
    joined = torch.cat(parts, 1)
    assert torch.equal(joined[:, :5], x) and not joined[:, 5:].any()
    assert torch.cat(real).tolist() == [True] * 5 + [False] * 3


# ---------------------------------------------------------------------------------------------- memory and speed

def test_offloaded_inputs_and_saved_attention_change_nothing(world, monkeypatch):
    """Each block's input goes away once and comes back once; buffers are used again; what is saved is not computed twice."""
    offloads, init = [], memory.Offload.__init__
    monkeypatch.setattr(memory.Offload, "__init__", lambda self, device: offloads.append(self) or init(self, device))
    plain = numbers(run(train_prfl, "plain", "--steps", "2"))
    counts = {}
    cases = {"checkpointed": [], "offloaded": ["--offload", "inputs", "weights"], "attention": ["--save_attention"]}
    for name, flags in cases.items():
        with Calls("_scaled_dot_product") as counted:
            assert numbers(run(train_prfl, name, "--steps", "2", "--checkpoint_blocks", *flags)) == plain
        counts[name] = counted.backward
    assert counts["offloaded"] == counts["checkpointed"] > 0 and counts["attention"] == 0
    (offload,) = offloads
    assert not offload.away and sum(map(len, offload.free.values())) == 5  # policy's three blocks and PAVRM's two


def test_an_offloaded_input_leaves_the_device():
    """Nothing keeps it but the copy: not the hooks, nor autograd."""
    run_block = memory.block_runner(train_prfl.parse_args(["--checkpoint_blocks", "--offload", "inputs"]), torch.device("cpu"))
    layers, alive = [torch.nn.Linear(8, 8) for _ in range(4)], []
    x = torch.ones(2, 8, requires_grad=True) * 1
    for layer in layers:
        alive.append(weakref.ref(x))
        x = run_block(layer, x)
    assert [each() is None for each in alive] == [True] * 4  # but for the last one, detached: backward begins with it
    x.sum().backward()
    assert all(layer.weight.grad is not None for layer in layers)


class Calls(TorchDispatchMode):
    """Counts the calls of operators of a name: in all, and of forward operators during backward."""

    def __init__(self, name):
        super().__init__()
        self.name, self.all, self.backward = name, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if self.name in str(op) and "backward" not in str(op):
            self.all += 1
            self.backward += torch._C._current_autograd_node() is not None
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", [[], pytest.param(["--lora_rank", "4"], marks=pytest.mark.full),
                                   pytest.param(["--compute_dtype", "bf16"], marks=pytest.mark.full)])
def test_at_most_three_graphs_and_none_after_the_second_step(world, monkeypatch, flags):
    """Counted with a backend that runs them as they are: the policy with and without gradient, and the reward model."""
    counter, compiled, after = CompileCounter(), torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(function, backend=counter, **options))
    check = records.Checkpoints.check_finite
    monkeypatch.setattr(records.Checkpoints, "check_finite", lambda *inputs: after.append(counter.frame_count) or check(*inputs))
    flags = [*flags, "--steps", "4", "--accumulation", "1", "--k", "1"]
    plain = numbers(run(train_prfl, "plain", *flags))
    torch._dynamo.reset()
    after.clear()
    compiled_log = numbers(run(train_prfl, "compiled", *flags, "--compile", "--checkpoint_blocks"))
    assert 2 <= counter.frame_count <= 3 and after[3] == after[-1] == counter.frame_count  # two checks a step
    for a, b in zip(plain, compiled_log):
        assert b.pop("k") == a.pop("k") and b == pytest.approx(a, rel=0.02 if "bf16" in flags else 1e-3)


def test_the_rollout_waits_for_nothing(world):
    """No value is read back from the device, so that the CPU runs ahead of it."""
    policy, pavrm = tiny(), fill_pavrm(tiny().config, 2, 3, 4)
    texts = [draw((5, 8), 30)]
    inputs = (lambda x, t: policy(x, t, texts), lambda x, t: pavrm(x, t, texts), UniPC(6, 5.0), draw((1, 16, 2, 4, 4), 5), [3])
    with Calls("_local_scalar_dense") as counted:
        (_, _, logit, _), = train_prfl.rewarded_steps(*inputs)
        assert counted.all == 0
        logit.item()
    assert counted.all == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_rollout_waits_for_nothing_on_cuda():
    policy = tiny().cuda()
    texts, x, t = [draw((5, 8), 30).cuda()], draw((1, 16, 2, 4, 4), 5).cuda(), torch.full((1,), 500.0, device="cuda")
    with torch.no_grad():
        policy(x, t, texts)  # makes the rotary table
        torch.cuda.set_sync_debug_mode("error")
        try:
            walk(lambda x, t: policy(x, t, texts), x, UniPC(6, 5.0), 0, 3)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_weights_stay_gathered_during_a_rollout(world):
    parallel.start()
    with torch.device("meta"):
        policy = WanModel(TINY)
    parallel.shard(policy, policy.blocks, [policy.time_embedding, policy.time_projection, policy.head], torch.device("cpu"),
                   train_prfl.parse_args([]))
    policy.to_empty(device="cpu")
    fill_({name: tensor.to_local() for name, tensor in policy.state_dict().items()}, 0)
    x, inputs, results = draw((1, 16, 2, 4, 4), 1), dict(t=torch.tensor([500.0]), context=[draw((3, 8), 2)]), []

    def sharded():
        return all(isinstance(parameter, DTensor) for parameter in policy.blocks.parameters())

    for gathered in (True, False):
        with parallel.rollout(policy, gathered):
            results += [policy(x, **inputs), policy(x, **inputs)]
            assert sharded() != gathered
        assert sharded()
        policy(x, **inputs).sum().backward()  # training goes on
    assert all(torch.equal(result, results[0]) and not result.requires_grad for result in results)


@pytest.mark.parametrize("flags", [[], ["--bf16_residual"]])
def test_bf16_compute_stays_near_float32(world, flags):
    exact = steps(run(train_prfl, "exact", "--steps", "3"))
    rough = steps(run(train_prfl, "rough", "--steps", "3", "--compute_dtype", "bf16", *flags))
    for name in ("sft_loss", "reward_loss", "reward"):
        assert [line[name] for line in rough] == pytest.approx([line[name] for line in exact], rel=0.02)
    assert [line["sft_loss"] for line in rough] != [line["sft_loss"] for line in exact]


def test_what_is_kept_in_bf16(world, monkeypatch):
    """Frozen weights are, trained ones are not, nor are heads and time embedding, nor anything that is saved."""
    models, shard = [], parallel.shard
    monkeypatch.setattr(parallel, "shard", lambda model, *rest: models.append(model) or shard(model, *rest))
    for flags in ([], ["--lora_rank", "4", "--checkpoint_blocks"]):
        run(train_prfl, f"run{len(flags)}", "--steps", "1", "--compute_dtype", "bf16", *flags)
        assert {tensor.dtype for tensor in load_file(f"run{len(flags)}/model/diffusion_pytorch_model.safetensors").values()} == {torch.float32}
    full, pavrm, adapted, _ = ({name: parameter.dtype for name, parameter in model.named_parameters()} for model in models)
    assert set(full.values()) == {torch.float32}
    assert pavrm["dit.blocks.0.ffn.0.weight"] == pavrm["dit.patch_embedding.weight"] == torch.bfloat16
    assert pavrm["mlp.fc1.weight"] == pavrm["dit.time_embedding.0.weight"] == pavrm["query_attention.queries"] == torch.float32
    assert adapted["blocks.0.self_attn.q.weight"] == torch.bfloat16 and adapted["blocks.0.self_attn.q.lora_A.weight"] == torch.float32
