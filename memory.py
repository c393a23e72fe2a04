"""What is kept for backward, and where: activation checkpointing, and offloading to CPU memory.

A 14B block at 720P x 81 frames keeps 12 to 21 GB for its backward, or 8 to 9 GB if it is compiled. Its input
alone takes 0.8 GB in bf16. Activation checkpointing keeps only the inputs of the blocks and computes the rest
again, one block at a time. Offloading also moves the inputs to CPU memory.
"""
import importlib.util
import logging
import os
import shutil
import sysconfig
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from files import InputError

aten = torch.ops.aten
ATTENTION = [aten._scaled_dot_product_cudnn_attention.default,
             aten._scaled_dot_product_flash_attention.default,
             aten._scaled_dot_product_efficient_attention.default,
             aten._scaled_dot_product_flash_attention_for_cpu.default]


# ------------------------------------------------------------------------------ compiled blocks

def compiles(args, device):
    """Whether blocks are compiled: on CUDA, unless --no-compile says otherwise."""
    return device.type == "cuda" if args.compile is None else args.compile


def compile_block(block, save_attention=False):
    """Compile a block: one graph per resolution, with or without gradient, frozen or trained.

    For backward it keeps the results of attention, of exchanges between ranks, and of linear layers (addmm).
    It computes the rest again, which costs little: norms, modulation, rotation and GELU, which are fused, and
    adapters, which are small and have no bias (mm). Left to itself the compiler keeps twice as much, and with
    its memory budget it computes cuDNN's attention again.

    save_attention: only attention's results are kept. Such a block needs no checkpoint around it.
    """
    # PyTorch warns that operations in place would be lost. A block has none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    kept = list(ATTENTION)
    if not save_attention:
        kept += [aten.addmm.default, torch.ops.wan_prfl.exchange.default]
    block.forward = torch.compile(
        partial(checkpoint, block.forward, use_reentrant=False,
                context_fn=partial(create_selective_checkpoint_contexts, kept)),
        fullgraph=True, dynamic=False)


def check_compiler(device):
    """Raise InputError if what torch.compile needs is not installed."""
    cuda = device.type == "cuda"
    compilers = [os.environ.get("CC", "gcc"), "clang"] if cuda else [os.environ.get("CXX", "g++")]
    missing = None
    if cuda and not importlib.util.find_spec("triton"):
        missing = "Triton"
    elif not any(map(shutil.which, compilers)):
        missing = "a C compiler, such as gcc" if cuda else "a C++ compiler, such as g++"
    elif not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing = "Python's headers, such as the package python3-dev"
    if missing:
        raise InputError(f"compiled blocks need {missing}; install it, or give --no-compile")


# ------------------------------------------------------------------------------ running a block

def block_runner(args, device):
    """The function with which a model runs each block (`model.run_block`), according to the flags."""
    offload = Offload(device) if "inputs" in args.offload else None
    compiled = compiles(args, device)
    contexts = noop_context_fn
    if args.save_attention:
        contexts = partial(create_selective_checkpoint_contexts, ATTENTION)

    def run_block(block, x, *rest):
        # The first block's input may differ in dtype and requires_grad from that of the others. Making
        # them alike lets all blocks share one compiled graph.
        if not args.bf16_residual:
            x = x.float()
        learns = any(parameter.requires_grad for parameter in block.parameters())
        if compiled and torch.is_grad_enabled() and learns and not x.requires_grad:
            # Adding 0 and not x.requires_grad_(): a leaf would stay on the device until backward ends.
            x = x + torch.zeros((), device=x.device, requires_grad=True)
        backward = torch.is_grad_enabled() and (learns or x.requires_grad)
        checkpointed = args.activation_checkpointing and backward
        with offload.of(x) if offload and checkpointed else nullcontext():
            if checkpointed and not (compiled and args.save_attention):
                x = checkpoint(block, x, *rest, use_reentrant=False, context_fn=as_it_is(block, contexts))
            else:
                x = block(x, *rest)
        return x.bfloat16() if args.bf16_residual else x

    return run_block


def as_it_is(block, contexts):
    """The context_fn of a checkpoint that computes a block again with its adapters as they are now.

    They may be off now, and by the time of backward `lora.without_adapters` has turned them on again. A
    compiled block has a graph for either state. contexts: another context_fn, which holds too.
    """
    state = {layer: layer.adapter_on for layer in block.modules() if hasattr(layer, "adapter_on")}

    def swap():
        for layer, on in state.items():
            state[layer], layer.adapter_on = layer.adapter_on, on

    @contextmanager
    def again(context):
        swap()
        try:
            with context:
                yield
        finally:
            swap()

    def forward_and_again():
        forward, recomputation = contexts()
        return forward, again(recomputation)
    return forward_and_again


class Offload:
    """Keeps the inputs of checkpointed blocks in pinned CPU memory.

    Copies run during the computation, on their own CUDA stream. In backward, a block's input is fetched while
    the block after it is computed.
    """

    def __init__(self, device):
        self.device = device
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.away = []  # the inputs in CPU memory, oldest first
        self.free = {}  # {(shape, dtype): buffers to use again}

    def of(self, x):
        """`with offload.of(x):` autograd saves x in CPU memory.

        The other tensors that it saves are shared by all blocks and stay on the device.
        """
        # The hooks live as long as the saved tensors, so they must not hold x itself.
        pointer, shape = x.data_ptr(), x.shape

        def pack(saved):
            return self.put(saved) if saved.data_ptr() == pointer and saved.shape == shape else saved

        def unpack(saved):
            return self.get(saved) if isinstance(saved, dict) else saved

        return saved_tensors_hooks(pack, unpack)

    def put(self, x):
        """Begin to copy x to the CPU.

        The previous input is now freed on the device: its copy had a whole block's time to finish. The
        computation first waits for that copy, and can then use the memory.
        """
        if self.away:
            self.wait(self.away[-1])
            self.away[-1]["x"] = None
        buffers = self.free.setdefault((x.shape, x.dtype), [])
        buffer = buffers.pop() if buffers else torch.empty_like(x, device="cpu", pin_memory=self.cuda)
        self.away.append({"x": x.detach(), "buffer": buffer, "copied": self.copy(buffer, x.detach())})
        return self.away[-1]

    def get(self, item):
        """The input of an item, on the device again. The input before it is fetched next."""
        self.fetch(item)
        self.wait(item)
        self.away = [other for other in self.away if other is not item]
        self.free[item["buffer"].shape, item["buffer"].dtype].append(item["buffer"])
        if self.away:
            self.fetch(self.away[-1])
        return item["x"]

    def fetch(self, item):
        if item["x"] is None:
            item["x"] = torch.empty_like(item["buffer"], device=self.device)
            item["copied"] = self.copy(item["x"], item["buffer"])

    def copy(self, target, source):
        """Begin to copy once the present computation is done; returns the event of the copy's end."""
        if not self.cuda:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, item):
        if item["copied"]:
            torch.cuda.current_stream().wait_event(item["copied"])
