"""PAVRM, the process-aware video reward model (arXiv 2511.21541): does a noisy latent, at any timestep, move well?

    python reward.py --video a.mp4 b.mp4 --prompt "a red disc moves left slowly"       # scores, and their curve
    python reward.py --data demo/val/index.jsonl                                       # encoded, labelled clips

The first blocks of a Wan transformer turn x_t, t and the condition into tokens; one learned query attends to all
tokens; a small MLP turns what it found into a logit. reward = sigmoid(logit). Nothing is decoded to pixels.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import sequence
from files import InputError, load_weights, read_json, save_weights, weight_shapes
from lora import merges, official_state
from model import WanConfig, WanModel


# Pools turn tokens (B, L, D) into (B, D). With sequence parallelism these are this rank's tokens, padding included, out of
# `length` on all ranks, and each pool puts the ranks' results together: nobody ever holds all tokens.

class QueryAttention(nn.Module):
    """Learned queries attend to the tokens, are added to what they get, and averaged."""

    def __init__(self, dim, num_queries=1, num_heads=8):
        super().__init__()
        self.queries = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_queries, dim)))
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)  # names and start of its weights

    def attend(self, tokens, length=None):
        """What the queries found (B, n, D), and their attention (B, heads, n, L), a row's sum being 1."""
        mha = self.multihead_attn
        present = sequence.present(length or tokens.shape[1], tokens.device)          # (L,)
        (wq, wk, wv), (bq, _, bv) = mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)
        wk, wv = (rearrange(w, "(h d) c -> h d c", h=mha.num_heads) for w in (wk, wv))  # (heads, d, D)
        q = rearrange(F.linear(self.queries, wq, bq), "n (h d) -> h n d", h=mha.num_heads)
        # q (W_k x) = (q W_k) x and sum(a W_v x) = W_v sum(a x): with few queries no token needs a key or value of its own. The
        # keys' bias moves all logits of a query alike, and cancels.
        logits = F.linear(tokens, (q @ wk).flatten(0, 1)).transpose(1, 2) * mha.head_dim ** -0.5   # (B, heads n, L)
        logits = logits.masked_fill(~present, -math.inf)
        largest = sequence.max_over_ranks(logits.detach().amax(-1, keepdim=True))     # makes exp safe, and cancels too
        weights = (logits - largest).exp()
        sums = sequence.sum_over_ranks(torch.cat([weights @ tokens, weights.sum(-1, keepdim=True)], -1))  # (B, heads n, D + 1)
        found, weights = ((x / sums[..., -1:]).unflatten(1, (mha.num_heads, -1)) for x in (sums[..., :-1], weights))
        found = rearrange(found @ wv.transpose(-1, -2), "b h n d -> b n (h d)")
        return mha.out_proj(found + bv), weights

    def forward(self, tokens, length=None):
        return (self.attend(tokens, length)[0] + self.queries).mean(1)               # (B, D)


class MeanPool(nn.Module):
    def forward(self, tokens, length=None):
        length = length or tokens.shape[1]
        present = sequence.present(length, tokens.device)              # (L,)
        return sequence.sum_over_ranks((tokens * present[:, None]).sum(1)) / length  # (B, D)


class MaxPool(nn.Module):
    def forward(self, tokens, length=None):
        present = sequence.present(length or tokens.shape[1], tokens.device)
        largest = tokens.masked_fill(~present[:, None], -math.inf).amax(1, keepdim=True)
        return sequence.gather(largest, sequence.size()).amax(1)       # (B, D)


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

    `tasks` names the labels that it is trained to predict, each with a head (pool and MLP) of its own over shared
    tokens. `pool` is query, with `num_queries`, as published, mean or max.
    """

    def __init__(self, dit: WanModel, num_blocks=8, tasks=("motion_quality",), pool="query", num_queries=1):
        super().__init__()
        if not 0 < num_blocks <= dit.config.num_layers:
            raise InputError(f"num_blocks is {num_blocks}, but the transformer has {dit.config.num_layers} blocks")
        dit.blocks = dit.blocks[:num_blocks]
        dit.head = None
        self.dit, self.tasks, self.settings = dit, list(tasks), {"pool": pool, "num_queries": num_queries}

        def head():
            pools = {"query": lambda: QueryAttention(dit.config.dim, num_queries), "mean": MeanPool, "max": MaxPool}
            return nn.ModuleDict({"query_attention": pools[pool](), "mlp": MLP(dit.config.dim)})

        self.query_attention, self.mlp = head().values()  # of the first label, named as in the published checkpoints
        self.other_heads = nn.ModuleDict({task: head() for task in self.tasks[1:]})

    @property
    def heads(self):
        """The modules of all heads: pool and MLP of the first label, of the second, ..."""
        return [self.query_attention, self.mlp, *(module for head in self.other_heads.values() for module in head.values())]

    def forward(self, x, t, context, clip_fea=None, y=None, tasks=None):
        """Logit, float32, of good motion: (B,) of the first label, or with `tasks`, a list of labels, (B, len(tasks)).

        Other arguments as in WanModel.forward. Section 3.2 of the paper.
        """
        tokens = self.dit.features(x, t, context, clip_fea, y, num_blocks=len(self.dit.blocks)).float()   # (B, L, D)
        length = x[0, 0, :, ::2, ::2].numel()  # tokens in all
        pools, mlps = self.heads[::2], self.heads[1::2]
        chosen = [self.tasks.index(task) for task in tasks or self.tasks[:1]]
        logits = torch.cat([mlps[i](pools[i](tokens, length)) for i in chosen], dim=1)                            # (B, n)
        return logits if tasks else logits.squeeze(1)

    def save_pretrained(self, directory, dtype=None):
        """Write one directory with everything the reward needs. Under torchrun every rank calls it."""
        own = {"num_blocks": len(self.dit.blocks), "tasks": self.tasks, "use_clip": self.dit.config.use_clip, **self.settings}
        config = {**self.dit.config.official(), "pavrm": own}
        save_weights(directory, official_state(self), config, name="pavrm", dtype=dtype, merge=merges(self))

    @classmethod
    def on_meta(cls, directory):
        """The reward model that a directory describes, on the meta device: structure without weights."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise InputError(f"{directory} holds no reward model (it has no config.json); train one with train_pavrm.py")
        config = read_json(path)
        if "pavrm" not in config:
            raise InputError(f"{path} does not describe a reward model; give a directory written by train_pavrm.py")
        own = dict(config["pavrm"])
        with torch.device("meta"):
            dit = WanModel(WanConfig.from_dict({**config, "use_clip": own.pop("use_clip")}, path))
            return cls(dit, **own)

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
        """Load what `save_pretrained` wrote. The heads compute in float32 whatever `dtype` the transformer has."""
        pavrm = cls.on_meta(directory)
        pavrm.dit.to(dtype)
        return load_weights(pavrm.to_empty(device=device), directory)


def check_fit(pavrm, model, reward_directory, model_directory):
    """Raise InputError unless the reward model judges what the model makes, under the model's own condition."""
    for name in ("in_dim", "text_dim", "text_len", "use_clip"):
        ours, theirs = getattr(model.config, name), getattr(pavrm.dit.config, name)
        if ours != theirs:
            raise InputError(f"the reward model {reward_directory} has {name} {theirs}, but {model_directory} has {ours}; "
                             f"train it on a model of this kind with train_pavrm.py")


def from_published(transformer, query_attention, mlp):
    """The PAVRM of a published transformer directory (whose config.json may count more blocks than it holds) and the two
    files of its head."""
    dit = WanModel.on_meta(transformer)
    num_blocks = 1 + max(int(name.split(".")[1]) for name in weight_shapes(transformer) if name.startswith("blocks."))
    pavrm = PAVRM(dit, num_blocks, num_queries=weight_shapes(query_attention).get("queries", [1])[0])
    load_weights(dit.to_empty(device="cpu"), transformer, ignore=["head."])
    load_weights(pavrm.query_attention, query_attention)
    load_weights(pavrm.mlp, mlp)
    return pavrm


# ---------------------------------------------------------------------------------------------- losses

def bce_loss(logit, label, reduction="mean"):
    """Binary cross-entropy of logits against labels in {0, 1}, of one shape, on the logit and in float32.

    A label that is NaN is not annotated: its loss is 0 and does not count. The sigmoid is never formed: rounded to
    bf16 it reaches 1 at a logit of 7, and the gradient ends there. `reduction` is mean or none.
    """
    present = ~label.float().isnan()
    losses = present * F.binary_cross_entropy_with_logits(logit.float(), label.float().nan_to_num(), reduction="none")
    return losses if reduction == "none" else losses.sum() / present.sum()


def bradley_terry_loss(better, worse, reduction="mean"):
    """-log sigmoid(better - worse) over pairs of logits (B,). `reduction` is mean or none."""
    losses = -F.logsigmoid(better.float() - worse.float())
    return losses if reduction == "none" else losses.mean()


def reward_loss(logit, weight=0.1, form="hinge"):
    """What PRFL minimises (mean), for logits (B,) and reward = sigmoid(logit).

    hinge, as published: weight * relu(2 - reward). log_sigmoid: -weight * log(reward), whose gradient does not fade
    where the reward is low. logit: -weight * logit, which never saturates.
    """
    logit = logit.float()
    loss = {"hinge": lambda: F.relu(2 - logit.sigmoid()), "log_sigmoid": lambda: -F.logsigmoid(logit), "logit": lambda: -logit}
    return weight * loss[form]().mean()


if __name__ == "__main__":
    import parallel
    import score  # which imports this file; the command is kept out of what is read to follow a step of PRFL
    parallel.run(score.main)
