"""PAVRM, the process-aware video reward model (arXiv 2511.21541): does a noisy latent, at any timestep, move well?

The first blocks of a Wan transformer turn x_t, t and the condition into tokens; one learned query attends to all
tokens; a small MLP turns what it found into a logit. reward = sigmoid(logit). Nothing is decoded to pixels.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from files import InputError, load_weights, read_json, save_weights
from model import WanConfig, WanModel


class QueryAttention(nn.Module):
    """Pool tokens (B, L, D) to (B, D): one learned query attends to them, and is added to what it gets."""

    def __init__(self, dim, num_heads=8):
        super().__init__()
        self.queries = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, dim)))
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, tokens):
        query = self.queries.expand(len(tokens), 1, -1)                # (B, 1, D)
        found, _ = self.multihead_attn(query, tokens, tokens, need_weights=False)
        return (found + query).squeeze(1)                              # (B, D)


class MLP(nn.Module):
    """D -> 1024 -> 512 -> 1 with ReLU."""

    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(dim, 1024), nn.Linear(1024, 512), nn.Linear(512, 1)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))         # (B, 1)


class PAVRM(nn.Module):
    """The reward model. It takes `dit` over: its blocks past the first `num_blocks` and its head are dropped.

    `task` names the label that it is trained to predict.
    """

    def __init__(self, dit: WanModel, num_blocks=8, task="motion_quality"):
        super().__init__()
        if not 0 < num_blocks <= dit.config.num_layers:
            raise InputError(f"num_blocks is {num_blocks}, but the transformer has {dit.config.num_layers} blocks")
        dit.blocks = dit.blocks[:num_blocks]
        dit.head = None
        self.dit, self.task = dit, task
        self.query_attention = QueryAttention(dit.config.dim)
        self.mlp = MLP(dit.config.dim)

    def forward(self, x, t, context, clip_fea=None, y=None):
        """Logit (B,), float32, of good motion; arguments as in WanModel.forward. Section 3.2 of the paper."""
        tokens = self.dit.features(x, t, context, clip_fea, y, num_blocks=len(self.dit.blocks))   # (B, L, D)
        return self.mlp(self.query_attention(tokens.float())).squeeze(-1)                         # (B,)

    def save_pretrained(self, directory, dtype=None):
        """Write one directory with everything the reward needs. Under torchrun every rank calls it."""
        reward = {"num_blocks": len(self.dit.blocks), "task": self.task, "use_clip": self.dit.config.use_clip}
        save_weights(directory, self.state_dict(), {**self.dit.config.official(), "pavrm": reward}, name="pavrm", dtype=dtype)

    @classmethod
    def on_meta(cls, directory):
        """The reward model that a directory describes, on the meta device: structure without weights."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise InputError(f"{directory} holds no reward model (it has no config.json); train one with train_pavrm.py")
        config = read_json(path)
        if "pavrm" not in config:
            raise InputError(f"{path} does not describe a reward model; give a directory written by train_pavrm.py")
        reward = config["pavrm"]
        with torch.device("meta"):
            dit = WanModel(WanConfig.from_dict({**config, "use_clip": reward["use_clip"]}, path))
            return cls(dit, reward["num_blocks"], reward["task"])

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
        """Load what `save_pretrained` wrote. The head computes in float32 whatever `dtype` the transformer has."""
        pavrm = cls.on_meta(directory)
        pavrm.dit.to(dtype)
        return load_weights(pavrm.to_empty(device=device), directory)


# ---------------------------------------------------------------------------------------------- losses

def bce_loss(logit, label):
    """Binary cross-entropy (mean) of logits (B,) and labels (B,) in {0, 1}, on the logit and in float32.

    The sigmoid is never formed: rounded to bf16 it reaches 1 at a logit of 7, and the gradient ends there.
    """
    return F.binary_cross_entropy_with_logits(logit.float(), label.float())


def bradley_terry_loss(better, worse):
    """-log sigmoid(better - worse) (mean) over pairs of logits (B,)."""
    return -F.logsigmoid(better.float() - worse.float()).mean()


def reward_loss(logit, weight=0.1):
    """What PRFL minimises (mean): weight * relu(2 - reward), reward = sigmoid(logit) (B,)."""
    return (weight * F.relu(2 - logit.float().sigmoid())).mean()


# ---------------------------------------------------------------------------------------------- evaluation

def classification_measures(logit, label):
    """Accuracy, precision, recall, F1 and loss of logits (N,) against labels (N,) in {0, 1}, at the threshold 0."""
    said, true = logit > 0, label > 0.5
    hits = (said & true).sum().item()
    precision = hits / max(said.sum().item(), 1)
    recall = hits / max(true.sum().item(), 1)
    return {"accuracy": (said == true).float().mean().item(), "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / max(precision + recall, 1e-12), "loss": bce_loss(logit, label).item()}
