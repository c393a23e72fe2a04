"""Stage 2: PRFL, process reward feedback learning (arXiv 2511.21541, section 3.3): train the generator against PAVRM.

    python train_prfl.py                                   # the tiny world, alone
    torchrun --nproc_per_node=8 train_prfl.py @recipes/prfl_t2v_14B_480P.args --reward ... --data ...

One iteration has two phases, each with an update of its own:

    sft      x_s = (1 - s) x_0 + s noise                     a real clip, at a random noise level s
             loss = |v(x_s, t) - (noise - x_0)|^2            flow matching: stay a model of real clips

    reward   x = noise;  k ~ uniform over all solver steps but the last
             k solver steps on x, without gradient           roll out to a random step ...
             one solver step with gradient  ->  x_next       ... take one more, and have the result judged
             loss = weight * relu(2 - sigmoid(PAVRM(x_next, t_next)))       in effect weight * (2 - reward)

The gradient flows through the frozen PAVRM and through that one step only. Nothing is decoded, so memory is that of
one training step. What the paper compares with is chosen by --phases:

    --phases sft            fine-tuning on the real clips alone
    --phases rwr            reward-weighted regression: sft's loss times exp((reward - 1) / temperature) of the clip
    --phases reward         PRFL without its SFT phase: the reward is hacked
    --phases sft reward     PRFL

Departures from the published code are listed in the README.
"""
import math
from contextlib import nullcontext
from copy import copy
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import parallel
import records
from data import TASKS, VAE_FILE, Clips, Order, ahead, choose_caption, clip_statistics, collate, label, to_uint8, write_video
from files import InputError, is_main, load_weights, open_safetensors, read_json, write_json, write_safetensors
from lora import add_lora, save_adapter, start_lora, without_adapters
from memory import block_runner
from model import WanModel
from reward import PAVRM, check_fit, reward_loss
from score import REWARD_TIMESTEPS, parse_tasks, process_logits
from solver import SOLVERS, TrainingSchedule, add_noise, flow_matching_target, guided, timestep, walk
from vae import WanVAE


def parse_args(argv=None):
    parser = parallel.Parser("Train a Wan model against a PAVRM reward. Symbols in brackets are those of the head of train_prfl.py.")
    parser.add_argument("--model", default="demo/model", help="official directory of the model to train (theta)")
    parser.add_argument("--reward", default="demo/reward", help="reward model (r), written by train_pavrm.py; none: samples "
                        "are not scored, for --phases sft")
    parser.add_argument("--data", default="demo/train/index.jsonl", help="index of encoded clips (data.py), real ones (x_0, c)")
    parser.add_argument("--good", default="motion_quality", choices=[*TASKS, "none"], help="clips annotated as poor in this are left out")
    parser.add_argument("--val", help="index of held-out clips, for the prompts of --samples; None: those of --data")
    parser.add_argument("--output", default="outputs/prfl", help="directory of this run: model/, checkpoints/, samples/, log.jsonl")
    parser.add_argument("--phases", nargs="+", default=["sft", "reward"], choices=["sft", "rwr", "reward"], help="phases of an iteration")
    parser.add_argument("--steps", type=int, default=100, help="iterations; the published number is not known")
    parser.add_argument("--batch_size", type=int, default=2, help="clips a micro-step, over all processes")
    parser.add_argument("--accumulation", type=int, default=5, help="micro-steps a phase and iteration; each has its own k")
    parser.add_argument("--sft_ratio", type=float, default=1.0, help="micro-steps of the sft (or rwr) phase to one of the reward phase")
    parser.add_argument("--lr", type=float, default=5e-6, help="learning rate")
    parser.add_argument("--lr_schedule", default="constant", choices=["constant", "linear", "cosine"], help="after the warm-up")
    parser.add_argument("--warmup", type=int, default=0, help="iterations of linear warm-up")
    parser.add_argument("--weight_decay", type=float, default=0.01, help="AdamW's weight decay")
    parser.add_argument("--max_norm", type=float, default=1.0, help="gradient norm above which it is clipped")
    parser.add_argument("--lora_rank", type=int, default=0, help="train adapters of this rank, weights "
                        "frozen; 0 trains all; published: 128")
    parser.add_argument("--lora_alpha", type=float, help="weight of the adapters times their rank; None: the rank")
    parser.add_argument("--lora_targets", nargs="+", default=["q", "k", "v", "o"], help="linear layers with adapters")
    parser.add_argument("--ema", type=float, default=0.0, help="decay of an average of the weights, saved beside them, sampled and "
                        "evaluated; 0: none; published: 0.99")
    parser.add_argument("--task", nargs="+", help="label that is rewarded, or a weighted sum: motion_quality=0.7 text_alignment=0.3; "
                        "None: the reward model's first")
    parser.add_argument("--reward_weight", type=float, default=0.1, help="weight of the reward loss (lambda)")
    parser.add_argument("--reward_form", default="hinge", choices=["hinge", "log_sigmoid", "logit"], help="what is made of the logit")
    parser.add_argument("--judge", default="next", choices=["next", "clean"], help="what is judged: the noisy latent after the step "
                        "(x_{t-1}), or the clean one it predicts (x_0), at timestep 0")
    parser.add_argument("--k", nargs="+", default=["all"], help="steps that may be rewarded (s): all of 0 .. K - 2, their early, "
                        "middle or late third, or numbers")
    parser.add_argument("--gradient_steps", type=int, default=1, help="steps with gradient, the rewarded one last")
    parser.add_argument("--rewards_per_rollout", type=int, default=1, help="different k that are rewarded on one rollout, their "
                        "gradients averaged: cheaper a reward, but they share the noise and the rollout's beginning")
    parser.add_argument("--rollout_steps", type=int, default=40, help="solver steps from noise to clip (K)")
    parser.add_argument("--solver", default="unipc", choices=SOLVERS, help="of rollouts and samples")
    parser.add_argument("--rollout_guidance", type=float, default=1.0, help="classifier-free guidance in the rollout; 1 is none")
    parser.add_argument("--kl_weight", type=float, default=0.0, help="weight of |v - v_start|^2 at the steps with gradient, against "
                        "the model as it started; takes a frozen copy of it, or none with --lora_rank")
    parser.add_argument("--rwr_temperature", type=float, default=0.1, help="of reward-weighted regression (beta)")
    parser.add_argument("--shift", type=float, default=5.0, help="shift of the noise levels, in all phases and in the samples")
    parser.add_argument("--timesteps", nargs="+", default=["uniform"], help="draws of t in the sft phase: uniform (over the shifted "
                        "table), logit_normal, or a list of timesteps")
    parser.add_argument("--long_caption", type=float, default=0.7, help="probability of the long caption, else the short one")
    parser.add_argument("--drop_prompt", type=float, default=0.1, help="probability of the empty prompt instead")
    parser.add_argument("--samples", type=int, default=2, help="clips of fixed prompts and seeds that are made and "
                        "measured as training goes on")
    parser.add_argument("--sample_every", type=int, default=50, help="iterations between them, the first before training; 0: never")
    parser.add_argument("--guidance", type=float, default=5.0, help="their guidance")
    parser.add_argument("--stop_below", nargs=2, metavar=("MEASURE", "SHARE"), help="stop when the samples' reward has risen and this "
                        "measure of them (motion_energy, contrast, saturation) is below this share of its start")
    parser.add_argument("--seed", type=int, default=0, help="of the data order, the noise and every other draw")
    parser.add_argument("--gather", default="auto", choices=["auto", "yes", "no"], help="keep the policy's weights gathered during a "
                        "rollout: faster, and more memory; auto: where they take less than a quarter of the GPU's")
    parser.add_execution(save_every=50)
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------- the method

def sft_loss(velocity, x0, noise, sigma, t, weight=1.0):
    """Flow-matching loss (scalar): x0, noise (B, C, F, H, W), noise level sigma (B,) and its timestep t (B,), weight (B,)."""
    error = velocity(add_noise(x0, noise, sigma), t) - flow_matching_target(x0, noise)
    return (weight * error.square().flatten(1).mean(1)).mean()


def rewarded_steps(velocity, pavrm, solver, x, ks, gradient_steps=1, judge="next", start=None, rollout=torch.no_grad):
    """Roll out from noise x (B, C, F, H, W) and have each step k of `ks` judged, one after the other.

    A rewarded step is done again without gradient where the rollout goes on to the next k.
    Yields k, the judged latents (B, C, F, H, W), their logits, and the mean square distance of the steps' velocities to
    those of `start`, all with gradient through the last `gradient_steps` steps and no further. velocity(x, t), start(x, t)
    and pavrm(x, t) know their condition. The latents stay float32 throughout.
    """
    at = 0
    for k in sorted(ks):
        first = max(k - gradient_steps + 1, 0)
        if first > at:
            with rollout():
                x = walk(velocity, x, solver, at, first)
            at = first
        # `solver` remembers the steps before; a copy goes on from there, so that the rollout may continue without gradient.
        branch, z, distance = copy(solver), x, torch.zeros((), device=x.device)
        for i in range(first, k + 1):
            t = timestep(solver, i, z)
            v = velocity(z, t)
            if start:
                with torch.no_grad():
                    v_start = start(z, t)
                distance = distance + (v - v_start).square().mean() / (k + 1 - first)
            before, z = z, branch.step(v, i, z)
        if judge == "clean":
            z, t_next = before - solver.sigmas[k].item() * v, torch.zeros_like(t)
        else:
            t_next = timestep(solver, k + 1, z)
        yield k, z, pavrm(z, t_next), distance


def rewardable(words, steps):
    """The steps k that --k names, of a solver of K steps: the last step is never one, since nothing comes after it."""
    if steps < 2:
        raise InputError(f"--rollout_steps {steps} leaves no step to reward; give at least 2")
    third = (steps - 1) / 3
    thirds = {"all": (0, 3), "early": (0, 1), "middle": (1, 2), "late": (2, 3)}
    if len(words) == 1 and words[0] in thirds:
        ks = list(range(*(round(third * part) for part in thirds[words[0]])))
    elif all(word.isdigit() for word in words):
        ks = sorted({int(word) for word in words})
    else:
        raise InputError(f"--k {' '.join(words)} names no steps; give all, early, middle, late, or numbers")
    if not ks or max(ks) > steps - 2:
        raise InputError(f"--k {' '.join(words)} does not fit {steps} rollout steps; k can be 0 to {steps - 2}")
    return ks


# ---------------------------------------------------------------------------------------------- training

def main(argv=None):
    args = parse_args(argv)
    device = parallel.start(args.sp, args.timeout)
    records.check_run(args)
    sampling = args.sample_every if args.samples else 0
    if len(set(args.phases)) < len(args.phases):
        raise InputError(f"--phases {' '.join(args.phases)} names one twice; give each once")
    choices = rewardable(args.k, args.rollout_steps)
    if not 1 <= args.rewards_per_rollout <= len(choices):
        raise InputError(f"--rewards_per_rollout {args.rewards_per_rollout} is not possible with {len(choices)} k; give 1 to {len(choices)}")
    if args.stop_below and (args.stop_below[0] not in ("motion_energy", "contrast", "saturation") or args.reward == "none"
                            or not args.stop_below[1].replace(".", "", 1).isdigit() or not sampling):
        raise InputError(f"--stop_below {' '.join(args.stop_below)} cannot be judged; give motion_energy, contrast or saturation "
                         f"and a share like 0.5, with a reward model and samples")
    clips, val_clips = Clips(args.data), Clips(args.val or args.data)
    clips.check(), val_clips.check()
    empty_prompt, negative_prompt = (clips.prompts[name].to(device) for name in ("empty", "negative"))
    good = [i for i, entry in enumerate(clips.entries) if args.good == "none" or label(entry["labels"], args.good) != 0]
    order = Order([entry["shape"] for entry in clips.entries], args.batch_size, args.seed, good)
    schedule = TrainingSchedule(args.shift, args.timesteps)

    # Both models as structure only, without weights, to see that everything fits before anything large is loaded.
    policy = WanModel.on_meta(args.model)
    collate([clips.load(0)], policy.config, "cpu")
    pavrm = PAVRM.on_meta(args.reward).requires_grad_(False) if args.phases != ["sft"] or sampling and args.reward != "none" else None
    tasks = parse_tasks(args.task, pavrm) if pavrm else {}
    if pavrm:
        check_fit(pavrm, policy, args.reward, args.model)
    vae = WanVAE.from_pretrained(Path(args.model, VAE_FILE), device=device) if sampling else None

    # Shard each over all processes (the modules named one by one compute in float32), give each shard its memory, then
    # read the weights into it.
    storage, run_block = parallel.storage(args, device), block_runner(args, device)

    def load_policy(model):
        parallel.shard(model, model.blocks, [model.time_embedding, model.time_projection, model.head], device, args)
        load_weights(model.to_empty(device=storage), args.model)
        model.run_block = run_block
        return model

    if args.lora_rank:
        add_lora(policy, args.lora_rank, args.lora_alpha or args.lora_rank, args.lora_targets)
    load_policy(policy)
    start_lora(policy, args.seed)
    frozen = load_policy(WanModel.on_meta(args.model).requires_grad_(False)) if args.kl_weight and not args.lora_rank else policy
    if pavrm:
        dit = pavrm.dit
        parallel.shard(pavrm, dit.blocks, [dit.time_embedding, dit.time_projection, *pavrm.heads], device, args)
        load_weights(pavrm.to_empty(device=storage), args.reward)
        dit.run_block = run_block

    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=device.type == "cuda")
    ema = parallel.EMA(policy, args) if args.ema else None
    checkpoints = records.Checkpoints(args, policy, optimizer, ema)
    first_step = checkpoints.load() if args.resume else 0
    log = records.Log(args, first_step, device)
    log.say(f"training {args.model} on {len(good)} clips, {len(clips) - len(good)} poor ones left out; "
            f"sample videos go to {args.output}/samples; {parallel.describe(args, policy, device)}")
    sft_count = max(round(args.accumulation * args.sft_ratio), 1)

    def micro_steps(step, phase):
        count = args.accumulation if phase == "reward" else sft_count
        return range(step * count, (step + 1) * count)

    def load(step):
        """{micro_step: what this process reads for it}; a thread does so while the step before is computed."""
        needed = sorted({micro_step for phase in args.phases for micro_step in micro_steps(step, phase)})
        return {micro_step: [clips.load(i) for _, i in parallel.share(order[micro_step])] for micro_step in needed}

    def micro_batch(micro_step, phase, samples):
        """This process's part of a micro-step: x_0 and noise (B, C, F, H, W), the functions velocity(x, t, negative_prompt),
        start(x, t) and reward_logits(x, t) -> (B, labels) that know the clips' condition, and keys for further draws, one a
        clip. With --sft_ratio 1 both phases of an iteration see the same clips and captions."""
        keys = [(args.seed, micro_step, place) for place, _ in parallel.share(order[micro_step])]
        x0, condition = collate(samples, policy.config, device)
        texts = [choose_caption(sample, empty_prompt, args.long_caption, args.drop_prompt, *key) for sample, key in zip(samples, keys)]
        noise = torch.stack([parallel.noise(x0.shape[1:], *key, phase) for key in keys]).to(device)

        def velocity(x, t, negative=False, model=policy):
            return model(x, t, [negative_prompt] * len(x) if negative else texts, **condition)

        def start(x, t):
            with without_adapters(frozen):
                return guided(lambda *inputs: velocity(*inputs, model=frozen), args.rollout_guidance)(x, t)

        def reward_logits(x, t):
            return pavrm(x, t, texts, **condition, tasks=list(tasks))

        return x0, noise, velocity, start, reward_logits, keys

    def export(directory):
        for suffix in ("", "_ema") if ema else ("",):
            with ema.swapped() if suffix else nullcontext():
                policy.save_pretrained(Path(directory, f"model{suffix}"), torch.float32)
                if args.lora_rank:
                    save_adapter(policy, Path(directory, f"adapter{suffix}.safetensors"))

    if sampling and first_step == 0:
        evaluate(policy, pavrm, tasks, vae, val_clips, 0, args, device, log)
        log.pause()
    rollout = partial(parallel.rollout, policy, parallel.gathers(args, policy, device))
    records.stop_on_signals()
    done, stop, stopped_by = first_step, False, None
    for step, samples in ahead(load, range(first_step, args.steps)):
        logged = {}
        for group in optimizer.param_groups:
            group["lr"] = args.lr * parallel.learning_rate_factor(step, args)

        for phase in [phase for phase in args.phases if phase != "reward"]:  # sft or rwr
            optimizer.zero_grad()
            losses = []
            for micro_step in micro_steps(step, "sft"):
                x0, noise, velocity, _, reward_logits, keys = micro_batch(micro_step, "sft", samples[micro_step])
                levels = [schedule.draw(parallel.uniform(*key, "timestep")) for key in keys]
                sigma, t = (torch.tensor(column, dtype=torch.float32, device=device) for column in zip(*levels))    # (B,)
                weight = 1.0
                if phase == "rwr":
                    with torch.no_grad():
                        reward = reward_of(reward_logits(add_noise(x0, noise, sigma), t), tasks)
                        weight = ((reward - sum(tasks.values())) / args.rwr_temperature).exp()                      # (B,), up to 1
                loss = sft_loss(velocity, x0, noise, sigma, t, weight)
                (loss / sft_count).backward()
                losses.append((loss.detach(), sources(samples[micro_step]), None))
            logged[f"{phase}_norm"] = parallel.clip_gradients(trained, args.max_norm)
            checkpoints.check_finite(logged[f"{phase}_norm"], step + 1, losses, args.seed)
            optimizer.step()
            logged[f"{phase}_loss"] = parallel.mean(torch.stack([loss for loss, *_ in losses]))

        if "reward" in args.phases:
            optimizer.zero_grad()
            losses, rewards, distances = [], [], []
            for micro_step in micro_steps(step, "reward"):
                _, noise, velocity, start, reward_logits, _ = micro_batch(micro_step, "reward", samples[micro_step])
                # The same k for all processes: with different ones they would meet in different collectives.
                drawn = torch.randperm(len(choices), generator=parallel.generator(args.seed, micro_step, "k"))
                drawn = [choices[i] for i in drawn[:args.rewards_per_rollout]]
                solver = SOLVERS[args.solver](args.rollout_steps, args.shift)
                for k, _, logits, distance in rewarded_steps(guided(velocity, args.rollout_guidance), reward_logits, solver, noise, drawn,
                                                             args.gradient_steps, args.judge, start if args.kl_weight else None, rollout):
                    loss = sum(weight * reward_loss(logits[:, i], args.reward_weight, args.reward_form)
                               for i, weight in enumerate(tasks.values())) + args.kl_weight * distance
                    (loss / args.accumulation / len(drawn)).backward()
                    losses.append((loss.detach(), sources(samples[micro_step]), k))
                    rewards.append(reward_of(logits.detach(), tasks).mean())
                    distances.append(distance.detach())
            logged["reward_norm"] = parallel.clip_gradients(trained, args.max_norm)
            checkpoints.check_finite(logged["reward_norm"], step + 1, losses, args.seed)
            optimizer.step()
            logged |= {"reward_loss": parallel.mean(torch.stack([loss for loss, *_ in losses])),
                       "reward": parallel.mean(torch.stack(rewards)), "k": [k for *_, k in losses]}
            if args.kl_weight:
                logged["kl"] = parallel.mean(torch.stack(distances))

        if ema:
            ema.update()
        done = step + 1
        log(done, **logged, lr=optimizer.param_groups[0]["lr"])
        stopped_by = records.stop_asked()
        if sampling and (done % sampling == 0 or done == args.steps) and not stopped_by:
            with ema.swapped() if ema else nullcontext():
                stop = evaluate(policy, pavrm, tasks, vae, val_clips, done, args, device, log)
        checkpoints.check()
        if done % args.save_every == 0 or done == args.steps or stop or stopped_by:
            checkpoints.save(done)
        if args.export_every and done % args.export_every == 0:
            export(Path(args.output, "exports", f"step_{done:06d}"))
        log.pause()
        if stop or stopped_by:
            break

    checkpoints.finish(), log.finish()
    if stopped_by and done < args.steps:
        log.say(f"stopped by {stopped_by} after step {done}; --resume goes on from there")
        return
    export(args.output)
    log.say(f"the trained model is in {args.output}/model")


def sources(samples):
    """For messages: which clips these are."""
    return [sample["entry"]["source_id"] for sample in samples]


def reward_of(logits, tasks):
    """The reward (B,) of logits (B, labels): the sum of their sigmoids, weighted."""
    return logits.sigmoid() @ torch.tensor(list(tasks.values()), device=logits.device)


@torch.no_grad()
def evaluate(policy, pavrm, tasks, vae, clips, step, args, device, log):
    """Make clips of fixed prompts and seeds and measure them, so that one sees what training changes, and reward hacking:

    reward: mean reward of the clips, noised again; saturated: share of them above 0.95
    velocity_distance: mean |v - v_start|^2 on the prompt's own clip, noised, v_start being that of the model before training
    motion_energy, contrast, saturation: of the decoded videos, see data.clip_statistics

    Videos go to OUTPUT/samples. Returns whether --stop_below asks to stop.
    """
    directory, first = (Path(args.output, "samples", f"step_{number:06d}") for number in (step, 0))
    negative, schedule = clips.prompts["negative"].to(device), TrainingSchedule(args.shift)
    names, rows = [], torch.zeros(0)
    for n, counts in parallel.deal(min(args.samples, len(clips))):
        sample = clips.load(n)
        x0, condition = collate([sample], policy.config, device)
        text = sample["text_long"].to(device)
        noise = parallel.noise(x0.shape, args.seed, n, "sample").to(device)
        measures = {"velocity_distance": 0.0 if step == 0 else math.nan}

        def velocity(x, t, negative_prompt=False):
            return policy(x, t, [negative if negative_prompt else text], **condition)

        latents = walk(guided(velocity, args.guidance), noise, SOLVERS[args.solver](args.rollout_steps, args.shift))
        if pavrm:
            fresh = parallel.noise(x0.shape, args.seed, n, "score").to(device)
            logits = process_logits(pavrm, latents, text, condition, fresh, REWARD_TIMESTEPS, list(tasks), shift=args.shift)
            measures["reward"] = reward_of(logits, tasks).mean().item()
            measures["saturated"] = float(measures["reward"] > 0.95 * sum(tasks.values()))
        levels = {f"t{t}": (schedule.near(t), torch.tensor([float(t)], device=device)) for t in (250, 500, 750)}
        velocities = {name: velocity(add_noise(x0, noise, sigma), t).cpu() for name, (sigma, t) in levels.items()}
        if step == 0 and counts:
            write_safetensors(first / f"{n}.safetensors", velocities)
        if step > 0 and Path(first, f"{n}.safetensors").is_file():
            before = open_safetensors(first / f"{n}.safetensors")
            measures["velocity_distance"] = sum((v - before.get_tensor(name)).square().mean().item() / 3 for name, v in velocities.items())
        video = to_uint8(vae.decode(latents)[0].cpu())
        measures |= clip_statistics(video)
        names, rows = list(measures), rows if len(rows) else torch.zeros(min(args.samples, len(clips)), len(measures))
        if counts:
            rows[n] = torch.tensor(list(measures.values()))
            log.later(write_video, directory / f"{n}.mp4", video, sample["entry"].get("fps", 16))
    dist.all_reduce(rows)  # each rank has zeros where others have worked
    measures = {name: value for name, value in zip(names, rows.mean(0).tolist()) if not math.isnan(value)}
    log.write({"step": step, "evaluation": measures})
    log.say("  samples:  " + "  ".join(f"{name} {value:.4g}" for name, value in measures.items()))
    if is_main():
        write_json(directory / "evaluation.json", measures)
    if not args.stop_below or step == 0:
        return False
    start, (name, share) = read_json(first / "evaluation.json"), args.stop_below
    hacked = measures["reward"] > start["reward"] and measures[name] < float(share) * start[name]
    if hacked:
        log.say(f"stopped: the samples' reward has risen from {start['reward']:.3f} to {measures['reward']:.3f}, while {name} has "
                f"fallen from {start[name]:.4g} to {measures[name]:.4g}")
    return hacked


if __name__ == "__main__":
    parallel.run(main)
