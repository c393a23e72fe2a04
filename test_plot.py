"""Pictures show what logs and scores hold; other files get a sentence."""
import json
import os
import sys

import numpy as np
import pytest

import plot
from files import InputError


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="plots need matplotlib")


def colours(path):
    """How many pixels of a picture have each of plot.COLOURS."""
    from matplotlib.image import imread
    pixels = np.round(imread(path)[..., :3] * 255) @ [0x10000, 0x100, 1]
    return {colour: (pixels == int(colour[1:], 16)).sum() for colour in plot.COLOURS}


def write_log(directory, rows, torn=""):
    directory.mkdir()
    (directory / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return directory


def prfl_step(step):
    return {"step": step, "sft_loss": 0.3, "sft_norm": 0.5, "reward_loss": 0.15, "reward": 0.5 + step / 100,
            "reward_norm": 0.1, "k": [step % 4, 2], "lr": 1e-5, "seconds": 0.5, "gigabytes": 1.5}


def prfl_evaluation(step):
    evaluation = {"reward": 0.5 + step / 100, "saturated": 0.1, "velocity_distance": step / 100,
                  "motion_energy": 0.04 - step / 1000, "contrast": 0.2, "saturation": 0.4}
    return {"step": step, "evaluation": evaluation}


def pavrm_step(step):
    by_timestep = {"0-200": 0.5} if step % 2 else {"200-400": 0.6, "800-1000": 0.7}
    return {"step": step, "loss": 0.7 - step / 100, "accuracy": 0.5, "norm": 1.0, "lr": 1e-5, "seconds": 0.5,
            "gigabytes": 1.5, "loss_by_timestep": by_timestep}


def measures(**others):
    return {t: {"auc": None if t == "1000" else 0.9, "loss": 0.4, **others} for t in ("201", "600", "1000")}


def written_scores(directory, clips, **others):
    scores = []
    for i in range(clips):
        rewards = {"motion_quality": [i / clips, 0.5]}
        scores.append({"name": f"_{i}$.mp4", "prompt": "p", "reward": i / clips, "rewards": rewards})
    content = {"reward_model": "r", "timesteps": [200, 800], "scores": scores, **others}
    (directory / "scores.json").write_text(json.dumps(content))
    return directory / "scores.json"


# ------------------------------------------------------------------------------ pictures

def test_prfl(tmp_path, matplotlib, capsys):
    rows = [prfl_evaluation(0), *map(prfl_step, range(1, 21)), prfl_evaluation(20)]
    run = write_log(tmp_path / "run", rows, torn='{"step": 21, "sft_')
    plot.main([str(run)])
    assert capsys.readouterr().out == f"{run}/dashboard.png\n"
    found = colours(run / "dashboard.png")
    assert not found.pop(plot.PINK)  # no reward-weighted regression here
    assert all(count > 100 for count in found.values())
    assert sorted(os.listdir(run)) == ["dashboard.png", "log.jsonl"]


def test_frames_are_relative_to_the_start():
    panels = plot.prfl([], [prfl_evaluation(0), prfl_evaluation(20)])
    lines = next(lines for lines, _, _, options in panels if options["title"].startswith("frames"))
    assert {style["label"]: list(np.round(y, 6)) for _, y, style in lines} == {
        "motion energy": [1, 0.5], "contrast": [1, 1], "colour saturation": [1, 1]}


@pytest.mark.parametrize("val, title", [("clips/val.jsonl", "held-out reward"), (None, "reward of samples"),
                                        ("no run.json", "reward of samples")])
def test_samples_are_held_out_only_if_the_run_had_val(tmp_path, monkeypatch, val, title):
    run = write_log(tmp_path / "run", [prfl_evaluation(0)])
    if val != "no run.json":
        (run / "run.json").write_text(json.dumps({"arguments": {"data": "clips/train.jsonl", "val": val}}))
    drawn = []
    monkeypatch.setattr(plot, "grid", lambda path, title, panels, **_: drawn.extend(panels))
    plot.draw(run)
    titles = [options["title"] for lines, _, _, options in drawn if lines]
    assert title in titles
    assert any("held" in name for name in titles) == (title == "held-out reward")


def test_panels_without_data_are_left_out(tmp_path, matplotlib):
    steps = [{"step": n, "sft_loss": 0.3 / n, "sft_norm": 0.5} for n in range(1, 4)]
    path = plot.draw(write_log(tmp_path / "sft", steps))
    assert colours(path)[plot.ORANGE] > 100 and not colours(path)[plot.BLUE]
    assert matplotlib.image.imread(path).shape[1] == 2 * 4.8 * 120  # two panels


def test_a_run_that_has_just_begun(tmp_path, matplotlib):
    path = plot.draw(write_log(tmp_path / "run", [prfl_evaluation(0)]) / "log.jsonl")
    assert colours(path)[plot.BLUE] > 10  # a dot


@pytest.mark.parametrize("others", [{"accuracy": 0.8, "ece": 0.05}, {"pair_accuracy": 0.8}])
def test_pavrm(tmp_path, matplotlib, others):
    evaluation = {"motion_quality": measures(**others), "physics_quality": measures(**others)}
    rows = [*map(pavrm_step, range(1, 21)), {"step": 10, "evaluation": evaluation},
            {"step": 20, "evaluation": evaluation}]
    found = colours(plot.draw(write_log(tmp_path / "run", rows)))
    # The loss, and the second label, which covers the first.
    assert found[plot.RED] > 100 and found[plot.ORANGE] > 100


def test_held_out_means_pass_over_what_is_not_measured():
    rows = [{"step": 10, "evaluation": {"motion_quality": measures(accuracy=0.8)}}]
    panels = {options["title"]: lines for lines, _, _, options in plot.pavrm([], rows)}
    means = panels["held out, mean over timesteps"]
    assert [(list(x), list(np.round(y, 6)), style["label"]) for x, y, style in means] == [
        ([10], [0.8], "motion_quality: accuracy"), ([10], [0.4], "motion_quality: loss")]
    assert [list(x) for x, _, _ in panels["held-out AUC"]] == [[201, 600]]


@pytest.mark.parametrize("clips, drawn", [(1, 1), (3, 3), (13, 14)])  # many: and their mean
def test_scores(tmp_path, matplotlib, clips, drawn):
    path = written_scores(tmp_path, clips, measures={"motion_quality": measures(accuracy=0.8)})
    reward, judged = plot.scores(json.loads(path.read_text()))
    assert len(reward[0]) == drawn and len(judged[0]) == 2
    assert [style["label"] for _, _, style in reward[0]][-1] == (None if clips == 13 else "0.00  _0$.mp4")
    if clips != 3:
        assert plot.draw(path) == tmp_path / "scores.png"
        assert colours(tmp_path / "scores.png")[plot.BLUE] > 100


def test_scores_without_measures(tmp_path, matplotlib):
    path = plot.draw(written_scores(tmp_path, 2))
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[1] == 6.2 * 120 and pixels.std() > 0.01 and not colours(path)[plot.BLUE]  # one panel


def test_reward_models_are_compared(tmp_path, matplotlib):
    runs = {"8 blocks": measures(), "4 blocks": {201: {"auc": 0.7}, 600: {"auc": 0.6}}}
    plot.by_timestep(runs, tmp_path / "a.png")
    found = colours(tmp_path / "a.png")
    assert found[plot.BLUE] > 100 and found[plot.ORANGE] > 100 and not found[plot.GREEN]
    with pytest.raises(InputError, match="nothing to draw for .*b.png"):
        plot.by_timestep({"8 blocks": measures()}, tmp_path / "b.png", measure="ece")
    assert os.listdir(tmp_path) == ["a.png"]


def test_methods_are_compared(tmp_path, matplotlib):
    rows = {"before": {"reward": (0.2, 0.02), "good motion": (0.3, None)}, "PRFL": {"reward": (0.8, 0.02)}}
    plot.bars(rows, tmp_path / "bars.png", "tiny world")
    found = colours(tmp_path / "bars.png")
    assert found[plot.ORANGE] > 1.2 * found[plot.BLUE] > 1000  # 0.8 against 0.2 + 0.3, and a legend


def test_the_running_mean():
    losses = [*[1.0] * 20, *[3.0] * 20, None, float("nan")]
    rows = [{"step": n, "loss": loss} for n, loss in enumerate(losses)]
    raw, (x, running, _) = plot.noisy(rows, ("loss", "loss", plot.RED))
    assert len(raw[0]) == len(x) == 40
    assert (running[:10] == 1).all() and (running[-10:] == 3).all() and 1 < running[20] < 3


# ------------------------------------------------------------------------------ wrong input

@pytest.mark.parametrize("name, content, message", [
    ("log.jsonl", b"", "log.jsonl is empty"),
    ("log.jsonl", b'{"step": 1, "sft', "line 1 is not valid JSON .*; is it the log of a training run"),
    ("log.jsonl", b'{"step": 1}\n{"st\n{"step": 3}\n', "log.jsonl, line 2 is not valid JSON"),
    ("log.jsonl", b'{"st": 1}\n{"step": 3}\n', "log.jsonl, line 1: step is missing"),
    ("log.jsonl", b'{"step": 1, "lr": 0.1}\n', "nothing to draw"),
    ("log.jsonl", b'{"step": 1, "evaluation": {"201": {"accuracy": 0.5}}}\n',
     "log.jsonl does not have the form"),
    ("clip.mp4", b"\x00\xff\xfe\n\x80", "clip.mp4, line 1 is not valid JSON"),
    ("scores.json", b"[1]", "scores.json: the content is a list; expected an object"),
    ("scores.json", b'{"reward_model": "r", "timesteps": [1], "scores": []}',
     "scores.json: scores is a list; expected a list that is not empty"),
    ("scores.json", b"{", "scores.json is not valid JSON"),
    ("scores.json", b'{"reward_model": "r", "timesteps": [1], "scores": [{"name": "a", "reward": NaN}]}',
     r"scores.json: scores\[0\].rewards is missing; expected an object"),
    ("log.jsonl", b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n", "nothing to draw"),
    ("log.jsonl", b'{"step": "1"}\n{"step": 2}\n', 'log.jsonl, line 1: step is "1"; expected a whole number'),
    ("log.jsonl", b'{"step": 1, "evaluation": [1]}\n{"step": 2}\n', "line 1: evaluation is a list"),
])
def test_neither_a_log_nor_scores(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        plot.main([str(tmp_path / name)])
    assert os.listdir(tmp_path) == [name]


def test_a_directory_without_a_log(tmp_path):
    with pytest.raises(InputError, match="log.jsonl does not exist; give a run's directory"):
        plot.draw(tmp_path)


def test_matplotlib_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="plots need matplotlib; install it with: pip install matplotlib"):
        plot.draw(write_log(tmp_path / "run", [prfl_step(1)]))
    assert os.listdir(tmp_path / "run") == ["log.jsonl"]
