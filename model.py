"""The Wan diffusion transformer, every variant: Wan2.1 T2V, I2V, FLF2V and Wan2.2 T2V, I2V, TI2V.

It takes noisy latents x_t, a timestep t in [0, 1000] and a text (and image) condition. It returns the
velocity noise - clean. Parameters have the names of the official checkpoints, which load and save directly.

With bf16 weights, the large matrix products and the attention are in bf16. All else stays in float32: the
time embedding and its projection, modulations, norms, the rotary angles, the head and the residual stream.
"""
import math
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import addcmul, nn

import sequence
from files import InputError, check_form, load_weights, read_json, save_weights, weight_shapes
from forms import CONFIG
from lora import merges, official_state

PATCH = (1, 2, 2)  # frames, rows, columns of a token
CLIP_DIM = 1280


@dataclass
class WanConfig:
    """The fields of an official config.json, and three that it leaves out."""
    model_type: str  # t2v, i2v, flf2v or ti2v
    dim: int
    ffn_dim: int
    freq_dim: int
    in_dim: int
    out_dim: int
    num_heads: int
    num_layers: int
    text_len: int = 512
    eps: float = 1e-6
    text_dim: int = 4096
    use_clip: bool | None = None  # image tokens in cross-attention; None: i2v and flf2v have them

    def __post_init__(self):
        if self.use_clip is None:
            self.use_clip = self.model_type in ("i2v", "flf2v")

    @classmethod
    def from_dict(cls, values, source="the configuration"):
        check_form(values, CONFIG, source)
        if values["dim"] % (2 * values["num_heads"]):
            raise InputError(f"{source}: dim is {values['dim']}, with {values['num_heads']} heads; "
                             f"expected a multiple of twice num_heads")
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def official(self):
        """The content of config.json. text_dim is written only where it is not the official one."""
        names = ["model_type", "dim", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim",
                 "text_len", "eps"]
        if self.text_dim != 4096:
            names.append("text_dim")
        values = {name: getattr(self, name) for name in names}
        return {"_class_name": "WanModel", "_diffusers_version": "0.33.0", **values}


# ------------------------------------------------------------------------------ pieces

class Linear32(nn.Linear):
    """A linear layer that computes in float32 whatever its weights are stored in."""

    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class LayerNorm32(nn.LayerNorm):
    """A layer norm that computes and returns float32."""

    def forward(self, x):
        weight, bias = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32, returned in x's dtype.

    On CUDA this is one operator, which keeps no float32 copy for backward.
    """

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def timestep_embedding(t, dim):
    """[cos, sin] of t times the frequencies 10000^(-i / half): (...) -> (..., dim), computed in float64."""
    half = dim // 2
    frequencies = 10000 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.double()[..., None] * frequencies                       # (..., half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


@lru_cache(maxsize=16)
def rotary_table(grid, head_dim, device):
    """(cos, sin), each (L, 1, head_dim / 2), of the angles of every token of a (frames, rows, columns) grid.

    The head's channel pairs are shared out among frame, row and column; an axis with n channels has the
    frequencies 10000^(-2j / n). The angles are computed in float64 and kept in float32.
    """
    channels = (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    angles = []
    for axis, (length, n) in enumerate(zip(grid, channels, strict=True)):
        frequencies = 10000 ** -(torch.arange(0, n, 2, dtype=torch.float64) / n)
        shape = [1, 1, 1, n // 2]
        shape[axis] = length
        angles.append(torch.outer(torch.arange(length).double(), frequencies).view(shape).expand(*grid, -1))
    angles = torch.cat(angles, dim=-1).reshape(-1, 1, head_dim // 2)   # (L, 1, head_dim / 2)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotate(x, cos, sin):
    """Turn each adjacent pair of channels of x (B, L, heads, head_dim) by its token's angle, in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))                           # (B, L, heads, head_dim / 2, 2)
    if torch.compiler.is_compiling():  # the compiler fuses this, but it has no complex numbers
        a, b = pairs.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:  # fastest in eager mode
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)


def attention(q, k, v):
    """softmax(q k^T / sqrt(head_dim)) v for (B, L, heads, head_dim), without a mask."""
    q, k, v = (rearrange(x, "b l h d -> b h l d") for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")


class SelfAttention(nn.Module):
    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)  # over all heads together

    def heads(self, x):
        return rearrange(x, "b l (h d) -> b l h d", h=self.num_heads)

    def forward(self, x, rotary):
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = self.heads(q), self.heads(k), self.heads(v)          # (B, L, heads, head_dim)
        q, k, v = sequence.to_heads(q, k, v, length=len(rotary[0]))    # all tokens, if ranks share them
        out = attention(rotate(q, *rotary), rotate(k, *rotary), v)
        return self.o(sequence.to_tokens(out))                         # (B, L, D)


class CrossAttention(SelfAttention):
    """Attention to the text and, if the model has them, to image tokens, which have their own k and v."""

    def __init__(self, dim, num_heads, eps, use_clip):
        super().__init__(dim, num_heads, eps)
        if use_clip:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x, text, image):
        q = self.heads(self.norm_q(self.q(x)))
        k, v = self.heads(self.norm_k(self.k(text))), self.heads(self.v(text))
        out = attention(q, k, v)                                       # (B, L, D)
        if image is not None:
            k, v = self.heads(self.norm_k_img(self.k_img(image))), self.heads(self.v_img(image))
            out = out + attention(q, k, v)
        return self.o(out)                                             # (B, L, D)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, ffn_dim, eps = config.dim, config.ffn_dim, config.eps
        self.norm1 = LayerNorm32(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, config.num_heads, eps)
        self.norm3 = LayerNorm32(dim, eps)
        self.cross_attn = CrossAttention(dim, config.num_heads, eps, config.use_clip)
        self.norm2 = LayerNorm32(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim ** 0.5)

    def forward(self, x, modulation, text, image, rotary):
        """x (B, L, D); modulation (B, 1 or L, 6, D) float32; text (B, 512, D); image (B, n, D) or None."""
        dtype = self.ffn[0].weight.dtype
        modulation = self.modulation.float() + modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(2)  # (B, 1 or L, D) each
        # addcmul(a, b, c) is a + b * c, and reads and writes all tokens once instead of twice.
        h = addcmul(shift1, self.norm1(x), 1 + scale1)                 # (B, L, D) float32
        x = addcmul(x, gate1, self.self_attn(h.to(dtype), rotary))     # the residual stream becomes float32
        x = x + self.cross_attn(self.norm3(x).to(dtype), text, image)
        h = addcmul(shift2, self.norm2(x), 1 + scale2)
        return addcmul(x, gate2, self.ffn(h.to(dtype)))                # (B, L, D) float32


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = LayerNorm32(config.dim, config.eps, elementwise_affine=False)
        self.head = Linear32(config.dim, PATCH[0] * PATCH[1] * PATCH[2] * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim ** 0.5)

    def forward(self, x, e):
        shift, scale = (self.modulation.float() + e[:, :, None]).unbind(2)  # (B, 1 or L, D)
        return self.head(self.norm(x) * (1 + scale) + shift)           # (B, L, 4 C_out) float32


class ImageEmbedding(nn.Module):
    """CLIP tokens (B, n, 1280) -> (B, n, D). First-last-frame models add positions to two images' tokens."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Sequential(nn.LayerNorm(CLIP_DIM), nn.Linear(CLIP_DIM, CLIP_DIM), nn.GELU(),
                                  nn.Linear(CLIP_DIM, config.dim), nn.LayerNorm(config.dim))
        if config.model_type == "flf2v":
            self.emb_pos = nn.Parameter(torch.zeros(1, 2 * 257, CLIP_DIM))

    def forward(self, tokens):
        if hasattr(self, "emb_pos"):
            if tokens.shape[1] == 257:
                tokens = rearrange(tokens, "(b two) n d -> b (two n) d", two=2)
            tokens = tokens + self.emb_pos                             # (B, 514, 1280)
        return self.proj(tokens.to(self.proj[1].weight.dtype))         # (B, n, D)


# ------------------------------------------------------------------------------ the model

class WanModel(nn.Module):
    """One Wan transformer. `config` is a WanConfig or the dict of a config.json."""

    def __init__(self, config):
        super().__init__()
        self.config = config = WanConfig.from_dict(config) if isinstance(config, dict) else config
        dim, text_dim = config.dim, config.text_dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear32(config.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        if config.use_clip:
            self.img_emb = ImageEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.run_block = lambda block, *inputs: block(*inputs)  # training puts memory.block_runner's here

    @classmethod
    def on_meta(cls, directory):
        """The model that an official directory describes, on the meta device: structure without weights."""
        config = WanConfig.from_dict(read_json(Path(directory) / "config.json"), f"{directory}/config.json")
        # The I2V models of Wan2.1 and 2.2 have the same config.json; only the names of their tensors differ.
        config.use_clip = any(name.startswith("img_emb.") for name in weight_shapes(directory))
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu", merge=None):
        """Load an official model directory, sharded or not. InputError names tensors that do not fit.

        merge: functions of weights (lora_files.merging).
        """
        return load_weights(cls.on_meta(directory).to(dtype), directory, device=device, merge=merge)

    def save_pretrained(self, directory, dtype=None):
        """Write an official model directory, with adapters merged. Under torchrun, every rank calls it."""
        save_weights(directory, official_state(self), self.config.official(), dtype=dtype, merge=merges(self))

    def forward(self, x, t, context, clip_fea=None, y=None):
        """Velocity (B, C_out, F, H, W), float32.

        x: noisy latents (B, C, F, H, W). t: timesteps in [0, 1000], (B,), or one per token (B, L) (Wan2.2).
        context: umT5 states, B tensors (n_i, text_dim) in a list or, zero-padded, (B, text_len, text_dim).
        clip_fea: CLIP tokens (B, 257, 1280); for first-last-frame models (2B, 257, 1280) or (B, 514, 1280).
        y: image condition (B, in_dim - C, F, H, W), joined to x on the channel axis.
        """
        grid = [size // patch for size, patch in zip(x.shape[2:], PATCH, strict=True)]
        e, tokens = self._run(x, t, context, clip_fea, y, len(self.blocks))
        patches = sequence.gather(self.head(tokens, e), math.prod(grid))   # (B, L, 4 C_out)
        return rearrange(patches, "b (f h w) (p q r c) -> b c (f p) (h q) (w r)",
                         f=grid[0], h=grid[1], w=grid[2], p=PATCH[0], q=PATCH[1], r=PATCH[2])

    def features(self, x, t, context, clip_fea=None, y=None, num_blocks=8):
        """The residual stream (B, L, D) after `num_blocks` blocks; arguments as in `forward`.

        Under sequence parallelism (sequence.py) it holds this rank's tokens only, padding included.
        """
        return self._run(x, t, context, clip_fea, y, num_blocks)[1]

    def _run(self, x, t, context, clip_fea, y, num_blocks):
        """Embed the inputs and run the first blocks: (e (B, 1 or L, D), residual stream (B, L, D))."""
        self._check(x, context, clip_fea, y)
        dtype = self.patch_embedding.weight.dtype
        if y is not None:
            x = torch.cat([x, y.to(x.dtype)], dim=1)                   # (B, in_dim, F, H, W)
        x = self.patch_embedding(x.to(dtype))                          # (B, D, F, H/2, W/2)
        grid = tuple(x.shape[2:])
        # (B, L, D), contiguous: the convolution's layout would make every layer slower. With sequence
        # parallelism, L counts this rank's tokens from here on.
        x = sequence.split(rearrange(x, "b d f h w -> b (f h w) d")).contiguous()

        # With one timestep per clip, everything below keeps a token axis of 1 and broadcasts.
        t = t[:, None] if t.ndim == 1 else sequence.split(t)
        e = self.time_embedding(timestep_embedding(t, self.config.freq_dim))  # (B, 1 or L, D)
        modulation = self.time_projection(e).unflatten(-1, (6, -1))    # (B, 1 or L, 6, D)

        text = self.text_embedding(self._pad(context).to(dtype))       # (B, 512, D); padding is attended too
        image = self.img_emb(clip_fea) if self.config.use_clip else None  # (B, 257 or 514, D)
        rotary = rotary_table(grid, self.config.dim // self.config.num_heads, x.device)
        for block in self.blocks[:num_blocks]:
            x = self.run_block(block, x, modulation, text, image, rotary)  # (B, L, D)
        return e, x

    def _pad(self, context):
        """Zero-pad each prompt's states to text_len rows: (B, text_len, text_dim)."""
        rows = self.config.text_len
        return torch.stack([F.pad(states, (0, 0, 0, rows - len(states))) for states in context])

    def _check(self, x, context, clip_fea, y):
        config = self.config
        channels = x.shape[1] + (0 if y is None else y.shape[1])
        if channels != config.in_dim:
            raise InputError(f"this {config.model_type} model takes {config.in_dim} channels "
                             f"(latents and image condition together), but got {channels}")
        if x.shape[3] % 2 or x.shape[4] % 2:
            raise InputError(f"latents of {x.shape[3]}x{x.shape[4]} cannot be cut into 2x2 patches; "
                             f"use video sides that are multiples of 16")
        longest = max(len(states) for states in context)
        if len(context) != len(x) or longest > config.text_len:
            raise InputError(f"{len(context)} prompts of at most {longest} tokens do not fit {len(x)} clips "
                             f"and text_len {config.text_len}")
        widths = {states.shape[-1] for states in context}
        if widths != {config.text_dim}:
            raise InputError(f"text states of width {max(widths)} do not fit this model's text_dim, "
                             f"{config.text_dim}; use the text encoder of the same directory")
        if config.use_clip and (clip_fea is None or clip_fea.shape[-1] != CLIP_DIM):
            raise InputError(f"this model needs clip_fea, the given image's CLIP tokens of width {CLIP_DIM}")
