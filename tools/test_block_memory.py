"""What a block keeps for backward, and what it reads and writes: formulas against what PyTorch does.

Sizes are those of the 14B at 720P x 81 frames, on the meta device, which has shapes but no memory. u is one
clip's tokens in bf16: 75,600 x 5,120 x 2 bytes = 0.774 GB.
"""
from collections import Counter
from functools import lru_cache, partial

import pytest
import torch
import torch.distributed as dist
from einops import rearrange
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memory
import model
import sequence
from lora import add_lora
from model import Block, WanConfig
from tools import floors
from tools.block_memory import block_memory, compiled_memory

TOKENS = 75_600
U = TOKENS * 5120 * 2
aten = torch.ops.aten


# ------------------------------------------------------------------------------ as on a CPU

@pytest.mark.parametrize("trained", ["all", "adapters", "nothing"])
@pytest.mark.parametrize("case", ["plain", "bf16_residual", "image", "sp", "ffn"])
def test_what_a_block_keeps_for_backward(trained, case, monkeypatch):
    """The formula against the bytes that autograd saves of a bf16 block.

    Each storage counts once, weights and inputs not at all.
    """
    dim, tokens, clips = 256, 384, 2
    config = WanConfig(model_type="t2v", dim=dim, ffn_dim=704, num_heads=4, num_layers=3, freq_dim=32,
                       in_dim=16, out_dim=16, text_len=32, text_dim=32, use_clip=case == "image")
    block = Block(config).bfloat16()
    if trained != "all":
        block.requires_grad_(False)
    if trained == "adapters":
        holder = torch.nn.Module()
        holder.blocks = torch.nn.ModuleList([block])
        add_lora(holder, 16, 16, ["ffn.0", "ffn.2"] if case == "ffn" else ["q", "k", "v", "o"])
        block.bfloat16()  # adapters compute in bf16, as FSDP gathers them
    sp = 1
    if case == "sp":  # the exchange with the other rank gets what it sends: of the same size
        sp = 2
        monkeypatch.setattr(sequence, "size", lambda: 2)
        monkeypatch.setattr(dist, "all_to_all_single",
                            lambda received, sent, group=None: received.copy_(sent))

    # The block's inputs: what is trained needs the gradient of what other layers computed from it.
    learns = trained == "all"
    x = torch.randn(clips, tokens, dim, requires_grad=True)
    if case == "bf16_residual":
        x = x.bfloat16()
    modulation = torch.randn(clips, 1, 6, dim, requires_grad=learns)
    text = torch.randn(clips, 32, dim, dtype=torch.bfloat16, requires_grad=learns)
    image = torch.randn(clips, 257, dim, dtype=torch.bfloat16) if case == "image" else None
    rotary = [torch.randn(tokens * sp, 1, dim // config.num_heads // 2) for _ in range(2)]
    given = [x, modulation, text, *rotary, *block.parameters()]
    if image is not None:
        given.append(image)
    given = {tensor.untyped_storage().data_ptr() for tensor in given}

    saved, alive = Counter(), []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its memory could be another's
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, modulation, text, image, rotary)
    computed, _ = block_memory(block, config, tokens, clips, bf16_residual=case == "bf16_residual", sp=sp,
                               fused_norm=False)
    assert computed == pytest.approx(saved.total(), rel=0.02)


# ------------------------------------------------------------------------------ as on a GPU, at full size

@torch.library.custom_op("counted::rms_norm", mutates_args=())
def counted_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


counted_rms_norm.register_fake(lambda x, weight: torch.empty_like(x))


@pytest.fixture
def as_on_cuda(monkeypatch):
    """cuDNN's attention, which the meta device would not choose."""
    def attention(q, k, v):
        q, k, v = (rearrange(x, "b l h d -> b h l d") for x in (q, k, v))
        out = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[0]
        return rearrange(out, "b h l d -> b l (h d)")

    monkeypatch.setattr(model, "attention", attention)


def full_size(config, trained, sp=1):
    """(a bf16 block on the meta device, its inputs)."""
    dim = config.dim
    with torch.device("meta"):
        block = Block(config).bfloat16().requires_grad_(trained == "all")
        if trained == "adapters":
            holder = torch.nn.Module()
            holder.blocks = torch.nn.ModuleList([block])
            add_lora(holder, 128, 128)
            block.bfloat16()
        learns = dict(requires_grad=trained == "all")
        x = torch.empty(1, TOKENS, dim, requires_grad=True)
        modulation = torch.empty(1, 1, 6, dim, **learns)
        text = torch.empty(1, 512, dim, dtype=torch.bfloat16, **learns)
        image = torch.empty(1, 257, dim, dtype=torch.bfloat16, **learns) if config.use_clip else None
        rotary = tuple(torch.empty(TOKENS * sp, 1, dim // config.num_heads // 2) for _ in range(2))
    return block, (x, modulation, text, image, rotary)


def compiled_graphs(block, inputs, monkeypatch, save_attention=False):
    """{"forward": graph, "backward": graph} of a block that memory.compile_block compiles; nothing is run."""
    graphs = {}

    def keep(name, module, _):
        graphs[name] = module.graph
        return make_boxed_func(module.forward)

    cut = partial(min_cut_rematerialization_partition, compiler="inductor")  # as inductor cuts the graph
    backend = aot_autograd(fw_compiler=partial(keep, "forward"), bw_compiler=partial(keep, "backward"),
                           partition_fn=cut)
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        memory.compile_block(block, save_attention)
    block.forward(*inputs).sum().backward()
    return graphs


def size_of(node):
    tensors = [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def kept_by(graphs):
    """The nodes of the backward graph that the forward keeps for it."""
    given = {node.name for node in graphs["forward"].nodes if node.op == "placeholder"}
    return [node for node in graphs["backward"].nodes
            if node.op == "placeholder" and node.name not in given and "tangents" not in node.name]


def largest_of(graphs):
    """The most bytes alive in the backward graph, weights and the block's inputs left out.

    Views and what is fused into its reader take no memory: what is kept, gradients, and the operands and
    results of matrix products and attention do.
    """
    nodes = list(graphs["backward"].nodes)
    names = {node.name for node in graphs["forward"].nodes if node.op == "placeholder"}
    given = {node for node in nodes if node.op == "placeholder" and node.name in names}

    @lru_cache(None)
    def is_view(node):
        views = ("view", "permute", "transpose", "t.default", "getitem", "expand", "select", "unsqueeze",
                 "slice", "split", "alias", "detach")
        return node.op == "call_function" and any(view in str(node.target) for view in views)

    @lru_cache(None)
    def is_large(node):
        operators = ("mm", "attention", "exchange", "sum")
        return node.op != "call_function" or any(name in str(node.target) for name in operators)

    @lru_cache(None)
    def is_read_by_large(node):
        return any(is_large(user) or (is_view(user) and is_read_by_large(user)) for user in node.users)

    @lru_cache(None)
    def has_memory(node):
        return not is_view(node) and node not in given and (is_large(node) or is_read_by_large(node))

    @lru_cache(None)
    def last_read(node):
        ends = [nodes.index(node)]
        for user in node.users:
            ends.append(nodes.index(user) if has_memory(user) else last_read(user))
        return max(ends)

    alive, largest = {}, 0
    for place, node in enumerate(nodes):
        if has_memory(node):
            alive[node] = size_of(node)
        largest = max(largest, sum(alive.values()))
        alive = {node: size for node, size in alive.items() if last_read(node) > place}
    return largest


def numbers_of(graph, operator):
    return sum(operator in str(node.target) for node in graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("size, trained, sp, units, products", [
    ("14B", "adapters", 1, 10.74, 54),
    pytest.param("14B", "all", 1, 11.74, 20, marks=pytest.mark.full),
    ("14B", "nothing", 1, 10.74, 8),
    pytest.param("14B", "adapters", 2, 13.74, 53, marks=pytest.mark.full),
    pytest.param("14B", "all", 2, 14.74, 20, marks=pytest.mark.full),
    pytest.param("14B", "nothing", 2, 12.74, 8, marks=pytest.mark.full),
    pytest.param("14B-I2V", "adapters", 1, 11.77, 54, marks=pytest.mark.full)])
def test_what_a_compiled_block_keeps(size, trained, sp, units, products, as_on_cuda, monkeypatch):
    """And that its backward computes neither attention again, nor an exchange, nor a layer of the model, only
    the two small products of each adapter."""
    config = floors.size_config(size)
    monkeypatch.setattr(sequence, "size", lambda: sp)
    block, inputs = full_size(config, trained, sp)
    graphs = compiled_graphs(block, inputs, monkeypatch)
    kept = sum(map(size_of, kept_by(graphs)))
    computed, working = compiled_memory(block, config, TOKENS, sp=sp)
    assert kept / U == pytest.approx(units, rel=0.03) and kept == pytest.approx(computed, rel=0.03)
    assert largest_of(graphs) == pytest.approx(computed + working, rel=0.05)

    backward = graphs["backward"]
    attentions = 3 if config.use_clip else 2
    assert numbers_of(backward, "attention.default") == 0
    assert numbers_of(backward, "attention_backward") == attentions
    assert numbers_of(backward, "exchange") == (2 if sp > 1 else 0)
    assert numbers_of(backward, "mm.default") == products and numbers_of(backward, "addmm") == 0


class FusedNorm(torch.autograd.Function):
    """What RMSNorm keeps on CUDA: its input and 1 / rms, not the float32 copies of other devices."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32), weight)
        return torch.empty_like(x)


@pytest.mark.parametrize("sp", [1, pytest.param(2, marks=pytest.mark.full)])
def test_what_a_compiled_block_keeps_that_saves_attention(sp, as_on_cuda, monkeypatch):
    """Attention's results and log-sums alone."""
    monkeypatch.setattr(sequence, "size", lambda: sp)
    block, inputs = full_size(floors.size_config("14B"), "nothing", sp)
    graphs = compiled_graphs(block, inputs, monkeypatch, save_attention=True)
    assert sum(map(size_of, kept_by(graphs))) / U == pytest.approx(2.03, rel=0.01)
    assert numbers_of(graphs["backward"], "attention.default") == 0


@pytest.mark.parametrize("trained, units", [("adapters", 17.9), ("all", 27.6), ("nothing", 15.8)])
def test_what_a_block_keeps_that_is_not_compiled(trained, units, as_on_cuda, monkeypatch):
    monkeypatch.setattr(model.F, "rms_norm", lambda x, shape, weight, eps: FusedNorm.apply(x, weight))
    config = floors.size_config("14B")
    block, inputs = full_size(config, trained)
    given = [leaf for leaf in tree_leaves((inputs, dict(block.named_parameters()))) if leaf is not None]
    given = {tensor.untyped_storage()._cdata for tensor in given}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        block(*inputs)
    total = sum(storage.nbytes() for storage in kept.values())
    assert total / U == pytest.approx(units, rel=0.03)
    assert total == pytest.approx(block_memory(block, config, TOKENS)[0], rel=0.03)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, without those of matrix products and attention."""

    bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        left_out = ("mm", "attention", "empty", "detach", "view")
        if not operator.is_view and not any(name in str(operator) for name in left_out):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return out


@pytest.mark.parametrize("trained, units", [("nothing", 75.7), ("adapters", 94.1)])
def test_what_a_block_reads_and_writes_besides(trained, units, as_on_cuda, monkeypatch):
    """Of a forward that is not compiled; each operator reads its inputs and writes its results once."""
    # On CUDA RMSNorm is one operator. Here it would be counted by the steps of which it consists.
    monkeypatch.setattr(model.F, "rms_norm", lambda x, shape, weight, eps: counted_rms_norm(x, weight))
    block, inputs = full_size(floors.size_config("14B"), trained)
    with torch.no_grad(), Traffic() as traffic:
        block(*inputs)
    assert traffic.bytes / U == pytest.approx(units, rel=0.03) and traffic.bytes / U < 100
