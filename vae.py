"""The Wan2.1 video autoencoder: a causal 3-D convolutional VAE, 8x smaller in space and 4x in time.

A video of 1 + 4n frames becomes 1 + n latent frames of 16 channels. Nothing looks into the future, so the
encoder and the decoder walk through time in chunks: the encoder takes 1, 4, 4, ... frames, the decoder one
latent frame at a time. Each causal convolution keeps its last two input frames for the next chunk, in a
`cache` that belongs to one walk. Memory does not grow with the length of the video, and the result equals one
pass over the whole video.

Both directions are differentiable. Layers have the names of the official checkpoint (`Wan2.1_VAE.pth`).
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from files import InputError, check_form, load_weights, weight_shapes

VAE_FILE = "Wan2.1_VAE.pth"  # in a model's directory

# Per-channel statistics of the official latents; `encode` returns (latent - mean) / std.
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution that sees the current frame and, before it, the last k - 1 frames of the past."""

    def forward(self, x, cache):
        past_frames = self.kernel_size[0] - 1
        if past_frames:
            past = cache.get(self)
            if past is None:  # the first chunk
                past = x.new_zeros(*x.shape[:2], past_frames, *x.shape[3:])
            x = torch.cat([past, x], dim=2)                            # (B, C, k - 1 + T, H, W)
            cache[self] = x[:, :, -past_frames:].clone()  # a clone: a view would keep the whole chunk alive
        return super().forward(x)                                      # (B, C', T, H, W)


def causal_conv(in_dim, out_dim, kernel):
    return CausalConv3d(in_dim, out_dim, kernel, padding=(0, kernel // 2, kernel // 2))


class RMSNorm(nn.Module):
    """x / ||x||_2 * sqrt(C) * gamma over the channels of (B, C, ...). axes: how many axes follow C."""

    def __init__(self, dim, axes):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))

    def forward(self, x):
        inverse_norm = x.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()
        return x * inverse_norm * (x.shape[1] ** 0.5 * self.gamma)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim, 3), nn.SiLU(), causal_conv(in_dim, out_dim, 3),
            RMSNorm(out_dim, 3), nn.SiLU(), nn.Dropout(0.0), causal_conv(out_dim, out_dim, 3))
        self.shortcut = causal_conv(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x, cache):
        h = walk(self.residual, x, cache)                              # (B, C', T, H, W)
        if self.shortcut is not None:
            x = self.shortcut(x, cache)
        return h + x


class AttentionBlock(nn.Module):
    """Self-attention with one head among the pixels of each frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x, cache):
        frames, height = x.shape[2], x.shape[3]
        h = self.norm(rearrange(x, "b c t h w -> (b t) c h w"))
        q, k, v = rearrange(self.to_qkv(h), "n (three c) h w -> three n 1 (h w) c", three=3)
        h = F.scaled_dot_product_attention(q, k, v)                    # (B T, 1, H W, C)
        h = self.proj(rearrange(h, "n 1 (h w) c -> n c h w", h=height))
        return x + rearrange(h, "(b t) c h w -> b c t h w", t=frames)


class Downsample(nn.Module):
    """Halve height and width and, if `temporal`, the frames too. The video's first frame passes alone."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x, cache):
        x = per_frame(self.resample, x)                                # (B, C, T, H/2, W/2)
        if self.time_conv is None:
            return x
        previous = cache.get(self)
        cache[self] = x[:, :, -1:].clone()
        if previous is None:  # the first frame
            return x
        return self.time_conv(torch.cat([previous, x], dim=2))         # (B, C, T/2, H/2, W/2)


class Upsample(nn.Module):
    """Double height and width and, if `temporal`, the frames too. The video's first frame passes alone."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                                      nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x, cache):
        if self.time_conv is not None:
            if self in cache:
                x = self.time_conv(x, cache)                           # (B, 2 C, T, H, W)
                x = rearrange(x, "b (two c) t h w -> b c (t two) h w", two=2)
            # The first frame never enters time_conv: for the second chunk the past is zeros, not that frame.
            cache[self] = True
        return per_frame(self.resample, x)                             # (B, C/2, T or 2 T, 2 H, 2 W)


def per_frame(layer, x):
    """Apply a 2-D layer to each frame of (B, C, T, H, W)."""
    frames = x.shape[2]
    x = layer(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(x, "(b t) c h w -> b c t h w", t=frames)


def walk(layers, x, cache):
    """Run layers in order; those that look back in time get the cache."""
    for layer in layers:
        if isinstance(layer, (RMSNorm, nn.SiLU, nn.Dropout)):
            x = layer(x)
        else:
            x = layer(x, cache)
    return x


def middle(dim):
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


class Encoder(nn.Module):
    def __init__(self, dim, z_dim):
        super().__init__()
        widths = [dim, dim, 2 * dim, 4 * dim, 4 * dim]
        self.conv1 = causal_conv(3, dim, 3)
        layers = []
        for level in range(4):
            width, out = widths[level], widths[level + 1]
            layers += [ResidualBlock(width, out), ResidualBlock(out, out)]
            if level < 3:
                layers.append(Downsample(out, temporal=level > 0))
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle(4 * dim)
        self.head = nn.Sequential(RMSNorm(4 * dim, 3), nn.SiLU(), causal_conv(4 * dim, z_dim, 3))

    def forward(self, x, cache):
        x = self.conv1(x, cache)                                       # (B, dim, T, H, W)
        x = walk([*self.downsamples, *self.middle, *self.head], x, cache)
        return x                                                       # (B, z_dim, T/4 or 1, H/8, W/8)


class Decoder(nn.Module):
    def __init__(self, dim, z_dim):
        super().__init__()
        self.conv1 = causal_conv(z_dim, 4 * dim, 3)
        self.middle = middle(4 * dim)
        layers = []
        width = 4 * dim
        for level, out in enumerate([4 * dim, 4 * dim, 2 * dim, dim]):
            layers += [ResidualBlock(width, out), ResidualBlock(out, out), ResidualBlock(out, out)]
            if level < 3:
                layers.append(Upsample(out, temporal=level < 2))
            width = out // 2  # up-sampling halves the channels
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(RMSNorm(dim, 3), nn.SiLU(), causal_conv(dim, 3, 3))

    def forward(self, z, cache):
        x = self.conv1(z, cache)                                       # (B, 4 dim, 1, h, w)
        x = walk([*self.middle, *self.upsamples, *self.head], x, cache)
        return x                                                       # (B, 3, 4 or 1, 8 h, 8 w)


class WanVAE(nn.Module):
    """The Wan2.1 VAE. Official size: dim 96, z_dim 16."""

    def __init__(self, dim=96, z_dim=16):
        super().__init__()
        if z_dim != len(MEAN):
            raise InputError(f"z_dim is {z_dim}, but the Wan2.1 VAE's latents have {len(MEAN)} channels")
        self.encoder = Encoder(dim, 2 * z_dim)  # mean and log-variance
        self.conv1 = causal_conv(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = causal_conv(z_dim, z_dim, 1)
        self.decoder = Decoder(dim, z_dim)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load `Wan2.1_VAE.pth` (or a file of another width); sizes are read from the tensors' shapes."""
        size = range(1, 10_001)
        form = {"encoder.conv1.weight": [size] * 5, "conv2.weight": [size] * 5}
        shapes = check_form(weight_shapes(path), form, path, f"a Wan2.1 VAE is in {VAE_FILE}")
        with torch.device("meta"):
            vae = cls(dim=shapes["encoder.conv1.weight"][0], z_dim=shapes["conv2.weight"][0])
        return load_weights(vae.to(dtype), path, device=device).eval().requires_grad_(False)

    def statistics(self, like):
        """Mean and standard deviation of official latents, each (1, 16, 1, 1, 1), in `like`'s dtype."""
        mean = torch.tensor(MEAN, dtype=like.dtype, device=like.device)
        std = torch.tensor(STD, dtype=like.dtype, device=like.device)
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def encode(self, video):
        """Video (B, 3, 1 + 4n, H, W) in [-1, 1] -> mean of normalised latents (B, 16, 1 + n, H/8, W/8)."""
        frames, height, width = video.shape[2:]
        if frames % 4 != 1 or height % 8 or width % 8:
            raise InputError(f"a video of {frames} frames of {width}x{height} cannot be encoded; "
                             f"it needs 1 + 4n frames and sides that are multiples of 8")
        chunks = [video[:, :, :1]]
        if frames > 1:
            chunks += video[:, :, 1:].split(4, dim=2)
        cache = {}
        h = torch.cat([self.encoder(chunk, cache) for chunk in chunks], dim=2)
        latent, _log_variance = self.conv1(h, cache).chunk(2, dim=1)   # (B, 16, 1 + n, H/8, W/8) each
        mean, std = self.statistics(latent)
        return (latent - mean) / std

    def decode(self, latents, recompute=False):
        """Normalised latents (B, 16, 1 + n, h, w) -> video (B, 3, 1 + 4n, 8h, 8w), not clamped to [-1, 1].

        recompute: for backward keep only what goes into each latent frame's pass through the decoder, the
        frame and the cache, and decode again there, one frame at a time. Values and gradients are the same.
        """
        mean, std = self.statistics(latents)
        z = self.conv2(latents * std + mean, {})
        cache, video = {}, []
        for frame in z.split(1, dim=2):
            if recompute:
                # The cache goes in as separate tensors, so that autograd saves them as it saves others.
                pixels, cache = checkpoint(self._decode_frame, frame, list(cache), *cache.values(),
                                           use_reentrant=False)
            else:
                pixels = self.decoder(frame, cache)
            video.append(pixels)
        return torch.cat(video, dim=2)

    def _decode_frame(self, frame, layers, *held):
        """One latent frame -> (its pixels, the new cache); the old cache maps `layers` to `held`."""
        cache = dict(zip(layers, held, strict=True))
        return self.decoder(frame, cache), cache
