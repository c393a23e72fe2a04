"""Sequence parallelism (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509): a group of ranks shares a clip's tokens.

Each of n ranks has L / n tokens, all channels of them; attention, which needs all tokens, has a part of the heads instead:

    (B, L / n, heads, d)  -- exchange -->  (B, L, heads / n, d)  -- attention, exchange -->  (B, L / n, heads, d)

Where n does not divide L, zeros are appended; attention and pooling leave them out. All other layers see each token alone.

Gradients: all ranks of a group compute the same loss, and each function's backward is its exact adjoint with respect to
the SUM of the ranks' losses. FSDP's mean over all ranks is then the gradient of the mean loss over clips, alike for
weights that saw a part of the tokens (blocks) and for weights that every rank applied to the whole (heads of the reward).
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ReduceOp

group = None  # the ranks that share this rank's clips; None: this rank has whole clips. Set by parallel.start


def size():
    return 1 if group is None else dist.get_world_size(group)


def rank():
    return 0 if group is None else dist.get_rank(group)


def split(x, dim=1):
    """This rank's part of the tokens along `dim`, zeros appended where they do not divide."""
    if size() == 1:
        return x
    missing = -x.shape[dim] % size()
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim % x.ndim) + (0, missing)).chunk(size(), dim)[rank()]


def present(length, device):
    """Which of this rank's tokens are real and not padding, of `length` in all: (L / n,) bool."""
    return split(torch.ones(length, dtype=torch.bool, device=device), 0)


# ---------------------------------------------------------------------------------------------- attention

def to_heads(q, k, v, length):
    """q, k, v (B, L / n, heads, d) of this rank's tokens -> (B, L, heads / n, d) of all `length` tokens, in one exchange."""
    if size() == 1:
        return q, k, v
    q, k, v = exchange(torch.stack([q, k, v]), 3, 2)[:, :, :length].unbind()
    return q, k, v.contiguous()  # which attention keeps for backward, and with a view all three


def to_tokens(x):
    """(B, L, D / n), this rank's heads of all tokens -> (B, L / n, D), this rank's tokens."""
    if size() == 1:
        return x
    return exchange(F.pad(x, (0, 0, 0, -x.shape[1] % size())), 1, 2)


@torch.library.custom_op("wan_prfl::exchange", mutates_args=())  # an operator, so that a compiled block stays one graph
def exchange(x: torch.Tensor, cut: int, join: int) -> torch.Tensor:
    """Cut x along one axis, send each rank its piece, and join what comes along another; ranks in order."""
    pieces = torch.stack(x.chunk(size(), cut))
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces, group=group)
    return torch.cat(received.unbind(), join)


@exchange.register_fake
def _(x, cut, join):
    shape = list(x.shape)
    shape[cut], shape[join] = shape[cut] // size(), shape[join] * size()
    return x.new_empty(shape)


def remember_axes(ctx, inputs, output):
    _, ctx.cut, ctx.join = inputs


exchange.register_autograd(lambda ctx, grad: (exchange(grad, ctx.join, ctx.cut), None, None), setup_context=remember_axes)


# ---------------------------------------------------------------------------------------------- over all tokens

class Gather(torch.autograd.Function):
    """(B, L / n, D) -> (B, L, D), in the ranks' order."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(size())]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, grad):
        parts = [part.contiguous() for part in grad.chunk(size(), 1)]
        out = torch.empty_like(parts[0])
        dist.reduce_scatter(out, parts, group=group)
        return out


def gather(x, length):
    """(B, L / n, D) of this rank's tokens -> (B, L, D) of all `length` tokens, on every rank."""
    return x if size() == 1 else Gather.apply(x)[:, :length]


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return Sum.forward(ctx, grad)


def sum_over_ranks(x):
    """The sum of the ranks' tensors."""
    return x if size() == 1 else Sum.apply(x)


@torch.no_grad()
def max_over_ranks(x):
    """The elementwise maximum of the ranks' tensors, without gradient."""
    if size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, ReduceOp.MAX, group=group)
    return x
