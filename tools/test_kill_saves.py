"""The short form of kill_saves.py: five kills, and whether it would notice what is torn."""
import re
import subprocess
import sys

import pytest
import torch.distributed as dist

import encode
import files
from testdata.helpers import ROOT
from tools import kill_saves


def test_five_kills_leave_nothing_half_there():
    """In a process of its own, which has no other threads when it forks."""
    done = subprocess.run([sys.executable, "-m", "tools.kill_saves", "--kills", "5"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.findall(r"^([a-z ]+): 1 kills, [01] of them .* nothing half there", done.stdout, re.M)
    assert said == list(kill_saves.KINDS)


@pytest.mark.parametrize("name", kill_saves.KINDS)
def test_a_torn_file_would_be_noticed(tmp_path, monkeypatch, name):
    """The largest file is cut in half, as one that is not written atomically would be."""
    monkeypatch.setattr(encode, "Encoder", encode.Encoder)  # writing changes both: put them back afterwards
    monkeypatch.setattr(files, "SHARD_BYTES", files.SHARD_BYTES)
    write, holds = kill_saves.KINDS[name]
    written = write(tmp_path, 1)
    assert [next(written), next(written)] == [1, 2]
    if dist.is_initialized():
        dist.destroy_process_group()
    assert holds(tmp_path, 2) and not holds(tmp_path, 3)
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    largest = max(contents, key=lambda path: len(contents[path]))
    largest.write_bytes(contents[largest][:len(contents[largest]) // 2])
    with pytest.raises((AssertionError, files.InputError)):
        assert holds(tmp_path, 2)
