"""Stage 2: train the generator against PAVRM by PRFL, process reward feedback learning.

arXiv 2511.21541, section 4.3 and algorithm 1.

    python train_prfl.py @recipes/tiny_prfl.args           # the tiny world, one process
    torchrun --nproc_per_node=8 train_prfl.py @recipes/prfl_t2v_14B_480P.args --reward ... --data ...

One iteration has two phases. Each ends with an update of its own, by the one AdamW that both share:

    sft      x_s = (1 - s) x_0 + s noise                     a real clip, at a random noise level s
             loss = |v(x_s, t) - (noise - x_0)|^2            flow matching: stay a model of real clips

    reward   x = noise;  k ~ uniform over all solver steps but the last; t is 1000 times the noise level
             k solver steps on x, without gradient           roll out to a random step ...
             one solver step with gradient  ->  x_next       ... take one more, and have the result judged
             loss = weight * relu(2 - sigmoid(PAVRM(x_next, t_next)))      in effect weight * (2 - reward)

The gradient flows through the frozen PAVRM and through that one step only. Nothing is decoded, so memory is
that of one training step. --phases selects PRFL or one of the baselines that the paper compares it with:

    --phases sft            fine-tuning on the real clips alone
    --phases rwr            reward-weighted regression: sft's loss times exp((reward - largest) / temperature)
    --phases reward         PRFL without its SFT phase: the reward gets hacked
    --phases sft reward     PRFL

docs/departures.md lists how this differs from the published code.
"""
import runpy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cli

import torch

import parallel
import records
from clips import LABELS, Clips, Order, choose_caption, collate, label_of, prefetch
from ema import EMA
from files import InputError, check_file, load_weights
from lora import add_lora, read_adapter, save_adapter, start_lora, without_adapters
from lora_files import merging
from memory import block_runner
from model import WanModel
from reward import PAVRM, ProcessReward, check_fit
from solver import SOLVERS, TrainingSchedule, add_noise, flow_matching_target, guided, timestep, walk
from vae import VAE_FILE, WanVAE


def parse_args(argv=None):
    parser = cli.Parser("Train a Wan model against a reward. Symbols are those at the head of train_prfl.py.")
    group = parser.add_argument_group("models and data")
    add = group.add_argument
    add("--model", default="demo/model", help="official directory of the model to train (v)")
    add("--reward", default="demo/reward",
        help="reward model, a directory written by train_pavrm.py; or FILE.py with a class Reward "
             "(docs/extend.md); or none, for --phases sft")
    add("--labels", nargs="+", metavar="LABEL[=WEIGHT]",
        help="the reward model's label to follow, or several with weights, such as motion_quality=0.7 "
             "text_alignment=0.3 (default: its first label)")
    add("--data", default="demo/train/index.jsonl", help="index of real clips (x_0), written by data.py")
    add("--skip_poor", default="motion_quality", choices=[*LABELS, "none"],
        help="leave out clips that are annotated as poor in this label; none: train on all clips")
    add("--val", help="index of held-out clips, whose prompts are sampled during training (default: --data)")
    add("--output", default="outputs/prfl", help="directory of the run: model, checkpoints, samples, log")
    cli.add_captions(group, long_caption=0.7, drop_prompt=0.1)
    group = parser.add_argument_group("adapters")
    cli.add_merged(group)
    cli.add_lora(group)
    group.add_argument("--lora_from", metavar="FILE",
                       help="LoRA file with which the adapters start; its rank and layers must be theirs")

    group = parser.add_argument_group("method")
    cli.add_noise_levels(group)
    add = group.add_argument
    add("--phases", nargs="+", default=["sft", "reward"], choices=["sft", "rwr", "reward"],
        help="phases of each iteration")
    add("--reward_weight", type=cli.Number(0, 10**6), default=0.1, help="weight of the reward loss")
    add("--reward_form", default="hinge", choices=["hinge", "log_sigmoid", "logit"],
        help="how the logit becomes a loss: relu(2 - reward), -log(reward) or -logit")
    add("--judge", default="next", choices=["next", "clean"],
        help="what is judged: the noisy latent after the step (x_next), or the clean one it predicts (x_0)")
    add("--k", nargs="+", default=["all"],
        help="steps that may be rewarded: all of 0 .. K - 2, their early, middle or late third, or numbers")
    add("--gradient_steps", type=cli.whole(1, 1000), default=1,
        help="solver steps with gradient; the last one is rewarded")
    add("--solver", default="unipc", choices=SOLVERS, help="solver of rollouts and samples")
    add("--solver_steps", type=cli.whole(2, 1000), default=40, help="solver steps from noise to a clip (K)")
    add("--rollout_guidance", type=cli.GUIDANCE, default=1.0,
        help="classifier-free guidance in rollouts; 1 is none")
    add("--kl_weight", type=cli.Number(0, 10**6), default=0.0,
        help="weight of |v - v_start|^2 at the steps with gradient, v_start being the model before training: "
             "a frozen copy, or the model without its adapters")
    add("--rwr_temperature", type=cli.Number(1e-6, 10**6), default=0.1,
        help="temperature of reward-weighted regression")

    group = parser.add_argument_group("optimization")
    group.add_argument("--steps", type=cli.whole(1), default=100, help="iterations; no number is published")
    cli.add_optimization(group, lr=5e-6, accumulation=5)

    add = parser.add_argument_group("samples during training").add_argument
    add("--samples", type=cli.whole(0, 10_000), default=2,
        help="clips of fixed prompts and seeds that are made and measured")
    add("--sample_every", type=cli.whole(0), default=50,
        help="iterations between samples; the first are made before training; 0: never")
    add("--sample_guidance", type=cli.GUIDANCE, default=5.0, help="classifier-free guidance of the samples")
    add("--stop_if_hacked", action="store_true",
        help="stop when the samples show that the reward is being hacked (monitor.py has the rule)")
    cli.add_execution(parser)
    cli.add_checkpoints(parser, save_every=50)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------ the method

def sft_loss(velocity, x0, noise, sigma, t, weight=1.0):
    """Flow-matching loss, a scalar.

    x0, noise (B, C, F, H, W); noise level sigma (B,) and its timestep t (B,); weight (B,) or a number.
    """
    error = velocity(add_noise(x0, noise, sigma), t) - flow_matching_target(x0, noise)
    return (weight * error.square().flatten(1).mean(1)).mean()


def rewarded_step(velocity, judge, solver, x, k, gradient_steps=1, judged="next", start=None,
                  rollout=torch.no_grad):
    """Roll out from noise x (B, C, F, H, W) to step k, take that step with gradient, have the result judged.

    velocity(x, t), start(x, t) and judge(x, t) know the clips' condition. The last `gradient_steps` steps, k
    the last of them, have a gradient; the steps before are taken within `rollout()`, a context without one.
    Returns the judged latents (B, C, F, H, W), what `judge` says of them, and the mean square distance of the
    velocities to those of `start` (0 without one). The latents stay float32 throughout.
    """
    first = max(k - gradient_steps + 1, 0)
    if first > 0:
        with rollout():
            x = walk(velocity, x, solver, last=first)

    distance = torch.zeros((), device=x.device)
    for i in range(first, k + 1):
        t = timestep(solver, i, x)
        v = velocity(x, t)
        if start:
            with torch.no_grad():
                v_start = start(x, t)
            distance = distance + (v - v_start).square().mean() / (k + 1 - first)
        before = x
        x = solver.step(v, i, x)

    # `before`, t and v are those of step k.
    if judged == "clean":
        clean = before - float(solver.sigmas[k]) * v  # the prediction of x_0
        return clean, judge(clean, torch.zeros_like(t)), distance
    return x, judge(x, timestep(solver, k + 1, x)), distance


def rewardable(words, steps):
    """The steps k that --k names, of `steps` solver steps. The last step is none: nothing comes after it."""
    third = (steps - 1) / 3
    thirds = {"all": (0, 3), "early": (0, 1), "middle": (1, 2), "late": (2, 3)}
    if len(words) == 1 and words[0] in thirds:
        begin, end = thirds[words[0]]
        ks = list(range(round(third * begin), round(third * end)))
    elif all(word.isdecimal() and len(word) < 5 for word in words):
        ks = sorted({int(word) for word in words})
    else:
        raise InputError(f"--k {' '.join(words)} names no steps; give all, early, middle, late, or numbers")
    if not ks or max(ks) > steps - 2:
        raise InputError(f"--k {' '.join(words)} does not fit {steps} solver steps; k is 0 to {steps - 2}")
    return ks


# ------------------------------------------------------------------------------ batches

class Batch(NamedTuple):
    """This process's part of a micro-step."""
    x0: torch.Tensor      # real clips (B, C, F, H, W)
    noise: torch.Tensor   # (B, C, F, H, W)
    texts: list           # states of B prompts (n_i, text_dim)
    negative: list        # B times the states of the negative prompt
    condition: dict       # image to video: y, clip_fea
    keys: list            # (seed, micro_step, place) of each clip, for further draws
    names: list           # source_id of each clip, for messages

    def velocity(self, model):
        """The model's velocity(x, t, negative_prompt) for these clips."""
        def velocity(x, t, negative_prompt=False):
            return model(x, t, self.negative if negative_prompt else self.texts, **self.condition)
        return velocity


class Batches:
    """Reads the clips of an iteration (in a thread, ahead of time) and makes them into batches."""

    def __init__(self, clips, order, config, args, device):
        self.clips, self.order, self.config, self.args, self.device = clips, order, config, args, device
        self.empty = clips.prompts["empty"].to(device)
        self.negative = clips.prompts["negative"].to(device)

    def read(self, step):
        """{micro_step: this process's clips} of an iteration."""
        micro_steps = range(step * self.args.accumulation, (step + 1) * self.args.accumulation)
        return {n: [self.clips.load(i) for _, i in parallel.share(self.order[n])] for n in micro_steps}

    def make(self, micro_step, phase, samples):
        """The batch of a micro-step. Both phases see the same clips and captions, each with its own noise.

        The reward phase uses the clips' shape, captions and image condition, not their latents.
        """
        args = self.args
        keys = [(args.seed, micro_step, place) for place, _ in parallel.share(self.order[micro_step])]
        x0, condition = collate(samples, self.config, self.device)
        texts = []
        for sample, key in zip(samples, keys, strict=True):
            texts.append(choose_caption(sample, self.empty, args.long_caption, args.drop_prompt, *key))
        noise = torch.stack([parallel.noise(x0.shape[1:], *key, phase) for key in keys]).to(self.device)
        names = [sample["entry"]["source_id"] for sample in samples]
        return Batch(x0, noise, texts, [self.negative] * len(texts), condition, keys, names)


# ------------------------------------------------------------------------------ models

def load(model, dit, heads, directory, run_block, device, args, merge=None):
    """Shard a model that has no weights yet over all processes, and read each process's part of the weights.

    `dit` is its transformer, `heads` the modules at its end, `merge` what LoRA files change in the weights.
    """
    parallel.shard(model, dit, heads, device, args)
    load_weights(model, directory, device=parallel.storage(model, args, device), merge=merge)
    dit.run_block = run_block


def make_reward(policy, device, args):
    """The reward to follow: class Reward of FILE.py, or a ProcessReward whose PAVRM has no weights yet."""
    if args.reward.endswith(".py"):
        check_file(args.reward)
        reward = runpy.run_path(args.reward).get("Reward", lambda *_: None)(args, device)
        needed = ("scores", "value", "loss", "largest", "timesteps")
        missing = ", ".join(name for name in needed if not hasattr(reward, name))
        if missing:
            raise InputError(f"{args.reward} has no {missing} in a class Reward; docs/extend.md shows one")
        return reward
    pavrm = PAVRM.on_meta(args.reward).requires_grad_(False)
    check_fit(pavrm, policy, args.reward, args.model)
    return ProcessReward(pavrm, cli.parse_labels(args.labels, pavrm), args.reward_weight, args.reward_form)


def start_velocity(frozen, batch, args):
    """The guided velocity before training: of a frozen copy, or of the policy with its adapters off."""
    velocity = guided(batch.velocity(frozen), args.rollout_guidance)

    def start(x, t):
        with without_adapters(frozen):
            return velocity(x, t)
    return start


def export(policy, ema, directory, args):
    """Write the model in the official layout, and its average and adapters where the run has them."""
    for suffix in ("", "_ema") if ema else ("",):
        with ema.swapped() if suffix else nullcontext():
            policy.save_pretrained(Path(directory, f"model{suffix}"), parallel.DTYPES[args.export_dtype])
            if args.lora_rank:
                save_adapter(policy, Path(directory, f"adapter{suffix}.safetensors"))


# ------------------------------------------------------------------------------ training

def main(argv=None):
    args = parse_args(argv)
    device = parallel.start(args.sp, args.timeout, args.deterministic)
    records.check_run(args)
    if len(set(args.phases)) < len(args.phases):
        raise InputError(f"--phases {' '.join(args.phases)} repeats a phase; give each once")
    if args.reward == "none" and args.phases != ["sft"]:
        raise InputError(f"--phases {' '.join(args.phases)} needs a reward; give --reward, or --phases sft")
    sample_every = args.sample_every if args.samples else 0
    if args.stop_if_hacked and (not sample_every or args.reward == "none"):
        raise InputError("--stop_if_hacked looks at the rewards of samples; give --reward, --samples and "
                         "--sample_every, or leave it out")
    solver = SOLVERS[args.solver](args.solver_steps, args.shift)
    choices = rewardable(args.k, len(solver.timesteps))

    # ---- data: the clips to train on, and the order in which they come
    clips = Clips(args.data)
    clips.check()
    val_clips = clips
    if args.val:
        val_clips = Clips(args.val)
        val_clips.check()
    kept = []
    for i, entry in enumerate(clips.entries):
        if args.skip_poor == "none" or label_of(entry["labels"], args.skip_poor) != 0:
            kept.append(i)
    order = Order([entry["shape"] for entry in clips.entries], args.batch_size, args.seed, kept)
    schedule = TrainingSchedule(args.shift, args.timesteps)

    # ---- models without weights, to refuse what does not fit before anything large is loaded
    policy = WanModel.on_meta(args.model)
    merge = merging(args.lora, args.model)
    collate([clips.load(0)], policy.config, "cpu")  # refuses clips that the model cannot take
    reward, vae = None, None
    if args.phases != ["sft"] or (sample_every and args.reward != "none"):
        reward = make_reward(policy, device, args)
    if sample_every:
        import monitor  # writes videos with av, which training itself does not need
        vae = WanVAE.from_pretrained(Path(args.model, VAE_FILE), device=device)

    # ---- the models sharded over all processes, with their weights. Adapters come first: what is frozen then
    # is stored in --compute_dtype. start_lora fills the adapters, which no checkpoint holds.
    run_block = block_runner(args, device)  # one for all models: they share the buffers of offloaded inputs
    if args.lora_rank:
        add_lora(policy, args.lora_rank, args.lora_alpha or args.lora_rank, args.lora_targets)
    started = read_adapter(policy, args.lora_from) if args.lora_from else {}
    load(policy, policy, [policy.head], args.model, run_block, device, args, merge)
    start_lora(policy, args.seed, started)
    frozen = policy  # for --kl_weight: the policy with its adapters off, or a copy
    if args.kl_weight and not args.lora_rank and "reward" in args.phases:
        frozen = WanModel.on_meta(args.model).requires_grad_(False)
        load(frozen, frozen, [frozen.head], args.model, run_block, device, args, merge)
    if reward and not args.reward.endswith(".py"):
        load(reward.pavrm, reward.pavrm.dit, reward.pavrm.heads, args.reward, run_block, device, args)

    # ---- the optimizer, and what the run records
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    ema = EMA(policy, args) if args.ema else None
    checkpoints = records.Checkpoints(args, policy, optimizer, ema)
    first_step = checkpoints.load() if args.resume else 0
    log = records.Log(args, first_step, device)
    log.say(f"training {args.model} on {len(kept)} clips, {len(clips) - len(kept)} poor ones left out; "
            f"{records.describe(args, policy, device)}")
    for warning in order.repeated:
        log.say(warning)
    if sample_every and first_step == 0:
        monitor.evaluate(policy, reward, vae, val_clips, 0, args, device, log)
        log.pause()

    batches = Batches(clips, order, policy.config, args, device)
    rollout = partial(parallel.rollout, policy, parallel.gathers(args, policy, device))
    records.stop_on_signals(log)
    done, hacked, stop, stopped_by = first_step, False, False, None
    for step, loaded in prefetch(batches.read, range(first_step, args.steps)):
        logged = {}
        for group in optimizer.param_groups:
            group["lr"] = args.lr * parallel.learning_rate_factor(step, args)

        # ---- phase 1: flow matching on real clips (sft), weighted by their rewards (rwr)
        for phase in [phase for phase in args.phases if phase != "reward"]:
            optimizer.zero_grad()
            losses = []  # (loss, names of the clips, k) of each micro-step
            for micro_step, samples in loaded.items():
                batch = batches.make(micro_step, "sft", samples)
                levels = [schedule.draw(parallel.uniform(*key, "timestep")) for key in batch.keys]
                sigma = torch.tensor([sigma for sigma, _ in levels], device=device)            # (B,)
                t = torch.tensor([float(t) for _, t in levels], device=device)                 # (B,)
                weight = 1.0
                if phase == "rwr":
                    with torch.no_grad():
                        x = add_noise(batch.x0, batch.noise, sigma)
                        value = reward.value(reward.scores(x, t, batch))
                        weight = ((value - reward.largest) / args.rwr_temperature).exp()       # (B,), up to 1
                loss = sft_loss(batch.velocity(policy), batch.x0, batch.noise, sigma, t, weight)
                (loss / args.accumulation).backward()
                losses.append((loss.detach(), batch.names, None))
            logged[f"{phase}_norm"] = parallel.clip_gradients(trained, args.max_norm)
            logged[f"{phase}_loss"] = mean = parallel.mean(torch.stack([loss for loss, *_ in losses]))
            checkpoints.check_finite(logged[f"{phase}_norm"], mean, step + 1, losses, args.seed)
            optimizer.step()

        # ---- phase 2: roll out from noise to step k, take one step with gradient, follow the reward
        if "reward" in args.phases:
            optimizer.zero_grad()
            losses, values, distances = [], [], []
            for micro_step, samples in loaded.items():
                batch = batches.make(micro_step, "reward", samples)
                velocity = guided(batch.velocity(policy), args.rollout_guidance)
                start = start_velocity(frozen, batch, args) if args.kl_weight else None
                judge = partial(reward.scores, batch=batch)
                # One k for all processes: with different values their collectives would not match.
                draw = parallel.generator(args.seed, micro_step, "k")
                k = choices[torch.randperm(len(choices), generator=draw)[0]]                   # uniform
                _, scores, distance = rewarded_step(velocity, judge, solver, batch.noise, k,
                                                    args.gradient_steps, args.judge, start, rollout)
                loss = reward.loss(scores) + args.kl_weight * distance
                (loss / args.accumulation).backward()
                losses.append((loss.detach(), batch.names, k))
                values.append(reward.value(scores.detach()).mean())
                distances.append(distance.detach())
            logged["reward_norm"] = parallel.clip_gradients(trained, args.max_norm)
            logged["reward_loss"] = mean = parallel.mean(torch.stack([loss for loss, *_ in losses]))
            checkpoints.check_finite(logged["reward_norm"], mean, step + 1, losses, args.seed)
            optimizer.step()
            logged["reward"] = parallel.mean(torch.stack(values))
            logged["k"] = [k for *_, k in losses]
            if args.kl_weight:
                logged["kl"] = parallel.mean(torch.stack(distances))

        # ---- after the step: average, log, look at samples, save
        if ema:
            ema.update()
        done = step + 1
        log(done, **logged, lr=optimizer.param_groups[0]["lr"])
        stopped_by = records.stop_asked()
        if sample_every and (done % sample_every == 0 or done == args.steps) and not stopped_by:
            with ema.swapped() if ema else nullcontext():
                hacked = monitor.evaluate(policy, reward, vae, val_clips, done, args, device, log)
        stop = stopped_by or (hacked and args.stop_if_hacked)
        checkpoints.check()
        if done % args.save_every == 0 or done == args.steps or stop:
            checkpoints.save(done)
        if args.export_every and done % args.export_every == 0:
            export(policy, ema, Path(args.output, "exports", f"step_{done:06d}"), args)
        log.pause()
        if stop:
            break

    # ---- the end: wait until all is written, then write the result
    checkpoints.finish()
    log.finish()
    if stopped_by and done < args.steps:
        log.say(f"stopped by {stopped_by} after step {done}; --resume continues from there")
        return
    if stop and not stopped_by:
        log.say(f"stopped after step {done}, because the samples look hacked; --keep_checkpoints and "
                f"--export_every keep earlier weights")
    export(policy, ema, args.output, args)
    log.say(f"the trained model is in {args.output}/model")


if __name__ == "__main__":
    cli.run(main)
