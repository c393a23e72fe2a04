"""Read files strictly and write them atomically.

Everything that the project loads or saves passes through here, so three promises are kept in one place:

* JSON of others has the expected form (forms.py), or a sentence says where it differs.
* Loaded weights have exactly the expected names and shapes, and are finite. They are never unpickled into
  objects, and stream tensor by tensor into place (a plain tensor or this rank's shard of one).
* A saved file or directory appears whole or not at all: it is written beside its place, flushed to the disk
  and then renamed. Weights that are not finite are not written.
"""
import json
import math
import os
import shutil
import sys
from collections import namedtuple
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


# ------------------------------------------------------------------------------ text and JSON of others

Number = namedtuple("Number", "low high step", defaults=[0])  # step 1: whole numbers, 4: low + 4n, 0: any
NOTHING = set()                            # {"a": int, str: NOTHING}: an object without any key but "a"
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", None: "null",
         dict: "an object", list: "a list", object: "a value"}


def check_file(path):
    """Raise InputError unless `path` is a file, or a link to one."""
    if not os.path.isfile(path):
        what = "is not a file" if os.path.exists(path) else "does not exist"
        raise InputError(f"{path} {what}; check the path")


def read_text(path):
    """The text of a UTF-8 file. Whatever goes wrong becomes a sentence with its name."""
    check_file(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # spreadsheets begin with a BOM
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def parse_json(text, where, form=object):
    """The value of JSON text that was read from `where`; InputError unless it has the form (`check_form`)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise InputError(f"{where} is not valid JSON ({error}); fix it or write it again") from None
    return check_form(value, form, where)


def read_json(path, form=object):
    """The value of a JSON file; InputError unless it has the form (`check_form`)."""
    return parse_json(read_text(path), path, form)


def check_form(value, form, where, hint=""):
    """Return `value`, which was read from `where`; InputError unless it has the form:

        int, float, str, bool, dict, list, None, object   such a value; numbers are finite; object is any
        range(1, 9), Number(0, 1)     a whole number of the range; a number from 0 to 1
        {"t2v", "i2v"}                one of these values
        [int], [int, str]             whole numbers, at least one; a list of just these two
        {"a": int, "b?": str}         an object with a, and with b or without; other keys are ignored
        {str: int}                    an object whose (other) keys all have whole numbers
        (int, [int], None)            one of these forms

    hint: what to do, if the form does not say it.
    """
    if fault := fault_of(value, form):
        key, what, expected = fault
        hint = hint and f"; {hint}"
        raise InputError(f"{where}: {key or 'the content'} {what}; expected {describe(expected)}{hint}")
    return value


def fault_of(value, form, key=""):
    """(key, what is wrong with its value, the form that is expected there) of the first fault, or None."""
    if type(form) is tuple:
        faults = [fault_of(value, each, key) for each in form]
        if None in faults:
            return None
        deepest = max(faults, key=lambda fault: len(fault[0]))
        return deepest if deepest[0] != key else (key, deepest[1], form)
    parts = []  # (value, form, key) of what is inside
    if isinstance(form, dict) and isinstance(value, dict):
        prefix = f"{key}." if key else ""
        for name in form:
            if name is not str and not name.endswith("?") and name not in value:
                return prefix + name, "is missing", form[name]
        for name, part in value.items():
            parts.append((part, form.get(name, form.get(f"{name}?", form.get(str, object))), prefix + name))
    elif isinstance(form, list) and type(value) in (list, tuple) and value and len(form) in (1, len(value)):
        parts = [(part, form[i % len(form)], f"{key}[{i}]") for i, part in enumerate(value)]
    elif not fits(value, form):
        shown = WORDS.get(type(value)) if isinstance(value, dict | list) else json.dumps(value)
        return key, f"is {shown[:60]}", form
    return next((fault for part in parts if (fault := fault_of(*part))), None)


def fits(value, form):
    """Whether a value has one of the forms without parts."""
    if form is float:
        form = Number(-sys.float_info.max, sys.float_info.max)  # not nan, not inf
    if isinstance(form, range):
        form = Number(form[0], form[-1], form.step)
    if isinstance(form, tuple):  # a Number, perhaps that of a flag
        if type(value) is not int and (form.step or type(value) is not float):
            return False
        return form.low <= value <= form.high and (not form.step or (value - form.low) % form.step == 0)
    if isinstance(form, set):
        return isinstance(value, str) and value in form
    return form is object or value is form or type(value) is form


def describe(form):
    """A form in words."""
    if type(form) is tuple:
        return " or ".join(map(describe, form))
    if isinstance(form, range):
        form = Number(form[0], form[-1], form.step)
    if isinstance(form, tuple):
        kind = {0: "a number", 1: "a whole number"}.get(form.step, f"{form.low} + {form.step}n")
        return f"{kind} from {form.low:,} to {form.high:,}"
    if isinstance(form, set):
        return " or ".join(sorted(form)) or "no such key"
    if isinstance(form, list):
        return "a list that is not empty" if len(form) == 1 else f"a list of {len(form)}"
    return WORDS[dict if isinstance(form, dict) else form]


# ------------------------------------------------------------------------------ reading weights

def open_safetensors(path):
    """`safe_open`; raises InputError if the file is missing, truncated or not a safetensors file."""
    check_file(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error}); "
                         f"copy or make it again") from None


def weight_files(path):
    """The files with the weights at `path`: a directory (sharded or not), a .safetensors or a .pth file."""
    path = Path(path)
    if not path.is_dir():
        check_file(path)
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        names = set(read_json(indices[0], {"weight_map": {str: str}})["weight_map"].values())
        for name in sorted(names):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(f"{indices[0]} names the file {name!r}; "
                                 f"it may only name .safetensors files beside it")
        return [path / name for name in sorted(names)]
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} safetensors files and no index; "
                         f"expected an official model directory")
    return found


def read_weights(path):
    """Yield (name, shape, read) for every tensor at `path`; `read(rows)` reads a slice of its first axis."""
    for file in weight_files(path):
        yield from read_safetensors(file) if file.suffix == ".safetensors" else _read_pth(file)


def read_safetensors(file):
    """`read_weights` of one .safetensors file."""
    tensors = open_safetensors(file)
    for name in tensors.keys():
        part = tensors.get_slice(name)

        def read(rows=None, name=name, part=part):
            try:
                return tensors.get_tensor(name) if rows is None else part[rows]
            except (SafetensorError, RuntimeError) as error:  # a type that torch does not have
                raise InputError(f"{file}: {name} cannot be read ({error}); use the official file") from None

        yield name, tuple(part.get_shape()), read


def _read_pth(file):
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        shapes = {str(name): tuple(tensor.shape) for name, tensor in state.items()}
        if not all(tensor.layout == torch.strided and not tensor.is_meta for tensor in state.values()):
            raise ValueError("not all of its tensors are plain ones")
    except Exception as error:  # torch raises many kinds; in each case nothing from the file has been run
        reason = str(error).strip().partition("\n")[0][:200]
        raise InputError(f"{file} is damaged or holds more than tensors and was not loaded "
                         f"({type(error).__name__}: {reason}); use the official file") from None
    for name, shape in shapes.items():
        yield name, shape, lambda rows=None, name=name: state[name] if rows is None else state[name][rows]


def weight_shapes(path):
    """{tensor name: shape} of the weights at `path`, read from the headers only."""
    shapes = {}
    for name, shape, _ in read_weights(path):
        if name in shapes or 0 in shape:
            what = "is in two files" if name in shapes else f"has no values, {list(shape)}"
            raise InputError(f"{path}: {name} {what}; use the official files")
        shapes[name] = shape
    return shapes


@torch.no_grad()
def load_weights(module, path, prefix="", ignore=(), device=None, merge=None):
    """Fill `module` in place from the weights at `path`. All names and shapes must match, else InputError.

    prefix: only names with this prefix are read, and the prefix is stripped (CLIP's file holds two towers).
    ignore: names that then start with one of these are skipped (a reward model does not use the transformer's
    head). device: where a module on the meta device gets its memory, after names and shapes have been found
    to match. The adapters of LoRA are not part of a checkpoint and keep their values. Parameters that
    `fully_shard` has turned into DTensors read only this rank's part. Memory: the module and one tensor.
    merge: {name: function}; function(tensor, rows) replaces what was read, rows or all (lora_files.merging).
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
    if device is not None:
        ours = module.to_empty(device=device).state_dict()
    for file in weight_files(path):
        for name, _, read in read_weights(file):
            if wanted(name):
                own = name.removeprefix(prefix)
                _load_tensor(ours[own], read, f"{file}: {name}", (merge or {}).get(own))
    return module


def _load_tensor(tensor, read, where, merge=None):
    """Read one tensor into its place, or this rank's part of it. InputError unless its values are numbers.

    The values are looked at once where they have arrived: a pass over 28 GB of a bf16 14B model's weights, or
    57 GB in float32, beside reading the same bytes from the disk. One core does 10 GB a second, a GPU 2,000.
    """
    rows = own_rows(tensor)
    values = read(rows)
    if not values.is_floating_point():
        raise InputError(f"{where} is {values.dtype}, expected floating-point numbers; use the official file")
    if merge:
        values = merge(values, rows)
    if rows is None:
        fill(tensor, values)
    else:
        tensor.to_local().copy_(values)
    if not is_finite(tensor):
        raise InputError(f"{where} has NaN or infinite values; copy or make the file again")


def is_finite(tensor):
    """Whether no value (of a sharded tensor: of this rank's part) is NaN or infinite; one pass, no copy."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(value.isfinite().item() for value in torch.aminmax(tensor))  # NaN becomes both


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
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    with atomic_write(path) as beside:  # half of a character, as odd file names have, becomes its JSON escape
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} to one safetensors file, atomically."""
    with atomic_write(path) as beside:
        _save_file(tensors, beside, path, metadata)


def _save_file(tensors, beside, path, metadata=None):
    for name in tensors:
        if not is_finite(tensors[name]):
            raise InputError(f"{path} was not written, for {name} is NaN or infinite; what was there stays")
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
