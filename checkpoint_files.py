"""The files of a checkpoint, as DCP (torch.distributed.checkpoint) writes them: one per rank, and .metadata.

What is added here: checksums of all files; a full disk shows as one; and nothing is unpickled but tensors,
numbers and DCP's own descriptions of them, for a pickle can run any program.
"""
import pickle
import re
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner

from files import InputError, is_finite, is_main, read_json, write_json

CHECKSUMS = "checksums.json"  # {name of a file: its CRC-32}
DTYPES = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
DESCRIPTIONS = {"BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"}
IN_METADATA = {"torch.Size", "torch.serialization._get_layout", "pathlib.PosixPath",
               "pathlib._local.PosixPath", "torch.distributed.checkpoint.filesystem._StorageInfo", *DTYPES,
               *(f"torch.distributed.checkpoint.metadata.{name}" for name in DESCRIPTIONS)}


# ------------------------------------------------------------------------------ writing

class Writer(dcp.FileSystemWriter):
    """Keeps the error of the disk, in place of which PyTorch says "unexpected pos 704 vs 598"."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise error.__context__ or error from None


def checksum(path):
    """CRC-32 of a file, at 3 GB/s on one core where the file is still in memory.

    The 171 GB of a 14B's weights and optimizer state take 57 s in one rank and 7 s in each of eight: beside
    training when they are saved, before it when it is resumed.
    """
    value = 0
    with open(path, "rb") as file:
        while part := file.read(2**20):
            value = zlib.crc32(part, value)
    return value


def write_checksums(directory, group):
    """Write the checksums of all files. Every rank must call this, and reads what it has just written."""
    own = list(directory.glob(f"__{dist.get_rank()}_*"))
    if is_main():
        own.append(directory / ".metadata")
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {path.name: checksum(path) for path in own}, group)
    if is_main():
        write_json(directory / CHECKSUMS, {name: value for part in parts for name, value in part.items()})


# ------------------------------------------------------------------------------ reading

def read_checkpoint(state, directory):
    """Fill the tensors of `state` in place. Returns all that is wrong with the checkpoint, in words.

    Every rank must call this, and all get the same answer.
    """
    faults = everywhere(changed_files(directory))
    if faults:
        return faults
    try:
        dcp.load(state, storage_reader=Reader(directory), planner=Planner())
    except pickle.UnpicklingError as error:
        return [str(error)]
    except CheckpointException as error:
        reasons = [reason for reason, _ in error.failures.values()]
        return sorted({re.split(r"\.\s", str(reason))[0] or type(reason).__name__ for reason in reasons})
    return [f"{name} is not finite" for name in everywhere(not_finite(state))]


def changed_files(directory):
    """What is wrong with this rank's share of the files, in words."""
    if not Path(directory, CHECKSUMS).exists():
        return []  # an earlier version wrote none
    try:
        sums = read_json(directory / CHECKSUMS, {".metadata": int, str: int})
    except InputError:
        return [f"{CHECKSUMS} cannot be read"]
    faults = []
    for name in list(sums)[dist.get_rank()::dist.get_world_size()]:
        try:
            if checksum(directory / name) != sums[name]:
                faults.append(f"{name} is not what was written")
        except OSError as error:
            faults.append(f"{name} cannot be read: {error.strerror}")
    return faults


class Reader(dcp.FileSystemReader):
    """Reads .metadata, a pickle, without running what it may hold."""

    def __init__(self, directory):
        super().__init__(directory)
        try:
            with open(Path(directory, ".metadata"), "rb") as file:
                self.metadata = MetadataUnpickler(file).load()
        except Exception as error:  # a damaged pickle raises anything
            raise pickle.UnpicklingError(f".metadata cannot be read: {error}") from None

    def read_metadata(self):
        return self.metadata


class MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if f"{module}.{name}" not in IN_METADATA:
            raise pickle.UnpicklingError(f"it would run {module}.{name}, which belongs in no checkpoint")
        return super().find_class(module, name)


class Planner(DefaultLoadPlanner):
    """Refuses values that would run a program, before DCP unpickles them without a check of its own."""

    def load_bytes(self, read_item, value):
        try:
            torch.load(value, weights_only=True)
        except Exception:  # of many kinds
            name = read_item.dest_index.fqn
            raise pickle.UnpicklingError(f"{name} is damaged, or more than tensors and numbers") from None
        value.seek(0)
        super().load_bytes(read_item, value)


# ------------------------------------------------------------------------------ finite, on all ranks

def not_finite(values, name=""):
    """The names of this rank's tensors, in dicts of dicts, that hold NaN or infinite values."""
    found = []
    if isinstance(values, dict):
        for key, value in values.items():
            found += not_finite(value, f"{name} {key}".strip())
    elif isinstance(values, torch.Tensor) and not is_finite(values):
        found.append(name)
    return found


def everywhere(own):
    """The items of all ranks' lists, sorted, each once. Every rank must call this."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return sorted({item for part in parts for item in part})
