"""Read weights strictly and write files atomically.

Everything that the project loads or saves passes through here, so two promises are kept in one place:

* Loaded weights have exactly the expected names and shapes. They are never unpickled into objects, and stream
  tensor by tensor into place (a plain tensor or this rank's shard of one).
* A saved file or directory appears whole or not at all: it is written under a temporary name,
  flushed to the disk and then renamed.
"""
import json
import math
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

SHARD_BYTES = 5 * 1000**3  # the size at which the official checkpoints are cut


class InputError(ValueError):
    """The user gave something wrong. The message is one sentence that says what, where and what to do."""


# ------------------------------------------------------------------------------ reading

def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); fix it or write it again") from None


def open_safetensors(path):
    """`safe_open`; raises InputError if the file is missing, truncated or not a safetensors file."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; check the path")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error}); "
                         f"copy or make it again") from None


def weight_files(path):
    """The files with the weights at `path`: a directory (sharded or not), a .safetensors or a .pth file."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist; check the path")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        names = set(read_json(indices[0])["weight_map"].values())
        return [path / name for name in sorted(names)]
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} safetensors files and no index; "
                         f"expected an official model directory")
    return found


def read_weights(path):
    """Yield (name, shape, read) for every tensor at `path`.

    `read()` returns the tensor from the file, `read(rows)` only a slice of its first axis.
    """
    for file in weight_files(path):
        yield from _read_safetensors(file) if file.suffix == ".safetensors" else _read_pth(file)


def _read_safetensors(file):
    with open_safetensors(file) as tensors:
        for name in tensors.keys():
            part = tensors.get_slice(name)

            def read(rows=None, name=name, part=part):
                return tensors.get_tensor(name) if rows is None else part[rows]

            yield name, tuple(part.get_shape()), read


def _read_pth(file):
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except Exception as error:  # torch raises many kinds; in each case nothing from the file has been run
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"{file} is damaged or holds more than tensors and was not loaded "
                         f"({type(error).__name__}: {reason}); use the official file") from None
    for name, shape in shapes.items():
        def read(rows=None, name=name):
            return state[name] if rows is None else state[name][rows]

        yield name, shape, read


def weight_shapes(path):
    """{tensor name: shape} of the weights at `path`, read from the headers only."""
    return {name: shape for name, shape, _ in read_weights(path)}


@torch.no_grad()
def load_weights(module, path, prefix="", ignore=()):
    """Fill `module` in place from the weights at `path`. All names and shapes must match, else InputError.

    prefix: only names with this prefix are read, and the prefix is stripped (CLIP's file holds two towers).
    ignore: names that then start with one of these are skipped (a reward model does not use the transformer's
    head). The adapters of LoRA are not part of a checkpoint and keep their values. Parameters that
    `fully_shard` has turned into DTensors read only this rank's part. Memory: the module and one tensor.
    """
    def wanted(name):
        return name.startswith(prefix) and not name.removeprefix(prefix).startswith(tuple(ignore))

    ours = {name: tensor for name, tensor in module.state_dict().items() if ".lora_" not in name}
    theirs = {name.removeprefix(prefix): shape for name, shape in weight_shapes(path).items() if wanted(name)}
    faults = [f"{name} is missing" for name in ours if name not in theirs]
    faults += [f"{name} is not expected" for name in theirs if name not in ours]
    for name, tensor in ours.items():
        if name in theirs and theirs[name] != tuple(tensor.shape):
            faults.append(f"{name} is {list(theirs[name])}, expected {list(tensor.shape)}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(f"{path} is a checkpoint of another model: {'; '.join(faults[:3])}{more}; "
                         f"give the directory or file that matches the configuration")
    for name, _, read in read_weights(path):
        if wanted(name):
            tensor = ours[name.removeprefix(prefix)]
            rows = own_rows(tensor)
            if rows is None:
                fill(tensor, read())
            else:
                tensor.to_local().copy_(read(rows))
    return module


def own_rows(tensor):
    """This rank's slice of the first axis of a tensor that is sharded along it; None for other tensors."""
    if not isinstance(tensor, DTensor) or Shard(0) not in tensor.placements:
        return None
    axis = tensor.placements.index(Shard(0))
    rows = math.ceil(len(tensor) / tensor.device_mesh.size(axis))
    first = tensor.device_mesh.get_local_rank(axis) * rows
    return slice(min(first, len(tensor)), min(first + rows, len(tensor)))


@torch.no_grad()
def fill(target, values):
    """Copy a full tensor, which every rank has, into a plain tensor or into this rank's shard of one."""
    if isinstance(target, DTensor):
        values = values.to(target.device)
        values = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(values)


def full_tensor(tensor):
    """Gather a sharded tensor; every rank must call this. A plain tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ------------------------------------------------------------------------------ writing

@contextmanager
def atomic_write(path):
    """`with atomic_write(path) as beside:` write a file or a directory at `beside`; at the end it is renamed.

    On any error, or Ctrl-C, `beside` is removed and `path` stays as it was. A file never replaces a
    directory.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    before = path.with_name(f".{path.name}.old")
    remove(beside)
    try:
        yield beside
        if path.is_dir() and not beside.is_dir():
            raise InputError(f"{path} is a directory; give the name of a file")
        flush(beside)
        if beside.is_dir():
            for file in beside.rglob("*"):
                flush(file)
        if path.is_dir():  # rename cannot replace a directory that is not empty
            remove(before)
            path.rename(before)
        beside.rename(path)
        remove(before)
    except BaseException:
        if before.exists() and not path.exists():
            before.rename(path)
        remove(beside)
        raise


def flush(path):
    """Wait until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_json(path, value):
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} to one safetensors file, atomically."""
    with atomic_write(path) as beside:
        _save_file(tensors, beside, path, metadata)


def _save_file(tensors, beside, path, metadata=None):
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)  # safetensors lets only the owner read
        flush(beside)  # now, so that other ranks wait for one file at a time
    except SafetensorError as error:  # for example a full disk
        raise OSError(f"{path} could not be written ({error}); what was there before is untouched") from None


@torch.no_grad()
def save_weights(directory, state, config, name="diffusion_pytorch_model", dtype=None, merge=None):
    """Write a state dict in the official layout: config.json and safetensors, cut at 5 GB with an index.

    Every rank must call it. Sharded tensors are gathered one at a time; rank 0 holds at most one file, and
    writes. config: the content of config.json. dtype: what tensors are cast to; None keeps their dtypes.
    merge: {name: function}; each of these tensors is replaced by function(tensor), in float32, just before it
    is written (lora.merges).
    """
    directory = Path(directory)
    names = sorted(file.name for file in directory.glob("*"))
    others = [other for other in names if other != "config.json" and not other.startswith(name)]
    if others:  # they would be lost, because the whole directory is replaced
        raise InputError(f"{directory} holds other files ({', '.join(others[:3])}); "
                         f"save to a directory of its own")
    merge = merge or {}

    # Distribute the tensors over files of at most SHARD_BYTES.
    size = {}
    for key, tensor in state.items():
        saved_dtype = dtype or (torch.float32 if key in merge else tensor.dtype)
        size[key] = tensor.numel() * saved_dtype.itemsize
    shards = [[]]
    for key in state:
        if shards[-1] and sum(size[other] for other in shards[-1]) + size[key] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(key)
    if len(shards) == 1:
        names = [f"{name}.safetensors"]
    else:
        names = [f"{name}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]

    def gather(keys):
        tensors = {}
        for key in keys:
            tensor = state[key].detach()
            if key in merge:
                tensor = merge[key](tensor)
            tensor = full_tensor(tensor)
            if is_main():
                tensors[key] = tensor.to("cpu", dtype or tensor.dtype)
        return tensors

    if not is_main():
        for keys in shards:
            gather(keys)
        dist.barrier()  # no rank goes on before the files exist
        return
    with atomic_write(directory) as beside:
        beside.mkdir()
        for file, keys in zip(names, shards, strict=True):
            _save_file(gather(keys), beside / file, directory / file, {"format": "pt"})
        if len(shards) > 1:
            weight_map = {key: file for file, keys in zip(names, shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
            (beside / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if dist.is_initialized():
        dist.barrier()


def is_main():
    return not dist.is_initialized() or dist.get_rank() == 0
