"""What one block of the transformer keeps for its backward, and what it needs while it runs, in bytes.

Computed from shapes, line by line of Block.forward. test_block_memory.py compares it with what PyTorch keeps.
"""
from lora import adapters
from tools.floors import image_tokens


def block_memory(block, config, tokens, clips=1, itemsize=2, bf16_residual=False, sp=1, fused_norm=True):
    """Bytes of a block with gradient: (kept by its forward for its backward, besides its input and weights;
    the most that backward needs on top of that).

    The lines of Block.forward, in order. `tokens` are this rank's, `itemsize` is that of the compute dtype.
    fused_norm: RMSNorm as on CUDA; elsewhere it keeps its input, and its result if its weight is trained, in
    float32.
    """
    def learns(name):  # the layer needs its input for the gradient of its weight
        layer = block.get_submodule(name)
        return layer.weight.requires_grad or hasattr(layer, "lora_A")

    D, F, c, heads = config.dim, config.ffn_dim, itemsize, config.num_heads
    trained = block.modulation.requires_grad
    norm = c * D + 4  # RMSNorm's input and 1 / rms
    if not fused_norm:
        norm = 4 * D + trained * 4 * D
    of_tokens, of_text = adapter_bytes(block, c)
    per_token = [
        bf16_residual * 4 * D,                                 # norm1: float32 copy of its input
        trained * 4 * D,                                       # norm1's result, for the gradient of the scale
        any(learns(f"self_attn.{name}") for name in "qkv") * c * D,
        2 * norm,                                              # norm_q, norm_k
        4 * c * D + 4 * heads,                                 # q, k, v, attention's result and log-sums
        (sp > 1) * 2 * c * D,                                  # q and k before rotation; v shares its buffer
        (sp > 1 and learns("self_attn.o")) * c * D,            # attention's result, back with its tokens
        trained * c * D,                                       # o's result, for the gate
        4 * D,                                                 # x, norm3's input
        learns("cross_attn.q") * c * D,
        norm,                                                  # norm_q
        2 * c * D + 4 * heads,                                 # q and result of cross-attention
        config.use_clip * (c * D + 4 * heads),                 # the same for image tokens
        (config.use_clip and learns("cross_attn.o")) * c * D,  # the sum of both results
        4 * D,                                                 # x, norm2's input
        trained * 4 * D,                                       # norm2's result
        learns("ffn.0") * c * D,
        c * F,                                                 # GELU's input
        learns("ffn.2") * c * F,                               # GELU's result
        trained * c * D,                                       # ffn's result, for the gate
        of_tokens,                                             # results of the adapters' first layers
        9 * 4,                                                 # mean and 1 / deviation of the norms
    ]
    angles = 8 * tokens * sp * D // heads                      # cos + i sin, for q and for k, of all tokens
    text = config.text_len * (learns("cross_attn.k") * norm + 2 * c * D + of_text)   # keys and values
    if config.use_clip:
        text += image_tokens(config) * (learns("cross_attn.k_img") * norm + 2 * c * D)
    saved = clips * (tokens * sum(per_token) + text) + angles

    # Backward begins with the FFN. First it holds the residual stream's gradient and its products with gate
    # and result, then GELU's two gradients. By then the results of ffn and GELU are free again.
    freed = trained * c * D + learns("ffn.2") * c * F
    working = max(trained * 12 * D, 4 * D + 2 * c * F - freed)
    return saved, clips * tokens * working


def compiled_memory(block, config, tokens, clips=1, itemsize=2, sp=1):
    """The same two numbers of a block that memory.compile_block compiled.

    The first counts what compile_block names. The second follows the graph of its backward (torch 2.13): most
    is alive at GELU or, with adapters, at self-attention, once their products have been computed again: 22.1
    times the clip's tokens in the compute dtype.
    """
    D, F, c, heads = config.dim, config.ffn_dim, itemsize, config.num_heads
    trained = block.modulation.requires_grad
    adapted = hasattr(block.self_attn.o, "lora_A")
    per_token = [
        5 * c * D + 4 * heads,                                 # q, k, v, attention and o of self-attention
        (sp > 1) * 2 * c * D,                                  # q, k and v exchanged, v not before as well
        (sp > 1 and (trained or adapted)) * c * D,             # attention's result, back with its tokens
        3 * c * D + 4 * heads,                                 # q, attention and o of cross-attention
        config.use_clip * (c * D + 4 * heads),                 # attention to image tokens
        c * F,                                                 # ffn.0
        trained * c * D,                                       # ffn.2, for the gate
    ]
    text = 2 * c * D * (config.text_len + config.use_clip * image_tokens(config))    # keys and values
    saved = clips * (tokens * sum(per_token) + text)
    working = 4 * D + 2 * c * F
    if adapted:
        working = max(working, 22.1 * c * D - sum(per_token))
    return saved, clips * tokens * working


def adapter_bytes(block, itemsize):
    """Bytes of the results of the adapters' first layers: (per token of the clip, per token of the text)."""
    of_tokens, of_text = 0, 0
    for name, layer in adapters(block).items():
        if name in ("cross_attn.k", "cross_attn.v"):
            of_text += itemsize * layer.lora_A.out_features
        else:
            of_tokens += itemsize * layer.lora_A.out_features
    return of_tokens, of_text


def forward_memory(config, tokens, clips=1, itemsize=2):
    """The most bytes that a block holds without gradient, besides its input."""
    rotation = (15 + 4 * itemsize) * config.dim  # while q and k are rotated
    ffn = (8 + itemsize) * config.dim + 2 * itemsize * config.ffn_dim
    return clips * tokens * max(rotation, ffn)
