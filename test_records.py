"""How a run stops and goes on: resuming, checkpoints, signals, a full disk, numbers that are not finite.

Kills at random moments are in tools/test_crash.py and tools/test_kill_saves.py.
"""
import fcntl
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

import checkpoint_files
import ema
import files
import parallel
import records
import train_pavrm
import train_prfl
from clips import Order
from files import InputError
from model import WanModel
from reward import PAVRM
from testdata.golden import draw
from testdata.helpers import SHAPE, flags_of, numbers, read_log, run, steps, tiny, weights_of
from tools import crash

SFT = ["--phases", "sft", "--accumulation", "1"]  # the cheapest run


# ------------------------------------------------------------------------------ resuming

@pytest.mark.parametrize("script, flags, results", [
    (train_pavrm, [], ["reward/pavrm.safetensors"]),
    (train_prfl, ["--solver_steps", "4"], ["model/diffusion_pytorch_model.safetensors"]),
    (train_pavrm, ["--lora_rank", "2", "--ema", "0.8", "--accumulation", "2"], ["reward/pavrm.safetensors"]),
    (train_prfl, ["--lora_rank", "2", "--ema", "0.8", "--kl_weight", "1", "--solver_steps", "3",
                  "--accumulation", "1", "--warmup", "3"],
     ["model/diffusion_pytorch_model.safetensors", "adapter.safetensors",
      "model_ema/diffusion_pytorch_model.safetensors", "adapter_ema.safetensors"])],
    ids=["pavrm", "prfl", "pavrm_adapters_average", "prfl_adapters_average"])
def test_resume_is_exact(world, script, flags, results):
    whole = run(script, "whole", *flags, "--steps", "3")
    run(script, "parts", *flags, "--steps", "2", "--save_every", "1")
    shutil.rmtree("parts/checkpoints/step_000002")  # as if killed before it: step 2 is done again
    with open("parts/log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # a line torn by the kill
    parts = run(script, "parts", *flags, "--steps", "3", "--resume")
    assert [line["step"] for line in steps(parts)] == [1, 2, 3]
    assert numbers(parts)[-1] == numbers(whole)[-1] and numbers(steps(parts)) == numbers(steps(whole))
    for result in results:
        assert Path("parts", result).read_bytes() == Path("whole", result).read_bytes(), result
    assert sorted(records.checkpoints("parts")) == [1, 3] and sorted(records.checkpoints("whole")) == [3]


def test_resuming_as_another_run_is_refused(world):
    flags = [*SFT, "--lora_rank", "2", "--ema", "0.8"]
    run(train_prfl, "run", "--steps", "1", *flags)
    with pytest.raises(InputError, match="--resume with another --lr than"):
        run(train_prfl, "run", "--steps", "2", *flags, "--lr", "1e-2", "--resume")
    with pytest.raises(InputError, match="--resume with another --lora_rank and --ema than"):
        run(train_prfl, "run", "--steps", "2", *flags, "--lora_rank", "4", "--ema", "0.5", "--resume")


def test_a_run_of_an_earlier_version_is_not_resumed(world):
    """Its run.json has flags of other names; what they would be now is not guessed."""
    run(train_prfl, "run", "--steps", "1", *SFT)
    record = files.read_json("run/run.json")
    record["arguments"]["rollout_steps"] = record["arguments"].pop("solver_steps")
    files.write_json("run/run.json", record)
    message = "run.json was written by another version .*--rollout_steps, --solver_steps.* start a new one"
    with pytest.raises(InputError, match=message):
        run(train_prfl, "run", "--steps", "2", *SFT, "--resume")
    assert read_log("run")[-1]["step"] == 1 and sorted(records.checkpoints("run")) == [1]


def test_memory_and_mesh_may_change_on_resuming(world):
    flags = ["--solver_steps", "3", "--accumulation", "1"]
    whole = run(train_prfl, "whole", *flags, "--steps", "3")
    run(train_prfl, "run", *flags, "--steps", "2")
    changed = ["--activation_checkpointing", "--keep_checkpoints", "5", "--offload", "inputs",
               "--deterministic"]
    assert numbers(run(train_prfl, "run", *flags, "--steps", "3", "--resume", *changed)) == numbers(whole)
    with pytest.raises(InputError, match="--resume with another --bf16_residual"):
        run(train_prfl, "run", *flags, "--steps", "4", "--resume", "--bf16_residual")


@pytest.mark.parametrize("script, flags, results", [
    (train_prfl, [*SFT, "--lora_rank", "2", "--ema", "0.5"], {"model": WanModel, "model_ema": WanModel}),
    (train_pavrm, [], {"reward": PAVRM})])
def test_results_are_float32_or_rounded_to_bf16(world, script, flags, results):
    """Adapters are merged in float32 and rounded once. The precision may change on resuming."""
    run(script, "run", "--steps", "1", *flags)
    exact = {name: weights_of(f"run/{name}") for name in results}
    run(script, "run", "--steps", "1", *flags, "--resume", "--export_dtype", "bf16")
    for name, kind in results.items():
        rounded = weights_of(f"run/{name}")
        assert rounded.keys() == exact[name].keys()
        for key, tensor in exact[name].items():
            assert tensor.dtype == torch.float32 and torch.equal(rounded[key], tensor.bfloat16()), key
        for key, tensor in kind.from_pretrained(f"run/{name}").state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, rounded[key].float()), key


def test_a_run_is_not_overwritten(world):
    run(train_prfl, "run", "--steps", "1", *SFT)
    with pytest.raises(InputError, match="already holds a run"):
        run(train_prfl, "run", "--steps", "1")
    with pytest.raises(InputError, match="no complete checkpoint to resume"):
        run(train_prfl, "other", "--resume")


def test_two_runs_in_one_directory(world):
    run(train_prfl, "run", "--steps", "1", *SFT)
    records._lock.close()  # as its process's end would
    with open("run/lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="run is in use by another run .*process"):
            run(train_prfl, "run", "--steps", "2", *SFT, "--resume")
    run(train_prfl, "run", "--steps", "2", *SFT, "--resume")


# ------------------------------------------------------------------------------ checkpoints

def test_the_newest_checkpoints_are_kept(world):
    run(train_prfl, "run", "--steps", "4", *SFT, "--save_every", "1", "--keep_checkpoints", "3")
    assert sorted(records.checkpoints("run")) == [2, 3, 4]


def test_what_was_torn_is_removed(world):
    run(train_prfl, "run", "--steps", "1", *SFT)
    Path("run/checkpoints/.step_000002.new").mkdir()
    run(train_prfl, "run", "--steps", "2", *SFT, "--resume")
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step_000001", "step_000002"]


def test_a_checkpoint_holds_what_was_when_it_was_asked_for(world):
    """Training goes on in place while the thread writes."""
    parallel.start()
    args = train_prfl.parse_args(["--output", "run"])
    layer = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(layer.parameters())
    checkpoints = records.Checkpoints(args, layer, optimizer)
    before = layer.weight.detach().clone()
    checkpoints.save(1)
    with torch.no_grad():
        layer.weight.zero_()
    checkpoints.finish()
    assert checkpoints.load() == 1 and torch.equal(layer.weight, before)


def test_a_full_disk_while_a_checkpoint_is_saved(world, monkeypatch):
    def full(self, path, mode):
        if mode == "wb":
            raise OSError(28, "No space left on device")
        return create_stream(self, path, mode)

    create_stream = FileSystem.create_stream
    run(train_prfl, "run", "--steps", "1", *SFT)
    monkeypatch.setattr(FileSystem, "create_stream", full)
    said = "the disk is full, .*/step_000002 could not be written; .* in run/checkpoints, .* from step 1$"
    with pytest.raises(OSError, match=said):
        run(train_prfl, "run", "--steps", "2", *SFT, "--resume")
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step_000001"]


@pytest.fixture
def tiny_disk(tmp_path):
    """A directory of 1 MB."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if done.returncode:
        pytest.skip("no right to mount a file system")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_disk_that_is_really_full(tiny_disk):
    """PyTorch says "unexpected pos 704 vs 598" then."""
    parallel.start()
    layer = torch.nn.Linear(1000, 1000)
    args = train_prfl.parse_args(["--output", str(tiny_disk / "run")])
    checkpoints = records.Checkpoints(args, layer, torch.optim.AdamW(layer.parameters()))
    checkpoints.save(1)
    with pytest.raises(OSError, match="the disk is full, .*/step_000001 could not be written"):
        checkpoints.finish()
    dist.destroy_process_group()
    assert not list(tiny_disk.glob("run/checkpoints/*"))


# ------------------------------------------------------------------------------ damaged checkpoints

@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "checksums.json"])
def test_64_zeroed_bytes_are_noticed(world, name):
    run(train_prfl, "run", "--steps", "2", *SFT, "--save_every", "1")
    with open(f"run/checkpoints/step_000002/{name}", "r+b") as file:
        file.seek(os.fstat(file.fileno()).st_size // 2)
        file.write(bytes(64))
    why = f"step_000002 is damaged \\({name} .*\\); remove it, then --resume continues from step 1$"
    with pytest.raises(InputError, match=why):
        run(train_prfl, "run", "--steps", "3", *SFT, "--resume")
    shutil.rmtree("run/checkpoints/step_000002")
    assert run(train_prfl, "run", "--steps", "3", *SFT, "--resume")[-1]["step"] == 3


def test_a_file_of_a_checkpoint_is_missing_and_there_is_no_other(world):
    run(train_prfl, "run", "--steps", "1", *SFT)
    Path("run/checkpoints/step_000001/__0_0.distcp").unlink()
    why = r"__0_0.distcp cannot be read: No such file.*\); remove it, .* start again without --resume$"
    with pytest.raises(InputError, match=why):
        run(train_prfl, "run", "--steps", "2", *SFT, "--resume")


def test_checkpoints_of_an_earlier_version_have_no_checksums(world):
    run(train_prfl, "run", "--steps", "1", *SFT)
    Path("run/checkpoints/step_000001/checksums.json").unlink()
    assert run(train_prfl, "run", "--steps", "2", *SFT, "--resume")[-1]["step"] == 2
    assert Path("run/checkpoints/step_000002/checksums.json").exists()


class Trap:
    """Makes a directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_the_metadata_of_a_stranger_runs_nothing(world):
    run(train_prfl, "run", "--steps", "1", *SFT)
    Path("run/checkpoints/step_000001/checksums.json").unlink()
    Path("run/checkpoints/step_000001/.metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match="damaged .*metadata .*would run posix.mkdir"):
        run(train_prfl, "run", "--steps", "2", *SFT, "--resume")
    assert not Path("trapped").exists()


def test_the_values_of_a_stranger_run_nothing(world):
    parallel.start()
    dcp.save({"value": Trap()}, checkpoint_id="checkpoint")
    faults = checkpoint_files.read_checkpoint({"value": 0}, Path("checkpoint"))
    assert faults == ["value is damaged, or more than tensors and numbers"]
    assert not Path("trapped").exists()


@pytest.mark.parametrize("name, content, message", [
    ("run.json", '{"arguments": [1]}', "run.json: arguments is "),
    ("run.json", "", "run.json is not valid JSON"),
    ("log.jsonl", '{"step": 1}\n{"st\n{"step": 1}\n', "log.jsonl, line 2 is not valid JSON"),
    ("log.jsonl", '{"step": "one"}\n', "log.jsonl, line 1: step is ")])
def test_records_in_a_wrong_form(world, name, content, message):
    run(train_prfl, "run", "--steps", "1", *SFT)
    Path("run", name).write_text(content)
    with pytest.raises(InputError, match=message):
        run(train_prfl, "run", "--steps", "2", *SFT, "--resume")
    assert Path("run", name).read_text() == content


# ------------------------------------------------------------------------------ signals

@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_ends_the_run(world, monkeypatch, script, name, capsys):
    clip, calls = parallel.clip_gradients, []

    def interrupted(*inputs):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.Signals[name])
        return clip(*inputs)

    flags = ["--steps", "4"]
    if script is train_prfl:
        flags = ["--steps", "3", "--solver_steps", "3", "--accumulation", "1"]
    whole = run(script, "whole", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "clip_gradients", interrupted)
        run(script, "run", *flags, "--save_every", "100")
    stopped = max(records.checkpoints("run"))
    assert stopped == {train_pavrm: 3, train_prfl: 2}[script]  # PRFL clips twice per step
    assert f"stopped by {name} after step {stopped}; --resume" in capsys.readouterr().out
    assert not Path("run/model").exists() and not Path("run/reward").exists()
    assert numbers(run(script, "run", *flags, "--resume")) == numbers(whole)


def test_a_second_signal_ends_at_once(world, monkeypatch):
    ended, clock = [], [1000.0]
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(records, "time", SimpleNamespace(time=lambda: clock[0]))
    records.stop_on_signals(None)
    os.kill(os.getpid(), signal.SIGTERM)
    clock[0] += 1.9
    os.kill(os.getpid(), signal.SIGTERM)  # the same one, passed on by a launcher
    assert not ended
    clock[0] += 0.2
    os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.full)])
def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ranks = crash.start("run", crash.NO_END, processes)
    while not records.checkpoints("run"):
        assert all(rank.poll() is None for rank in ranks), crash.printed_by("run")
        time.sleep(0.02)
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    assert [rank.wait() for rank in ranks] == [130] * processes
    said = Path("run.txt").read_text()
    step, checkpoint = re.findall(r"^stopped by Ctrl-C after step (\d+); --resume continues from step (\d+)$",
                                  said, re.M)[0]
    assert int(step) >= int(checkpoint) == max(records.checkpoints("run"))
    assert "Traceback" not in said and said.count("Ctrl-C") == 1


# ------------------------------------------------------------------------------ numbers that are not finite

def make_infinite(clip):
    """Finite latents whose loss is not."""
    texts = {"text_short": draw((2, 8), 2).bfloat16(), "text_long": draw((5, 8), 3).bfloat16()}
    files.write_safetensors(f"clips/{clip}.safetensors", {"latents": 1e30 * draw(SHAPE, 1), **texts})


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_a_loss_that_is_not_finite_names_its_clip(quick, script):
    make_infinite(5)
    message = r"step \d: the loss is (nan|inf) and .* \(clip [\d ]*5[\d ]*; seed 0\).* step 0 on: python "
    with pytest.raises(InputError, match=message):
        run(script, "run", "--steps", "8")
    assert not Path("run/model").exists()


def test_a_reward_that_is_not_finite_names_k(quick, monkeypatch):
    """Here the reward makes it."""
    reward = train_prfl.ProcessReward
    loss = reward.loss
    monkeypatch.setattr(reward, "loss", lambda self, scores: loss(self, scores) * float("nan"))
    message = r"step 1: the loss is nan and .* nan \(clip \d \d at k 2(; clip \d \d at k 2)?; seed 0\)"
    with pytest.raises(InputError, match=message):
        run(train_prfl, "run", "--k", "2")


def test_the_printed_command_shows_it_again(world, monkeypatch):
    make_infinite(Order([SHAPE] * 8, 2, 0)[1][0])  # met at the second step
    flags = flags_of(train_prfl, "run", "--steps", "20", *SFT, "--save_every", "1")
    said = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [train_prfl.__file__, *flags])
        with pytest.raises(InputError) as error:
            train_prfl.main()
        dist.destroy_process_group()
        sentence, again = str(error.value).split(" on: ")
        python, script, *flags = shlex.split(again)
        assert (python, script, flags[-1]) == ("python", train_prfl.__file__, "--resume")
        said.append(sentence)
    assert said[0] == said[1] and said[0].startswith("step 2: ")


def test_a_loss_that_is_not_finite_although_the_norm_is(world, monkeypatch):
    """As where the weights get no gradient."""
    reward = train_prfl.ProcessReward
    loss, stepped = reward.loss, []
    monkeypatch.setattr(reward, "loss", lambda self, scores: loss(self, scores) * float("nan"))
    monkeypatch.setattr(parallel, "clip_gradients", lambda *_: 0.0)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: stepped.append(None))
    with pytest.raises(InputError, match="step 1: the loss is nan and the gradient norm 0.0 .clip"):
        run(train_prfl, "run", "--phases", "reward")
    assert not stepped


def test_a_loss_on_another_process_stops_all(world):
    """It is not finite on rank 1 alone, and no gradient shows it."""
    Path("stop.py").write_text(
        "import os, cli, parallel, train_pavrm\n"
        "parallel.clip_gradients = lambda *_: 0.0\n"
        "make = train_pavrm.Batches.make\n"
        "def spoilt(self, *part):\n"
        "    batch = make(self, *part)\n"
        "    return batch._replace(x0=batch.x0 * (float('nan') if os.environ['RANK'] == '1' else 1))\n"
        "train_pavrm.Batches.make = spoilt\n"
        "cli.run(train_pavrm.main)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "stop.py"]
    done = subprocess.run([*command, *flags_of(train_pavrm, "run")], capture_output=True, text=True)
    assert done.returncode and not records.checkpoints("run")
    assert "error: step 1: the loss is nan and the gradient norm 0.0 (clip " in done.stderr


def overflow(optimizer):
    optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))


def overflow_second_moment(optimizer):
    optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg_sq"].fill_(float("inf"))


@pytest.mark.parametrize("spoil, what", [
    (overflow, "model "), (overflow_second_moment, "optimizer .*exp_avg_sq"), (None, "ema ")],
    ids=["weights", "optimizer", "average"])
def test_values_that_are_not_finite_are_not_saved(world, monkeypatch, spoil, what):
    """They become so in the last step, so no loss shows it."""
    step, update = torch.optim.AdamW.step, ema.EMA.update

    def spoilt_step(optimizer):
        step(optimizer)
        if spoil:
            spoil(optimizer)

    def spoilt_update(average):
        update(average)
        if not spoil:
            next(iter(average.average.values())).fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", spoilt_step)
    monkeypatch.setattr(ema.EMA, "update", spoilt_update)
    message = rf"step 1: 1 of .* not finite \({what}.*, and nothing was saved; .* step 0 on: python"
    with pytest.raises(InputError, match=message):
        run(train_prfl, "run", "--steps", "1", *SFT, "--ema", "0.9" if not spoil else "0")
    assert not list(Path("run").rglob("step_*")) and not Path("run/model").exists()


def test_values_that_are_not_finite_are_not_resumed(world, monkeypatch):
    """Of a version that saved them."""
    with monkeypatch.context() as patch:
        patch.setattr(records, "not_finite", lambda _: [])
        patch.setattr(files, "is_finite", lambda _: True)
        step = torch.optim.AdamW.step
        patch.setattr(torch.optim.AdamW, "step", lambda optimizer: (step(optimizer), overflow(optimizer)))
        run(train_prfl, "run", "--steps", "1", *SFT)
    with pytest.raises(InputError, match=r"step_000001 is damaged \(model .* is not finite\); remove it"):
        run(train_prfl, "run", "--steps", "2", *SFT, "--resume")


# ------------------------------------------------------------------------------ flags, the log

@pytest.mark.parametrize("flags, message", [
    (["--save_attention"], "--save_attention needs --activation_checkpointing"),
    (["--offload", "inputs"], "--offload inputs needs --activation_checkpointing")])
def test_flags_that_do_not_fit_together_are_refused(world, flags, message):
    with pytest.raises(InputError, match=message):
        run(train_prfl, "run", *flags)
    assert not Path("run").exists()


def test_what_a_run_says_of_itself(world):
    run(train_prfl, "run", "--steps", "1", *SFT, "--seed", "3")
    record = files.read_json("run/run.json")
    assert set(record) == {"arguments", "commit", "torch", "processes", "device"}
    assert (record["arguments"]["seed"], record["processes"], record["device"]) == (3, 1, "cpu")


def test_how_processes_are_used_is_described(monkeypatch):
    """In the log's first line: processes, what they share, and the attention that PyTorch takes."""
    args = train_prfl.parse_args(["--dp_replicate", "2"])
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert records.describe(args, tiny(), torch.device("cpu")) == "1 process on cpu, flash attention"
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr("sequence.size", lambda: 2)
    said = records.describe(args, tiny(), torch.device("cpu"))
    assert said.startswith("8 processes (copies of the weights: 2, processes per clip: 2) on cpu, ")


def test_a_full_disk_while_the_log_is_written():
    log = object.__new__(records.Log)
    log.path = Path("/dev/full")
    with pytest.raises(OSError, match="/dev/full could not be written .No space left on device.; make room"):
        log.write({"step": 1})


def test_videos_are_written_later():
    log = object.__new__(records.Log)
    log.thread, log.writing = records.ThreadPoolExecutor(1), []
    written = []
    log.later(written.append, "a")
    log.finish()
    assert written == ["a"]
    log.later(Path("/nowhere/a.txt").write_text, "a")
    with pytest.raises(OSError):
        log.finish()
