"""PAVRM, the process-aware video reward model (arXiv 2511.21541, section 4.2), and the reward PRFL follows.

The first blocks of a Wan transformer turn a noisy latent x_t, its timestep t and the condition into tokens.
One learned query attends to all tokens. A small MLP turns the result into a logit: does this clip move well?

    reward = sigmoid(logit(x_t, t, caption))        nothing is decoded to pixels
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import sequence
from files import InputError, check_form, load_weights, read_json, save_weights
from forms import REWARD_CONFIG
from lora import merges, official_state
from model import WanConfig, WanModel

REWARD_TIMESTEPS = [201, 400, 600, 800]  # a finished clip is judged at these; at 1000 it is pure noise


# ------------------------------------------------------------------------------ pools
# A pool turns tokens (B, L, D) into (B, D). With sequence parallelism it sees this rank's tokens, padding
# included, out of `length` on all ranks, and combines the ranks' results: no rank ever holds all tokens.

class QueryAttention(nn.Module):
    """Learned queries attend to the tokens, are added to the result, and averaged."""

    def __init__(self, dim, num_queries=1, num_heads=8):
        super().__init__()
        self.queries = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_queries, dim)))
        # Never called: it names and initialises the weights as the published checkpoints do.
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def attend(self, tokens, length=None):
        """What n queries found (B, n, D), and their attention (B, heads, n, L), whose rows sum to 1."""
        mha = self.multihead_attn
        wq, wk, wv = mha.in_proj_weight.chunk(3)
        bq, _, bv = mha.in_proj_bias.chunk(3)
        wk = rearrange(wk, "(h d) c -> h d c", h=mha.num_heads)                # (heads, d, D)
        wv = rearrange(wv, "(h d) c -> h d c", h=mha.num_heads)
        q = rearrange(F.linear(self.queries, wq, bq), "n (h d) -> h n d", h=mha.num_heads)

        # q (W_k x) = (q W_k) x and sum(a W_v x) = W_v sum(a x): with few queries, no token needs its own key
        # or value. The bias of the keys moves all logits of a query alike and cancels in the softmax.
        logits = F.linear(tokens, (q @ wk).flatten(0, 1)).transpose(1, 2)      # (B, heads n, L)
        logits = logits * mha.head_dim ** -0.5
        present = sequence.present(length or tokens.shape[1], tokens.device)   # (L,)
        logits = logits.masked_fill(~present, -math.inf)

        # Softmax over the tokens of all ranks. Subtracting the largest logit keeps exp finite and cancels.
        largest = sequence.max_over_ranks(logits.detach().amax(-1, keepdim=True))
        weights = (logits - largest).exp()
        sums = torch.cat([weights @ tokens, weights.sum(-1, keepdim=True)], -1)  # (B, heads n, D + 1)
        sums = sequence.sum_over_ranks(sums)
        total = sums[..., -1:]
        found = (sums[..., :-1] / total).unflatten(1, (mha.num_heads, -1))     # (B, heads, n, D)
        weights = (weights / total).unflatten(1, (mha.num_heads, -1))          # (B, heads, n, L)
        found = rearrange(found @ wv.transpose(-1, -2), "b h n d -> b n (h d)")
        return mha.out_proj(found + bv), weights

    def forward(self, tokens, length=None):
        return (self.attend(tokens, length)[0] + self.queries).mean(1)         # (B, D)


class MeanPool(nn.Module):
    def forward(self, tokens, length=None):
        length = length or tokens.shape[1]
        present = sequence.present(length, tokens.device)                      # (L,)
        total = sequence.sum_over_ranks((tokens * present[:, None]).sum(1))
        return total / length                                                  # (B, D)


class MaxPool(nn.Module):
    def forward(self, tokens, length=None):
        present = sequence.present(length or tokens.shape[1], tokens.device)
        largest = tokens.masked_fill(~present[:, None], -math.inf).amax(1, keepdim=True)
        return sequence.gather(largest, sequence.size()).amax(1)               # (B, D)


POOLS = {"query": QueryAttention, "mean": MeanPool, "max": MaxPool}


# ------------------------------------------------------------------------------ the reward model

class MLP(nn.Module):
    """D -> 1024 -> 512 -> 1 with ReLU."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 1024)
        self.fc2 = nn.Linear(1024, 512)
        self.fc3 = nn.Linear(512, 1)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))                 # (B, 1)


class PAVRM(nn.Module):
    """The reward model. It takes over `dit` and drops its head and all blocks past the first `num_blocks`.

    `labels` names what it learns to predict; each label has its own head (pool and MLP) over shared tokens.
    `pool` is query, with `num_queries`, as published, or mean or max.
    """

    def __init__(self, dit: WanModel, num_blocks=8, labels=("motion_quality",), pool="query", num_queries=1):
        super().__init__()
        if not 0 < num_blocks <= dit.config.num_layers:
            raise InputError(f"num_blocks is {num_blocks}; the transformer has {dit.config.num_layers}")
        if pool == "query" and dit.config.dim % 8:
            raise InputError(f"dim is {dit.config.dim}; the query pool needs a multiple of 8, its heads")
        if len(set(labels)) < len(labels):
            raise InputError(f"labels are {', '.join(labels)}; give each label once")
        dit.blocks = dit.blocks[:num_blocks]
        dit.head = None
        self.dit = dit
        self.labels = list(labels)
        self.settings = {"pool": pool, "num_queries": num_queries}

        def head():
            pooling = QueryAttention(dit.config.dim, num_queries) if pool == "query" else POOLS[pool]()
            return nn.ModuleDict({"query_attention": pooling, "mlp": MLP(dit.config.dim)})

        # The first label's head has the names of the published checkpoints.
        self.query_attention, self.mlp = head().values()
        self.other_heads = nn.ModuleDict({label: head() for label in self.labels[1:]})

    @property
    def heads(self):
        """The modules of all heads: pool and MLP of the first label, of the second, ..."""
        others = [module for head in self.other_heads.values() for module in head.values()]
        return [self.query_attention, self.mlp, *others]

    def forward(self, x, t, context, clip_fea=None, y=None, labels=None):
        """Logit of good motion, float32: (B,) of the first label, or (B, n) of a list of n labels.

        The other arguments are those of WanModel.forward. Section 4.2 of the paper.
        """
        tokens = self.dit.features(x, t, context, clip_fea, y, num_blocks=len(self.dit.blocks))
        tokens = tokens.float()                                                # (B, L, D)
        length = x[0, 0, :, ::2, ::2].numel()                                  # tokens on all ranks
        pools, mlps = self.heads[::2], self.heads[1::2]
        chosen = [self.labels.index(label) for label in labels or self.labels[:1]]
        logits = [mlps[i](pools[i](tokens, length)) for i in chosen]           # (B, 1) each
        return torch.cat(logits, dim=1) if labels else logits[0].squeeze(1)

    def save_pretrained(self, directory, dtype=None):
        """Write one directory with everything the reward needs. Under torchrun every rank calls it."""
        own = {"num_blocks": len(self.dit.blocks), "labels": self.labels, **self.settings,
               "use_clip": self.dit.config.use_clip}
        config = {**self.dit.config.official(), "pavrm": own}
        save_weights(directory, official_state(self), config, name="pavrm", dtype=dtype, merge=merges(self))

    @classmethod
    def on_meta(cls, directory):
        """The reward model that a directory describes, on the meta device: structure without weights."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise InputError(f"{directory} holds no reward model (config.json is missing); "
                             f"train one with train_pavrm.py")
        hint = "give a directory written by train_pavrm.py"
        config = check_form(read_json(path), REWARD_CONFIG, path, hint)
        own = dict(config["pavrm"])
        with torch.device("meta"):
            dit = WanModel(WanConfig.from_dict({**config, "use_clip": own.pop("use_clip")}, path))
            return cls(dit, **own)

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
        """Load what `save_pretrained` wrote. The heads compute in float32, the transformer in `dtype`."""
        pavrm = cls.on_meta(directory)
        pavrm.dit.to(dtype)
        return load_weights(pavrm, directory, device=device)


def check_fit(pavrm, model, reward_directory, model_directory):
    """Raise InputError unless the reward model takes the latents that the model makes, and its condition."""
    for name in ("in_dim", "text_dim", "text_len", "use_clip"):
        ours = getattr(model.config, name)
        theirs = getattr(pavrm.dit.config, name)
        if ours != theirs:
            raise InputError(f"{reward_directory} has {name} {theirs}, and {model_directory} has {ours}; "
                             f"train a reward model on this kind of model with train_pavrm.py")


# ------------------------------------------------------------------------------ losses

def bce_loss(logit, label, reduction="mean"):
    """Binary cross-entropy of logits against labels in {0, 1}, of one shape, on the logit and in float32.

    A label that is NaN is not annotated: its loss is 0 and does not count. The sigmoid is never formed: in
    bf16 it rounds to 1 at a logit of 7, where the gradient would vanish. `reduction` is mean or none.
    """
    logit, label = logit.float(), label.float()
    present = ~label.isnan()
    losses = present * F.binary_cross_entropy_with_logits(logit, label.nan_to_num(), reduction="none")
    return losses if reduction == "none" else losses.sum() / present.sum()


def bradley_terry_loss(better, worse, reduction="mean"):
    """-log sigmoid(better - worse) over pairs of logits (B,). `reduction` is mean or none."""
    losses = -F.logsigmoid(better.float() - worse.float())
    return losses if reduction == "none" else losses.mean()


def reward_loss(logit, weight=0.1, form="hinge"):
    """What PRFL minimises (mean), for logits (B,) and reward = sigmoid(logit).

    hinge        weight * relu(2 - reward), as in the published code, whose relu never cuts anything off
    log_sigmoid  -weight * log(reward): its gradient does not fade where the reward is low
    logit        -weight * logit: it never saturates
    """
    logit = logit.float()
    if form == "hinge":
        return weight * F.relu(2 - logit.sigmoid()).mean()
    if form == "log_sigmoid":
        return weight * (-F.logsigmoid(logit)).mean()
    return weight * (-logit).mean()


# ------------------------------------------------------------------------------ what PRFL follows

class ProcessReward:
    """The reward of PRFL: a PAVRM's labels, each squashed by a sigmoid, weighted and added.

    Any class with these methods and attributes can take its place (docs/extend.md shows two):

        scores(x, t, batch) -> (B, n)   numbers with gradient, of latents x (B, C, F, H, W) at timestep t (B,)
        value(scores) -> (B,)           the reward, squashed as this reward wants it, for the log
        loss(scores) -> scalar          what training minimises
        largest                         the largest possible value: samples near it are called saturated, and
                                        --phases rwr weights clips by exp((value - largest) / temperature)
        timesteps                       noise levels at which a finished clip is judged; [0]: the clean clip

    `batch` has the prompts' states and the image condition of the clips: batch.texts, batch.condition.
    """
    timesteps = REWARD_TIMESTEPS

    def __init__(self, pavrm, weights, loss_weight=0.1, form="hinge"):
        self.pavrm = pavrm
        self.weights = weights  # {label: weight}
        self.loss_weight = loss_weight
        self.form = form
        self.largest = sum(weights.values())  # all weights are positive

    def scores(self, x, t, batch):
        """Logits (B, labels). PAVRM sees the generator's own texts, long ones too, as published."""
        return self.pavrm(x, t, batch.texts, **batch.condition, labels=list(self.weights))

    def value(self, scores):
        return scores.sigmoid() @ torch.tensor(list(self.weights.values()), device=scores.device)

    def loss(self, scores):
        total = 0
        for i, weight in enumerate(self.weights.values()):
            total = total + weight * reward_loss(scores[:, i], self.loss_weight, self.form)
        return total
