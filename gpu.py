"""The GPU of this process: which one it is, which attention kernel runs on it, and --deterministic.

What PyTorch reads about GPUs when it is imported is set at the head of cli.py.
"""
import os
import socket

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from files import InputError

_attention = None  # the context of the kernels' order, never left; garbage collection would leave it


def start(deterministic=False):
    """Choose this process's GPU and the order of its attention kernels. Returns the device, or the CPU.

    Every script that runs a transformer calls it, or parallel.start, which does. `deterministic` comes from
    the flag; it must be known before the first process group, since NCCL reads it too.
    """
    global _attention
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", index(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()))
    torch.cuda.set_device(device)
    _attention = sdpa_kernel(attention_kernels(torch.cuda.get_device_capability(device)), set_priority=True)
    _attention.__enter__()
    torch.use_deterministic_algorithms(deterministic)  # True: no cuDNN, and flash adds in order
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # needless writes of NaN
    return device


def index(local_rank, count):
    """The GPU of a process among the `count` it sees. Some launchers show each process only its own."""
    if count == 1:
        return 0
    if local_rank >= count:
        raise InputError(f"there are more processes than the {count} GPUs here; lower --nproc_per_node")
    return local_rank


def attention_kernels(capability):
    """The fastest first, for a GPU of compute capability (major, minor); where one does not run, PyTorch
    takes the next."""
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if capability >= (9, 0):  # Hopper and newer
        fused.reverse()
    return [*fused, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def check_own(device):
    """Refuse two processes on one GPU, which NCCL would report only as "invalid usage"."""
    if device.type != "cuda":
        return
    names = [None] * dist.get_world_size()
    name = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    dist.all_gather_object(names, name)
    if names.count(name) > 1:
        raise InputError(f"{names.count(name)} processes share one GPU ({name}); lower --nproc_per_node")
