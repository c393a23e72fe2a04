"""Reading a file never runs anything in it, and written files appear whole or not at all."""
import errno
import os

import pytest
import torch

import files
from files import InputError, atomic_write, load_weights, save_weights


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


@pytest.mark.parametrize("content, message", [(None, "does not exist"), ("{", "not valid JSON")])
def test_wrong_json(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        files.read_json(tmp_path / "config.json")


def test_a_shard_named_by_the_index_is_missing(tmp_path):
    save_weights(tmp_path / "model", {"a": torch.ones(3)}, {})
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    (tmp_path / "model/diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="model-00001-of-00002.safetensors does not exist"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "model")
