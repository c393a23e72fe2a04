"""How accurate a reward model is: its logits at several noise levels, and measures of them against labels.

A clip x_0 is noised to x_t at each timestep t, and the reward model gives a logit for every label. Each clip
has its own fixed noise, so two models, or two checkpoints of one model, are measured on the same inputs.
"""
import torch
import torch.distributed as dist
from tqdm import tqdm

import parallel
from clips import collate, label_of
from files import InputError, is_finite, is_main
from reward import REWARD_TIMESTEPS, bce_loss, bradley_terry_loss
from solver import TrainingSchedule, add_noise

EVALUATION_TIMESTEPS = [*REWARD_TIMESTEPS, 1000]  # the published ones; at 1000 only the caption is known

# ---------------------------------------------------------------------------------------------- logits

@torch.no_grad()
def process_logits(pavrm, x0, text, condition, noise, timesteps, labels=None, batch_size=1, shift=5.0):
    """Logits (T, labels) of one clip x0 (1, C, F, H, W) at T timesteps, `batch_size` of them at once.

    `text` is (n, text_dim), `condition` what `collate` returns for this clip; `labels` are names, by default
    all that the model has.
    """
    schedule = TrainingSchedule(shift)
    logits = []
    for t in torch.tensor(timesteps, dtype=torch.float32).split(batch_size):
        n = len(t)
        sigma = torch.tensor([schedule.near(level) for level in t], device=x0.device)
        x = add_noise(x0.expand(n, -1, -1, -1, -1), noise, sigma)  # (n, C, F, H, W)
        repeated = {name: value.expand(n, *value.shape[1:]) for name, value in condition.items()}
        logits.append(pavrm(x, t.to(x0.device), [text] * n, **repeated, labels=labels or pavrm.labels))
    return torch.cat(logits)  # (T, labels)


def score_clips(pavrm, clips, indices, timesteps, device, seed=0, batch_size=1, shift=5.0):
    """Logits (N, T, labels) of the N encoded clips at `indices`, with their short captions.

    Each clip has its own fixed noise; clips of one pair have the same. All ranks share the work.
    """
    logits = torch.zeros(len(indices), len(timesteps), len(pavrm.labels))
    hidden = None if is_main() else True  # None: shown on a terminal only
    for n, counts in tqdm(parallel.shard_indices(len(indices)), desc="scoring", leave=False, disable=hidden):
        clip = clips.load(indices[n])
        x0, condition = collate([clip], pavrm.dit.config, device)
        noise = fixed_noise(clip, seed).to(device)
        text = clip["text_short"].to(device)
        found = process_logits(pavrm, x0, text, condition, noise, timesteps, None, batch_size, shift)
        if not is_finite(found):
            raise InputError(f"clip {clip['entry']['source_id']}: its scores are NaN or infinite; "
                             f"look at the weights of the reward model, and at the clip")
        if counts:
            logits[n] = found.cpu()
    dist.all_reduce(logits)  # each rank has zeros where others did the work
    return logits


def fixed_noise(clip, seed):
    """The noise (1, C, F, H, W) that a clip is scored with: its own, or that of its pair."""
    entry = clip["entry"]
    name = entry.get("pair_id") or entry["source_id"]
    return parallel.noise((1, *clip["latents"].shape), seed, name, "evaluation")


# ---------------------------------------------------------------------------------------------- measures

def measure(logits, clips, indices, pavrm, timesteps, pairs=None):
    """{label: {timestep: measures}} of the logits (N, T, labels) that `score_clips` returned.

    Only annotated clips count, and a label that no clip is annotated for is left out. With `pairs`, a list of
    (better, worse) positions in `indices`, the measures are those of a model trained on pairs: how often the
    better clip has the larger logit (a tie counts half), ROC AUC, and the Bradley-Terry loss.
    """
    measures = {}
    for column, name in enumerate(pavrm.labels):
        annotated = {}  # {position: 1 or 0}
        for n, i in enumerate(indices):
            value = label_of(clips.entries[i]["labels"], name)
            if value is not None:
                annotated[n] = value
        if not annotated:
            continue
        true = torch.tensor(list(annotated.values()))
        measures[name] = {}
        for place, t in enumerate(timesteps):
            at_t = logits[:, place, column]  # (N,)
            found = classification_measures(at_t[list(annotated)], true)
            if pairs:
                accuracy, loss = pair_measures(at_t, pairs)
                found = {"pair_accuracy": accuracy, "auc": found["auc"], "loss": loss}
            measures[name][t] = found
    return measures


def pair_measures(logit, pairs):
    """(accuracy, Bradley-Terry loss) of logits (N,), for pairs (better, worse) of positions in them."""
    better = logit[[better for better, _ in pairs]]
    worse = logit[[worse for _, worse in pairs]]
    right = (better > worse).float() + (better == worse).float() / 2
    return right.mean().item(), bradley_terry_loss(better, worse).item()


def classification_measures(logit, label):
    """Measures of logits (N,) against labels (N,) in {0, 1}; a logit above 0 predicts 1.

    accuracy, precision, recall, f1; auc, see `roc_auc`; loss (binary cross-entropy); ece, the expected
    calibration error: clips are put into ten bins by their reward, and each bin's mean reward is compared to
    its share of good clips. The error is the mean distance of the two over all clips.
    """
    predicted = logit > 0
    true = label > 0.5
    hits = (predicted & true).sum().item()
    precision = hits / max(predicted.sum().item(), 1)
    recall = hits / max(true.sum().item(), 1)

    reward = logit.double().sigmoid()
    bins = (reward * 10).long().clamp(max=9)  # a reward of 1 belongs to the last bin
    error = 0
    for b in range(10):
        error += (reward - true.double())[bins == b].sum().abs().item()
    return {
        "accuracy": (predicted == true).float().mean().item(),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-12),
        "auc": roc_auc(logit, true),
        "loss": bce_loss(logit, label).item(),
        "ece": error / len(logit),
    }


def roc_auc(logit, true):
    """The share of (good, poor) pairs in which the good clip has the larger logit; a tie counts half.

    logit (N,), true (N,) bool. None if all clips are good, or all poor. By ranks (Mann-Whitney): the rank of
    a good clip among all clips, less its rank among the good ones, is the number of poor clips below it.
    """
    good = true.sum().item()
    poor = len(true) - good
    if not good or not poor:
        return None
    _, place, count = logit.double().unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()                     # the last rank, from 1, of the clips with each value
    midrank = (last - (count.double() - 1) / 2)[place]  # (N,): the mean rank of all clips with the same value
    below = midrank[true].sum().item() - good * (good + 1) / 2
    return below / (good * poor)


def table(measures):
    """The lines of a table of `measure`'s result: one per label and timestep."""
    lines = []
    for name, rows in measures.items():
        for t, row in rows.items():
            numbers = [f"{key} {'-' if value is None else f'{value:.3f}'}" for key, value in row.items()]
            lines.append(f"  {name}, timestep {t:>4}:  " + "  ".join(numbers))
    return lines
