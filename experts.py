"""Wan2.2 A14B is two transformers: one for high noise, one for low."""
from pathlib import Path

import torch
from torch import nn

from model import WanModel


class WanExperts(nn.Module):
    """Both transformers of an A14B model; a timestep t >= boundary * 1000 goes to the one for high noise."""

    BOUNDARY = {"t2v": 0.875, "i2v": 0.900}

    def __init__(self, high_noise, low_noise):
        super().__init__()
        self.high_noise, self.low_noise = high_noise, low_noise
        self.config, self.boundary = high_noise.config, self.BOUNDARY[high_noise.config.model_type]

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
        """Load a directory that holds high_noise_model/ and low_noise_model/."""
        high = WanModel.from_pretrained(Path(directory) / "high_noise_model", dtype, device)
        low = WanModel.from_pretrained(Path(directory) / "low_noise_model", dtype, device)
        return cls(high, low)

    def expert(self, t):
        """The transformer for timestep t, a Python number."""
        return self.high_noise if t >= self.boundary * 1000 else self.low_noise

    def forward(self, x, t, context, clip_fea=None, y=None):
        """As WanModel.forward; all clips of a batch are at the same timestep t (B,)."""
        return self.expert(t[0].item())(x, t, context, clip_fea, y)
