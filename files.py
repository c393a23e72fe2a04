"""Read weights strictly, write files whole.

Everything the project loads or saves passes through here, so two promises are kept in one place:

* what is loaded has exactly the expected names and shapes, is never unpickled into objects, and streams
  tensor by tensor into its place (a plain tensor or this rank's shard of one);
* what is saved appears whole or not at all: it is written beside its place, flushed to the disk, then renamed.
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
    """Something that the user gave is wrong. The message is one sentence: what, where, what to do."""


# ---------------------------------------------------------------------------------------------- reading

def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); mend it or write it again") from None


def open_safetensors(path):
    """`safe_open`, with a sentence where the file is missing, cut short or something else."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; check the path")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error}); copy or make it again") from None


def weight_files(path):
    """The files that hold the weights at `path`: a directory (sharded or not), a .safetensors or a .pth file."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist; check the path")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        return [path / name for name in sorted(set(read_json(indices[0])["weight_map"].values()))]
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} safetensors files and no index; expected an official model directory")
    return found


def read_weights(path):
    """Yield (name, shape, read) for every tensor at `path`; `read(rows)` returns a slice of its first axis from the file, and
    `read()` all of it."""
    for file in weight_files(path):
        if file.suffix == ".safetensors":
            with open_safetensors(file) as tensors:
                for name in tensors.keys():
                    yield name, tuple(tensors.get_slice(name).get_shape()), lambda rows=None, name=name: (
                        tensors.get_tensor(name) if rows is None else tensors.get_slice(name)[rows])
        else:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            except Exception as error:  # torch raises many kinds; whichever it is, nothing of the file has been run
                reason = str(error).strip().splitlines()[0][:200]
                raise InputError(f"{file} is damaged or holds more than tensors and was not loaded "
                                 f"({type(error).__name__}: {reason}); use the official file") from None
            for name, shape in shapes.items():
                yield name, shape, lambda rows=None, name=name: state[name] if rows is None else state[name][rows]


def weight_shapes(path):
    """{tensor name: shape} of the weights at `path`, from the headers alone."""
    return {name: shape for name, shape, _ in read_weights(path)}


@torch.no_grad()
def load_weights(module, path, prefix="", ignore=()):
    """Fill `module` in place from the weights at `path`; all names and shapes must match.

    `prefix` selects and strips a prefix of the file's names (CLIP's file holds two towers); names that start with
    one of `ignore` are passed over (a reward model has no use for the transformer's head). Parameters that
    `fully_shard` has turned into DTensors read this rank's part alone. Never holds more than the module and one tensor.
    """
    def wanted(name):
        return name.startswith(prefix) and not name.removeprefix(prefix).startswith(tuple(ignore))

    ours = {name: tensor for name, tensor in module.state_dict().items() if ".lora_" not in name}  # adapters are no part of it
    theirs = {name.removeprefix(prefix): shape for name, shape in weight_shapes(path).items() if wanted(name)}
    faults = ([f"{name} is missing" for name in ours if name not in theirs]
              + [f"{name} is not expected" for name in theirs if name not in ours]
              + [f"{name} is {list(theirs[name])}, expected {list(ours[name].shape)}"
                 for name in ours if name in theirs and theirs[name] != tuple(ours[name].shape)])
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(f"{path} is a checkpoint of another model: {'; '.join(faults[:3])}{more}; "
                         f"give the directory or file that matches the configuration")
    for name, _, read in read_weights(path):
        if wanted(name):
            tensor = ours[name.removeprefix(prefix)]
            rows = own_rows(tensor)
            fill(tensor, read()) if rows is None else tensor.to_local().copy_(read(rows))
    return module


def own_rows(tensor):
    """The slice of the first axis that this rank holds of a tensor sharded along it; None of any other."""
    if not isinstance(tensor, DTensor) or Shard(0) not in tensor.placements:
        return None
    axis = tensor.placements.index(Shard(0))
    rows = math.ceil(len(tensor) / tensor.device_mesh.size(axis))
    first = tensor.device_mesh.get_local_rank(axis) * rows
    return slice(min(first, len(tensor)), min(first + rows, len(tensor)))


@torch.no_grad()
def fill(target, values):
    """Copy a whole tensor, which every rank has, into a plain tensor or into this rank's shard of one."""
    if isinstance(target, DTensor):
        values = distribute_tensor(values.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(values)


def whole(tensor):
    """A tensor gathered from all ranks, which must all call this; a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------------------------------------- writing

@contextmanager
def written_whole(path):
    """`with written_whole(path) as beside:` write a file or a directory at `beside`; it is renamed to `path` if all went well.

    On any error, or Ctrl-C, what was written is removed and what stood at `path` before still stands. A directory
    is never replaced by a file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, before = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    remove(beside)
    try:
        yield beside
        if path.is_dir() and not beside.is_dir():
            raise InputError(f"{path} is a directory; give the name of a file")
        for file in [beside, *beside.rglob("*")] if beside.is_dir() else [beside]:
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
    """Wait until a file or a directory's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_json(path, value):
    with written_whole(path) as beside:
        beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} to one safetensors file, whole or not at all."""
    with written_whole(path) as beside:
        _save_file(tensors, beside, path, metadata)


def _save_file(tensors, beside, path, metadata=None):
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)  # safetensors lets only the owner read
        flush(beside)  # now, so that other ranks wait for one file at a time
    except SafetensorError as error:  # the disk is full, say
        raise OSError(f"{path} could not be written ({error}); what stood there before is untouched") from None


@torch.no_grad()
def save_weights(directory, state, config, name="diffusion_pytorch_model", dtype=None, merge=None):
    """Write a state dict in the official layout: config.json and safetensors, cut at 5 GB with an index.

    Every rank calls it (sharded tensors are gathered one at a time); rank 0 holds one file at most, and writes.
    `config` is the content of config.json. `dtype` casts floating tensors, None keeps them. `merge` has a function for some
    names, through which their tensors go when their turn comes: an adapter that is added, in float32.
    """
    directory = Path(directory)
    others = [file.name for file in sorted(directory.glob("*")) if file.name != "config.json" and not file.name.startswith(name)]
    if others:  # the directory is replaced as a whole, and those would be lost
        raise InputError(f"{directory} holds other files ({', '.join(others[:3])}); save to a directory of its own")
    merge = merge or {}
    size = {key: tensor.numel() * (dtype or (torch.float32 if key in merge else tensor.dtype)).itemsize for key, tensor in state.items()}
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
            tensor = whole(merge[key](state[key].detach()) if key in merge else state[key].detach())
            if is_main():
                tensors[key] = tensor.to("cpu", dtype or tensor.dtype)
        return tensors

    if not is_main():
        for keys in shards:
            gather(keys)
        dist.barrier()  # nobody goes on before the files stand
        return
    with written_whole(directory) as beside:
        beside.mkdir()
        for file, keys in zip(names, shards):
            _save_file(gather(keys), beside / file, directory / file, {"format": "pt"})
        if len(shards) > 1:
            weight_map = {key: file for file, keys in zip(names, shards) for key in keys}
            index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
            (beside / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if dist.is_initialized():
        dist.barrier()


def is_main():
    return not dist.is_initialized() or dist.get_rank() == 0
