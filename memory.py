"""What is kept for backward, and where: checkpointed blocks, and their inputs in the CPU's memory.

A 14B block at 720P x 81 frames keeps 11 to 20 GB for its backward, its input alone 0.8 GB in bf16. Checkpointing keeps the
inputs and computes the rest again, a block at a time; offloading moves the inputs off the GPU as well.
"""
from contextlib import contextmanager, nullcontext

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def block_runner(args, device):
    """What a model runs each block by, `model.run_block`: checkpointed, its input offloaded or rounded, as the flags ask."""
    offload = Offload(device) if "inputs" in args.offload else None
    kernels = [getattr(torch.ops.aten, name).default for name in (
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention_for_cpu")]

    def contexts():
        return create_selective_checkpoint_contexts(
            lambda ctx, op, *inputs, **options: CheckpointPolicy.MUST_SAVE if op in kernels else CheckpointPolicy.PREFER_RECOMPUTE)

    def run_block(block, x, *rest):
        if args.compile and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # with adapters the first block's input takes no gradient: one graph more for that alone
        if args.checkpoint_blocks and torch.is_grad_enabled():
            with offload.of(x) if offload else nullcontext():
                more = {"context_fn": contexts} if args.save_attention else {}
                x = checkpoint(block, x, *rest, use_reentrant=False, **more)
        else:
            x = block(x, *rest)
        return x.bfloat16() if args.bf16_residual else x

    return run_block


class Offload:
    """Keeps the inputs of checkpointed blocks in pinned CPU memory. Copies run beside the computation, on a stream of their
    own; in backward, a block's input is fetched while the block after it is computed."""

    def __init__(self, device):
        self.device, self.cuda = device, device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.away, self.free = [], {}  # inputs in the CPU's memory, oldest first; buffers for reuse, by shape and dtype

    def of(self, x):
        """`with offload.of(x):` autograd saves x in the CPU's memory; what else it saves, all blocks share, and it stays."""
        pointer, shape = x.data_ptr(), x.shape  # not x itself: the hooks live as long as what is saved, and would keep it
        return saved_tensors_hooks(lambda saved: self.put(saved) if saved.data_ptr() == pointer and saved.shape == shape else saved,
                                   lambda saved: self.get(saved) if isinstance(saved, dict) else saved)

    def put(self, x):
        buffers = self.free.setdefault((x.shape, x.dtype), [])
        buffer = buffers.pop() if buffers else torch.empty_like(x, device="cpu", pin_memory=self.cuda)
        with self.beside():
            buffer.copy_(x, non_blocking=True)
            if self.cuda:
                x.record_stream(self.stream)  # its memory is not reused before the copy is done
        self.away.append({"buffer": buffer, "x": None})
        return self.away[-1]

    def get(self, item):
        self.fetch(item)
        if self.cuda:
            torch.cuda.current_stream().wait_stream(self.stream)
            item["x"].record_stream(torch.cuda.current_stream())
        self.away = [other for other in self.away if other is not item]
        self.free[item["buffer"].shape, item["buffer"].dtype].append(item["buffer"])
        if self.away:
            self.fetch(self.away[-1])
        return item["x"]

    def fetch(self, item):
        if item["x"] is None:
            with self.beside():
                item["x"] = item["buffer"].to(self.device, non_blocking=True, copy=True)

    @contextmanager
    def beside(self):
        if not self.cuda:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
