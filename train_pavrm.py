"""Stage 1: train PAVRM, the process-aware video reward model (arXiv 2511.21541, section 3.2).

    python train_pavrm.py                                  # the tiny world, alone
    torchrun --nproc_per_node=8 train_pavrm.py @recipes/pavrm_t2v_14B_480P.args --train ... --val ...

One step, for a clip x_0 with a human label y in {0, 1}:

    t, s   ~ uniform over the shifted schedule             a random denoising step and its noise level
    x_s    = (1 - s) x_0 + s noise                         the clip as the generator sees it at that step
    loss   = BCE(logit(x_s, t, caption), y)                on the logit, in float32

or, with --loss bt (Bradley-Terry), for a better clip a and a worse clip b of one prompt, with the same t and noise:

    loss   = -log sigmoid(logit(a_s, t, caption) - logit(b_s, t, caption))

The first blocks of the transformer and the head are trained, the embeddings stay. Every so many steps the model is
evaluated on held-out clips at fixed timesteps with fixed noise. The result is one directory, OUTPUT/reward; with --ema
it is the average, as is what is evaluated.

Departures from the published code are listed in the README.
"""
import math
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

import parallel
import records
from data import TASKS, Clips, Order, ahead, choose_caption, collate, label
from files import InputError, is_main, load_weights, write_json
from lora import add_lora, start_lora
from memory import block_runner
from model import WanModel
from reward import PAVRM, bce_loss, bradley_terry_loss
from score import EVALUATION_TIMESTEPS, measure, score, table
from solver import TrainingSchedule, add_noise


def parse_args(argv=None):
    parser = parallel.Parser("Train PAVRM, the reward model on noisy latents.")
    parser.add_argument("--model", default="demo/model", help="official directory of the transformer it starts from")
    parser.add_argument("--train", nargs="+", default=["demo/train/index.jsonl"], metavar="INDEX",
                        help="index of encoded, labelled clips (data.py); for pairs also two lists, better and worse")
    parser.add_argument("--val", nargs="+", default=["demo/val/index.jsonl"], metavar="INDEX", help="the same, of held-out clips")
    parser.add_argument("--output", default="outputs/pavrm", help="directory of this run: reward/, evaluation.json, log.jsonl, ...")
    parser.add_argument("--task", nargs="+", default=["motion_quality"], choices=TASKS,
                        help="labels that are learnt, each with a head of its own; clips with none of them are left out")
    parser.add_argument("--loss", default="ce", choices=["ce", "bt"], help="cross-entropy on labels, or Bradley-Terry on pairs: "
                        "clips that share a pair_id and differ in the label")
    parser.add_argument("--num_blocks", type=int, help="blocks of the transformer that are kept: 8 as published; None: that, or half "
                        "of a model with fewer than 16")
    parser.add_argument("--train_blocks", type=int, nargs="*", help="numbers of the blocks that are trained; none after "
                        "the flag: the heads alone; None: all that are kept")
    parser.add_argument("--pool", default="query", choices=["query", "mean", "max"], help="how tokens become one vector")
    parser.add_argument("--num_queries", type=int, default=1, help="learned queries of the query pool (q)")
    parser.add_argument("--lora_rank", type=int, default=0, help="train adapters of this rank in place of the blocks; 0 trains the blocks")
    parser.add_argument("--lora_alpha", type=float, help="weight of the adapters times their rank; None: the rank")
    parser.add_argument("--lora_targets", nargs="+", default=["q", "k", "v", "o"], help="linear layers with adapters")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=2, help="clips, or pairs, a micro-step, over all processes")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-steps a step")
    parser.add_argument("--lr", type=float, default=1e-6, help="learning rate of the blocks")
    parser.add_argument("--head_lr", type=float, help="learning rate of pool and MLP; None: 1e-6 for ce, 1e-5 for bt")
    parser.add_argument("--lr_schedule", default="constant", choices=["constant", "linear", "cosine"], help="after the warm-up")
    parser.add_argument("--warmup", type=int, default=0, help="steps of linear warm-up")
    parser.add_argument("--weight_decay", type=float, default=0.01, help="AdamW's weight decay")
    parser.add_argument("--max_norm", type=float, default=1.0, help="gradient norm above which it is clipped, of blocks and heads together")
    parser.add_argument("--ema", type=float, default=0.0, help="decay of the average of the weights that is evaluated and saved; 0: none")
    parser.add_argument("--shift", type=float, default=5.0, help="shift of the noise levels towards noise")
    parser.add_argument("--timesteps", nargs="+", default=["uniform"], help="draws of t: uniform (over the shifted table), logit_normal, "
                        "or a list of timesteps")
    parser.add_argument("--long_caption", type=float, default=0.0, help="probability of the long caption, else the short one")
    parser.add_argument("--drop_prompt", type=float, default=0.0, help="probability of the empty prompt instead")
    parser.add_argument("--eval_timesteps", type=int, nargs="+", default=EVALUATION_TIMESTEPS, help="timesteps of evaluation")
    parser.add_argument("--eval_every", type=int, default=200, help="steps between evaluations; there is one at the end too")
    parser.add_argument("--seed", type=int, default=0, help="of the data order, the noise and the start of heads and adapters")
    parser.add_execution(save_every=200)
    return parser.parse_args(argv)


def load_items(paths, args):
    """The clips of an index (or of two lists), checked, and the items to learn from: clips (i,) or pairs (better, worse)."""
    if len(paths) > 2 or len(paths) == 2 and args.loss != "bt":
        raise InputError(f"{len(paths)} indices are given; give one, or two with --loss bt: the better clips and the worse")
    clips = Clips.two_lists(*paths) if len(paths) == 2 else Clips(paths[0])
    clips.check()
    items = clips.pairs(args.task[0]) if args.loss == "bt" else [(i,) for i in clips.select(*args.task)]
    if not items and args.loss == "bt":
        raise InputError(f"{' '.join(paths)}: no two clips share a pair_id and differ in {args.task[0]}; annotate pairs, or use --loss ce")
    if not items:
        raise InputError(f"no clip of {paths[0]} is annotated for {' or '.join(args.task)}; annotate it, or choose another --task")
    if is_main():
        for task in args.task:
            labels = [label(entry["labels"], task) for entry in clips.entries]
            print(f"{' '.join(paths)}: {len(items)} {'pairs' if args.loss == 'bt' else 'clips'}; {task}: "
                  f"{labels.count(1)} good, {labels.count(0)} poor, {labels.count(None)} not annotated")
    return clips, items


def main(argv=None):
    args = parse_args(argv)
    if args.head_lr is None:
        args.head_lr = {"ce": 1e-6, "bt": 1e-5}[args.loss]
    device = parallel.start(args.sp, args.timeout)
    records.check_run(args)
    if args.lora_rank and args.train_blocks is not None:
        raise InputError("--train_blocks and --lora_rank exclude each other: adapters train beside all blocks; give one of them")
    if args.loss == "bt" and len(args.task) > 1:
        raise InputError("--loss bt learns one label, since a pair is better in one of them; give one --task")
    clips, items = load_items(args.train, args)
    val_clips, val_items = load_items(args.val, args)
    order = Order([clips.entries[item[0]]["shape"] for item in items], args.batch_size, args.seed)
    schedule = TrainingSchedule(args.shift, args.timesteps)
    labels = [[label(entry["labels"], task) for task in args.task] for entry in clips.entries]
    truth = torch.tensor([[math.nan if value is None else value for value in row] for row in labels])  # (clips, labels)
    annotated = truth.isfinite()
    empty_prompt = clips.prompts["empty"].to(device) if args.drop_prompt else torch.empty(0, device=device)

    # The model: the transformer's first blocks, streamed from its checkpoint, and new heads, the same on all ranks.
    dit = WanModel.on_meta(args.model)
    layers = dit.config.num_layers
    num_blocks = args.num_blocks or min(8, layers // 2)
    if not set(args.train_blocks or []) <= set(range(num_blocks)):
        raise InputError(f"--train_blocks {' '.join(map(str, args.train_blocks))}: blocks 0 to {num_blocks - 1} are kept; choose from them")
    collate([clips.load(items[0][0])], dit.config, "cpu")  # to see that data and model fit
    torch.manual_seed(args.seed)
    pavrm = PAVRM(dit, num_blocks, args.task, args.pool, args.num_queries)
    dit.requires_grad_(False)
    if args.lora_rank:
        add_lora(dit, args.lora_rank, args.lora_alpha or args.lora_rank, args.lora_targets)
    else:
        for number, block in enumerate(dit.blocks):
            block.requires_grad_(args.train_blocks is None or number in args.train_blocks)
    parallel.shard(pavrm, dit.blocks, [dit.time_embedding, dit.time_projection, *pavrm.heads], device, args)
    dit.to_empty(device=parallel.storage(args, device))
    load_weights(dit, args.model, ignore=["head.", *(f"blocks.{i}." for i in range(num_blocks, layers))])
    start_lora(dit, args.seed)
    dit.run_block = block_runner(args, device)

    groups = [{"params": [p for p in dit.parameters() if p.requires_grad], "lr": args.lr},
              {"params": [p for head in pavrm.heads for p in head.parameters()], "lr": args.head_lr}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.999), weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    rates = [group["lr"] for group in optimizer.param_groups]
    ema = parallel.EMA(pavrm, args) if args.ema else None
    checkpoints = records.Checkpoints(args, pavrm, optimizer, ema)
    first_step = checkpoints.load() if args.resume else 0
    log = records.Log(args, first_step, device)
    log.say(parallel.describe(args, dit, device))

    def load(step):
        """The step's micro-batches: [(this process's part of it, its clips with the keys of their draws, what was read of them)]."""
        batches = []
        for micro_step in range(step * args.accumulation, (step + 1) * args.accumulation):
            share = parallel.share(order[micro_step])  # (place in the batch, item)
            # First the clips, or all better clips, then all worse ones, with the t and the noise of their pair.
            chosen = [(items[n][side], (args.seed, micro_step, place)) for side in range(len(items[0])) for place, n in share]
            batches.append((share, chosen, [clips.load(i) for i, _ in chosen]))
        return batches

    def export(directory):
        with ema.swapped() if ema else nullcontext():
            pavrm.save_pretrained(Path(directory, "reward"), torch.float32)

    records.stop_on_signals()
    done, stopped_by = first_step, None
    for step, batches in ahead(load, range(first_step, args.steps)):
        optimizer.zero_grad()
        # Every annotated label counts alike, on whichever rank and in whichever micro-step it is.
        micro_steps = range(step * args.accumulation, (step + 1) * args.accumulation)
        count = sum(annotated[items[n][0]].sum() for micro_step in micro_steps for n in order[micro_step])
        step_losses = []
        totals = torch.zeros(3, 5, dtype=torch.float64)  # loss, right answers and their number, by fifths of the timesteps
        for share, chosen, samples in batches:
            x0, condition = collate(samples, dit.config, device)                                # (B, 16, F, H, W)
            texts = [choose_caption(sample, empty_prompt, args.long_caption, args.drop_prompt, *key)
                     for sample, (_, key) in zip(samples, chosen)]
            sigma, t = zip(*(schedule.draw(parallel.uniform(*key, "timestep")) for _, key in chosen))
            sigma, t = torch.tensor(sigma, device=device), torch.tensor(t, device=device).float()  # (B,)
            noise = torch.stack([parallel.noise(x0.shape[1:], *key, "noise") for _, key in chosen]).to(device)

            logit = pavrm(add_noise(x0, noise, sigma), t, texts, **condition, tasks=args.task)  # (B, labels)
            if args.loss == "ce":
                labels = truth[[i for i, _ in chosen]].to(device)
                losses, right = bce_loss(logit, labels, reduction="none"), (logit > 0) == (labels > 0)
            else:
                better, worse = logit.chunk(2)                                                  # (pairs, 1)
                losses, right = bradley_terry_loss(better, worse, reduction="none"), better > worse
            step_losses.append((losses.detach().sum(), [sample["entry"]["source_id"] for sample in samples], None))
            (losses.sum() / count * parallel.data_ranks()).backward()  # gradients are averaged over them
            seen = annotated[[items[n][0] for _, n in share]]
            values = torch.stack([losses.detach().cpu(), right.cpu() & seen, seen]).sum(-1)      # (3, B or pairs)
            totals.index_add_(1, (t[:len(seen)].cpu() / 200).long().clamp(max=4), values.double())
        factor = parallel.learning_rate_factor(step, args)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * factor
        norm = parallel.clip_gradients([p for p in pavrm.parameters() if p.requires_grad], args.max_norm)
        checkpoints.check_finite(norm, step + 1, step_losses, args.seed)
        optimizer.step()
        if ema:
            ema.update()

        dist.all_reduce(totals)
        loss, right, seen = totals.sum(1).tolist()
        by_timestep = {f"{200 * b}-{200 * b + 200}": (totals[0, b] / totals[2, b]).item() for b in range(5) if totals[2, b]}
        done = step + 1
        log(done, loss=loss / seen, accuracy=right / seen, norm=norm, lr=args.lr * factor, loss_by_timestep=by_timestep)
        if done % args.eval_every == 0 or done == args.steps:
            with ema.swapped() if ema else nullcontext():
                evaluate(pavrm, val_clips, val_items, args, device, done, log)
        stopped_by = records.stop_asked()
        checkpoints.check()
        if done % args.save_every == 0 or done == args.steps or stopped_by:
            checkpoints.save(done)
        if args.export_every and done % args.export_every == 0:
            export(Path(args.output, "exports", f"step_{done:06d}"))
        log.pause()
        if stopped_by:
            break

    checkpoints.finish()
    if stopped_by and done < args.steps:
        log.say(f"stopped by {stopped_by} after step {done}; --resume goes on from there")
        return
    export(args.output)
    log.say(f"the reward model is in {args.output}/reward")


def evaluate(pavrm, clips, items, args, device, step, log):
    """Measures on held-out clips, a label and a timestep each: printed, in the log, and in evaluation.json."""
    indices = sorted({i for item in items for i in item})
    logits = score(pavrm, clips, indices, args.eval_timesteps, device, args.seed, shift=args.shift)
    pairs = [tuple(map(indices.index, pair)) for pair in items] if args.loss == "bt" else None
    measures = measure(logits, clips, indices, pavrm, args.eval_timesteps, pairs)
    log.write({"step": step, "evaluation": measures})
    if is_main():
        write_json(Path(args.output, "evaluation.json"), measures)
    log.say("\n".join(table(measures)))


if __name__ == "__main__":
    parallel.run(main)
