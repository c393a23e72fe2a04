"""Reading a file runs nothing in it, wrong ones get a sentence, written ones appear whole or not at all."""
import copy
import errno
import json
import math
import os
import random
import re

import pytest
import torch
from safetensors.torch import save_file

import files
import forms
from files import InputError, atomic_write, load_weights, save_weights
from testdata.helpers import TINY


class Trap:
    """Pickled, this would create a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickled_object_is_not_run(tmp_path):
    torch.save({"weight": torch.zeros(2, 2), "trap": Trap(tmp_path / "sprung")}, tmp_path / "model.pth")
    with pytest.raises(InputError, match="model.pth is damaged or holds more than tensors"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "model.pth", weights_only=False)  # the trap works
    assert (tmp_path / "sprung").exists()


def test_a_pth_that_is_not_a_dictionary_of_tensors(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="list.pth is damaged"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "list.pth")


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("fault, raised", [(full_disk, OSError), (interrupted, KeyboardInterrupt)])
@pytest.mark.parametrize("where", ["save_file", "os.fsync"])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, fault, raised, where):
    save_weights(tmp_path / "model", {"a": torch.ones(3)}, {"version": 1})

    def fail_late(*args, **kwargs):
        if where == "save_file":
            args[1].write_bytes(b"half")  # something is on the disk already
        fault()

    monkeypatch.setattr(f"files.{where}", fail_late)
    with pytest.raises(raised):
        save_weights(tmp_path / "model", {"a": torch.zeros(3)}, {"version": 2})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["model"]
    assert files.read_json(tmp_path / "model/config.json") == {"version": 1}
    layer = torch.nn.Module()
    layer.a = torch.nn.Parameter(torch.zeros(3))
    assert load_weights(layer, tmp_path / "model").a.tolist() == [1, 1, 1]


def test_an_old_save_is_replaced_but_nothing_else_is(tmp_path):
    save_weights(tmp_path / "model", {"a": torch.ones(3)}, {"version": 1})
    (tmp_path / "model/diffusion_pytorch_model.safetensors.index.json").write_text("of an older save")
    save_weights(tmp_path / "model", {"a": torch.zeros(3)}, {"version": 2})
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert os.listdir(tmp_path) == ["model"]
    (tmp_path / "model/Wan2.1_VAE.pth").write_text("precious")
    with pytest.raises(InputError, match="holds other files .Wan2.1_VAE.pth."):
        save_weights(tmp_path / "model", {"a": torch.ones(3)}, {})
    assert (tmp_path / "model/Wan2.1_VAE.pth").read_text() == "precious"


def test_a_directory_is_never_replaced_by_a_file(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/precious").write_text("")
    with pytest.raises(InputError, match="results is a directory"):
        files.write_json(tmp_path / "results", {})
    assert os.listdir(tmp_path) == ["results"] and os.listdir(tmp_path / "results") == ["precious"]


def test_others_may_read_what_is_written(tmp_path):
    umask = os.umask(0o022)
    try:
        save_weights(tmp_path / "model", {"a": torch.ones(3)}, {})
    finally:
        os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()} == {0o644}


def test_a_failed_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    save_weights(tmp_path / "model", {"a": torch.ones(3)}, {"version": 1})
    rename = files.Path.rename

    def refuse_new(path, target):
        if path.name.endswith(".new"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(files.Path, "rename", refuse_new)
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "model") as beside:
        beside.mkdir()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["model"]
    assert files.read_json(tmp_path / "model/config.json") == {"version": 1}


def test_a_shard_named_by_the_index_is_missing(tmp_path):
    save_weights(tmp_path / "model", {"a": torch.ones(3)}, {})
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    (tmp_path / "model/diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="model-00001-of-00002.safetensors does not exist"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "model")


# ------------------------------------------------------------------------------ JSON of others

WRONG = [None, True, -1, 0.5, 10**400, 10**9, float("nan"), float("inf"), "", "word", [], [[]], {}, {"a": {}}]

GOOD = {  # a value of each form
    "CONFIG": {**TINY, "eps": 1e-6, "_class_name": "WanModel"},
    "REWARD_CONFIG": {**TINY, "pavrm": {"num_blocks": 2, "labels": ["motion_quality"], "use_clip": False,
                                        "pool": "query", "num_queries": 1}},
    "SAMPLING": {"size": [64, 48], "frames": 17, "fps": 16, "solver_steps": 20, "shift": 5.0, "guidance": 1.0,
                 "prompt": ["a ball"], "negative_prompt": ""},
    "ENTRY": {"file": "a.safetensors", "source_id": "a", "short_caption": "s", "long_caption": "l",
              "labels": {}, "pair_id": None, "shape": [16, 2, 4, 4], "model_type": "t2v", "fps": 16},
    "META": {"source_id": "one", "short_caption": "s", "latents_path": "a.npy", "pair_id": 3},
    "LOG": {"step": 1, "reward": 0.5, "k": [1, 2], "loss_by_timestep": {"0-200": 0.5}},
    "SCORES": {"reward_model": "r", "timesteps": [200, 800], "measures": {"l": {"200": {"auc": None}}},
               "scores": [{"name": "a", "reward": 0.5, "rewards": {"l": [0.5, 0.4]}}]}}


def mutations(value):
    """Copies of nested plain data in which one part is missing, or has one of the WRONG values instead."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        for wrong in WRONG:
            changed = copy.copy(value)
            changed[key] = wrong
            yield changed
        if isinstance(value, dict):
            yield {other: part for other, part in value.items() if other != key}
        if isinstance(value[key], dict | list):
            for part in mutations(value[key]):
                changed = copy.copy(value)
                changed[key] = part
                yield changed


@pytest.mark.parametrize("name", GOOD)
def test_json_of_others_has_its_form_or_a_sentence_says_where_not(tmp_path, name):
    """Each key missing, of another type, nested, huge; the sentence names the file, and how it should be."""
    form, path = getattr(forms, name), tmp_path / "a.json"
    path.write_text(json.dumps(GOOD[name]))
    assert files.read_json(path, form) == GOOD[name]
    refused = taken = 0
    for changed in [*mutations(GOOD[name]), *WRONG]:
        try:
            path.write_text(json.dumps(changed))
            assert isinstance(files.read_json(path, form), dict)
            taken += 1
        except InputError as error:
            assert re.fullmatch(r".*/a\.json: \S.* (is missing|is .{1,60}); expected .+", str(error)), error
            refused += 1
    assert refused > 20 and taken


@pytest.mark.parametrize("form, value, message", [
    ({"dim": range(2, 201)}, {"dim": 10**6}, "a.json: dim is 1000000; expected a whole number from 2 to 200"),
    ({"a": {"b": [float]}}, {"a": {"b": [1, "x"]}}, r'a.json: a.b\[1\] is "x"; expected a number'),
    ({"a": (int, None)}, {"a": [1]}, "a.json: a is a list; expected a whole number or null"),
    ({"a": (str, [str])}, {"a": ["x", 1]}, r"a.json: a\[1\] is 1; expected text"),
    ({"a": [int, int]}, {"a": [1, 2, 3]}, "a.json: a is a list; expected a list of 2"),
    ({"a": [int]}, {"a": []}, "a.json: a is a list; expected a list that is not empty"),
    ({"a": int}, {}, "a.json: a is missing; expected a whole number"),
    ({"a": {"x", "y"}}, {"a": "z"}, 'a.json: a is "z"; expected x or y'),
    ({str: files.NOTHING}, {"path": "/etc"}, 'a.json: path is "/etc"; expected no such key'),
    ({"a": files.Number(1, 9, step=4)}, {"a": 7}, r"a.json: a is 7; expected 1 \+ 4n from 1 to 9"),
    (dict, 3, "a.json: the content is 3; expected an object"),
])
def test_what_a_sentence_about_a_form_says(tmp_path, form, value, message):
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=f"{message}$"):
        files.read_json(tmp_path / "a.json", form)


@pytest.mark.parametrize("content, message", [
    (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"\x00\xff", "not UTF-8 text"),
    (b"1" * 9999, "digits"), (b"[" * 99999, "recursion"), (b"\xef\xbb\xbf{}", None)])
def test_a_text_that_is_not_json(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    if message is None:
        assert files.read_json(tmp_path / "a.json") == {}
        return
    with pytest.raises(InputError, match=f"a.json is .*{message}"):
        files.read_json(tmp_path / "a.json")


def test_what_is_not_a_file(tmp_path):
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for read in (files.read_json, files.open_safetensors):
        for name in ("none", "broken", "circle", "\0", "a" * 5000):
            with pytest.raises(InputError, match="does not exist; check the path"):
                read(tmp_path / name)
        for name in (".", "pipe"):
            with pytest.raises(InputError, match="is not a file; check the path"):
                read(tmp_path / name)


def test_half_of_a_character_is_written_as_json_has_it(tmp_path):
    """As in the name of a file that is not UTF-8."""
    files.write_json(tmp_path / "a.json", {"path": "a\udcff.mp4"})
    assert files.read_json(tmp_path / "a.json") == {"path": "a\udcff.mp4"}


# ------------------------------------------------------------------------------ weights of others

class Pair(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(2, 3, dtype=dtype))
        self.b = torch.nn.Parameter(torch.zeros(4, dtype=dtype))


def write(path, tensors):
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_neither_loaded_nor_saved(tmp_path, suffix, dtype, value):
    tensors = {"a": torch.ones(2, 3, dtype=dtype), "b": torch.ones(4, dtype=dtype)}
    path = tmp_path / f"weights{suffix}"
    write(path, tensors)
    assert load_weights(Pair(dtype), path).a.sum() == 6
    tensors["b"][2] = value
    write(path, tensors)
    with pytest.raises(InputError, match=f"weights{suffix}: b has NaN or infinite values; copy or make"):
        load_weights(Pair(dtype), path)
    with pytest.raises(InputError, match=r"out/\S*.safetensors was not written, for b is NaN or infinite"):
        save_weights(tmp_path / "out", tensors, {})
    with pytest.raises(InputError, match="out.safetensors was not written, for b is NaN or infinite"):
        files.write_safetensors(tmp_path / "out.safetensors", tensors)
    assert os.listdir(tmp_path) == [path.name]


def test_a_value_that_overflows_in_the_models_type(tmp_path):
    save_file({"a": torch.full((2, 3), 1e30), "b": torch.ones(4)}, tmp_path / "a.safetensors")
    load_weights(Pair(torch.bfloat16), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="a.safetensors: a has NaN or infinite values"):
        load_weights(Pair(torch.float16), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="a is NaN or infinite"):
        save_weights(tmp_path / "out", {"a": torch.full((2, 3), 1e30)}, {}, dtype=torch.float16)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", ["empty", "cut", "header", "longer", "random", "zeros"])
def test_damaged_files_of_weights(tmp_path, suffix, damage):
    path = tmp_path / f"weights{suffix}"
    write(path, {"a": torch.ones(2, 3), "b": torch.ones(4)})
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[:-9], "header": b"\xff" * 8 + whole[8:],
                      "longer": whole + bytes(9), "random": random.Random(0).randbytes(999),
                      "zeros": bytes(len(whole))}[damage])
    try:
        loaded = load_weights(Pair(), path)
        assert suffix == ".pth" and damage in ("longer", "header")  # a zip is read from its end, and is whole
        assert loaded.a.sum() == 6 and loaded.b.sum() == 4
    except InputError as error:
        assert re.search(f"weights{suffix} is damaged", str(error))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("change, message", [
    ({"a": torch.ones(2, 3, dtype=torch.int64)}, "weights.*: a is torch.int64, expected floating-point"),
    ({"a": torch.ones(2, 3, dtype=torch.bool)}, "weights.*: a is torch.bool, expected"),
    ({"a": torch.ones(2, 3, dtype=torch.complex64)}, "weights.*: a is torch.complex64, expected"),
    ({"a": torch.ones(3, 2)}, r"another model: a is \[3, 2\], expected \[2, 3\]"),
    ({"a": torch.ones(0, 3)}, r"weights.*: a has no values, \[0, 3\]"),
    ({"c": torch.ones(1)}, "c is not expected"),
])
def test_wrong_tensors(tmp_path, suffix, change, message):
    path = tmp_path / f"weights{suffix}"
    write(path, {"a": torch.ones(2, 3), "b": torch.ones(4), **change})
    with pytest.raises(InputError, match=message):
        load_weights(Pair(), path)


@pytest.mark.parametrize("state", [[1], 3, {"a": 1}, {"a": torch.ones(2, 3).to_sparse()},
                                   {"a": torch.ones(2, 3, device="meta")}, {"model": {"a": torch.ones(1)}}])
def test_a_pth_of_other_things(tmp_path, state):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match="a.pth is damaged or holds more than tensors"):
        load_weights(Pair(), tmp_path / "a.pth")


def test_a_pth_whose_names_are_numbers(tmp_path):
    torch.save({1: torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="another model: a is missing; b is missing; 1 is not expected"):
        load_weights(Pair(), tmp_path / "a.pth")


@pytest.mark.parametrize("weight_map, message", [
    ({"a": "../one.safetensors"}, "names the file '../one.safetensors'; it may only name"),
    ({"a": "/etc/passwd"}, "names the file '/etc/passwd'"),
    ({"a": "one.pth"}, "names the file 'one.pth'"),
    ({"a": 1}, "index.json: weight_map.a is 1; expected text"),
    ([], "index.json: weight_map is a list; expected an object"),
    ({}, "a is missing; b is missing"),
    ({"a": "one.safetensors", "b": "two.safetensors"}, "model: a is in two files"),
])
def test_an_index_of_shards_names_files_beside_it(tmp_path, weight_map, message):
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("one", "two"):
        save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, directory / f"{name}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=message):
        load_weights(Pair(), directory)


def test_no_memory_is_taken_for_weights_that_do_not_fit(tmp_path):
    """A model of a terabyte is refused at once, because its file holds another."""
    save_file({"a": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    with torch.device("meta"):
        huge = torch.nn.Linear(2**19, 2**19)
    with pytest.raises(InputError, match="a checkpoint of another model"):
        load_weights(huge, tmp_path / "a.safetensors", device="cpu")
