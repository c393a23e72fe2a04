"""Reward FL: train the generator against a reward on decoded frames, through the last steps of a rollout.

IPRO, arXiv 2510.14255.

    python train_reward_fl.py                                  # the tiny world, one process; brightness
    torchrun --nproc_per_node=8 train_reward_fl.py @recipes/reward_fl_i2v_A14B.args --reward ... --data ...

One step:

    x      = noise                                new for each clip of each step
    x     += (s_next - s) v(x, t)                 N Euler steps. Those from --first_step on have a gradient,
                                                  which passes through the whole chain
    kl     = mean of |v - v_start|^2 / (2 s^2)    over these steps; v_start is the model before training
    video  = clamp(VAE decoder(x), -1, 1)         one latent frame at a time
    loss   = -weight * (score(video) - mean) / deviation + kl_weight * kl

The reward is a Python file (`Reward` below). Gradients of pixels can also fool the network that scores them.
So --report scores the same clips with a second reward, which is not followed.

PRFL (train_prfl.py) needs neither decoder nor chain: it rewards a noisy latent after one step with gradient.
docs/reward_fl.md lists how this differs from the published code.
"""
import runpy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import cli

import torch
import torch.distributed as dist

import parallel
import records
from clips import Clips, Order, collate, prefetch
from ema import EMA
from experts import WanExperts
from files import InputError, check_file, load_weights
from lora import add_lora, save_adapter, start_lora, without_adapters
from memory import block_runner
from model import WanModel
from solver import SOLVERS, timestep, walk
from vae import VAE_FILE, WanVAE
from video import clip_statistics, to_uint8, write_video


def parse_args(argv=None):
    parser = cli.Parser("Train a Wan model against a reward on pixels. Symbols are those at the head of "
                        "train_reward_fl.py.")
    group = parser.add_argument_group("models and data")
    add = group.add_argument
    add("--model", default="demo/model",
        help="official directory of the model to train (v); of Wan2.2 A14B, the one that holds "
             "high_noise_model and low_noise_model")
    add("--experts", default="low", choices=["low", "high", "both"],
        help="which transformers of an A14B model are trained")
    add("--reward", metavar="FILE.py", default="demo/bright.py",
        help="the reward to follow (docs/reward_fl.md)")
    add("--report", metavar="FILE.py", help="a second reward, which is only reported")
    add("--data", default="demo/train/index.jsonl",
        help="index of clips, written by data.py: their prompts, first frames and shapes are used")
    add("--output", default="outputs/reward_fl", help="directory of the run")
    cli.add_lora(parser.add_argument_group("adapters"))

    add = parser.add_argument_group("method").add_argument
    add("--solver", default="euler", choices=SOLVERS, help="solver of rollouts and samples")
    add("--solver_steps", type=cli.SOLVER_STEPS, default=8, help="solver steps from noise to a clip (N)")
    add("--shift", type=cli.SHIFT, default=5.0, help="how far all noise levels are shifted towards noise")
    add("--first_step", type=cli.whole(0, 999), default=4,
        help="the first solver step with gradient, counted from 0; the last is always N - 1")
    add("--reward_weight", type=cli.Number(0, 10**6), default=0.1, help="weight of the normalised score")
    add("--kl_weight", type=cli.Number(0, 10**6), default=1.0,
        help="weight of kl; 0 saves the reference's passes")

    group = parser.add_argument_group("optimization")
    group.add_argument("--steps", type=cli.whole(1), default=500, help="optimizer steps")
    cli.add_optimization(group, lr=2.5e-6, accumulation=1)

    add = parser.add_argument_group("samples during training").add_argument
    add("--samples", type=cli.whole(0, 10_000), default=2,
        help="clips of fixed prompts and seeds that are made and scored")
    add("--sample_every", type=cli.whole(0), default=25,
        help="steps between samples; the first are made before training; 0: never")
    cli.add_execution(parser)
    cli.add_checkpoints(parser, save_every=25)
    parser.set_defaults(lora_rank=32, lora_targets=["q", "k", "v", "o", "ffn.0", "ffn.2"], weight_decay=0.0,
                        batch_size=None)  # None: one clip per process (or group of --sp)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------ the method

def rollout(velocity, reference, noise, solver, first, context=torch.no_grad):
    """Walk from noise (B, C, F, H, W) to clean latents, with gradient from step `first` on.

    velocity(x, t) and reference(x, t) know the clips' condition; t (B,) timesteps. The steps before `first`
    are taken within `context()`, one without gradient. Returns the latents and kl, a scalar: the mean, over
    the steps with gradient, of mean((v - v_ref)^2) / (2 sigma^2), the divergence of two Gaussians around the
    velocities. Its gradient passes through the policy, the trajectory, and the reference, whose input depends
    on the policy. reference None: kl is 0.
    """
    with context():
        x = walk(velocity, noise, solver, last=first)
    kl = torch.zeros((), device=noise.device)
    steps = range(first, len(solver.timesteps))
    for i in steps:
        t = timestep(solver, i, x)
        v = velocity(x, t)
        if reference:
            # At the first of these steps x depends on no weight: nothing need be kept for backward.
            with nullcontext() if x.requires_grad else torch.no_grad():
                v_ref = reference(x, t)
            kl = kl + (v - v_ref).square().mean() / (2 * float(solver.sigmas[i]) ** 2) / len(steps)
        x = solver.step(v, i, x)
    return x, kl


def decode(vae, latents):
    """Latents (C, F, H, W) -> frames (1 + 4 (F - 1), 3, 8 H, 8 W) in [-1, 1], with gradient in little memory.

    Where a value is clamped, it has no gradient.
    """
    dtype = next(vae.parameters()).dtype
    video = vae.decode(latents[None].to(dtype), recompute=torch.is_grad_enabled())[0]
    return video.float().clamp(-1, 1).transpose(0, 1)


# ------------------------------------------------------------------------------ rewards

HOW = " with respect to the video; compute it with differentiable functions, or give the file to --report"


class Reward:
    """A reward on pixels from a Python file.

    The file has a function `score(video, clip)`, or a class `Reward(args, device)` with such a method.

        video    float32 (F, 3, H, W), RGB in [-1, 1], on this process's device
        clip     the clip's entry in the index (source_id, video_path, fps, ...), and its "prompt"
        returns  a tensor of one number with a gradient with respect to the video; or None where the clip
                 cannot be scored: then kl alone teaches

    `mean` and `deviation`, numbers of the file or the object, normalise scores; without them 0 and 1.
    """

    def __init__(self, path, args, device):
        check_file(path)
        found = runpy.run_path(path)
        source = found["Reward"](args, device) if "Reward" in found else SimpleNamespace(**found)
        self.path = path
        self.function = getattr(source, "score", None)
        self.mean, self.deviation = getattr(source, "mean", 0.0), getattr(source, "deviation", 1.0)
        if not callable(self.function):
            raise InputError(f"{path} has neither a function score(video, clip) nor a class Reward with it; "
                             f"docs/reward_fl.md shows one")
        if callable(self.mean) or callable(self.deviation) or not self.deviation > 0:
            raise InputError(f"{path}: mean is {self.mean} and deviation {self.deviation}; give two "
                             f"numbers, the second above 0")

    def __call__(self, video, entry):
        """The score of a video, a float32 scalar, or None."""
        score = self.function(video, {**entry, "prompt": entry["long_caption"]})
        if score is None:
            return None
        name = entry["source_id"]
        if not torch.is_tensor(score) or score.numel() != 1:
            raise InputError(f"{self.path}: the score of clip {name} is a {type(score).__name__} and not a "
                             f"tensor of one number; return such a tensor, or None")
        if torch.is_grad_enabled() and not score.requires_grad:
            raise InputError(f"{self.path}: the score of clip {name} has no gradient{HOW}")
        return score.float().reshape(())

    def normalised(self, score):
        return (score - self.mean) / self.deviation


def try_out(reward, report, video, entry):
    """The scores of a real clip, before anything large is loaded. InputError if the first has no gradient."""
    video.requires_grad_()
    score = reward(video, entry)
    if score is not None and torch.autograd.grad(score, video, allow_unused=True)[0] is None:
        raise InputError(f"{reward.path}: the score has no gradient{HOW}")
    with torch.no_grad():
        return None if score is None else score.detach(), report and report(video, entry)


def mean_of_scores(scores):
    """Mean over all ranks of those scores that are not None; None if all are."""
    found = [score.item() for score in scores if score is not None]
    total = torch.tensor([sum(found), len(found)], dtype=torch.float64)
    dist.all_reduce(total)
    return (total[0] / total[1]).item() if total[1] else None


# ------------------------------------------------------------------------------ batches

class Batch(NamedTuple):
    """This process's part of a micro-step."""
    noise: torch.Tensor   # (B, C, F, H, W)
    texts: list           # states of B prompts (n_i, text_dim), those of the long captions
    condition: dict       # image to video: y, clip_fea
    entries: list         # what the index says of each clip

    def velocity(self, model):
        return lambda x, t: model(x, t, self.texts, **self.condition)

    def reference(self, frozen):
        """The velocity before training: of a frozen copy, or of the policy with its adapters off."""
        def reference(x, t):
            with without_adapters(frozen):
                return frozen(x, t, self.texts, **self.condition)
        return reference


def make_batch(samples, keys, config, device):
    """The batch of some clips, each with the noise of its key."""
    x0, condition = collate(samples, config, device)
    noise = torch.stack([parallel.noise(x0.shape[1:], *key) for key in keys]).to(device)
    texts = [sample["text_long"].to(device) for sample in samples]
    return Batch(noise, texts, condition, [sample["entry"] for sample in samples])


# ------------------------------------------------------------------------------ models

EXPERTS = {"high": "high_noise_model", "low": "low_noise_model"}


def open_policy(directory):
    """A model without weights, and its transformers {folder: WanModel}: one, in ".", or A14B's two."""
    if not Path(directory, EXPERTS["low"]).is_dir():
        model = WanModel.on_meta(directory)
        return model, {".": model}
    parts = {folder: WanModel.on_meta(Path(directory, folder)) for folder in EXPERTS.values()}
    return WanExperts(*parts.values()), parts


def choose_trained(policy, parts, solver, args):
    """The transformers to train, {folder: WanModel}. Each of them must be used by a step with gradient."""
    if not isinstance(policy, WanExperts):
        return parts
    trained = {folder: parts[folder] for name, folder in EXPERTS.items() if args.experts in (name, "both")}
    times = [float(t) for t in solver.timesteps[args.first_step:]]
    used = [policy.expert(t) for t in times]
    for folder, dit in trained.items():
        if not any(dit is other for other in used):
            raise InputError(f"--experts {args.experts}: no step with gradient uses {folder}, since they "
                             f"have timesteps up to {max(times):.0f}, and the boundary is "
                             f"{1000 * policy.boundary:.0f}; choose another --first_step or --experts")
    if args.ema and len(trained) > 1:
        raise InputError("--ema averages one transformer; leave it out, or give --experts low or high")
    return trained


def load(parts, run_block, device, args):
    """Shard transformers that have no weights yet over all processes, and read each process's part."""
    for folder, dit in parts.items():
        parallel.shard(dit, dit, [dit.head], device, args)
        load_weights(dit, Path(args.model, folder), device=parallel.storage(dit, args, device))
        dit.run_block = run_block


def export(trained, ema, directory, args):
    """Write the trained transformers in the official layout, and their average and adapters, if any."""
    dtype = parallel.DTYPES[args.export_dtype]
    for suffix in ("", "_ema") if ema else ("",):
        with ema.swapped() if suffix else nullcontext():
            for folder, dit in trained.items():
                dit.save_pretrained(Path(directory, f"model{suffix}", folder), dtype)
                if args.lora_rank:
                    name = f"adapter{suffix}" if folder == "." else f"adapter{suffix}_{folder}"
                    save_adapter(dit, Path(directory, f"{name}.safetensors"))


# ------------------------------------------------------------------------------ training

def main(argv=None):
    args = parse_args(argv)
    device = parallel.start(args.sp, args.timeout, args.deterministic)
    if args.batch_size is None:
        args.batch_size = parallel.data_ranks()
    records.check_run(args)
    solver = SOLVERS[args.solver](args.solver_steps, args.shift)
    if args.first_step >= len(solver.timesteps):
        raise InputError(f"--first_step {args.first_step} is none of the {len(solver.timesteps)} solver "
                         f"steps; give 0 to {len(solver.timesteps) - 1}")
    sample_every = args.sample_every if args.samples else 0

    # ---- data: the clips whose prompts and first frames are used, and the order in which they come
    clips = Clips(args.data)
    clips.check()
    order = Order([entry["shape"] for entry in clips.entries], args.batch_size, args.seed)

    # ---- what can be refused before anything large is loaded
    policy, parts = open_policy(args.model)
    trained = choose_trained(policy, parts, solver, args)
    sample = clips.load(0)
    x0, _ = collate([sample], policy.config, device)  # refuses clips that the model cannot take
    vae = WanVAE.from_pretrained(Path(args.model, VAE_FILE), parallel.compute_dtype(args, device), device)
    reward = Reward(args.reward, args, device)
    report = Reward(args.report, args, device) if args.report else None
    with torch.no_grad():
        video = decode(vae, x0[0])
    real = try_out(reward, report, video, sample["entry"])
    del video, x0

    # ---- the models sharded over all processes, with their weights
    run_block = block_runner(args, device)  # one for all: they share the buffers of offloaded inputs
    policy.requires_grad_(False)
    for dit in trained.values():
        if args.lora_rank:
            add_lora(dit, args.lora_rank, args.lora_alpha or args.lora_rank, args.lora_targets)
        else:
            dit.requires_grad_(True)
    load(parts, run_block, device, args)
    start_lora(policy, args.seed)
    frozen = policy  # for kl: the policy with its adapters off, or a copy
    if args.kl_weight and not args.lora_rank:
        frozen, frozen_parts = open_policy(args.model)
        frozen.requires_grad_(False)
        load(frozen_parts, run_block, device, args)

    # ---- the optimizer, and what the run records
    learner = policy if len(trained) == len(parts) else next(iter(trained.values()))
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    ema = EMA(learner, args) if args.ema else None
    checkpoints = records.Checkpoints(args, learner, optimizer, ema)
    start = checkpoints.load() if args.resume else 0
    log = records.Log(args, start, device)
    log.say(f"training {args.model} on {len(clips)} clips; {records.describe(args, policy, device)}")
    log.say(f"the real clip {sample['entry']['source_id']} has the score {show(real[0])}"
            + (f", reported {show(real[1])}" if report else ""))
    for warning in order.repeated:
        log.say(warning)
    look = partial(evaluate, policy, reward, report, vae, clips, solver, args, device, log)
    if sample_every and start == 0:
        look(0)
        log.pause()

    def read(step):
        """[(keys, clips)] of this process, one for each micro-step of a step."""
        found = []
        for micro_step in range(step * args.accumulation, (step + 1) * args.accumulation):
            share = parallel.share(order[micro_step])
            keys = [(args.seed, micro_step, place, "reward") for place, _ in share]
            found.append((keys, [clips.load(i) for _, i in share]))
        return found

    context = partial(parallel.rollout, policy, parallel.gathers(args, policy, device))
    records.stop_on_signals(log)
    done, stopped_by = start, None
    for step, loaded in prefetch(read, range(start, args.steps)):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * parallel.learning_rate_factor(step, args)
        optimizer.zero_grad()
        losses, scores, reported, kls = [], [], [], []
        for keys, samples in loaded:
            # ---- roll out, with gradient through the last steps
            batch = make_batch(samples, keys, policy.config, device)
            reference = batch.reference(frozen) if args.kl_weight else None
            latents, kl = rollout(batch.velocity(policy), reference, batch.noise, solver, args.first_step,
                                  context)

            # ---- score each clip on its frames
            loss = args.kl_weight * kl + 0 * latents.sum()  # backward needs the same path on every rank
            for x, entry in zip(latents, batch.entries, strict=True):
                video = decode(vae, x)                                                     # (F, 3, H, W)
                score = reward(video, entry)
                scores.append(None if score is None else score.detach())
                if score is not None:
                    loss = loss - args.reward_weight * reward.normalised(score) / len(latents)
                if report:
                    with torch.no_grad():
                        reported.append(report(video.detach(), entry))
            (loss / args.accumulation).backward()
            losses.append((loss.detach(), [entry["source_id"] for entry in batch.entries], None))
            kls.append(kl.detach())

        # ---- the update
        norm = parallel.clip_gradients(parameters, args.max_norm)
        loss = parallel.mean(torch.stack([loss for loss, *_ in losses]))
        checkpoints.check_finite(norm, loss, step + 1, losses, args.seed)
        optimizer.step()
        if ema:
            ema.update()

        # ---- after the step: log, look at samples, save
        done = step + 1
        logged = {"loss": loss, "score": mean_of_scores(scores)}
        if report:
            logged["report"] = mean_of_scores(reported)
        log(done, **logged, kl=parallel.mean(torch.stack(kls)), norm=norm, lr=optimizer.param_groups[0]["lr"])
        stopped_by = records.stop_asked()
        if sample_every and (done % sample_every == 0 or done == args.steps) and not stopped_by:
            with ema.swapped() if ema else nullcontext():
                look(done)
        checkpoints.check()
        if done % args.save_every == 0 or done == args.steps or stopped_by:
            checkpoints.save(done)
        if args.export_every and done % args.export_every == 0:
            export(trained, ema, Path(args.output, "exports", f"step_{done:06d}"), args)
        log.pause()
        if stopped_by:
            break

    # ---- the end: wait until all is written, then write the result
    checkpoints.finish()
    log.finish()
    if stopped_by and done < args.steps:
        log.say(f"stopped by {stopped_by} after step {done}; --resume continues from there")
        return
    export(trained, ema, args.output, args)
    log.say(f"the trained model is in {args.output}/model")


def show(score):
    return "none" if score is None else f"{score:.4g}"


@torch.no_grad()
def evaluate(policy, reward, report, vae, clips, solver, args, device, log, step):
    """Make clips of fixed prompts and seeds, write them to OUTPUT/samples, and score them, in the log too."""
    count = min(args.samples, len(clips))
    measured = []
    for n, counts in parallel.shard_indices(count):
        sample = clips.load(n)
        entry = sample["entry"]
        batch = make_batch([sample], [(args.seed, n, "sample")], policy.config, device)
        latents = walk(batch.velocity(policy), batch.noise, solver)
        video = decode(vae, latents[0])
        score, reported = reward(video, entry), report and report(video, entry)
        if counts:
            frames = to_uint8(video.transpose(0, 1).cpu())
            measured.append((score, reported, clip_statistics(frames)))
            log.later(write_video, Path(args.output, "samples", f"step_{step:06d}", f"{n}.mp4"), frames,
                      entry.get("fps", 16))
    measures = {"score": mean_of_scores([score for score, *_ in measured])}
    if report:
        measures["report"] = mean_of_scores([reported for _, reported, _ in measured])
    for name in ("motion_energy", "contrast", "saturation"):
        measures[name] = mean_of_scores([torch.tensor(statistics[name]) for *_, statistics in measured])
    log.write({"step": step, "evaluation": measures})
    log.say("  samples:  " + "  ".join(f"{name} {show(value)}" for name, value in measures.items()))


if __name__ == "__main__":
    cli.run(main)
