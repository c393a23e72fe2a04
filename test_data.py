"""The command: the linter, and encoding alone and in two processes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import annotations
import data
from annotations import read_list
from clips import Clips
from encode import encode_clips
from files import InputError
from testdata.helpers import ROOT, brightening, torchrun
from video import write_video

torch.set_num_threads(1)  # everything here is tiny: more threads only get in each other's way

SETTINGS = {"size": (48, 32), "frames": 5, "fps": 16, "device": "cpu"}


def test_the_linter_prints_all_faults_and_the_balance(models, tmp_path, capsys):
    write_video(tmp_path / "a.mp4", brightening(12))
    write_video(tmp_path / "short.mp4", brightening(3))
    (tmp_path / "text.mp4").write_text("words")
    good = {"video_path": "a.mp4", "short_caption": "c", "physics_quality": 1, "human_quality": 1}
    (tmp_path / "a.json").write_text(json.dumps([
        good | {"source_id": "fine"}, good | {"source_id": "gone", "video_path": "gone.mp4"},
        good | {"source_id": "text", "video_path": "text.mp4"},
        good | {"source_id": "short", "video_path": "short.mp4"},
        good | {"source_id": "mute", "short_caption": " "},
        good | {"source_id": "unsure", "physics_quality": "maybe"},
        good | {"source_id": "typo", "fysics_quality": 1},
        good | {"source_id": "nested", "labels": {"blurr_quality": 1}},
        good | {"source_id": "half", "human_quality": None},
        good | {"source_id": "fine", "physics_quality": "poor"},
        good | {"source_id": "no", "video_path": None}, good | {"source_id": "up/../on"}]))
    flags = ["--check", str(tmp_path / "a.json"), "--model", str(models["t2v"]), "--size", "48x32",
             "--output", str(tmp_path / "out")]
    assert data.main([*flags, "--frames", "5", "--label", "motion_quality"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for number, words in enumerate([
            "line 2 (gone): ... does not exist", "line 3 (text): ... not a video",
            "line 4 (short): ... 3 frames",
            "line 5 (mute): ... empty", "line 6 (unsure): ... physics_quality is 'maybe'",
            "line 6 (unsure): ... motion_quality is not annotated",
            "line 7 (typo): ... 'fysics_quality' is not a label",
            "line 8 (nested): ... 'blurr_quality' is not a label",
            "line 9 (half): ... motion_quality is not annotated",
            "line 10 (fine): ... line 1 has the same source_id", "line 11 (no): ... video_path is missing",
            "line 12 (up/../on): ... cannot name a file"]):
        start, words = words.split("... ")
        assert lines[number].startswith(start) and words in lines[number]
    assert lines[12] == "12 clips, 12 faults"
    assert lines[14].split() == ["physics_quality", "10", "1", "1"]
    assert lines[15].split() == ["human_quality", "11", "0", "1"]
    assert lines[18].split() == ["motion_quality", "9", "1", "2"]
    assert lines[19:] == ["10 of 12 clips would be refused (5 frames at 16 fps, 48x32); "
                          "until they are fixed or removed, nothing is encoded"]

    (tmp_path / "a.json").write_text(json.dumps([good]))
    assert data.main([*flags, "--frames", "5"]) == 0
    assert capsys.readouterr().out.endswith("none of 1 clips would be refused (5 frames at 16 fps, 48x32)\n")
    assert data.main([*flags, "--frames", "13"]) == 1
    assert data.main([*flags, "--frames", "5", "--label", "blur_quality"]) == 1
    assert "none of 1 clips would be refused" in capsys.readouterr().out  # a missing label stops no encoding
    assert not (tmp_path / "out").exists()


def test_check_takes_its_settings_as_encoding_does(models, entries, tmp_path, capsys):
    """From the flags, else from what --output holds, else from the model's sampling.json."""
    model = tmp_path / "model"
    model.mkdir()
    for file in models["t2v"].iterdir():
        (model / file.name).symlink_to(file)
    own = {"size": [48, 32], "frames": 5, "fps": 8}
    clips = str(tmp_path / "clips.json")  # six frames at 16 fps: three at 8
    where = ["--model", str(model), "--output", str(tmp_path / "out")]

    def refused(*flags):
        """What --check says at the end. Encoding must refuse the same, or write its index."""
        code = data.main(["--check", clips, *where, *flags])
        *lines, last = capsys.readouterr().out.splitlines()
        if code:
            with pytest.raises(InputError) as error:
                data.main(["--list", clips, *where, *flags])
            faults = [line.strip() for line in str(error.value).splitlines()[1:]]
            assert faults == lines[:len(faults)] and len(faults) == len(lines) - 7
        return last.split(";")[0]

    assert refused() == "2 of 2 clips would be refused (81 frames at 16 fps, 832x480)"
    (model / "sampling.json").write_text(json.dumps(own))
    assert refused() == "2 of 2 clips would be refused (5 frames at 8 fps, 48x32)"
    assert refused("--fps", "16") == "none of 2 clips would be refused (5 frames at 16 fps, 48x32)"
    assert not (tmp_path / "out").exists()
    data.main(["--list", clips, *where, "--fps", "16", "--size", "32x32"])
    capsys.readouterr()
    assert refused() == "none of 2 clips would be refused (5 frames at 16 fps, 32x32)"
    for flags, sentence in [(["--size", "40x32"], "was encoded with other size"),
                            (["--size", "40x32", "--output", "new"], "make both multiples of 16"),
                            (["--output", clips], "clips.json is a file"),
                            (["--frames", "6"], "--frames 6 is not possible")]:
        with pytest.raises(InputError, match=sentence):
            data.main(["--check", clips, *where, *flags])


def test_warnings_do_not_stop_encoding(models, entries, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(annotations, "check_video", lambda path, *rest: [f"{Path(path).name} is interlaced"])
    clips = str(tmp_path / "clips.json")
    where = ["--model", str(models["t2v"]), "--output", str(tmp_path / "out"),
             "--size", "48x32", "--frames", "5"]
    warnings = ["warning: line 1 (b): b.mp4 is interlaced", "warning: line 2 (a): a.mp4 is interlaced"]
    assert data.main(["--check", clips, *where]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [*warnings, "2 clips, 0 faults"]
    assert data.main(["--list", clips, *where]) == 0
    assert capsys.readouterr().err.splitlines()[:2] == warnings


def test_the_command_encodes_and_reports_in_one_sentence(models, entries, tmp_path):
    flags = ["--list", str(tmp_path / "clips.json"), "--model", str(models["t2v"]),
             "--output", str(tmp_path / "out")]
    assert not data.main([*flags, "--size", "48x32", "--frames", "5"])
    assert len(Clips(tmp_path / "out/index.jsonl")) == 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, data.__file__, *flags, "--frames", "81"],
                             env=environment, capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1


def test_a_published_list_gets_its_prompts(models, tmp_path):
    (tmp_path / "data.list").write_text("meta/0.json\n")
    assert data.main(["--list", str(tmp_path / "data.list"), "--model", str(models["t2v"])]) == 0
    with safe_open(tmp_path / "prompts.safetensors", "pt") as tensors:
        assert tensors.get_tensor("empty").shape == (1, 16)
    with pytest.raises(InputError, match="other.list does not exist"):
        data.main(["--list", str(tmp_path / "other.list"), "--model", str(models["t2v"])])


WATCHED = """
import os
import sys
from pathlib import Path

import annotations
import cli
import data

check, encode = annotations.check_video, data.Encoder.encode
watched = open(f"rank {os.environ['RANK']}", "w", buffering=1)


def watched_check(path, *rest):
    print("check", Path(path).stem, file=watched)
    return check(path, *rest)


def watched_encode(self, videos, captions):
    print("encode", captions[0][0], file=watched)
    return encode(self, videos, captions)


annotations.check_video, data.Encoder.encode = watched_check, watched_encode
cli.run(data.main)
"""


@pytest.fixture
def four(entries, tmp_path, monkeypatch):
    """Flags for a list of four clips c0 ... c3, whose captions are their names. `watched.py` does what
    data.py does, and notes it.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for n in range(4):
        write_video(f"c{n}.mp4", brightening(6 + n))
    clips = [{"video_path": f"c{n}.mp4", "prompt": f"c{n}"} for n in range(4)]
    Path("four.json").write_text(json.dumps(clips))
    Path("watched.py").write_text(WATCHED)
    return ["--list", "four.json", "--size", "48x32", "--frames", "5"]


def notes():
    """What each of the two ranks has done."""
    return [Path(f"rank {rank}").read_text().splitlines() for rank in (0, 1)]


def test_two_ranks_share_the_work(models, four):
    flags = [*four, "--model", models["t2v"]]
    alone = encode_clips(read_list("four.json"), models["t2v"], "alone", **SETTINGS).read_bytes()
    done = torchrun(2, "watched.py", *flags, "--output", "shared")
    assert done.stdout == "4 clips are encoded: shared/index.jsonl\n"
    assert Path("shared/index.jsonl").read_bytes() == alone
    assert notes() == [["check c0", "check c2", "encode c0", "encode c2"],
                       ["check c1", "check c3", "encode c1", "encode c3"]]
    for n in range(4):
        file = f"clips/c{n}.safetensors"
        assert Path("shared", file).read_bytes() == Path("alone", file).read_bytes()

    Path("shared/clips/c0.safetensors").unlink()  # both were rank 0's
    Path("shared/clips/c2.safetensors").unlink()
    torchrun(2, "watched.py", *flags, "--output", "shared")
    assert notes() == [["check c0", "encode c0"], ["check c2", "encode c2"]]
    assert Path("shared/index.jsonl").read_bytes() == alone


def test_the_faults_of_all_ranks_are_reported_together(models, four):
    for n in (0, 1):  # one is rank 0's, the other rank 1's
        Path(f"c{n}.mp4").write_text("words")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    flags = [*four, "--model", str(models["t2v"]), "--output", "shared"]
    done = subprocess.run([*command, "watched.py", *flags], capture_output=True, text=True)
    assert done.returncode != 0
    message = done.stderr[done.stderr.index("error: the list has 2 faults"):]
    first, second = message.splitlines()[1:3]
    assert first.startswith("  line 1 (c0): c0.mp4 is damaged")
    assert second.startswith("  line 2 (c1): c1.mp4 is damaged")
    assert notes() == [["check c0", "check c2"], ["check c1", "check c3"]]
    assert not Path("shared").exists()
