"""Stage 1: train PAVRM, the process-aware video reward model (arXiv 2511.21541, section 3.2).

    python train_pavrm.py                                  # the tiny world, alone
    torchrun --nproc_per_node=8 train_pavrm.py --batch_size 8 --model Wan2.1-T2V-14B --train ... --val ...

One step, for a clip x_0 with a human label y in {0, 1}:

    t, s   ~ uniform over the shifted schedule             a random denoising step and its noise level
    x_s    = (1 - s) x_0 + s noise                         the clip as the generator sees it at that step
    loss   = BCE(logit(x_s, t, caption), y)                on the logit, in float32

The first blocks of the transformer and the head are trained, the embeddings stay. Every so many steps the model is
evaluated on held-out clips at fixed timesteps with fixed noise. The result is one directory, OUTPUT/reward.

Departures from the published code are listed in the README.
"""
import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import parallel
from data import TASKS, Clips, Order, collate, label
from files import InputError, is_main, load_weights
from model import WanModel
from reward import PAVRM, bce_loss, classification_measures
from solver import TrainingSchedule, add_noise


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train PAVRM, the reward model on noisy latents.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="official directory of the transformer it starts from")
    parser.add_argument("--train", default="demo/train/index.jsonl", help="index of encoded, labelled clips (data.py)")
    parser.add_argument("--val", default="demo/val/index.jsonl", help="the same, of held-out clips")
    parser.add_argument("--output", default="outputs/pavrm", help="directory of this run: reward/, checkpoints/, log.jsonl")
    parser.add_argument("--task", default="motion_quality", choices=TASKS, help="label that is learnt; clips without it are left out")
    parser.add_argument("--num_blocks", type=int, help="blocks of the transformer that are kept: 8 as published, or half of a "
                        "model with fewer than 16 (default: that)")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=2, help="clips a step, over all processes")
    parser.add_argument("--lr", type=float, default=1e-6, help="learning rate of the blocks")
    parser.add_argument("--head_lr", type=float, default=1e-6, help="learning rate of query attention and MLP")
    parser.add_argument("--weight_decay", type=float, default=0.01, help="AdamW's weight decay")
    parser.add_argument("--max_norm", type=float, default=1.0, help="gradient norm, of blocks and head together, above which it is clipped")
    parser.add_argument("--shift", type=float, default=5.0, help="shift of the noise levels towards noise")
    parser.add_argument("--eval_timesteps", type=int, nargs="+", default=[201, 400, 600, 800, 1000], help="timesteps of evaluation")
    parser.add_argument("--eval_every", type=int, default=200, help="steps between evaluations; there is one at the end too")
    parser.add_argument("--save_every", type=int, default=200, help="steps between checkpoints; there is one at the end too")
    parser.add_argument("--checkpoint_blocks", action="store_true", help="keep only the blocks' inputs for backward and compute the "
                        "rest again: a third slower, and what large models need")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    parser.add_argument("--seed", type=int, default=0, help="of the data order, the noise and the head's start")
    return parser.parse_args(argv)


@torch.no_grad()
def evaluate(pavrm, clips, indices, args, device):
    """{timestep: measures} over held-out clips, each with its own fixed noise and its short caption."""
    schedule = TrainingSchedule(args.shift)
    logits = torch.zeros(len(args.eval_timesteps), len(indices))
    for n, counts in tqdm(parallel.deal(len(indices)), desc="evaluating", leave=False, disable=None if is_main() else True):
        clip = clips.load(indices[n])
        x0, condition = collate([clip], pavrm.dit.config, device)
        noise = parallel.noise(x0.shape, args.seed, clip["entry"]["source_id"], "evaluation").to(device)
        for row, t in enumerate(args.eval_timesteps):
            x = add_noise(x0, noise, schedule.near(t))
            logit = pavrm(x, torch.tensor([float(t)], device=device), [clip["text_short"].to(device)], **condition)
            logits[row, n] = logit.item() if counts else 0
    dist.all_reduce(logits)  # each rank has zeros where others have worked
    labels = torch.tensor([label(clips.entries[i]["labels"], args.task) for i in indices]).float()
    return {t: classification_measures(row, labels) for t, row in zip(args.eval_timesteps, logits)}


def labelled(path, task):
    """The clips of an index, checked, and the indices of those that have the label."""
    clips = Clips(path)
    clips.check()
    indices = clips.select(task)
    if not indices:
        raise InputError(f"no clip of {path} is annotated for {task}; annotate it, or choose another --task")
    good = sum(label(clips.entries[i]["labels"], task) for i in indices)
    if is_main():
        print(f"{path}: {len(indices)} clips for {task}, {good} good and {len(indices) - good} poor; "
              f"{len(clips) - len(indices)} without the label left out")
    return clips, indices


def main(argv=None):
    args = parse_args(argv)
    device = parallel.start()
    parallel.check_run(args)
    clips, indices = labelled(args.train, args.task)
    val_clips, val_indices = labelled(args.val, args.task)
    order = Order([entry["shape"] for entry in clips.entries], args.batch_size, args.seed, indices)
    schedule = TrainingSchedule(args.shift)

    # The model: the transformer's first blocks, streamed from its checkpoint, and a new head, the same on all ranks.
    dit = WanModel.on_meta(args.model)
    layers = dit.config.num_layers
    num_blocks = args.num_blocks or min(8, layers // 2)
    collate([clips.load(indices[0])], dit.config, "cpu")  # to see that data and model fit
    torch.manual_seed(args.seed)
    pavrm = PAVRM(dit, num_blocks, args.task)
    pavrm.requires_grad_(False)
    blocks, head = [dit.blocks], [pavrm.query_attention, pavrm.mlp]
    for module in blocks + head:
        module.requires_grad_(True)
    parallel.shard(pavrm, dit.blocks, [dit.time_embedding, dit.time_projection, *head], device)
    dit.to_empty(device=device)
    load_weights(dit, args.model, ignore=["head.", *(f"blocks.{i}." for i in range(num_blocks, layers))])

    dit.checkpoint_blocks = args.checkpoint_blocks

    optimizer = torch.optim.AdamW([{"params": [p for module in blocks for p in module.parameters()], "lr": args.lr},
                                   {"params": [p for module in head for p in module.parameters()], "lr": args.head_lr}],
                                  betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=device.type == "cuda")
    first_step = parallel.load_checkpoint(args.output, pavrm, optimizer) if args.resume else 0
    log = parallel.Log(args.output, args, args.steps, first_step, device)

    for step in range(first_step, args.steps):
        share = parallel.share(order[step])  # (position in the batch, clip)
        samples = [clips.load(i) for _, i in share]
        x0, condition = collate(samples, dit.config, device)                                # (B, 16, F, H, W)
        texts = [sample["text_short"].to(device) for sample in samples]
        labels = torch.tensor([label(sample["entry"]["labels"], args.task) for sample in samples], device=device)

        sigma, t = zip(*(schedule.at(parallel.uniform(args.seed, step, n, "timestep")) for n, _ in share))
        sigma, t = torch.tensor(sigma, device=device), torch.tensor(t, device=device).float()  # (B,)
        noise = torch.stack([parallel.noise(x0.shape[1:], args.seed, step, n, "noise") for n, _ in share]).to(device)

        logit = pavrm(add_noise(x0, noise, sigma), t, texts, **condition)                   # (B,)
        loss = bce_loss(logit, labels)
        optimizer.zero_grad()
        loss.backward()
        norm = parallel.clip_gradients([p for p in pavrm.parameters() if p.requires_grad], args.max_norm)
        optimizer.step()

        right = ((logit > 0) == (labels > 0)).float().mean()
        done = step + 1
        log(done, loss=parallel.mean(loss), accuracy=parallel.mean(right), norm=norm)
        if done % args.eval_every == 0 or done == args.steps:
            report(evaluate(pavrm, val_clips, val_indices, args, device), done, log)
        if done % args.save_every == 0 or done == args.steps:
            parallel.save_checkpoint(args.output, done, pavrm, optimizer)
        log.pause()

    pavrm.save_pretrained(Path(args.output, "reward"))
    log.say(f"the reward model is in {args.output}/reward")


def report(measures, step, log):
    """Print a line a timestep, and put the same in the log."""
    log.write({"step": step, "evaluation": measures})
    for t, row in measures.items():
        log.say(f"  held out, timestep {t:>4}:  " + "  ".join(f"{name} {value:.3f}" for name, value in row.items()))


if __name__ == "__main__":
    parallel.run(main)
