"""Both training stages: the official PRFL values, exact resume, one process or two, and what they must refuse."""
import json
import shutil
import signal
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
import records
import train_pavrm
import train_prfl
from files import InputError
from reward import PAVRM
from solver import UniPC
from test_model import golden_inputs, tiny
from test_reward import fill_pavrm
from test_vae import golden
from testdata.golden import agree, draw, fill_
from vae import WanVAE

HAS_CUDA = torch.cuda.is_available()
PAVRM_FLAGS = ["--batch_size", "4", "--lr", "1e-3", "--head_lr", "1e-3", "--eval_every", "100"]
PRFL_FLAGS = ["--good", "none", "--batch_size", "2", "--lr", "1e-3", "--rollout_steps", "6", "--accumulation", "2", "--sample_every", "0"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A directory with a model, a reward model and an index of eight encoded clips; the current one while the test runs.

    Everything runs on the CPU, whatever the machine has.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
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
    for number in (signal.SIGTERM, signal.SIGUSR1):  # which the scripts take over
        signal.signal(number, signal.SIG_DFL)
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
    return [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]


def steps(log):
    return [line for line in log if "evaluation" not in line]


def numbers(log):
    """What must not depend on when or by how many processes a step was done."""
    return [{name: value for name, value in line.items() if name not in ("seconds", "gigabytes")} for line in log]


# ---------------------------------------------------------------------------------------------- the method

@pytest.mark.parametrize("k", [0, 3, 11])
def test_official_prfl_values(k):
    values, meta = golden("prfl_t2v")
    inputs, config, seed = golden_inputs({**meta, "t": "[0]", "clip_n": "0"})
    policy = train_prfl.WanModel(config)
    fill_(policy.state_dict(), seed)
    pavrm = fill_pavrm(config, int(meta["k"]), seed + 100, seed + 107).requires_grad_(False)
    solver = UniPC(int(meta["steps"]), float(meta["shift"]))
    (_, x_next, logit, _), = train_prfl.rewarded_steps(lambda x, t: policy(x, t, inputs["context"]),
                                                       lambda x, t: pavrm(x, t, inputs["context"]), solver, inputs["x"], [k])
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
    assert train_prfl.sft_loss(lambda x, t: noise - x0, x0, noise, sigma, t).item() == 0
    seen = []
    loss = train_prfl.sft_loss(lambda x, t: seen.append(x) or torch.zeros_like(x), x0, noise, sigma, t)
    assert loss.item() == pytest.approx((noise - x0).square().mean().item())
    assert torch.allclose(seen[0][1], 0.1 * x0[1] + 0.9 * noise[1])


def test_one_prfl_step_is_read_in_under_1500_lines():
    files_to_read = ("train_prfl.py", "reward.py", "solver.py", "model.py", "parallel.py")
    assert sum(len(Path(train_prfl.__file__).with_name(name).read_text().splitlines()) for name in files_to_read) < 1500


# ---------------------------------------------------------------------------------------------- training

def test_pavrm_learns_its_labels(world):
    log = steps(run(train_pavrm, "run", "--steps", "60"))
    assert sum(line["loss"] for line in log[-10:]) < 0.5 * sum(line["loss"] for line in log[:10])
    assert sum(line["accuracy"] for line in log[-10:]) / 10 > 0.9
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    evaluation = lines[-1]["evaluation"]["motion_quality"]
    assert list(evaluation) == ["201", "400", "600", "800", "1000"]
    assert set(evaluation["400"]) == {"accuracy", "precision", "recall", "f1", "auc", "loss", "ece"}
    assert files.read_json("run/evaluation.json") == lines[-1]["evaluation"]
    assert PAVRM.from_pretrained("run/reward").tasks == ["motion_quality"]


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
    args = train_pavrm.parse_args(["--task", "physics_quality"])
    _, items = train_pavrm.load_items(["clips/index.jsonl"], args)
    assert items == [(0,), (3,)]
    with pytest.raises(InputError, match="no clip .* annotated for motion_quality"):
        train_pavrm.load_items(["clips/index.jsonl"], train_pavrm.parse_args([]))


def test_prfl_raises_the_reward(world):
    """Of the same noise, at the same k, scored before and after."""
    log = run(train_prfl, "run", "--steps", "12", "--phases", "reward")
    ks = [k for line in log for k in line["k"]]
    assert min(ks) == 0 and max(ks) == 4 and len(ks) == 24  # of six rollout steps, the last is never the rewarded one
    pavrm, scores = PAVRM.from_pretrained("reward"), []
    for policy in (tiny(), train_prfl.WanModel.from_pretrained("run/model")):
        texts = [draw((5, 8), 30)] * 8
        with torch.no_grad():
            (_, _, logit, _), = train_prfl.rewarded_steps(lambda x, t: policy(x, t, texts), lambda x, t: pavrm(x, t, texts), UniPC(6, 5.0),
                                                          draw((8, 16, 2, 4, 4), 5), [2])
        scores.append(logit.sigmoid().mean().item())
    assert scores[1] > scores[0] + 0.01


def test_the_reward_model_is_frozen(world, monkeypatch):
    """In fact: its parameters ask for no gradient and get none, while the policy's do."""
    seen, shard = [], parallel.shard
    monkeypatch.setattr(parallel, "shard", lambda model, *rest: seen.append(model) or shard(model, *rest))
    before = {name: tensor.clone() for name, tensor in PAVRM.from_pretrained("reward").state_dict().items()}
    run(train_prfl, "run", "--steps", "2")
    policy, pavrm = seen
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in pavrm.parameters())
    assert all(parameter.grad is not None for parameter in policy.parameters())
    assert all(torch.equal(before[name], parameter.full_tensor()) for name, parameter in pavrm.named_parameters())


def test_each_phase_has_its_own_update(world):
    """Two phases are two optimizer steps, and the reward's gradient holds nothing of the SFT phase before it."""
    both = run(train_prfl, "both", "--steps", "1", "--lr", "0")
    for phase in ("sft", "reward"):
        alone = run(train_prfl, phase, "--steps", "1", "--lr", "0", "--phases", phase)
        for name in (f"{phase}_loss", f"{phase}_norm"):
            assert both[0][name] == alone[0][name], name
    dcp_to_torch_save("both/checkpoints/step_000001", "both.pt")
    optimizer = torch.load("both.pt", weights_only=False)["optimizer"]["state"]
    assert {int(entry["step"]) for entry in optimizer.values()} == {2}


def test_checkpointed_blocks_train_alike(world):
    assert numbers(run(train_prfl, "a", "--steps", "2")) == numbers(run(train_prfl, "b", "--steps", "2", "--checkpoint_blocks"))


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_resume_is_exact(world, script):
    whole = run(script, "whole", "--steps", "6")
    run(script, "parts", "--steps", "4", "--save_every", "2")
    shutil.rmtree("parts/checkpoints/step_000004")  # as if killed before it: steps 2 and on are done again
    with open("parts/log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a line torn by the kill
    parts = run(script, "parts", "--steps", "6", "--resume")
    assert [line["step"] for line in steps(parts)] == list(range(1, 7))
    assert numbers(parts) == numbers(whole)
    weights = {train_pavrm: "reward/pavrm.safetensors", train_prfl: "model/diffusion_pytorch_model.safetensors"}[script]
    assert Path("parts", weights).read_bytes() == Path("whole", weights).read_bytes()
    assert sorted(records.checkpoints("parts")) == [2, 6] and sorted(records.checkpoints("whole")) == [6]


def test_resuming_as_another_run_is_refused(world):
    run(train_prfl, "run", "--steps", "1", "--phases", "sft")
    with pytest.raises(InputError, match="--resume with another --lr"):
        run(train_prfl, "run", "--steps", "2", "--phases", "sft", "--lr", "1e-2", "--resume")


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_one_process_or_two(world, script):
    """Two processes under torchrun have the same losses, norms, rewards and evaluations as one, over ten steps."""
    fill_vae("model")
    more = ["--sample_every", "10", "--samples", "1"] if script is train_prfl else []  # more processes than samples
    one = numbers(run(script, "one", "--steps", "10", *more))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script.__file__,
                           *flags_of(script, "two", "--steps", "10", *more)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    two = numbers(read_log("two"))
    assert len(one) == len(two) >= 10
    for a, b in zip(one, two):
        a, b = flat(a), flat(b)
        assert b == pytest.approx(a, rel=1e-4, abs=1e-7)
    if script is train_prfl:
        assert (data.read_video("one/samples/step_000010/0.mp4") == data.read_video("two/samples/step_000010/0.mp4")).float().mean() > 0.99


def fill_vae(directory):
    vae = WanVAE(dim=4)
    fill_(vae.state_dict(), 0)
    torch.save(vae.state_dict(), Path(directory, data.VAE_FILE))


def flat(line):
    """A log line's numbers by name, those of its evaluation too."""
    nested = {}
    for task, rows in line.get("evaluation", {}).items():
        for t, row in rows.items() if isinstance(rows, dict) else [("", {"": rows})]:
            nested |= {f"{task} {t} {name}": value for name, value in row.items()}
    return {**{name: value for name, value in line.items() if not isinstance(value, (dict, list))}, **nested}


def test_image_to_video_trains(world):
    """Latents of the first frame and CLIP tokens reach the policy and the reward model."""
    shutil.rmtree("model"), shutil.rmtree("reward")
    changes = dict(model_type="i2v", in_dim=36)
    tiny(**changes).save_pretrained("model")
    PAVRM(tiny(3, **changes), 2).save_pretrained("reward")
    for i in range(8):
        with files.open_safetensors(f"clips/{i}.safetensors") as clip:
            tensors = {name: clip.get_tensor(name) for name in clip.keys()}
        files.write_safetensors(f"clips/{i}.safetensors", {**tensors, "condition": draw((16, 2, 4, 4), 50 + i), "clip": draw((257, 1280), 60 + i)})
    assert len(run(train_prfl, "prfl", "--steps", "1")) == 1
    assert len(steps(run(train_pavrm, "pavrm", "--steps", "1"))) == 1


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_training_on_cuda_in_bf16_stays_near_the_cpu(world, script, monkeypatch):
    on_cpu = steps(run(script, "cpu", "--steps", "3"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    on_gpu = steps(run(script, "gpu", "--steps", "3", "--checkpoint_blocks"))
    for a, b in zip(on_gpu, on_cpu):
        assert [a[name] for name in a if "loss" in name] == pytest.approx([b[name] for name in b if "loss" in name], rel=0.1)


# ---------------------------------------------------------------------------------------------- refusals

def test_prfl_needs_a_reward_model(world):
    with pytest.raises(InputError, match="nowhere holds no reward model"):
        run(train_prfl, "run", "--reward", "nowhere")
    fill_pavrm(tiny(text_dim=16).config, 2, 3, 4).save_pretrained("other")
    with pytest.raises(InputError, match="has text_dim 16, but model has 8"):
        run(train_prfl, "run", "--reward", "other")
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
    assert not records.checkpoints("run")
    assert len(run(train_prfl, "run", "--steps", "1", "--phases", "sft", "--seed", "1")) == 1  # and may start again


def test_missing_latents_are_found_before_training(world):
    Path("clips/6.safetensors").unlink()
    with pytest.raises(InputError, match="clip 6"):
        run(train_prfl, "run")
    assert not Path("run").exists()


def test_batch_size_that_cannot_be_shared(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert parallel.share([7, 8, 9, 6]) == [(2, 9), (3, 6)]
    assert parallel.deal(5) == [(1, True), (3, True), (4, False)]
    with pytest.raises(InputError, match="--batch_size 3 cannot be shared equally by 2"):
        parallel.share([7, 8, 9])


def test_errors_are_one_sentence_and_an_exit_code(world):
    done = subprocess.run([sys.executable, train_prfl.__file__, *flags_of(train_prfl, "run", "--reward", "nowhere")], capture_output=True, text=True)
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
