"""PAVRM, the process-aware video reward model (arXiv 2511.21541): does a noisy latent, at any timestep, move well?

    python reward.py --video a.mp4 b.mp4 --prompt "a red disc moves left slowly"       # scores, and their curve
    python reward.py --data demo/val/index.jsonl                                       # encoded, labelled clips

The first blocks of a Wan transformer turn x_t, t and the condition into tokens; one learned query attends to all
tokens; a small MLP turns what it found into a logit. reward = sigmoid(logit). Nothing is decoded to pixels.
"""
import argparse
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import parallel
from data import Clips, collate, encode_clips, label, parse_size, read_video, write_video
from files import InputError, is_main, load_weights, read_json, save_weights, weight_shapes, write_json
from lora import merged_state
from model import WanConfig, WanModel
from solver import TrainingSchedule, add_noise


class QueryAttention(nn.Module):
    """Pool tokens (B, L, D) to (B, D): learned queries attend to them, are added to what they get, and averaged."""

    def __init__(self, dim, num_queries=1, num_heads=8):
        super().__init__()
        self.queries = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_queries, dim)))
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, tokens):
        query = self.queries.expand(len(tokens), -1, -1)               # (B, n, D)
        found, _ = self.multihead_attn(query, tokens, tokens, need_weights=False)
        return (found + query).mean(1)                                 # (B, D)

    def weights(self, tokens):
        """How much the queries attend to each token, averaged over heads and queries: (B, L), a row's sum is 1."""
        query = self.queries.expand(len(tokens), -1, -1)
        return self.multihead_attn(query, tokens, tokens)[1].mean(1)


class MeanPool(nn.Module):
    def forward(self, tokens):
        return tokens.mean(1)                                          # (B, D)


class MaxPool(nn.Module):
    def forward(self, tokens):
        return tokens.amax(1)                                          # (B, D)


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
        pools, mlps = self.heads[::2], self.heads[1::2]
        chosen = [self.tasks.index(task) for task in tasks or self.tasks[:1]]
        logits = torch.cat([mlps[i](pools[i](tokens)) for i in chosen], dim=1)                            # (B, n)
        return logits if tasks else logits.squeeze(1)

    def save_pretrained(self, directory, dtype=None):
        """Write one directory with everything the reward needs. Under torchrun every rank calls it."""
        own = {"num_blocks": len(self.dit.blocks), "tasks": self.tasks, "use_clip": self.dit.config.use_clip, **self.settings}
        save_weights(directory, merged_state(self), {**self.dit.config.official(), "pavrm": own}, name="pavrm", dtype=dtype)

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


# ---------------------------------------------------------------------------------------------- scoring

EVALUATION_TIMESTEPS = [201, 400, 600, 800, 1000]  # as published; at 1000 the clip is all noise, and only its caption is left
REWARD_TIMESTEPS = EVALUATION_TIMESTEPS[:-1]  # the reward of a finished clip is the mean over these


@torch.no_grad()
def process_logits(pavrm, x0, text, condition, noise, timesteps, tasks=None, batch_size=1, shift=5.0):
    """Logits (T, labels) of one clip x0 (1, C, F, H, W) at T timesteps, `batch_size` of them at once."""
    schedule, logits = TrainingSchedule(shift), []
    for some in torch.tensor(timesteps, dtype=torch.float32).split(batch_size):
        n = len(some)
        sigma = torch.tensor([schedule.near(t) for t in some], device=x0.device)
        x = add_noise(x0.expand(n, -1, -1, -1, -1), noise, sigma)
        several = {name: value.expand(n, *value.shape[1:]) for name, value in condition.items()}
        logits.append(pavrm(x, some.to(x0.device), [text] * n, **several, tasks=tasks or pavrm.tasks))
    return torch.cat(logits)


def score(pavrm, clips, indices, timesteps, device, seed=0, batch_size=1, shift=5.0):
    """Logits (N, T, labels) of encoded clips with their short captions, the work shared by all ranks.

    Each clip has its own fixed noise; clips of one pair have the same.
    """
    logits = torch.zeros(len(indices), len(timesteps), len(pavrm.tasks))
    for n, counts in tqdm(parallel.deal(len(indices)), desc="scoring", leave=False, disable=None if is_main() else True):
        clip = clips.load(indices[n])
        x0, condition = collate([clip], pavrm.dit.config, device)
        noise = fixed_noise(clip, seed).to(device)
        found = process_logits(pavrm, x0, clip["text_short"].to(device), condition, noise, timesteps, None, batch_size, shift)
        logits[n] = found.cpu() if counts else 0
    dist.all_reduce(logits)  # each rank has zeros where others have worked
    return logits


def fixed_noise(clip, seed):
    """The noise (1, C, F, H, W) that a clip is scored with: its own, or that of its pair."""
    entry = clip["entry"]
    return parallel.noise((1, *clip["latents"].shape), seed, entry.get("pair_id") or entry["source_id"], "evaluation")


def measure(logits, clips, indices, pavrm, timesteps, pairs=None):
    """{label: {timestep: measures}} of `score`'s logits, for the labels that are annotated; also of `pairs` of places."""
    measures = {}
    for column, task in enumerate(pavrm.tasks):
        labels = [label(clips.entries[i]["labels"], task) for i in indices]
        rows = [n for n, value in enumerate(labels) if value is not None]
        true = torch.tensor([labels[n] for n in rows])
        for place, t in enumerate(timesteps):
            if rows:
                found = classification_measures(logits[rows, place, column], true)
                if pairs:
                    better, worse = (logits[list(side), place, column] for side in zip(*pairs))
                    found = {"pair_accuracy": ((better > worse).float() + (better == worse).float() / 2).mean().item(), "auc": found["auc"],
                             "loss": bradley_terry_loss(better, worse).item()}
                measures.setdefault(task, {})[t] = found
    return measures


def classification_measures(logit, label):
    """Accuracy, precision, recall, F1 (threshold 0), ROC AUC, loss and expected calibration error of logits (N,) against
    labels (N,) in {0, 1}. AUC is the share of (good, poor) pairs in the right order, and None where there are none. ECE
    (ten bins of the reward) is how far from the share of good clips the mean reward of a bin is, on average."""
    said, true, reward = logit > 0, label > 0.5, logit.double().sigmoid()
    hits = (said & true).sum().item()
    precision = hits / max(said.sum().item(), 1)
    recall = hits / max(true.sum().item(), 1)
    pairs = logit[true][:, None] - logit[~true]
    bins = (reward * 10).long().clamp(max=9)
    gaps = [(reward - true.double())[bins == b].sum().abs().item() for b in range(10)]
    return {"accuracy": (said == true).float().mean().item(), "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / max(precision + recall, 1e-12),
            "auc": ((pairs > 0).float() + (pairs == 0).float() / 2).mean().item() if pairs.numel() else None,
            "loss": bce_loss(logit, label).item(), "ece": sum(gaps) / len(logit)}


def table(measures):
    """The lines of a table of `measure`'s result, one a label and timestep."""
    return [f"  {task}, timestep {t:>4}:  " + "  ".join(f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in row.items())
            for task, rows in measures.items() for t, row in rows.items()]


def parse_tasks(words, pavrm):
    """["motion_quality"] or ["motion_quality=0.7", "text_alignment=0.3"] -> {label: weight}; [] is the first label."""
    tasks = {}
    for word in words or pavrm.tasks[:1]:
        name, _, weight = word.partition("=")
        if name not in pavrm.tasks:
            raise InputError(f"--task {name} is no label of this reward model, which has {', '.join(pavrm.tasks)}; choose from them")
        try:
            tasks[name] = float(weight or 1)
        except ValueError:
            raise InputError(f"--task {word} has no number as its weight; write {name}=0.5, say") from None
    return tasks


# ---------------------------------------------------------------------------------------------- the command

@torch.no_grad()
def attention_video(pavrm, pool, clip, video, timesteps, seed, device):
    """The frames (T, H, W, 3) with a query pool's attention over them as a heat map, the mean over timesteps."""
    x0, condition = collate([clip], pavrm.dit.config, device)
    noise, schedule = fixed_noise(clip, seed).to(device), TrainingSchedule()
    weights = 0
    for t in timesteps:
        x, time = add_noise(x0, noise, schedule.near(t)), torch.tensor([float(t)], device=device)
        tokens = pavrm.dit.features(x, time, [clip["text_short"].to(device)], **condition, num_blocks=len(pavrm.dit.blocks))
        weights = weights + pool.weights(tokens.float())
    F_, H, W = x0.shape[2], x0.shape[3] // 2, x0.shape[4] // 2
    heat = F.interpolate(weights.view(1, F_, H, W), video.shape[1:3], mode="bilinear")[0].cpu()   # (F, H, W)
    heat = (heat / heat.amax())[(torch.arange(len(video)) + 3) // 4, ..., None]                   # (T, H, W, 1)
    hot = torch.tensor([255.0, 200.0, 0.0]) * heat + torch.tensor([160.0, 0.0, 80.0]) * (1 - heat)
    return (video * (1 - 0.75 * heat) + hot * 0.75 * heat).round().to(torch.uint8)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Score videos or encoded clips with a reward model, at several noise levels.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--reward", default="demo/reward", help="the reward model, written by train_pavrm.py")
    parser.add_argument("--video", nargs="+", help="videos to score")
    parser.add_argument("--prompt", nargs="+", help="their prompts: one for all, or one each")
    parser.add_argument("--data", help="or: an index of encoded clips (data.py); where it has labels, measures are printed too")
    parser.add_argument("--model", default="demo/model", help="official model directory, whose VAE and text encoder encode the videos")
    parser.add_argument("--size", type=parse_size, help="width x height the videos are cut to; None: as the model has it")
    parser.add_argument("--frames", type=int, help="1 + 4n frames of each; None: as the model has it")
    parser.add_argument("--fps", type=float, help="frames a second; None: as the model has it")
    parser.add_argument("--timesteps", type=int, nargs="+", default=REWARD_TIMESTEPS, help="noise levels; the reward is their mean")
    parser.add_argument("--task", nargs="+", help="the label, or a weighted sum: motion_quality=0.7 text_alignment=0.3; None: the first")
    parser.add_argument("--attention", action="store_true", help="also write each video with the query's attention as a heat map")
    parser.add_argument("--plot", action="store_true", help="also draw rewards against timesteps, scores.png (takes matplotlib)")
    parser.add_argument("--batch_size", type=int, default=1, help="noise levels of a clip scored at once")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--output", default="outputs/scores", help="directory for scores.json, the heat maps and the encoded videos")
    parser.add_argument("--convert", nargs=3, metavar=("TRANSFORMER", "QUERY_ATTENTION", "MLP"),
                        help="instead: make the directory --reward from a published transformer directory and its two head files")
    args = parser.parse_args(argv)
    if args.convert and args.reward == parser.get_default("reward"):
        raise InputError("--convert would replace the tiny world's reward model; say with --reward where to write")
    if args.convert:
        from_published(*args.convert).save_pretrained(args.reward)
        print(f"the reward model is in {args.reward}")
        return
    if bool(args.video) == bool(args.data):
        raise InputError("there is nothing to score, or too much; give either --video or --data")
    device = parallel.start()
    if args.video:
        prompts = args.prompt * len(args.video) if args.prompt and len(args.prompt) == 1 else args.prompt or []
        if len(prompts) != len(args.video):
            raise InputError(f"{len(args.video)} videos have {len(prompts)} prompts; give one --prompt for all, or one each")
        stems = Counter(Path(path).stem for path in args.video)
        entries = [{"line": n, "source_id": Path(path).stem + (f"-{n}" if stems[Path(path).stem] > 1 else ""), "video_path": path,
                    "short_caption": prompt, "long_caption": prompt, "labels": {}, "pair_id": "video"}
                   for n, (path, prompt) in enumerate(zip(args.video, prompts), 1)]
        args.data = encode_clips(entries, args.model, Path(args.output, "encoded"), args.size, args.frames, args.fps)
        dist.barrier()  # rank 0 writes the index
    clips, pavrm = Clips(args.data), PAVRM.from_pretrained(args.reward, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    clips.check()
    tasks, indices = parse_tasks(args.task, pavrm), list(range(len(clips)))
    if args.attention:
        missing = [entry["source_id"] for entry in clips.entries if not Path(entry.get("video_path") or "?").is_file()]
        pool = pavrm.heads[2 * pavrm.tasks.index(next(iter(tasks)))]  # of the first label asked for
        if missing or not isinstance(pool, QueryAttention):
            raise InputError(f"--attention needs each clip's video, and {missing[0]} has none here; leave it out" if missing else
                             "--attention shows where a query looks, and this reward model pools without one; leave it out")
    logits = score(pavrm, clips, indices, args.timesteps, device, args.seed, args.batch_size)             # (N, T, labels)
    measures = measure(logits, clips, indices, pavrm, args.timesteps)
    weights = torch.tensor([tasks.get(task, 0.0) for task in pavrm.tasks])
    rewards = logits.sigmoid().mean(1) @ weights                                                          # (N,)
    scores = [{"name": entry["source_id"], "prompt": entry["short_caption"], "reward": reward.item(),
               "rewards": {task: row[:, i].sigmoid().tolist() for i, task in enumerate(pavrm.tasks)}}
              for entry, reward, row in zip(clips.entries, rewards, logits)]
    if is_main():
        write_json(Path(args.output, "scores.json"), {"reward_model": args.reward, "timesteps": args.timesteps, "scores": scores,
                                                      **({"measures": measures} if measures else {})})
        for row in scores:
            print(f"{row['reward']:.3f}  {row['name']}  {row['prompt']!r}")
        print("\n".join([*table(measures), f"written: {args.output}/scores.json"]))
        if args.plot:
            import plot  # here, since it is another script and only this needs it
            print(f"written: {plot.draw(Path(args.output, 'scores.json'))}")
    for n, counts in parallel.deal(len(clips)) if args.attention else ():
        entry = clips.entries[n]
        video = read_video(entry["video_path"], entry["fps"], entry["frames"], [8 * side for side in entry["shape"][:1:-1]])
        heat = attention_video(pavrm, pool, clips.load(n), video, args.timesteps, args.seed, device)
        if counts:
            write_video(Path(args.output, f"attention_{entry['source_id']}.mp4"), heat, entry["fps"])


if __name__ == "__main__":
    parallel.run(main)
