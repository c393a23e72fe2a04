"""Stage 1: train PAVRM, the process-aware video reward model (arXiv 2511.21541, section 4.2).

    python train_pavrm.py @recipes/tiny_pavrm.args         # the tiny world, one process
    torchrun --nproc_per_node=8 train_pavrm.py @recipes/pavrm_t2v_14B_480P.args --train ... --val ...

One step, for a generated clip x_0 with a human label y in {0, 1}:

    t, s   ~ uniform over the shifted schedule             a random denoising step and its noise level
    x_s    = (1 - s) x_0 + s noise                         the clip as the generator sees it at that step
    loss   = BCE(logit(x_s, t, caption), y)                on the logit, in float32

or, with --loss bt (Bradley-Terry), for a better clip a and a worse clip b of one prompt, at the same t and
with the same noise:

    loss   = -log sigmoid(logit(a_s, t, caption) - logit(b_s, t, caption))

The first blocks of the transformer and the head are trained, the embeddings stay. Every --eval_every steps
the model is evaluated on held-out clips, at fixed timesteps with fixed noise. The result is one directory,
OUTPUT/reward. With --ema it holds the average of the weights, which is also what is evaluated.

docs/departures.md lists how this differs from the published code.
"""
import math
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import cli

import torch
import torch.distributed as dist

import parallel
import records
from clips import LABELS, Clips, Order, choose_caption, collate, label_of, prefetch
from ema import EMA
from evaluation import EVALUATION_TIMESTEPS, measure, score_clips, table
from files import InputError, is_main, load_weights, write_json
from lora import add_lora, start_lora
from lora_files import merging
from memory import block_runner
from model import WanModel
from reward import PAVRM, bce_loss, bradley_terry_loss
from solver import TrainingSchedule, add_noise


def parse_args(argv=None):
    parser = cli.Parser("Train PAVRM, the reward model on noisy latents.")
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--model", default="demo/model", help="official directory of the transformer to start from")
    add("--train", nargs="+", default=["demo/train/index.jsonl"], metavar="INDEX",
        help="index of labelled clips, written by data.py; with --loss bt, optionally two: the better clips "
             "and the worse ones")
    add("--val", nargs="+", default=["demo/val/index.jsonl"], metavar="INDEX",
        help="index of held-out clips to evaluate with, or two as for --train")
    add("--labels", nargs="+", default=["motion_quality"], choices=LABELS,
        help="labels to learn, each with its own head; clips that have none of them are left out")
    add("--output", default="outputs/pavrm", help="directory of the run: reward, checkpoints, log")
    cli.add_captions(group, long_caption=0.0, drop_prompt=0.0)

    group = parser.add_argument_group("reward model")
    add = group.add_argument
    add("--loss", default="ce", choices=["ce", "bt"],
        help="cross-entropy on labels, or Bradley-Terry on pairs: clips of one pair_id with different labels")
    add("--num_blocks", type=cli.whole(1, 10_000),
        help="transformer blocks to keep (default: 8 as published, or half of a model with fewer than 16)")
    add("--train_blocks", type=cli.whole(0, 10_000), nargs="*",
        help="numbers of the blocks to train; without numbers, only the heads are trained (default: all)")
    add("--pool", default="query", choices=["query", "mean", "max"], help="how tokens become one vector")
    add("--num_queries", type=cli.whole(1, 10_000), default=1,
        help="learned queries of the query pool")
    cli.add_noise_levels(group)
    cli.add_merged(group)
    cli.add_lora(group)

    group = parser.add_argument_group("optimization")
    group.add_argument("--steps", type=cli.whole(1), default=1000,
                       help="optimizer steps; the published number is not known")
    cli.add_optimization(group, lr=1e-6, accumulation=1)
    group.add_argument("--head_lr", type=cli.Number(0, 10),
                       help="learning rate of pool and MLP (default, published: 1e-6 for ce, 1e-5 for bt)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_timesteps", type=cli.whole(0, 1000), nargs="+", default=EVALUATION_TIMESTEPS,
        help="timesteps at which the reward model is evaluated")
    add("--eval_every", type=cli.whole(1), default=200,
        help="steps between evaluations; the last step always has one")
    cli.add_execution(parser)
    cli.add_checkpoints(parser, save_every=200)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------ data

def load_items(paths, args):
    """The checked clips of an index (or of two), and the items to learn from: (i,) or (better, worse)."""
    if len(paths) > 2 or (len(paths) == 2 and args.loss != "bt"):
        raise InputError(f"{len(paths)} indices are given; give one, or two with --loss bt: the better clips "
                         f"and the worse ones")
    clips = Clips.two_lists(*paths) if len(paths) == 2 else Clips(paths[0])
    clips.check()
    if args.loss == "bt":
        items = clips.pairs(args.labels[0])
        what = "pairs"
    else:
        items = [(i,) for i in clips.select(*args.labels)]
        what = "clips"
    if not items and args.loss == "bt":
        raise InputError(f"{' '.join(paths)}: no two clips share a pair_id and differ in {args.labels[0]}; "
                         f"annotate pairs, or use --loss ce")
    if not items:
        raise InputError(f"no clip of {paths[0]} is annotated for {' or '.join(args.labels)}; "
                         f"annotate some, or choose other --labels")
    if is_main():
        for name in args.labels:
            labels = [label_of(entry["labels"], name) for entry in clips.entries]
            print(f"{' '.join(paths)}: {len(items)} {what}; {name}: {labels.count(1)} good, "
                  f"{labels.count(0)} poor, {labels.count(None)} not annotated")
    return clips, items


def label_table(clips, names):
    """The labels of all clips, float32 (clips, labels): 1, 0, or NaN where a clip is not annotated."""
    rows = []
    for entry in clips.entries:
        labels = [label_of(entry["labels"], name) for name in names]
        rows.append([math.nan if label is None else label for label in labels])
    return torch.tensor(rows)


class Batch(NamedTuple):
    """This process's part of a micro-step: B clips, or P pairs, first the better clips and then the worse."""
    x0: torch.Tensor      # (B, C, F, H, W), or (2 P, ...)
    noise: torch.Tensor   # the same shape; both clips of a pair have one noise and one timestep
    sigma: torch.Tensor   # (B,)
    t: torch.Tensor       # (B,)
    texts: list           # states of B prompts (n_i, text_dim)
    condition: dict       # image to video: y, clip_fea
    clips: list           # index of each clip
    items: list           # for each item, the index of its clip, or of the better clip of its pair
    names: list           # source_id of each clip, for messages


class Batches:
    """Reads the clips of a step (in a thread, ahead of time) and makes them into batches."""

    def __init__(self, clips, items, order, config, args, device):
        self.clips, self.items, self.order = clips, items, order
        self.config, self.args, self.device = config, args, device
        self.schedule = TrainingSchedule(args.shift, args.timesteps)
        self.empty = clips.prompts["empty"].to(device) if args.drop_prompt else torch.empty(0, device=device)

    def micro_steps(self, step):
        return range(step * self.args.accumulation, (step + 1) * self.args.accumulation)

    def read(self, step):
        """[(items, clips, keys, samples)] of this process, one for each micro-step of a step."""
        found = []
        for micro_step in self.micro_steps(step):
            share = parallel.share(self.order[micro_step])  # (place in the batch, item)
            clips, keys = [], []
            for side in range(len(self.items[0])):
                for place, item in share:
                    clips.append(self.items[item][side])
                    keys.append((self.args.seed, micro_step, place))
            items = [self.items[item][0] for _, item in share]
            found.append((items, clips, keys, [self.clips.load(i) for i in clips]))
        return found

    def make(self, items, clips, keys, samples):
        args = self.args
        x0, condition = collate(samples, self.config, self.device)
        texts = []
        for sample, key in zip(samples, keys, strict=True):
            texts.append(choose_caption(sample, self.empty, args.long_caption, args.drop_prompt, *key))
        levels = [self.schedule.draw(parallel.uniform(*key, "timestep")) for key in keys]
        sigma = torch.tensor([sigma for sigma, _ in levels], device=self.device)
        t = torch.tensor([float(t) for _, t in levels], device=self.device)
        noise = torch.stack([parallel.noise(x0.shape[1:], *key, "noise") for key in keys]).to(self.device)
        names = [sample["entry"]["source_id"] for sample in samples]
        return Batch(x0, noise, sigma, t, texts, condition, clips, items, names)


# ------------------------------------------------------------------------------ model

def build_pavrm(args):
    """PAVRM: a transformer's first blocks, still without weights, and new heads, the same on all ranks."""
    dit = WanModel.on_meta(args.model)
    layers = dit.config.num_layers
    num_blocks = args.num_blocks or min(8, layers // 2)
    if not set(args.train_blocks or []) <= set(range(num_blocks)):
        raise InputError(f"--train_blocks {' '.join(map(str, args.train_blocks))}: blocks 0 to "
                         f"{num_blocks - 1} are kept; choose from them")
    torch.manual_seed(args.seed)
    pavrm = PAVRM(dit, num_blocks, args.labels, args.pool, args.num_queries)
    dit.requires_grad_(False)
    if args.lora_rank:
        add_lora(dit, args.lora_rank, args.lora_alpha or args.lora_rank, args.lora_targets)
    else:
        for number, block in enumerate(dit.blocks):
            block.requires_grad_(args.train_blocks is None or number in args.train_blocks)
    return pavrm, layers


def load_pavrm(pavrm, layers, args, device):
    """Shard it over all processes, and read each process's part of the transformer's weights."""
    dit = pavrm.dit
    parallel.shard(pavrm, dit, pavrm.heads, device, args)
    ignore = ["head.", *(f"blocks.{i}." for i in range(len(dit.blocks), layers))]
    load_weights(dit, args.model, ignore=ignore, device=parallel.storage(pavrm, args, device),
                 merge=merging(args.lora, args.model))
    start_lora(dit, args.seed)
    dit.run_block = block_runner(args, device)


def make_optimizer(pavrm, args, device):
    """AdamW with a learning rate for the transformer and one for the heads."""
    groups = [{"params": [p for p in pavrm.dit.parameters() if p.requires_grad], "lr": args.lr},
              {"params": [p for head in pavrm.heads for p in head.parameters()], "lr": args.head_lr}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=args.weight_decay,
                             fused=device.type == "cuda")


def export(pavrm, ema, directory, args):
    """Write the reward model, or its average where the run has one."""
    with ema.swapped() if ema else nullcontext():
        pavrm.save_pretrained(Path(directory, "reward"), parallel.DTYPES[args.export_dtype])


# ------------------------------------------------------------------------------ training

def main(argv=None):
    args = parse_args(argv)
    if args.head_lr is None:
        args.head_lr = {"ce": 1e-6, "bt": 1e-5}[args.loss]
    device = parallel.start(args.sp, args.timeout, args.deterministic)
    records.check_run(args)
    if args.lora_rank and args.train_blocks is not None:
        raise InputError("--train_blocks and --lora_rank exclude each other: adapters train beside all "
                         "blocks; give one of them")
    if "reward" in args.offload:
        raise InputError("--offload reward is for train_prfl.py; here the reward model trains, so leave it "
                         "out")
    if args.loss == "bt" and len(args.labels) > 1:
        raise InputError("--loss bt compares the clips of a pair by one label; "
                         "give one with --labels")

    # ---- data: the clips, or pairs, to learn from, their labels and their order
    clips, items = load_items(args.train, args)
    val_clips, val_items = load_items(args.val, args)
    order = Order([clips.entries[item[0]]["shape"] for item in items], args.batch_size, args.seed)
    truth = label_table(clips, args.labels)                            # (clips, labels), NaN: not annotated
    annotated = truth.isfinite()

    # ---- the model, the optimizer, and what the run records
    pavrm, layers = build_pavrm(args)
    dit = pavrm.dit
    for some, some_items in [(clips, items), (val_clips, val_items)]:
        collate([some.load(some_items[0][0])], dit.config, "cpu")  # refuses clips that the model cannot take
    load_pavrm(pavrm, layers, args, device)
    optimizer = make_optimizer(pavrm, args, device)
    rates = [group["lr"] for group in optimizer.param_groups]
    ema = EMA(pavrm, args) if args.ema else None
    checkpoints = records.Checkpoints(args, pavrm, optimizer, ema)
    first_step = checkpoints.load() if args.resume else 0
    log = records.Log(args, first_step, device)
    log.say(records.describe(args, dit, device))
    for warning in order.repeated:
        log.say(warning)

    batches = Batches(clips, items, order, dit.config, args, device)
    records.stop_on_signals(log)
    done, stopped_by = first_step, None
    for step, read in prefetch(batches.read, range(first_step, args.steps)):
        optimizer.zero_grad()
        # Every annotated label counts alike, on whichever rank and in whichever micro-step it is.
        count = 0
        for micro_step in batches.micro_steps(step):
            count = count + sum(annotated[items[item][0]].sum() for item in order[micro_step])
        step_losses = []
        totals = torch.zeros(3, 5, dtype=torch.float64)  # loss, right answers, labels, by fifth of timesteps

        # ---- forward and backward of each micro-step
        for part in read:
            batch = batches.make(*part)
            x = add_noise(batch.x0, batch.noise, batch.sigma)                              # (B, C, F, H, W)
            logit = pavrm(x, batch.t, batch.texts, **batch.condition, labels=args.labels)  # (B, labels)
            if args.loss == "ce":
                labels = truth[batch.clips].to(device)
                losses = bce_loss(logit, labels, reduction="none")
                right = (logit > 0) == (labels > 0)
            else:
                better, worse = logit.chunk(2)                                             # (pairs, 1)
                losses = bradley_terry_loss(better, worse, reduction="none")
                right = better > worse
            (losses.sum() / count * parallel.data_ranks()).backward()  # FSDP averages gradients over ranks
            step_losses.append((losses.detach().sum(), batch.names, None))
            seen = annotated[batch.items]
            values = torch.stack([losses.detach().cpu(), right.cpu() & seen, seen]).sum(-1)  # (3, items)
            fifths = (batch.t[:len(seen)].cpu() / 200).long().clamp(max=4)
            totals.index_add_(1, fifths, values.double())

        # ---- the update
        factor = parallel.learning_rate_factor(step, args)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        norm = parallel.clip_gradients([p for p in pavrm.parameters() if p.requires_grad], args.max_norm)
        dist.all_reduce(totals)
        loss, right, seen = totals.sum(1).tolist()
        checkpoints.check_finite(norm, loss, step + 1, step_losses, args.seed)
        optimizer.step()
        if ema:
            ema.update()

        # ---- after the step: log, evaluate, save
        by_timestep = {}
        for fifth, (total, _, number) in enumerate(totals.T.tolist()):
            if number:
                by_timestep[f"{200 * fifth}-{200 * fifth + 200}"] = total / number
        done = step + 1
        log(done, loss=loss / seen, accuracy=right / seen, norm=norm, lr=args.lr * factor,
            loss_by_timestep=by_timestep)
        stopped_by = records.stop_asked()
        if (done % args.eval_every == 0 or done == args.steps) and not stopped_by:
            with ema.swapped() if ema else nullcontext():
                evaluate(pavrm, val_clips, val_items, args, device, done, log)
        checkpoints.check()
        if done % args.save_every == 0 or done == args.steps or stopped_by:
            checkpoints.save(done)
        if args.export_every and done % args.export_every == 0:
            export(pavrm, ema, Path(args.output, "exports", f"step_{done:06d}"), args)
        log.pause()
        if stopped_by:
            break

    # ---- the end: wait until all is written, then write the result
    checkpoints.finish()
    if stopped_by and done < args.steps:
        log.say(f"stopped by {stopped_by} after step {done}; --resume continues from there")
        return
    export(pavrm, ema, args.output, args)
    log.say(f"the reward model is in {args.output}/reward")


def evaluate(pavrm, clips, items, args, device, step, log):
    """Measures on held-out clips for each label and timestep: printed, in the log, and in evaluation.json."""
    indices = sorted({i for item in items for i in item})
    logits = score_clips(pavrm, clips, indices, args.eval_timesteps, device, args.seed, shift=args.shift)
    pairs = None
    if args.loss == "bt":
        pairs = [tuple(map(indices.index, pair)) for pair in items]
    measures = measure(logits, clips, indices, pavrm, args.eval_timesteps, pairs)
    log.write({"step": step, "evaluation": measures})
    if is_main():
        write_json(Path(args.output, "evaluation.json"), measures)
    log.say("\n".join(table(measures)))


if __name__ == "__main__":
    cli.run(main)
