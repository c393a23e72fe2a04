"""What a run survives and how it stops: kills, signals, numbers that are not finite, a second run in its directory."""
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import crash
import data
import files
import parallel
import records
import train_pavrm
import train_prfl
from files import InputError
from test_train import flags_of, numbers, run, world  # noqa: F401 (world is a fixture)
from testdata.golden import draw



def test_a_killed_run_loses_nothing(tmp_path, monkeypatch):
    """The short form of crash.py: a kill at a random moment, resumed bit for bit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert crash.crash(kills=1, steps=6, reshard=False) == 1


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_ends_the_run(world, monkeypatch, script, name, capsys):
    clip, calls = parallel.clip_gradients, []

    def interrupted(*inputs):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.Signals[name])
        return clip(*inputs)

    whole = run(script, "whole", "--steps", "5")
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "clip_gradients", interrupted)
        run(script, "run", "--steps", "5", "--save_every", "100")
    stopped = max(records.checkpoints("run"))
    assert stopped == {train_pavrm: 3, train_prfl: 2}[script]  # PRFL clips twice a step
    assert f"stopped by {name} after step {stopped}; --resume goes on" in capsys.readouterr().out
    assert not Path("run/model").exists() and not Path("run/reward").exists()
    assert numbers(run(script, "run", "--steps", "5", "--resume")) == numbers(whole)


def test_a_second_signal_ends_at_once(world, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    records.stop_on_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # the same one, passed on by a launcher
    assert not ended
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3)
    os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]


def make_infinite(clip):
    """Finite latents whose loss is not."""
    files.write_safetensors(f"clips/{clip}.safetensors", {"latents": 1e30 * draw((16, 2, 4, 4), 1), "text_short": draw((2, 8), 2).bfloat16(),
                                                          "text_long": draw((5, 8), 3).bfloat16()})


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_a_loss_that_is_not_finite_names_its_clip(world, script):
    make_infinite(5)
    with pytest.raises(InputError, match=r"step \d: the gradient norm is (nan|inf) \(clip [\d ]*5[\d ]*; seed 0\).* from step 0 on: python "):
        run(script, "run", "--steps", "8")
    assert not Path("run/model").exists()


def test_a_reward_that_is_not_finite_names_k(world, monkeypatch):
    """Here the reward model makes it, and only at one k."""
    reward_loss = train_prfl.reward_loss
    monkeypatch.setattr(train_prfl, "reward_loss", lambda *inputs: reward_loss(*inputs) * float("nan"))
    with pytest.raises(InputError, match=r"step 1: the gradient norm is nan \(clip \d \d at k 2(; clip \d \d at k 2)?; seed 0\)"):
        run(train_prfl, "run", "--k", "2")


def test_the_printed_command_shows_it_again(world):
    make_infinite(data.Order([line["shape"] for line in world], 2, 0)[2][0])  # met at the second step
    command = [sys.executable, train_prfl.__file__, *flags_of(train_prfl, "run", "--steps", "20", "--phases", "sft", "--save_every", "1")]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 1
    said = first.stderr.strip().splitlines()[-1]
    again = shlex.split(said.split(" on: ")[1])
    assert again[0] == "python" and again[-1] == "--resume"
    second = subprocess.run([sys.executable, *again[1:]], capture_output=True, text=True)
    assert second.returncode == 1 and second.stderr.strip().splitlines()[-1].split(" on: ")[0] == said.split(" on: ")[0]


def test_two_runs_in_one_directory(world):
    run(train_prfl, "run", "--steps", "1", "--phases", "sft")
    records._lock.close()  # as its process's end would
    with open("run/lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="run is in use by another run .*process"):
            run(train_prfl, "run", "--steps", "2", "--phases", "sft", "--resume")
    run(train_prfl, "run", "--steps", "2", "--phases", "sft", "--resume")


def test_the_newest_checkpoints_are_kept(world):
    run(train_prfl, "run", "--steps", "5", "--phases", "sft", "--save_every", "1", "--keep", "3")
    assert sorted(records.checkpoints("run")) == [3, 4, 5]


def test_what_was_torn_is_removed(world):
    run(train_prfl, "run", "--steps", "1", "--phases", "sft")
    Path("run/checkpoints/.step_000002.new").mkdir()
    run(train_prfl, "run", "--steps", "2", "--phases", "sft", "--resume")
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step_000001", "step_000002"]


def test_a_checkpoint_holds_what_was_when_it_was_asked_for(world):
    """Training goes on in place while the thread writes."""
    parallel.start()
    try:
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
    finally:
        dist.destroy_process_group()


def test_memory_and_mesh_may_change_on_resuming(world):
    whole = run(train_prfl, "whole", "--steps", "3")
    run(train_prfl, "run", "--steps", "2")
    assert numbers(run(train_prfl, "run", "--steps", "3", "--resume", "--checkpoint_blocks", "--keep", "5", "--offload", "inputs")) == numbers(whole)
    with pytest.raises(InputError, match="--resume with another --bf16_residual"):
        run(train_prfl, "run", "--steps", "4", "--resume", "--bf16_residual")


def test_clips_are_read_ahead():
    seen = []
    reading = data.ahead(lambda item: seen.append(item) or -item, iter([1, 2, 3]))
    assert next(reading) == (1, -1)
    assert next(reading) == (2, -2) and seen[:2] == [1, 2]  # 3 is on its way
    assert list(reading) == [(3, -3)] and seen == [1, 2, 3]
    with pytest.raises(InputError, match="no such clip"):
        list(data.ahead(lambda item: (_ for _ in ()).throw(InputError("no such clip")), [1]))


def test_videos_are_written_later(world):
    log = object.__new__(records.Log)
    log.thread, log.writing = records.ThreadPoolExecutor(1), []
    log.later(Path("a.txt").write_text, "a")
    log.finish()
    assert Path("a.txt").read_text() == "a"
    log.later(Path("nowhere/a.txt").write_text, "a")
    with pytest.raises(OSError):
        log.finish()
