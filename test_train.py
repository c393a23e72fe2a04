"""Both training stages: the official PRFL values, exact resume, one process or two, and what they must refuse."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import data
import files
import parallel
import train_pavrm
import train_prfl
from files import InputError
from reward import PAVRM
from solver import UniPC
from test_model import golden_inputs, tiny
from test_reward import fill_pavrm
from test_vae import golden
from testdata.golden import agree, draw, fill_

PAVRM_FLAGS = ["--batch_size", "4", "--lr", "1e-3", "--head_lr", "1e-3", "--eval_every", "100"]
PRFL_FLAGS = ["--batch_size", "2", "--lr", "1e-3", "--rollout_steps", "6", "--accumulation", "2", "--sample_every", "0"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A directory with a model, a reward model and an index of eight encoded clips; the current one while the test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    tiny().save_pretrained("model")
    fill_pavrm(tiny().config, 2, 3, 4).save_pretrained("reward")
    states = {name: draw((2, 8), i).bfloat16() for i, name in enumerate(["empty", "negative"])}
    files.write_safetensors("clips/prompts.safetensors", states)
    lines = []
    for i in range(8):
        files.write_safetensors(f"clips/{i}.safetensors", {"latents": draw((16, 2, 4, 4), 10 + i),
                                                           "text_short": draw((2, 8), 20 + i).bfloat16(),
                                                           "text_long": draw((5, 8), 30 + i).bfloat16()})
        lines.append({"file": f"{i}.safetensors", "source_id": str(i), "short_caption": "a", "long_caption": "b",
                      "labels": {"physics_quality": i % 2, "human_quality": 1}, "shape": [16, 2, 4, 4], "fps": 16})
    write_index(lines)
    yield lines
    if dist.is_initialized():
        dist.destroy_process_group()


def write_index(lines):
    Path("clips/index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def flags_of(script, output, *flags):
    inputs = {train_pavrm: ["--train", "clips/index.jsonl", "--val", "clips/index.jsonl", *PAVRM_FLAGS],
              train_prfl: ["--data", "clips/index.jsonl", "--reward", "reward", *PRFL_FLAGS]}[script]
    return ["--model", "model", *inputs, "--output", output, *flags]


def run(script, output, *flags):
    """Run a stage in this process; returns its log: a list of dicts, one a step."""
    try:
        script.main(flags_of(script, output, *flags))
    finally:
        dist.destroy_process_group()
    return read_log(output)


def read_log(output):
    lines = [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "evaluation" not in line]


def losses(log):
    return [{name: value for name, value in line.items() if "loss" in name or "norm" in name} for line in log]


# ---------------------------------------------------------------------------------------------- the method

@pytest.mark.parametrize("k", [0, 3, 11])
def test_official_prfl_values(k):
    values, meta = golden("prfl_t2v")
    inputs, config, seed = golden_inputs({**meta, "t": "[0]", "clip_n": "0"})
    policy = train_prfl.WanModel(config)
    fill_(policy.state_dict(), seed)
    pavrm = fill_pavrm(config, int(meta["k"]), seed + 100, seed + 107).requires_grad_(False)
    solver = UniPC(int(meta["steps"]), float(meta["shift"]))
    x_next, logit = train_prfl.rewarded_step(policy, pavrm, solver, inputs["x"], k, inputs["context"], {})
    loss = train_prfl.reward_loss(logit)
    loss.backward()
    assert agree(x_next, values[f"{k}.x_next"], 1e-5)
    assert agree(logit.sigmoid(), values[f"{k}.reward"], 1e-5)
    assert agree(loss.view(1), values[f"{k}.loss"], 1e-5)
    for name in ("blocks.0.self_attn.q.weight", "head.head.weight"):
        assert agree(policy.get_parameter(name).grad, values[f"{k}.grad.{name}"], 1e-4)
    assert all(parameter.grad is None for parameter in pavrm.parameters())


def test_sft_learns_the_velocity():
    """The flow-matching loss of the true velocity is zero, and of a zero velocity it is the target's square."""
    x0, noise, sigma, t = draw((2, 16, 2, 4, 4), 1), draw((2, 16, 2, 4, 4), 2), torch.tensor([0.3, 0.9]), torch.tensor([300.0, 900.0])
    assert train_prfl.sft_loss(lambda x, *_: noise - x0, x0, noise, sigma, t, [], {}).item() == 0
    seen = []
    loss = train_prfl.sft_loss(lambda x, *_: seen.append(x) or torch.zeros_like(x), x0, noise, sigma, t, [], {})
    assert loss.item() == pytest.approx((noise - x0).square().mean().item())
    assert torch.allclose(seen[0][1], 0.1 * x0[1] + 0.9 * noise[1])


# ---------------------------------------------------------------------------------------------- training

def test_pavrm_learns_its_labels(world):
    log = run(train_pavrm, "run", "--steps", "60")
    assert sum(line["loss"] for line in log[-10:]) < 0.5 * sum(line["loss"] for line in log[:10])
    assert sum(line["accuracy"] for line in log[-10:]) / 10 > 0.9
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    evaluation = lines[-1]["evaluation"]
    assert list(evaluation) == ["201", "400", "600", "800", "1000"]
    assert set(evaluation["400"]) == {"accuracy", "precision", "recall", "f1", "loss"}
    assert PAVRM.from_pretrained("run/reward").task == "motion_quality"


def test_only_blocks_and_head_of_pavrm_change(world):
    run(train_pavrm, "run", "--steps", "2", "--num_blocks", "2")
    trained, start = PAVRM.from_pretrained("run/reward").dit.state_dict(), tiny().state_dict()
    for name, tensor in trained.items():
        assert torch.equal(tensor, start[name]) != name.startswith("blocks."), name


def test_a_missing_label_is_not_zero(world):
    """Clips without the label are left out: of two clips of which one is not annotated, only the other is seen."""
    for line in world:
        line["labels"]["human_quality"] = None
        line["labels"]["physics_quality"] = 1 if line["source_id"] in "03" else None
    write_index(world)
    _, indices = train_pavrm.labelled("clips/index.jsonl", "physics_quality")
    assert indices == [0, 3]
    with pytest.raises(InputError, match="no clip .* annotated for motion_quality"):
        train_pavrm.labelled("clips/index.jsonl", "motion_quality")


def test_prfl_raises_the_reward_and_leaves_the_reward_model_alone(world):
    before = PAVRM.from_pretrained("reward").state_dict()
    log = run(train_prfl, "run", "--steps", "12", "--phases", "reward")
    assert log[-1]["reward"] > log[0]["reward"] + 0.01
    assert all(torch.equal(a, b) for a, b in zip(before.values(), PAVRM.from_pretrained("reward").state_dict().values()))
    ks = [k for line in log for k in line["k"]]
    assert min(ks) == 0 and max(ks) == 4 and len(ks) == 24  # of six rollout steps, the last is never the rewarded one


def test_each_phase_has_its_own_update(world):
    """Two phases are two optimizer steps: neither phase alone moves the weights as both do."""
    both = run(train_prfl, "both", "--steps", "1")
    sft = run(train_prfl, "sft", "--steps", "1", "--phases", "sft")
    assert both[0]["sft_loss"] == sft[0]["sft_loss"] and both[0]["sft_norm"] == sft[0]["sft_norm"]
    state = files.read_json("both/run.json")
    assert state["arguments"]["phases"] == ["sft", "reward"]
    dcp_to_torch_save("both/checkpoints/step_000001", "both.pt")
    optimizer = torch.load("both.pt", weights_only=False)["optimizer"]["state"]
    assert {int(entry["step"]) for entry in optimizer.values()} == {2}


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_resume_is_exact(world, script):
    whole = run(script, "whole", "--steps", "6")
    run(script, "parts", "--steps", "3", "--save_every", "2")
    shutil.rmtree("parts/checkpoints/step_000003")  # as if killed after step 3: steps 2 and on are done again
    parts = run(script, "parts", "--steps", "6", "--resume")
    assert [line["step"] for line in parts] == list(range(6))
    assert losses(parts) == losses(whole)
    weights = {train_pavrm: "reward/pavrm.safetensors", train_prfl: "model/diffusion_pytorch_model.safetensors"}[script]
    assert Path("parts", weights).read_bytes() == Path("whole", weights).read_bytes()
    assert len(parallel.checkpoints("parts")) <= 2


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_one_process_or_two(world, script):
    """Two processes under torchrun have the same losses and gradient norms as one, over ten steps."""
    one = losses(run(script, "one", "--steps", "10"))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                           script.__file__, *flags_of(script, "two", "--steps", "10")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    two = losses(read_log("two"))
    assert len(one) == len(two) == 10
    for a, b in zip(one, two):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_training_on_cuda_in_bf16_stays_near_the_cpu(world, script, monkeypatch):
    on_gpu = run(script, "gpu", "--steps", "3", "--checkpoint_blocks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = run(script, "cpu", "--steps", "3")
    for a, b in zip(losses(on_gpu), losses(on_cpu)):
        assert a == pytest.approx(b, rel=0.1)


# ---------------------------------------------------------------------------------------------- refusals

def test_prfl_needs_a_reward_model(world):
    with pytest.raises(InputError, match="nowhere holds no reward model"):
        run(train_prfl, "run", "--reward", "nowhere")
    with pytest.raises(InputError, match="does not describe a reward model"):
        run(train_prfl, "run", "--reward", "model")
    assert not Path("run").exists()


def test_a_run_is_not_overwritten(world):
    run(train_prfl, "run", "--steps", "1", "--phases", "sft")
    with pytest.raises(InputError, match="already holds a run"):
        run(train_prfl, "run", "--steps", "1")
    with pytest.raises(InputError, match="no complete checkpoint to resume"):
        run(train_prfl, "other", "--resume")


def test_nan_latents_stop_the_run(world):
    latents = draw((16, 2, 4, 4), 0)
    latents[3, 1, 2, 2] = float("nan")
    files.write_safetensors("clips/5.safetensors", {"latents": latents, "text_short": torch.zeros(2, 8), "text_long": torch.zeros(5, 8)})
    with pytest.raises(InputError, match="clip 5: .*5.safetensors has NaN"):
        run(train_prfl, "run", "--steps", "8", "--phases", "sft")


def test_missing_latents_are_found_before_training(world):
    Path("clips/6.safetensors").unlink()
    with pytest.raises(InputError, match="clip 6"):
        run(train_prfl, "run")
    assert not Path("run").exists()


def test_batch_size_that_cannot_be_shared(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert parallel.share([7, 8, 9, 6]) == [(2, 9), (3, 6)]
    assert parallel.deal(5) == [1, 3, 4]
    with pytest.raises(InputError, match="--batch_size 3 cannot be shared equally by 2"):
        parallel.share([7, 8, 9])


def test_errors_are_one_sentence_and_an_exit_code(world):
    done = subprocess.run([sys.executable, Path(__file__).with_name("train_prfl.py"), "--model", "model", "--reward", "nowhere",
                           "--data", "clips/index.jsonl"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: nowhere holds no reward model")
    assert "Traceback" not in done.stderr


def test_a_full_disk_while_a_checkpoint_is_saved(world, monkeypatch):
    def full(self, path, mode):
        if mode == "wb":
            raise OSError(28, "No space left on device")
        return create_stream(self, path, mode)

    create_stream = FileSystem.create_stream
    run(train_prfl, "run", "--steps", "1", "--phases", "sft")
    monkeypatch.setattr(FileSystem, "create_stream", full)
    with pytest.raises(OSError, match="step_000002 could not be written .*No space left"):
        run(train_prfl, "run", "--steps", "2", "--phases", "sft", "--resume")
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step_000001"]


def test_random_draws_depend_on_their_key_alone():
    assert torch.equal(parallel.noise((3,), 0, 1, 2, "noise"), parallel.noise((3,), 0, 1, 2, "noise"))
    draws = [parallel.uniform(seed, step, "k") for seed in range(20) for step in range(50)]
    assert len(set(draws)) == 1000 and abs(sum(draws) / 1000 - 0.5) < 0.05 and min(draws) < 0.01
