"""The scripts on a GPU that is not there.

Whole runs of `main`, in bf16, on tensors that say they are on cuda:0 and are computed on the CPU. They fail
where they would fail on a GPU, or be slow there:

    tensors of both devices in one operator   a table or a schedule was left on the CPU
    bf16 and float32 in one                   matrix product, convolution, attention or layer norm
    the host waits for the GPU                .item(), bool(tensor), .cpu(), nonzero, tensors made of numbers:
                                              only in functions that are listed here, and in no rollout
    numbers that are not a CPU's in bf16      where only a GPU goes: FSDP2 on cuda, fused AdamW, offloading

FSDP2 is the real one, with one process. PyTorch's own FakeTensorMode would not do: its tensors have no
values, and backward on its cuda tensors needs a PyTorch that was built with CUDA.

What this cannot see: CUDA's kernels (whether there is one for a type and a shape, how exact it is, how fast),
memory, streams (dummies here) and so whether a copy is waited for, pinned memory, NCCL (gloo here), several
processes, compiled blocks, and where PyTorch's own code waits.
"""
import shutil
import sys
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import av
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses import fake_tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

import files
import gpu as gpu_module
import model
import sample
import score
import train_pavrm
import train_prfl
from clips import Clips
from encode import encode_clips
from model import rotary_table
from reward import PAVRM
from solver import SOLVERS, UniPC, walk
from t5 import T5_FILE
from testdata.golden import draw
from testdata.helpers import (
    ROOT,
    SHAPE,
    brightening,
    fill_pavrm,
    fill_vae,
    flat,
    numbers,
    run,
    tiny,
    weights_of,
)
from vae import VAE_FILE
from video import read_video

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and says more")
torch.set_num_threads(1)  # everything here is tiny: more threads only get in each other's way

aten = torch.ops.aten
CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")


# ------------------------------------------------------------------------------ a GPU that is not there

class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU. `on_cpu`: a plain one, with which everything is computed.

    PyTorch's C++ code takes it for a meta tensor, and so its autograd asks for no GPU.
    """
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        values = values.resolve_conj() if values.is_complex() else values
        self = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device=META)
        self.on_cpu = values
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise RuntimeError(f"{op} of a GPU's tensor, outside a_gpu() or in another thread")

    def data_ptr(self):
        return self.on_cpu.data_ptr()

    def untyped_storage(self):
        return self.on_cpu.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, numbers):
        return torch.tensor(numbers, dtype=self.dtype, device=CUDA)

    def __getitem__(self, places):
        return super().__getitem__(as_tensors(places))

    def __setitem__(self, places, value):
        super().__setitem__(as_tensors(places), value)


def as_tensors(places):
    """An index whose lists are tensors: PyTorch would make those of a meta tensor without values."""
    if isinstance(places, tuple):
        return tuple(map(as_tensors, places))
    return torch.tensor(places, dtype=torch.long, device=CUDA) if isinstance(places, list) else places


class Gpu(TorchDispatchMode):
    """Computes what is asked of the pretended GPU, in `with a_gpu() as gpu:`, as strictly as CUDA.

    gpu.waits: where the host waited for it, such as "parallel.mean reads" or "clips.collate sends".
    """

    def __init__(self):
        super().__init__()
        self.waits = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = tensors_in([args, list(kwargs.values())], [])
        if any(isinstance(x, DTensor) for x in tensors):
            return NotImplemented  # it asks again, with the part of it that this process has
        ours = {id(x.on_cpu): x for x in tensors if isinstance(x, OnGpu)}
        if not ours and "device" not in kwargs or any(isinstance(x, fake_tensor.FakeTensor) for x in tensors):
            return op(*args, **kwargs)  # a CPU's own; fake tensors are those with which DTensor plans
        check_types(op, args, tensors)
        to_gpu = goes_to_gpu(op, args, tensors, kwargs.get("device"))
        if wait := wait_of(op, args, kwargs, tensors, to_gpu):
            self.waits.add(f"{place()} {wait}")
        if to_gpu and "device" in kwargs:
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        out = op(*values_of(args), **{name: values_of(value) for name, value in kwargs.items()})
        return on_gpu(out, ours) if to_gpu else out


def tensors_in(x, found):
    """Add the tensors in an operator's arguments to a list, which is returned."""
    if isinstance(x, torch.Tensor):
        found.append(x)
    elif type(x) in (list, tuple):
        for part in x:
            tensors_in(part, found)
    return found


def values_of(x):
    if type(x) in (list, tuple):
        return type(x)(map(values_of, x))
    return x.on_cpu if isinstance(x, OnGpu) else x


def on_gpu(x, ours):
    """An operator's results on the GPU. What was written in place is the tensor that was given."""
    if type(x) in (list, tuple):
        return type(x)(on_gpu(part, ours) for part in x)
    if not isinstance(x, torch.Tensor):
        return x
    return ours[id(x)] if id(x) in ours else OnGpu(x)


def goes_to_gpu(op, args, tensors, device):
    """Whether an operator's results are on the GPU."""
    if op is aten.copy_.default:
        return isinstance(args[0], OnGpu)
    given = any(isinstance(x, OnGpu) for x in tensors)
    if device is None or device == META and given:  # META: the device that PyTorch takes an input's to be ...
        return given
    if device == META:                              # ... or that of a module without weights
        return op is aten.scalar_tensor.default or torch._C._current_autograd_node() is not None
    return device.type == "cuda"


def check_types(op, args, tensors):
    """Raise RuntimeError where CUDA does and a CPU does not."""
    others = [x for x in tensors if not isinstance(x, OnGpu)]
    if len(others) == len(tensors) or op in (aten.copy_.default, aten._to_copy.default):
        return
    number = torch.Tag.pointwise in op.tags and all(x.ndim == 0 and x.device == CPU for x in others)
    if others and (not number or op._schema.is_mutable and args[0] is others[0]):
        raise RuntimeError(f"{op} got tensors on cuda:0 and on the CPU, not all on the same device")
    if op is aten.native_layer_norm.default and len({x.dtype for x in tensors}) > 1:
        raise RuntimeError(f"{op} got tensors that are not all of the same dtype")


def wait_of(op, args, kwargs, tensors, to_gpu):
    """"reads" or "sends" if the host waits for all that the GPU has to do, else None."""
    given = any(isinstance(x, OnGpu) for x in tensors)
    if op in (aten._to_copy.default, aten.copy_.default):
        from_gpu = isinstance(args[1] if op is aten.copy_.default else args[0], OnGpu)
        if from_gpu == to_gpu or kwargs.get("non_blocking") or args[2:3] == (True,):
            return None
        return "reads" if from_gpu else "sends"
    if op in (aten.index.Tensor, aten.index_put_.default):  # only a mask must be counted first
        return "reads" if given and any(x.dtype == torch.bool for x in tensors[1:]) else None
    return "reads" if given and depends_on_values(op) else None


@cache
def depends_on_values(op):
    """Whether an operator's result is a number, or has a shape, that the host must know."""
    return torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags


def place():
    """The function of this project in which the present operator was called: file.function."""
    frame = sys._getframe()
    while frame:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.parent == ROOT and not path.stem.startswith("test_") and not name.startswith("<"):
            return f"{path.stem}.{name}"
        frame = frame.f_back
    return "a test"


@contextmanager
def a_gpu():
    """`with a_gpu() as gpu:` this machine seems to have one GPU."""
    init, sdpa, kernel_of = dist.init_process_group, F.scaled_dot_product_attention, torch._fused_sdp_choice
    data, generator = torch.Tensor.data, torch.Generator
    stream = MagicMock(is_capturing=lambda: False)
    cuda = dict(is_available=True, is_initialized=True, _lazy_init=None, device_count=1, current_device=0,
                set_device=None, get_device_capability=(9, 0),
                get_device_properties=SimpleNamespace(uuid="GPU-0", total_memory=80e9),
                is_current_stream_capturing=False, max_memory_allocated=0, reset_peak_memory_stats=None,
                Stream=stream, current_stream=stream, stream=stream, Event=MagicMock())

    def attention(q, k, v):  # a CPU's kernels, which PyTorch would not choose for our tensors
        if not isinstance(q, OnGpu):
            return sdpa(q, k, v)
        if not q.dtype == k.dtype == v.dtype:
            raise RuntimeError("attention got q, k and v that are not all of the same dtype")
        if SDPBackend(kernel_of(q.on_cpu, k.on_cpu, v.on_cpu)) == SDPBackend.FLASH_ATTENTION:
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        return aten._scaled_dot_product_attention_math(q, k, v)[0]

    def numbered(function):  # "cuda" is the first GPU; PyTorch would ask CUDA
        def call(*args, **kwargs):
            args = [CUDA if isinstance(x, str | torch.device) and str(x) == "cuda" else x for x in args]
            if str(kwargs.get("device")) == "cuda":
                kwargs["device"] = CUDA
            return function(*args, **kwargs)
        return call

    def set_data(self, value):  # modules and FSDP2 move weights so
        if isinstance(value, OnGpu) != isinstance(self, OnGpu):
            torch.utils.swap_tensors(self, torch.nn.Parameter(value.detach(), self.requires_grad))
        else:
            data.__set__(self, value)
            if isinstance(self, OnGpu):
                self.on_cpu = value.on_cpu

    with pytest.MonkeyPatch.context() as patch:
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        patch.setattr(torch.accelerator, "current_stream", lambda *_: stream)
        patch.setattr(dist, "init_process_group",
                      lambda backend, **rest: init(backend.replace("nccl", "gloo"), **rest))
        patch.setattr(F, "scaled_dot_product_attention", attention)
        patch.setattr(torch, "_fused_sdp_choice", lambda *_: SDPBackend.FLASH_ATTENTION.value)
        patch.setattr(torch, "Generator", lambda device="cpu": generator())
        patch.setattr(torch, "tensor", numbered(torch.tensor))
        patch.setattr(torch.Tensor, "to", numbered(torch.Tensor.to))
        patch.setattr(torch.Tensor, "data", property(data.__get__, set_data))
        patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        patch.setattr(DTensor, "device", property(lambda self: self._local_tensor.device), raising=False)
        patch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
        patch.setattr(gpu_module, "_attention", None)  # what start() puts here ends with the test
        rotary_table.cache_clear()
        torch._C._ensureCUDADeviceGuardSet()       # a PyTorch with CUDA asks no driver
        torch._C._set_only_lift_cpu_tensors(True)  # a tensor of numbers is made on the CPU and then sent
        try:
            with Gpu() as gpu:
                yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            rotary_table.cache_clear()


# ------------------------------------------------------------------------------ what it notices

@pytest.mark.parametrize("look", [
    lambda x: x.sum().item(), lambda x: float(x[0, 0]), lambda x: bool(x.isnan().any()), lambda x: x.tolist(),
    lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: torch.empty(2, 3).copy_(x), lambda x: x.nonzero(),
    lambda x: x[x > 0], lambda x: torch.equal(x, x)])
def test_reading_in_a_rollout_is_noticed(look):
    assert waits_of_a_rollout(look) == {"solver.walk reads"}


@pytest.mark.parametrize("send", [
    lambda x: torch.tensor([1.0], device=x.device), lambda x: torch.ones(3).to(x.device), lambda x: x[[0]],
    lambda x: x.new_tensor([1.0]), lambda x: x.clone().copy_(torch.ones(2, 3))])
def test_sending_in_a_rollout_is_noticed(send):
    assert waits_of_a_rollout(send) == {"solver.walk sends"}


def waits_of_a_rollout(velocity):
    with a_gpu() as gpu:
        x = torch.zeros(2, 3, device="cuda")
        walk(lambda x, t: [velocity(x), t[:, None] * x][1], x, UniPC(3, 5.0))
    return gpu.waits


@pytest.mark.parametrize("mixed, error", [
    (lambda x: x + torch.ones(3), "same device"),
    (lambda x: x @ torch.ones(3, 3), "same device"),
    (lambda x: torch.stack([x[0, 0], torch.zeros(())]), "same device"),
    (lambda x: torch.zeros(()).add_(x.sum()), "same device"),
    (lambda x: x.bfloat16() @ x.T, "same dtype"),
    (lambda x: F.linear(x.bfloat16(), x), "same dtype"),
    (lambda x: F.conv1d(x[None].bfloat16(), x[:, :2, None]), "should be the same"),
    (lambda x: F.scaled_dot_product_attention(x[None], x[None].bfloat16(), x[None]), "same dtype"),
    (lambda x: F.layer_norm(x.bfloat16(), (3,), x[0], x[1]), "same dtype")])
def test_what_does_not_go_together_is_refused(mixed, error):
    with a_gpu(), pytest.raises(RuntimeError, match=error):
        mixed(torch.zeros(2, 3, device="cuda"))


def test_a_table_left_on_the_cpu_is_noticed(monkeypatch):
    monkeypatch.setattr(model, "rotary_table", lambda grid, width, device: rotary_table(grid, width, CPU))
    with a_gpu(), pytest.raises(RuntimeError, match="same device"):
        policy = tiny(num_layers=1).to(CUDA, torch.bfloat16)
        policy(torch.zeros(1, *SHAPE, device=CUDA), torch.zeros(1, device=CUDA),
               [torch.zeros(2, 8, device=CUDA)])


def test_what_a_gpu_takes():
    """A single number of the CPU, copies that do not block, what backward makes: nothing waits for them."""
    with a_gpu() as gpu:
        x = torch.ones(2, 3, device="cuda").requires_grad_()
        (torch.where(x > 0, 3 * x * x, 0.0).unbind()[0].sum() * torch.tensor(0.5)).backward()
        on_cpu = torch.empty(2, 3).copy_(x.grad, non_blocking=True)
        assert not gpu.waits
        assert x.grad.device == CUDA and type(on_cpu) is torch.Tensor
        assert x.grad.tolist() == on_cpu.tolist() == [[3.0] * 3, [0.0] * 3]


# ------------------------------------------------------------------------------ rollouts

@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v"])
def test_a_rollout_and_the_rewarded_step_wait_for_nothing(kind):
    """Once the model's first call has made its table of angles. A ti2v model has one timestep per token."""
    changes = dict(num_layers=1, model_type=kind, in_dim=36 if kind == "i2v" else 16)
    with a_gpu() as gpu:
        policy = tiny(**changes).to(CUDA, torch.bfloat16)
        pavrm = fill_pavrm(policy.config, 1, 3, 4).requires_grad_(False).to(CUDA)
        pavrm.dit.to(torch.bfloat16)
        noise, texts, condition = draw((1, *SHAPE), 5).to(CUDA), [draw((5, 8), 30).to(CUDA)], {}
        if kind == "i2v":
            condition["y"] = draw((1, 20, *SHAPE[1:]), 6).to(CUDA)
            condition["clip_fea"] = draw((1, 5, 1280), 7).to(CUDA)

        def velocity(x, t):
            return policy(x, t[:, None].expand(-1, 8) if kind == "ti2v" else t, texts, **condition)

        def judge(x, t):
            return pavrm(x, t, texts, **condition)

        velocity(noise, torch.zeros(1, device=CUDA))
        gpu.waits.clear()
        for solver in SOLVERS if kind == "t2v" else ["unipc"]:
            x, logit, distance = train_prfl.rewarded_step(
                velocity, judge, SOLVERS[solver](6, 5.0), noise, k=3, gradient_steps=2, start=velocity)
            (distance - logit.sum()).backward()
            assert (x.device, x.dtype, logit.dtype) == (CUDA, torch.float32, torch.float32)
        assert not gpu.waits
        assert all(weight.grad.device == CUDA for weight in policy.parameters())


# ------------------------------------------------------------------------------ training

# Where the host may wait: for weights, for the clips of a micro-step, for the numbers of the log, to save.
LOADING = {"files._load_tensor sends", "files.fill sends", "files.is_finite reads", "parallel.shard sends",
           "model.rotary_table sends"}
PRFL_WAITS = LOADING | {
    "clips.collate sends", "clips.choose_caption sends", "train_prfl.__init__ sends", "train_prfl.make sends",
    "train_prfl.main sends", "reward.value sends", "parallel.clip_gradients reads", "parallel.mean reads",
    "files.gather reads"}
PAVRM_WAITS = LOADING | {
    "clips.collate sends", "clips.choose_caption sends", "train_pavrm.make sends", "train_pavrm.main sends",
    "train_pavrm.main reads", "parallel.clip_gradients reads", "files.gather reads",
    "evaluation.score_clips sends", "evaluation.score_clips reads", "evaluation.process_logits sends"}
BF16 = ["--compute_dtype", "bf16"]


def make_world(**changes):
    """Put other models into the world, of one block each: every operator takes time here."""
    shutil.rmtree("model")
    shutil.rmtree("reward")
    small = tiny(num_layers=1, **changes)
    small.save_pretrained("model")
    fill_pavrm(small.config, 1, 3, 4).save_pretrained("reward")
    fill_vae("model")


def agree(on_gpu, on_cpu):
    """Assert that two logs have the same numbers. Rounding may differ: a GPU's AdamW is a fused one."""
    assert len(on_gpu) == len(on_cpu) > 0
    for a, b in zip(numbers(on_gpu), numbers(on_cpu), strict=True):
        assert flat(a) == pytest.approx(flat(b), rel=1e-3)


SAMPLES = ["--samples", "1", "--sample_every", "1", "--sample_guidance", "1"]
LORA = ["--lora_rank", "2", "--rollout_guidance", "2", "--kl_weight", "1", "--solver", "dpm++",
        "--activation_checkpointing", "--ema", "0.5", "--offload", "inputs", "ema"]
RWR = ["--phases", "rwr", "reward", "--kl_weight", "1", "--gradient_steps", "2", "--judge", "clean",
       "--solver", "euler", "--activation_checkpointing", "--save_attention", "--bf16_residual",
       "--offload", "weights"]
SAMPLING_WAITS = {"monitor.measure_sample reads", "monitor.measure_sample sends", "vae.statistics sends"}
LORA_WAITS = {"lora.save_adapter reads", "ema.__init__ reads", "ema.update reads", "ema._swap reads",
              "ema._swap sends"}


@pytest.mark.parametrize("kind, flags, more", [
    ("t2v", SAMPLES, SAMPLING_WAITS), ("i2v", LORA, LORA_WAITS), ("t2v", RWR, set())],
    ids=["samples", "lora", "rwr"])
def test_prfl(quick, kind, flags, more):
    if kind == "t2v":
        make_world()
    else:
        make_world(model_type="i2v", in_dim=36, use_clip=False)
        for i in range(8):
            tensors = weights_of(f"clips/{i}.safetensors") | {"condition": draw(SHAPE, 50 + i)}
            files.write_safetensors(f"clips/{i}.safetensors", tensors)
    flags = ["--steps", "1", "--accumulation", "1", "--solver_steps", "3", "--k", "1", *flags]
    with a_gpu() as gpu:
        log = run(train_prfl, "gpu", "--no-compile", *flags)
    assert gpu.waits <= PRFL_WAITS | more
    agree(log, run(train_prfl, "cpu", *flags, *BF16))


@pytest.mark.full
def test_a_run_is_saved_and_resumed(world):
    make_world()
    flags = ["--phases", "sft", "--reward", "none", "--accumulation", "1"]
    with a_gpu() as gpu:
        run(train_prfl, "gpu", "--no-compile", *flags, "--steps", "1")
        log = run(train_prfl, "gpu", "--no-compile", *flags, "--steps", "2", "--resume")
    assert "checkpoint_files.read_checkpoint sends" in gpu.waits
    agree(log, run(train_prfl, "cpu", *flags, *BF16, "--steps", "2"))


@pytest.mark.parametrize("flags", [
    [], pytest.param(["--loss", "bt", "--pool", "max", "--lora_rank", "2", "--ema", "0.5"],
                     marks=pytest.mark.full)], ids=["ce", "bt"])
def test_pavrm(pairs, flags):
    make_world()
    flags = ["--steps", "1", "--num_blocks", "1", *flags]
    with a_gpu() as gpu:
        log = run(train_pavrm, "gpu", "--no-compile", *flags)
    assert gpu.waits <= PAVRM_WAITS
    agree(log, run(train_pavrm, "cpu", *flags, *BF16))


# ------------------------------------------------------------------------------ encoding, sampling, scoring

ENCODING = LOADING | {
    "encode.text reads", "encode.encode sends", "encode.encode reads", "encode.image_latents sends",
    "t5.encode_prompts sends", "clip.forward sends", "vae.statistics sends"}
SAMPLING = {"sample.main sends", "sample.main reads", "sample.mean_reward reads",
            "evaluation.process_logits sends"}
SCORING = LOADING | {
    "clips.collate sends", "evaluation.process_logits sends", "evaluation.score_clips sends",
    "evaluation.score_clips reads", "score.attention_video sends", "score.attention_video reads"}


def test_encoding(models, entries, tmp_path):
    """A CPU computes alike: umT5 in bf16, the VAE and CLIP in float32."""
    settings = {"size": (48, 32), "frames": 5, "fps": 16}
    with a_gpu() as gpu:
        encode_clips(entries[1:], models["i2v"], tmp_path / "gpu", **settings)
    assert gpu.waits <= ENCODING
    encode_clips(entries[1:], models["i2v"], tmp_path / "cpu", **settings, device="cpu")
    on_gpu, on_cpu = (weights_of(tmp_path / place / "clips/a.safetensors") for place in ("gpu", "cpu"))
    assert set(on_gpu) == set(on_cpu) == {"latents", "condition", "clip", "text_short", "text_long"}
    for name, tensor in on_gpu.items():
        assert torch.allclose(tensor.float(), on_cpu[name].float(), atol=1e-5), name


def test_sampling(models, world):
    """From an image; of two seeds the better one, and the other is dropped on the way."""
    small = tiny(model_type="i2v", in_dim=36, use_clip=False, num_layers=1, text_len=32, text_dim=16)
    small.save_pretrained("i2v")
    fill_pavrm(small.config, 1, 3, 4).save_pretrained("judge")
    for file in ("google", VAE_FILE, T5_FILE):
        Path("i2v", file).symlink_to(models["i2v"] / file)
    av.VideoFrame.from_ndarray(brightening(2, 32, 32)[1].numpy()).save("a.png")
    with a_gpu() as gpu:
        sample.main(["--model", "i2v", "--image", "a.png", "--prompt", "a red ball", "--size", "32x32",
                     "--frames", "5", "--solver_steps", "2", "--best_of", "2", "--drop_at", "1", "--reward",
                     "judge", "--save_file", "a.mp4"])
    assert gpu.waits <= ENCODING | SAMPLING
    assert read_video("a.mp4", 16, 5).shape == (5, 32, 32, 3)


def test_scoring(world):
    """Rewards in bf16 are near those in float32; so is where the reward model looks."""
    make_world()
    flags = ["--data", "clips/index.jsonl", "--reward", "reward", "--timesteps", "400"]
    clip, video = Clips("clips/index.jsonl").load(0), brightening(5)
    results, heats = [], []
    for machine in (a_gpu(), nullcontext()):
        with machine as gpu:
            score.main([*flags, "--output", "scores"])
            dist.destroy_process_group()
            device = torch.device("cuda" if gpu else "cpu")
            pavrm = PAVRM.from_pretrained("reward", torch.bfloat16 if gpu else torch.float32, device)
            heats.append(score.attention_video(pavrm, pavrm.query_attention, clip, video, [400], 0, device))
        if gpu:
            assert gpu.waits <= SCORING
        results.append([row["reward"] for row in files.read_json("scores/scores.json")["scores"]])
    assert results[0] == pytest.approx(results[1], abs=0.01)
    assert (heats[0].float() - heats[1].float()).abs().max() < 20
