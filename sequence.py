"""Sequence parallelism: a group of ranks shares the tokens of a clip (DeepSpeed-Ulysses, Jacobs et al. 2023,
arXiv 2309.14509).

Each of n ranks has L / n tokens with all their channels. Attention needs all tokens; there, each rank has a
part of the heads instead:

    (B, L / n, heads, d)  -- exchange -->  (B, L, heads / n, d)  -- attention,
                          -- exchange -->  (B, L / n, heads, d)

If n does not divide L, zeros are appended; attention and pooling leave them out. All other layers see each
token alone.

Gradients: all ranks of a group compute the same loss, and each function's backward is its exact adjoint with
respect to the SUM of the ranks' losses. FSDP's mean over all ranks is then the gradient of the mean loss over
clips. This holds for weights that saw a part of the tokens (blocks) as well as for weights that every rank
applied to all of them (heads of the reward).
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ReduceOp

# The ranks that share a clip with this one. None: this rank has whole clips. Set by parallel.start.
group = None


def size():
    return 1 if group is None else dist.get_world_size(group)


def rank():
    return 0 if group is None else dist.get_rank(group)


def split(x, dim=1):
    """This rank's part of the tokens along `dim`; zeros are appended if the ranks do not divide them."""
    if size() == 1:
        return x
    axes_after = x.ndim - 1 - dim % x.ndim
    missing = -x.shape[dim] % size()
    padded = F.pad(x, (0, 0) * axes_after + (0, missing))  # F.pad counts axes from the last
    return padded.chunk(size(), dim)[rank()]


def present(length, device):
    """Which of this rank's tokens are not padding, of `length` tokens in all: (L / n,) bool."""
    return split(torch.ones(length, dtype=torch.bool, device=device), 0)


# ------------------------------------------------------------------------------ attention

def to_heads(q, k, v, length):
    """q, k, v (B, L / n, heads, d) of this rank's tokens -> (B, L, heads / n, d) of all tokens.

    One exchange for all three. length: L, the number of tokens without padding.
    """
    if size() == 1:
        return q, k, v
    q, k, v = exchange(torch.stack([q, k, v]), 3, 2)[:, :, :length].unbind()
    return q, k, v.contiguous()  # attention keeps v for backward, and a view would keep all three


def to_tokens(x):
    """(B, L, D / n), this rank's heads of all tokens -> (B, L / n, D), this rank's tokens."""
    if size() == 1:
        return x
    return exchange(F.pad(x, (0, 0, 0, -x.shape[1] % size())), 1, 2)


# A custom operator, so that a compiled block stays one graph. It needs the type hints.
@torch.library.custom_op("wan_prfl::exchange", mutates_args=())
def exchange(x: torch.Tensor, cut: int, join: int) -> torch.Tensor:
    """Cut x along axis `cut`, send each rank its piece, and join the received pieces along axis `join`."""
    pieces = torch.stack(x.chunk(size(), cut))
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces, group=group)
    return torch.cat(received.unbind(), join)


@exchange.register_fake
def _(x, cut, join):
    shape = list(x.shape)
    shape[cut] //= size()
    shape[join] *= size()
    return x.new_empty(shape)


def remember_axes(ctx, inputs, output):
    _, ctx.cut, ctx.join = inputs


def exchange_back(ctx, grad):
    return exchange(grad, ctx.join, ctx.cut), None, None


exchange.register_autograd(exchange_back, setup_context=remember_axes)


# ------------------------------------------------------------------------------ over all tokens

class Gather(torch.autograd.Function):
    """(B, L / n, D) -> (B, L, D), in the order of the ranks."""

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
