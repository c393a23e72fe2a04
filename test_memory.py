"""What is kept for backward, and where; compiled blocks."""
import shutil
import weakref
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import memory
import records
import train_pavrm
import train_prfl
from files import InputError
from testdata.helpers import ROOT, Calls, flags_of, flat, numbers, read_log, run, torchrun

CPU = torch.device("cpu")
HAS_COMPILER = any(map(shutil.which, ("g++", "clang++")))


def test_offloaded_inputs_and_saved_attention_change_nothing(quick, monkeypatch):
    """Each block's input goes away and comes back once; buffers are reused; saved results are not computed
    twice."""
    offloads, init = [], memory.Offload.__init__

    def spy(self, device):
        offloads.append(self)
        init(self, device)

    monkeypatch.setattr(memory.Offload, "__init__", spy)
    flags = ["--steps", "2", "--accumulation", "1", "--solver_steps", "4"]
    plain = numbers(run(train_prfl, "plain", *flags))
    counts = {}
    cases = {"checkpointed": [],
             "offloaded": ["--offload", "inputs", "weights"],
             "reward": ["--offload", "reward"],
             "attention": ["--save_attention"]}
    for name, more in cases.items():
        with Calls("_scaled_dot_product") as counted:
            log = run(train_prfl, name, *flags, "--activation_checkpointing", *more)
        assert numbers(log) == plain, name
        counts[name] = counted.backward
    assert counts["offloaded"] == counts["checkpointed"] > 0 and counts["attention"] == 0
    (offload,) = offloads
    assert not offload.away
    assert sum(map(len, offload.free.values())) == 5  # policy's three blocks and PAVRM's two


@pytest.mark.parametrize("flags, requires_grad", [([], True), (["--compile"], True), (["--compile"], False)])
def test_an_offloaded_input_leaves_the_device(flags, requires_grad):
    """Nothing keeps it but the copy: not the hooks, nor autograd. The first block's needs no gradient."""
    args = train_prfl.parse_args(["--activation_checkpointing", "--offload", "inputs", *flags])
    run_block = memory.block_runner(args, torch.device("cpu"))
    layers, alive = [torch.nn.Linear(8, 8) for _ in range(4)], []

    def remember(layer, given):  # what the layer is given may be another tensor than run_block got
        alive.append(weakref.ref(given[0].untyped_storage()))

    for layer in layers:
        layer.register_forward_pre_hook(remember)
    x = torch.ones(2, 8, requires_grad=requires_grad) * 1
    for layer in layers:
        x = run_block(layer, x)
    assert [each() is None for each in alive] == [True, True, True, False]  # the last one's copy is under way
    x.sum().backward()
    assert all(layer.weight.grad is not None for layer in layers)


@pytest.mark.parametrize("flags", [[], pytest.param(["--lora_rank", "4"], marks=pytest.mark.full),
                                   pytest.param(["--compute_dtype", "bf16"], marks=pytest.mark.full)])
def test_at_most_three_graphs_and_none_after_the_second_step(quick, monkeypatch, flags):
    """The policy with and without gradient, and the reward model; the backend counts them and runs them as
    they are."""
    counter, after = CompileCounter(), []
    compiled, check = torch.compile, records.Checkpoints.check_finite

    def spy(*inputs):
        after.append(counter.frame_count)
        return check(*inputs)

    monkeypatch.setattr(torch, "compile", partial(compiled, backend=counter))
    monkeypatch.setattr(records.Checkpoints, "check_finite", spy)
    flags = [*flags, "--steps", "3", "--accumulation", "1", "--k", "1"]
    plain = numbers(run(train_prfl, "plain", *flags))
    torch._dynamo.reset()
    after.clear()
    compiled_log = numbers(run(train_prfl, "compiled", *flags, "--compile", "--activation_checkpointing"))
    assert 2 <= counter.frame_count <= 3
    assert after[3] == after[-1] == counter.frame_count and len(after) == 6  # two checks per step
    for a, b in zip(plain, compiled_log, strict=True):
        assert b.pop("k") == a.pop("k") and b == pytest.approx(a, rel=0.02 if "bf16" in flags else 1e-3)


# ------------------------------------------------------------------------------ the compiler itself

@pytest.mark.full
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
@pytest.mark.parametrize("script, flags", [
    (train_prfl, ["--lora_rank", "4", "--offload", "inputs", "reward", "--sp", "2"]),
    (train_prfl, ["--save_attention", "--offload", "inputs", "--compute_dtype", "bf16"]),
    (train_pavrm, ["--sp", "2"])])
def test_compiled_by_inductor(world, monkeypatch, script, flags):
    """Sharded, with adapters, checkpointing, offloading, and the exchange of tokens between ranks: the losses
    and norms of blocks that are not compiled."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--steps", "2", "--accumulation", "1", "--activation_checkpointing", *flags]
    if script is train_prfl:
        flags += ["--k", "1", "--solver_steps", "4", "--samples", "0"]
    for output, more in (("plain", []), ("compiled", ["--compile"])):
        torchrun(2, ROOT / f"{script.__name__}.py", *flags_of(script, output, *flags, *more))
    plain, compiled = numbers(read_log("plain")), numbers(read_log("compiled"))
    assert len(plain) == len(compiled) >= 2
    for a, b in zip(plain, compiled, strict=True):
        assert flat(b) == pytest.approx(flat(a), rel=0.02 if "bf16" in flags else 1e-3, abs=1e-5)


def test_blocks_are_compiled_on_cuda():
    cuda = torch.device("cuda")
    cases = [([], False, True), (["--compile"], True, True), (["--no-compile"], False, False)]
    for flags, here, there in cases:
        args = train_prfl.parse_args(flags)
        assert (memory.compiles(args, CPU), memory.compiles(args, cuda)) == (here, there)


@pytest.mark.parametrize("kind, present, missing", [
    ("cpu", [], r"a C\+\+ compiler"),
    ("cpu", ["gcc", "clang"], r"a C\+\+ compiler"),
    ("cpu", ["g++"], "Python's headers"),
    ("cuda", ["gcc"], "Triton"),
    ("cuda", ["triton"], "a C compiler"),
    ("cuda", ["triton", "clang"], "Python's headers")])
def test_a_missing_compiler(monkeypatch, kind, present, missing):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in present else None)
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: name in present)
    monkeypatch.setattr(memory.sysconfig, "get_path", lambda name: "nowhere")
    with pytest.raises(InputError, match=f"blocks need {missing}.*; install it, or give --no-compile"):
        memory.check_compiler(torch.device(kind))
