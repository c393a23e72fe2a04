"""What training reads: labels, encoded clips (ours and published), pairs, batches and their order."""
import json
import random
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import records
import train_pavrm
import train_prfl
from clips import ANNOTATIONS, Clips, Order, choose_caption, collate, condition_input, label_of, prefetch
from files import InputError
from model import WanModel
from testdata.golden import draw
from testdata.helpers import long_texts, run, short_texts

ENTRY = {"file": "a.safetensors", "source_id": "a", "short_caption": "s", "long_caption": "l",
         "pair_id": None, "labels": {"physics_quality": 1}, "shape": [16, 2, 4, 6], "model_type": "i2v"}


def make_clip(folder, tensors, **changes):
    """The Clips of an index with one clip, `a`."""
    save_file(tensors, folder / "a.safetensors")  # whatever they hold
    return make_index(folder / "index.jsonl", ENTRY | changes)


def make_index(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return Clips(path)


def good_tensors():
    return {"latents": torch.randn(16, 2, 4, 6), "condition": torch.randn(16, 2, 4, 6),
            "clip": torch.randn(5, 80), "text_short": torch.randn(3, 8), "text_long": torch.randn(4, 8)}


def test_motion_quality_is_physics_and_human():
    cases = {(1, 1): 1, (1, 0): 0, (0, 1): 0, (0, 0): 0, (0, None): 0, (None, 0): 0, (1, None): None,
             (None, 1): None, (None, None): None, ("maybe", 1): None}
    for (physics, human), expected in cases.items():
        assert label_of({"physics_quality": physics, "human_quality": human}, "motion_quality") is expected
    assert label_of({"blur_quality": 0}, "blur_quality") == 0
    assert label_of({}, "blur_quality") is None
    with pytest.raises(InputError, match="sharpness is not a label; choose from physics_.*, motion_quality"):
        label_of({}, "sharpness")


# ------------------------------------------------------------------------------ encoded clips

def refuse(message, clips, headers=True):
    """Loading the clip raises InputError, and so does the check, which reads the headers alone."""
    for use in [lambda: clips.load(0), clips.check][:1 + headers]:
        with pytest.raises(InputError, match=message) as error:
            use()
        assert "clip a: " in str(error.value)


def test_a_clip_is_loaded_as_it_was_written(tmp_path):
    tensors = good_tensors()
    clips = make_clip(tmp_path, tensors)
    clips.check()
    loaded = clips.load(0)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert loaded["entry"] is clips.entries[0]


def test_a_damaged_or_missing_file_is_named(tmp_path):
    clips = make_clip(tmp_path, good_tensors())
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-10])
    refuse("a.safetensors is damaged", clips)
    (tmp_path / "a.safetensors").unlink()
    refuse("a.safetensors does not exist", clips)
    with pytest.raises(InputError, match="prompts.safetensors does not exist"):
        clips.prompts  # noqa: B018


def test_wrong_tensors_are_named(tmp_path):
    tensors = good_tensors()
    for name, value in [("latents", float("nan")), ("text_long", float("inf"))]:
        bad = tensors[name].clone()
        bad.view(-1)[3] = value
        clips = make_clip(tmp_path, tensors | {name: bad})
        refuse(f"a.safetensors has NaN or infinite {name}", clips, headers=False)
    refuse("of the wrong shape", make_clip(tmp_path, tensors, shape=[16, 2, 4, 4]))
    for name, shape in [("latents", (16, 3, 4, 6)), ("condition", (16, 1, 4, 6)), ("text_short", (1, 3, 8))]:
        refuse(f"{name} of the wrong shape", make_clip(tmp_path, tensors | {name: torch.zeros(shape)}))
    tensors.pop("condition")
    refuse("condition is missing in .*a.safetensors", make_clip(tmp_path, tensors))
    assert make_clip(tmp_path, tensors, model_type="t2v").load(0)["condition"] is None


def test_tensors_of_other_types_and_sizes_are_named(tmp_path):
    tensors = good_tensors()
    whole = tensors | {"latents": tensors["latents"].long()}
    refuse("a.safetensors has .* latents, or other than float", make_clip(tmp_path, whole), headers=False)
    empty = tensors | {"text_short": torch.zeros(0, 8)}
    refuse(r"text_short of the wrong shape \[0, 8\]", make_clip(tmp_path, empty))


@pytest.mark.parametrize("changes", [
    {"empty": None}, {"negative": torch.zeros(8)}, {"negative": torch.full((2, 8), torch.nan)},
    {"empty": torch.zeros(0, 8)}, {"empty": torch.zeros(2, 8, dtype=torch.int64)}])
def test_wrong_prompts_are_refused(tmp_path, changes):
    clips = make_clip(tmp_path, good_tensors())
    states = {"empty": torch.zeros(1, 8), "negative": torch.zeros(2, 8)}
    save_file(states, tmp_path / "prompts.safetensors")
    assert {name: tuple(state.shape) for name, state in clips.prompts.items()} == {
        "empty": (1, 8), "negative": (2, 8)}
    states = {name: state for name, state in (states | changes).items() if state is not None}
    save_file(states, tmp_path / "prompts.safetensors")
    with pytest.raises(InputError, match="prompts.safetensors: (empty|negative) is missing, NaN, inf"):
        clips.prompts  # noqa: B018


@pytest.mark.parametrize("value", [np.zeros((1, 16, 2, 4, 6), dtype=int), np.array("text"), np.array(1.0),
                                   np.zeros(0), b"", b"no array", b"\x93NUMPY\x01\x00\xff\xff"])
def test_published_arrays_of_other_kinds_are_refused(tmp_path, value):
    (tmp_path / "a.json").write_text('{"latents_path": "a.npy"}')
    if isinstance(value, bytes):
        (tmp_path / "a.npy").write_bytes(value)
    else:
        np.save(tmp_path / "a.npy", value)
    with pytest.raises(InputError, match="a.npy is damaged or not an array"):
        Clips([tmp_path / "a.json"])
    np.savez(tmp_path / "a.npy", value)
    (tmp_path / "a.npy.npz").rename(tmp_path / "a.npy")
    with pytest.raises(InputError, match="a.npy is damaged or not an array"):
        Clips([tmp_path / "a.json"])


def test_an_index_that_cannot_be_used_is_reported(tmp_path):
    with pytest.raises(InputError, match="clip a: physics_quality is 'maybe'"):
        make_index(tmp_path / "index.jsonl", ENTRY | {"labels": {"physics_quality": "maybe"}})
    for content, message in [("", "index.jsonl is empty"), ('{"video": "a.mp4"}', "line 1: file is missing"),
                             (json.dumps(ENTRY | {"source_id": "../a"}), "cannot name a file")]:
        (tmp_path / "index.jsonl").write_text(content)
        with pytest.raises(InputError, match=message):
            Clips(tmp_path / "index.jsonl")


def test_clips_are_selected_by_what_they_are_annotated_for(tmp_path):
    labels = [{"physics_quality": 1, "human_quality": 1}, {"human_quality": 1}, {"physics_quality": 0}, {}]
    clips = make_index(tmp_path / "index.jsonl", *[ENTRY | {"labels": given} for given in labels])
    assert len(clips) == 4
    names = ("motion_quality", "human_quality", "blur_quality")
    assert [clips.select(name) for name in names] == [[0, 2], [0, 1], []]
    assert clips.select("blur_quality", "physics_quality", "human_quality") == [0, 1, 2]


def test_published_data_is_read_as_it_is(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    shapes = {"latents": (1, 16, 2, 4, 6), "f1_black": (1, 16, 2, 4, 6), "masked": (1, 20, 2, 4, 6),
              "imgclip": (2, 5, 8), "short": (1, 3, 8), "long": (1, 4, 8)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    (tmp_path / "latents").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / f"latents/{name}.npy", array)
    metas = [{"source_id": "one", "short_caption": "s", "long_caption": "l", "physics_quality": "good",
              "human_quality": None, "vae_latent_path": "latents/latents.npy",
              "f1_black_path": "latents/f1_black.npy", "imgclip_path": "latents/imgclip.npy",
              "textshort_path": "latents/short.npy", "textlong_path": "latents/long.npy"},
             {"prompt": "p", "latents_path": str(tmp_path / "latents/latents.npy"),
              "image_embeds": "latents/imgclip.npy", "latents_condition_path": "latents/masked.npy",
              "text_en_path": "latents/long.npy"},
             {"source_id": "three", "video_vae_latent_path": "../latents/latents.npy",  # or beside the meta
              "save_textshort_path": "../latents/short.npy"}]
    (tmp_path / "meta").mkdir()
    for number, meta in enumerate(metas):
        (tmp_path / f"meta/{number}.json").write_text(json.dumps(meta))
    (tmp_path / "data.list").write_text("meta/0.json\nmeta/1.json\n\n" + str(tmp_path / "meta/2.json") + "\n")
    monkeypatch.chdir(tmp_path)  # metas name their arrays as seen from where the code ran
    clips = Clips(tmp_path / "data.list")
    clips.check()
    one, two, three = (clips.load(i) for i in range(3))
    for clip in (one, two, three):
        assert np.array_equal(clip["latents"], arrays["latents"][0])
    assert np.array_equal(one["condition"], arrays["f1_black"][0])
    assert two["condition"].shape == (20, 2, 4, 6) and three["condition"] is None and three["clip"] is None
    assert one["clip"].shape == (10, 8) and np.array_equal(one["clip"][5:], arrays["imgclip"][1])
    assert [len(clip["text_short"]) for clip in (one, two, three)] == [3, 4, 3]
    assert [len(clip["text_long"]) for clip in (one, two, three)] == [4, 4, 3]
    assert one["entry"]["labels"] == dict.fromkeys(ANNOTATIONS) | {"physics_quality": 1}
    assert (one["entry"]["long_caption"], one["entry"]["shape"]) == ("l", (16, 2, 4, 6))
    assert (two["entry"]["short_caption"], two["entry"]["source_id"]) == ("p", "1")
    assert Clips(["meta/0.json", "meta/2.json"]).load(1)["entry"]["source_id"] == "three"

    np.save(tmp_path / "latents/short.npy", np.array([{"an": "object"}], dtype=object))
    with pytest.raises(InputError, match="clip one: .*short.npy is damaged or not an array"):
        clips.load(0)
    (tmp_path / "latents/long.npy").unlink()
    with pytest.raises(InputError, match="(?s)3 of 3 clips.*clip 1: .*long.npy does not exist"):
        clips.check()
    whole = (tmp_path / "latents/latents.npy").read_bytes()
    (tmp_path / "latents/latents.npy").write_bytes(whole[:-8])
    with pytest.raises(InputError, match="latents.npy is damaged"):
        Clips("data.list")
    (tmp_path / "meta/0.json").write_text("{}")
    with pytest.raises(InputError, match="0.json names no latents"):
        Clips("data.list")


# ------------------------------------------------------------------------------ pairs

def test_pairs_are_all_better_and_worse_clips_of_one_id(tmp_path):
    labels = {"a": [1, 0, 1], "b": [0, 0], "c": [1, None], None: [1, 0]}
    entries = []
    for pair_id, values in labels.items():
        for value in values:
            entries.append(ENTRY | {"pair_id": pair_id, "labels": {"blur_quality": value}})
    found = make_index(tmp_path / "index.jsonl", *entries)
    assert found.pairs("blur_quality") == [(0, 1), (2, 1)]
    assert found.pairs("human_quality") == []


@pytest.mark.parametrize("change, message", [
    ({"short_caption": "other"}, "clips a and b share the pair_id p and have different captions"),
    ({"shape": [16, 2, 6, 4]}, "clips a and b are a pair and have different shapes")])
def test_clips_that_cannot_be_a_pair_are_named(tmp_path, change, message):
    better = ENTRY | {"pair_id": "p"}
    worse = better | {"source_id": "b", "labels": {"physics_quality": 0}} | change
    with pytest.raises(InputError, match=message):
        make_index(tmp_path / "index.jsonl", better, worse).pairs("physics_quality")


def test_two_lists_make_pairs_of_one_prompt(tmp_path):
    """The published form: better clips in one list, worse ones in another, in any order."""
    better = [ENTRY | {"source_id": f"good {name}", "short_caption": name, "labels": {}} for name in "xy"]
    worse = [ENTRY | {"source_id": f"poor {name}", "short_caption": name, "labels": {}} for name in "yx"]
    make_index(tmp_path / "better.jsonl", *better)
    make_index(tmp_path / "worse.jsonl", *worse)
    clips = Clips.two_lists(tmp_path / "better.jsonl", tmp_path / "worse.jsonl")
    assert clips.pairs("text_alignment") == [(0, 3), (1, 2)]
    assert clips.entries[0]["labels"] == dict.fromkeys(ANNOTATIONS, 1)
    assert clips.entries[3]["source_id"] == "poor x"


# ------------------------------------------------------------------------------ what a model is given

def test_the_mask_marks_the_given_frames():
    condition = torch.randn(2, 16, 3, 4, 6)
    i2v, flf2v = condition_input(condition, "i2v"), condition_input(condition, "flf2v")
    assert i2v.shape == flf2v.shape == (2, 20, 3, 4, 6)
    assert torch.equal(i2v[:, 4:], condition) and torch.equal(flf2v[:, 4:], condition)
    assert i2v[0, :4, :, 0, 0].tolist() == [[1, 0, 0]] * 4
    assert flf2v[1, :4, :, 3, 5].tolist() == [[1, 0, 0]] * 3 + [[1, 0, 1]]
    assert condition_input(i2v, "i2v") is i2v
    for model_type, channels in [("t2v", 16), ("i2v", 12)]:
        with pytest.raises(InputError, match=f"{model_type} model cannot use a condition of {channels} chan"):
            condition_input(condition[:, :channels], model_type)


def test_a_batch_holds_what_the_model_takes():
    samples = [good_tensors() | {"entry": {"source_id": name}} for name in "ab"]

    def batch(model_type, use_clip=False, text_dim=8):
        config = SimpleNamespace(model_type=model_type, use_clip=use_clip, text_dim=text_dim)
        return collate(samples, config, "cpu")

    latents, condition = batch("t2v")
    assert torch.equal(latents[1], samples[1]["latents"]) and condition == {}
    assert batch("i2v")[1].keys() == {"y"}
    condition = batch("flf2v", use_clip=True)[1]
    expected = torch.stack([samples[0]["condition"], samples[1]["condition"]])
    assert torch.equal(condition["y"], condition_input(expected, "flf2v"))
    assert torch.equal(condition["clip_fea"], torch.stack([samples[0]["clip"], samples[1]["clip"]]))
    with pytest.raises(InputError, match="clip a has text states of width 8, but the model takes 4096"):
        batch("t2v", text_dim=4096)
    samples[1]["clip"] = None
    with pytest.raises(InputError, match="clip b was encoded without clip, which this i2v model needs"):
        batch("i2v", use_clip=True)
    samples[0]["condition"] = None
    with pytest.raises(InputError, match="clip a was encoded without condition"):
        batch("i2v")


def test_captions_are_chosen_and_dropped_as_often_as_asked():
    sample, empty = {"text_short": torch.ones(1), "text_long": torch.full((1,), 2.0)}, torch.zeros(1)
    drawn = torch.stack([choose_caption(sample, empty, 0.7, 0.1, 0, n // 4, n % 4) for n in range(4000)])
    for value, share in [(0, 0.1), (1, 0.27), (2, 0.63)]:
        assert (drawn == value).float().mean().item() == pytest.approx(share, abs=0.03)
    assert {choose_caption(sample, empty, 0, 0, n).item() for n in range(50)} == {1.0}
    assert {choose_caption(sample, empty, 1, 0, n).item() for n in range(50)} == {2.0}
    assert {choose_caption(sample, empty, 1, 1, n).item() for n in range(50)} == {0.0}


def test_a_thread_loads_the_next_item():
    seen = []
    loading = prefetch(lambda item: seen.append(item) or -item, iter([1, 2, 3]))
    assert next(loading) == (1, -1)
    assert next(loading) == (2, -2) and seen[:2] == [1, 2]  # 3 is on its way
    assert list(loading) == [(3, -3)] and seen == [1, 2, 3]

    def fail(item):
        raise InputError("no such clip")

    with pytest.raises(InputError, match="no such clip"):
        list(prefetch(fail, [1]))


# ------------------------------------------------------------------------------ order

@pytest.fixture
def draws(monkeypatch):
    """The keys of all generators that an Order has made, in a list that grows."""
    made = []

    class Counted(random.Random):
        def __init__(self, key):
            made.append(key)
            super().__init__(key)

    monkeypatch.setattr("clips.random.Random", Counted)
    return made


def test_each_epoch_draws_every_clip_in_a_new_order():
    shapes = [(16, 2, 4, 6)] * 7 + [[16, 2, 6, 4]] * 4 + [(16, 1, 4, 6)]
    order = Order(shapes, batch_size=3, seed=5)
    assert order.batches_per_epoch == 3 + 2 + 1
    epochs = [[order[6 * epoch + i] for i in range(6)] for epoch in range(4)]
    for batches in epochs:
        assert all(len(batch) == 3 for batch in batches)
        assert all(len({tuple(shapes[i]) for i in batch}) == 1 for batch in batches)
        drawn = [i for batch in batches for i in batch]
        assert set(drawn) == set(range(12))
        assert sorted(drawn.count(i) for i in range(7)) == [1] * 5 + [2] * 2  # nine places for seven clips
        assert drawn.count(11) == 3
    assert len({str(batches) for batches in epochs}) == 4
    places = {[11 in batch for batch in batches].index(True) for batches in epochs}
    assert len(places) > 1  # batches are shuffled
    again = Order(shapes, batch_size=3, seed=5)
    assert again[17] == epochs[2][5] and [again[i] for i in range(6)] == epochs[0]  # from the number alone
    assert [Order(shapes, 3, seed=6)[i] for i in range(6)] != epochs[0]


def test_the_order_of_a_seed_stays():
    """A run that is resumed with a later version of this file sees the clips it would have seen."""
    order = Order([(1,)] * 5 + [(2,)] * 3, batch_size=2, seed=5)
    assert [order[n] for n in range(10)] == [
        [7, 6], [0, 3], [6, 5], [2, 1], [4, 2],
        [1, 2], [5, 7], [4, 0], [6, 5], [3, 4]]


def test_an_epoch_is_drawn_once(draws):
    """In training, while the next iteration's clips are read ahead, over the border of two epochs."""
    order = Order([(1,)] * 8, batch_size=2, seed=3)
    expected = [Order([(1,)] * 8, batch_size=2, seed=3)[n] for n in range(13)]
    draws.clear()
    for n in range(12):
        assert order[n + 1] == expected[n + 1]  # the thread's
        assert order[n] == expected[n]
        assert order[n] == expected[n]
    assert draws == ["order 3 0", "order 3 1", "order 3 2", "order 3 3"]
    assert order[0] == expected[0] and len(draws) == 5  # only two epochs are kept
    order[0].clear()
    assert order[0] == expected[0]  # what a caller does to a batch changes no other


def test_a_second_thread_waits_for_the_draw_of_the_first(monkeypatch):
    expected = Order([(1,)] * 8, 2, 0)[2]
    order = Order([(1,)] * 8, 2, 0)
    made, found = [], []
    second = threading.Thread(target=lambda: found.append(order[2]))

    class Interrupted(random.Random):
        def __init__(self, key):
            made.append(key)
            if len(made) == 1:
                second.start()
                second.join(0.3)  # it could end now if it did not wait
            super().__init__(key)

    monkeypatch.setattr("clips.random.Random", Interrupted)
    found.append(order[2])
    second.join()
    assert found == [expected, expected] and made == ["order 0 0"]


def test_an_order_may_leave_clips_out():
    order = Order([(1,)] * 9, batch_size=2, seed=0, subset=[1, 4, 6, 8])
    assert order.batches_per_epoch == 2 and sorted(order[0] + order[1]) == [1, 4, 6, 8]
    with pytest.raises(InputError, match="no clip is left"):
        Order([(1,)], batch_size=2, seed=0, subset=[])


def test_shapes_with_fewer_clips_than_a_batch_are_told():
    shapes = [(16, 2, 4, 6)] * 7 + [(16, 2, 6, 4)] * 2 + [(16, 1, 4, 6)] * 3
    warning, = Order(shapes, batch_size=3, seed=0).repeated
    assert "shape [16, 2, 6, 4]" in warning and "only 2 " in warning and "--batch_size is 3" in warning
    assert Order(shapes, batch_size=2, seed=0).repeated == []
    assert len(Order(shapes, batch_size=8, seed=0).repeated) == 3
    assert Order(shapes, batch_size=3, seed=0, subset=range(7)).repeated == []


# ------------------------------------------------------------------------------ in training

@pytest.fixture
def told(monkeypatch):
    """The text states that models are told while the test runs."""
    seen, run = [], WanModel._run

    def watched(self, x, t, context, *rest):
        seen.extend(context)
        return run(self, x, t, context, *rest)

    monkeypatch.setattr(WanModel, "_run", watched)
    monkeypatch.setattr(train_pavrm, "evaluate", lambda *_: None)
    return seen


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_the_chosen_caption_is_what_the_model_is_told(quick, told, script):
    """Short and long ones, where both are asked for."""
    run(script, "run", "--steps", "2", "--long_caption", "0.5", "--drop_prompt", "0")
    captions = {2: short_texts(range(8)), 5: long_texts(range(8))}
    assert {len(text) for text in told} == set(captions)
    for text in told:
        assert any(torch.equal(text, caption) for caption in captions[len(text)])


def test_a_dropped_prompt_is_the_empty_one(quick, told):
    run(train_prfl, "run", "--steps", "1", "--drop_prompt", "1")
    assert told and all(torch.equal(text, draw((2, 8), 0).bfloat16()) for text in told)


def test_every_epoch_has_another_order(quick, monkeypatch):
    """Eight clips in batches of four: two batches per epoch, each clip once, in another order than before."""
    seen, load = [], Clips.load
    monkeypatch.setattr(Clips, "load", lambda self, i: seen.append(i) or load(self, i))
    monkeypatch.setattr(train_pavrm, "evaluate", lambda *_: None)
    run(train_pavrm, "run", "--steps", "6")
    epochs = [seen[-24:][8 * n:8 * n + 8] for n in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("script", [train_pavrm, train_prfl])
def test_a_clip_that_breaks_during_training_ends_it(world, monkeypatch, script):
    """By its name: no other clip takes its place, and nothing is saved."""
    file, log = Path("clips/3.safetensors"), records.Log

    def breaks(*inputs):  # after all checks
        file.write_bytes(file.read_bytes()[:-200])
        return log(*inputs)

    monkeypatch.setattr(records, "Log", breaks)
    with pytest.raises(InputError, match="clip 3: .*3.safetensors is damaged"):
        run(script, "run", "--steps", "8")
    assert not records.checkpoints("run")
    assert not Path("run/reward").exists() and not Path("run/model").exists()
