"""Operations and floors: known figures, and what PyTorch itself counts."""
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import train_prfl
from lora import add_lora
from memory import block_runner
from model import WanConfig, WanModel
from reward import PAVRM
from tools import floors, plan

SMALL = dict(model_type="t2v", dim=96, ffn_dim=256, num_heads=4, num_layers=3, freq_dim=32, in_dim=16,
             out_dim=16, text_len=16, text_dim=32)
P480, P720 = (832, 480), (1280, 720)


def prfl(*flags, config=None, gpus=1, size=P720, frames=81):
    """The plan of a run of train_prfl.py, by default of 14B."""
    args = train_prfl.parse_args(["--activation_checkpointing", *flags])
    return plan.Run("prfl", args, config or floors.size_config("14B"), gpus, "H200", size, frames)


def test_tokens_of_a_clip():
    assert floors.token_count(P480, 81) == 32760 and floors.token_count(P720, 81) == 75600


@pytest.mark.parametrize("dit, size, backward, petaflop, seconds", [
    ("14B", P720, False, 6.5, 10.3), ("14B", P480, False, 1.68, 2.5), ("14B", P720, True, 28.5, 49),
    ("1.3B", P720, False, 1.25, None), ("1.3B", P480, False, 0.28, 0.44), ("PAVRM", P720, True, 5.3, 9)])
def test_known_floors(dit, size, backward, petaflop, seconds):
    """PFLOP, and seconds on an H200, of the official sizes and of the 14B's PAVRM; 81 frames."""
    run = prfl("--batch_size", "1", config=floors.size_config("1.3B" if dit == "1.3B" else "14B"))
    model = run.judge if dit == "PAVRM" else run.model
    count = floors.flops(model, floors.token_count(size, 81), backward=backward)
    assert sum(count.values()) / 1e15 == pytest.approx(petaflop, rel=0.03)
    assert seconds is None or floors.floor(count, "H200") == pytest.approx(seconds, rel=0.04)


def test_known_floor_of_a_step():
    parts = floors.operations(prfl("--batch_size", "1"))
    assert list(parts) == ["rollout, 19 steps", "gradient step", "reward", "sft"]
    assert sum(parts["rollout, 19 steps"].values()) / 1e15 == pytest.approx(124, rel=0.03)
    assert sum(floors.floor(count, "H200") for count in parts.values()) == pytest.approx(302, rel=0.03)
    shared = floors.operations(prfl("--batch_size", "2", "--sp", "4", gpus=8))
    assert sum(shared["sft"].values()) == pytest.approx(sum(parts["sft"].values()) / 4)


@pytest.mark.parametrize("flags, part", [
    ([], "rollout, 1 steps"),  # the mean of k = 0, 1 and 2
    (["--k", "2"], "rollout, 2 steps"),
    (["--k", "2", "--gradient_steps", "2"], "rollout, 1 steps"),
    (["--k", "0", "2", "--gradient_steps", "2"], "rollout, 0.5 steps")])
def test_steps_of_a_rollout(flags, part):
    run = prfl("--batch_size", "1", "--solver_steps", "4", *flags, config=WanConfig(**SMALL))
    assert next(iter(floors.operations(run))) == part


def test_parts_of_other_methods():
    def parts(*flags):
        return list(floors.operations(prfl("--batch_size", "1", *flags, config=WanConfig(**SMALL))))
    assert parts("--phases", "rwr") == ["rwr"]
    assert "start model" in parts("--kl_weight", "1")
    plain, guided = (floors.operations(prfl("--batch_size", "1", *flags)) for flags in
                     ([], ["--rollout_guidance", "5"]))
    assert guided["gradient step"] == floors.times(plain["gradient step"], 2)
    assert guided["reward"] == plain["reward"]


@pytest.mark.parametrize("trained", ["nothing", "all", "adapters", "reward"])
def test_operations_are_those_that_run(trained):
    """As PyTorch counts them while a checkpointed model runs; it has to be told about the CPU's attention."""
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    attention = {
        getattr(torch.ops.aten, kernel): lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        getattr(torch.ops.aten, f"{kernel}_backward"):
            lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])}
    model = WanModel(WanConfig(**SMALL))
    if trained == "adapters":
        add_lora(model, 8, 8)
    if trained == "reward":
        model = PAVRM(model, 2).requires_grad_(False)
    args = train_prfl.parse_args(["--activation_checkpointing"])
    getattr(model, "dit", model).run_block = block_runner(args, torch.device("cpu"))
    x = torch.randn(1, 16, 2, 16, 24).requires_grad_(trained == "reward")

    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        with torch.no_grad() if trained == "nothing" else nullcontext():
            out = model(x, torch.tensor([500.0]), [torch.randn(5, 32)])
        if trained != "nothing":
            out.sum().backward()
    count = floors.flops(model, 192, backward=trained != "nothing")
    # With adapters the first block's input takes no gradient, here a third of what all inputs take.
    tolerance = 0.03 if trained == "adapters" else 0.015
    assert sum(count.values()) == pytest.approx(counter.get_total_flops(), rel=tolerance)


def test_options_of_a_gradient():
    """What each adds to 14B's operations, as counted by hand."""
    model, tokens = prfl("--batch_size", "1").model, floors.token_count(P720, 81)
    forward = floors.flops(model, tokens)
    checkpointed = floors.flops(model, tokens, backward=True)
    kept = floors.flops(model, tokens, backward=True, checkpoint=False)
    saved = floors.flops(model, tokens, backward=True, save_attention=True)
    assert forward["attention_backward"] == 0 and kept["attention_backward"] == 2.5 * forward["attention"]
    assert kept["linear"] == 3 * forward["linear"] and kept["attention"] == forward["attention"]
    assert 3.99 < checkpointed["linear"] / forward["linear"] < 4  # not all layers lie in blocks
    assert checkpointed["attention"] == 2 * forward["attention"]
    assert saved["linear"] == checkpointed["linear"] and saved["attention"] == forward["attention"]
