"""The GPU of a process, without one: its number, the order of the attention kernels, --deterministic."""
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend

import gpu
import train_pavrm
import train_prfl
from files import InputError
from testdata.helpers import ROOT
from tools import bench

CUDA = torch.device("cuda", 0)
FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION


# ------------------------------------------------------------------------------ one GPU for each process

@pytest.mark.parametrize("local_rank, count, index", [(0, 8, 0), (7, 8, 7), (0, 1, 0), (7, 1, 0)])
def test_the_gpu_of_a_process(local_rank, count, index):
    """Its own of those it sees; some launchers show each process one GPU, which has number 0 then."""
    assert gpu.index(local_rank, count) == index


def test_more_processes_than_gpus():
    with pytest.raises(InputError, match="more processes than the 2 GPUs here"):
        gpu.index(2, 2)


def test_two_processes_on_one_gpu(monkeypatch):
    """Of one that each process sees, it must be another one for each."""
    def gathered(names, name):
        names[:] = others + [name]

    uuid = "GPU-b"
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    monkeypatch.setattr(gpu.socket, "gethostname", lambda: "node 1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    others = ["node 1 GPU-a"]
    gpu.check_own(CUDA)
    uuid = "GPU-a"
    with pytest.raises(InputError, match="2 processes share one GPU .node 1 GPU-a.; lower --nproc_per_node"):
        gpu.check_own(CUDA)
    gpu.check_own(torch.device("cpu"))


# ------------------------------------------------------------------------------ attention

@pytest.fixture
def fake_gpu(monkeypatch):
    """fake_gpu(capability): from now on PyTorch says that there is one GPU. What is set is undone later."""
    before = torch._C._get_sdp_priority_order()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(gpu, "_attention", None)
    fill = torch.utils.deterministic.fill_uninitialized_memory

    def make(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    yield make
    gpu._attention.__exit__(None, None, None)
    assert torch._C._get_sdp_priority_order() == before
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("capability, first", [((7, 5), FLASH), ((8, 0), FLASH), ((8, 9), FLASH),
                                               ((9, 0), CUDNN), ((10, 0), CUDNN), ((12, 0), CUDNN)])
def test_the_fastest_attention_comes_first(fake_gpu, capability, first):
    """Hopper and newer have cuDNN's, all others flash; the slow ones are the last in any case."""
    fake_gpu(capability)
    assert gpu.start() == CUDA
    order = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]
    second = CUDNN if first is FLASH else FLASH
    assert order[:4] == [first, second, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def test_whoever_uses_cuda_starts_it_in_one_place():
    """Only gpu.py looks for a GPU, and so sets the order. The models that encode need none: their attention
    is float32 or written out, and neither flash nor cuDNN takes it."""
    looking = set()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")):
        if "torch.cuda.is_available()" in path.read_text() and not path.stem.startswith("test_"):
            looking.add(path.stem)
    assert looking == {"gpu", "encode", "data"}


# ------------------------------------------------------------------------------ --deterministic

def test_deterministic_algorithms_are_asked_for_once(fake_gpu):
    fake_gpu((9, 0))
    gpu.start(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # with warnings, atomics stay
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # else PyTorch refuses matrix products
    gpu.start()  # another run in the same process
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("main, flags", [(train_pavrm.main, []), (train_prfl.main, []),
                                         (bench.main, ["forward"])])
def test_the_flag_arrives_before_the_first_process_group(monkeypatch, main, flags):
    class Started(Exception):
        pass

    def start(deterministic=False):
        raise Started(deterministic, dist.is_initialized())

    monkeypatch.setattr(gpu, "start", start)
    for more, value in ([], False), (["--deterministic"], True):
        with pytest.raises(Started) as found:
            main([*flags, *more])
        assert found.value.args == (value, False)
