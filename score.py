"""Score clips with a reward model at several noise levels, measure how right the scores are, show where the model looks.

    python reward.py --video a.mp4 b.mp4 --prompt "a red disc moves left slowly"       # scores, and their curve
    python reward.py --data demo/val/index.jsonl                                       # encoded, labelled clips
"""
import argparse
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import parallel
from data import Clips, collate, encode_clips, label, parse_size, read_video, write_video
from files import InputError, is_main, write_json
from reward import PAVRM, QueryAttention, bce_loss, bradley_terry_loss, from_published
from solver import TrainingSchedule, add_noise

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
        attention = pool.attend(tokens.float())[1]
        weights = weights + attention.mean((1, 2))                                                # (1, L)
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
