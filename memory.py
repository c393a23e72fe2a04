"""What is kept for backward, and where: checkpointed blocks, and their inputs in the CPU's memory.

A 14B block at 720P x 81 frames keeps 11 to 20 GB for its backward, its input alone 0.8 GB in bf16. Checkpointing keeps the
inputs and computes the rest again, a block at a time; offloading moves the inputs off the GPU as well.
"""
from contextlib import nullcontext

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
        if not args.bf16_residual:
            x = x.float()  # as all blocks but the first get it: one graph less for a compiler
        learns = any(parameter.requires_grad for parameter in block.parameters())
        if args.compile and torch.is_grad_enabled() and learns and not x.requires_grad:
            x = x.detach().requires_grad_()  # likewise: with adapters the first block's input takes no gradient
        if args.checkpoint_blocks and torch.is_grad_enabled() and (learns or x.requires_grad):
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
        """Begin to copy x away. The input before it is dropped now: its copy had a whole block's time. The computation waits
        for that copy first, so that what it computes next may have the memory."""
        if self.away:
            self.wait(self.away[-1])
            self.away[-1]["x"] = None
        buffers = self.free.setdefault((x.shape, x.dtype), [])
        buffer = buffers.pop() if buffers else torch.empty_like(x, device="cpu", pin_memory=self.cuda)
        self.away.append({"x": x.detach(), "buffer": buffer, "copied": self.copy(buffer, x.detach())})
        return self.away[-1]

    def get(self, item):
        """The input of an item, on its device again; the one before it sets out."""
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
        """Begin to copy after what is being computed; returns the event of the end."""
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
