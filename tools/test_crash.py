"""The short form of crash.py: killed once at a random moment, resumed bit for bit."""
import re

import pytest
from torch.distributed.checkpoint import CheckpointException

from files import InputError
from tools import crash


@pytest.mark.full
def test_a_killed_run_loses_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    crash.crash(kills=1, seed=14, reshard=False)  # soon after the first checkpoint, and only one process
    said = capsys.readouterr().out
    found = re.fullmatch(r"kill 1 at step (\d+); the newest checkpoint is of step (\d+)\n", said)
    step, checkpoint = found.groups()
    assert int(step) >= int(checkpoint) >= 2


def test_a_run_that_differs_is_reported(tmp_path, monkeypatch):
    """Logs that differ in the last bit of one number, without training."""
    logs = {"killed": [{"step": 1, "reward": 0.5}], "whole": [{"step": 1, "reward": 0.5000000000000001}]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(crash, "finish", lambda output, *_: logs[output])
    with pytest.raises(InputError, match="the killed run differs from the whole one"):
        crash.crash(kills=0, reshard=False)
    logs["killed"] = logs["whole"]
    crash.crash(kills=0, reshard=False)


def test_a_damaged_checkpoint_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoints/step_000002").mkdir(parents=True)
    with pytest.raises(CheckpointException, match="step_000002"):
        crash.check_files("run")


def test_a_log_without_what_may_differ_and_without_a_torn_line(tmp_path):
    first = '{"step": 1, "seconds": 2.0, "gigabytes": 1.0, "loss": 0.5}'
    (tmp_path / "log.jsonl").write_text(first + '\n{"step": 2, "se')
    assert crash.log_of(tmp_path) == [{"step": 1, "loss": 0.5}]
    assert crash.log_of(tmp_path / "nowhere") == []
