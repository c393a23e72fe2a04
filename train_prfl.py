"""Stage 2: PRFL, process reward feedback learning (arXiv 2511.21541, section 3.3): train the generator against PAVRM.

    python train_prfl.py                                   # the tiny world, alone
    torchrun --nproc_per_node=8 train_prfl.py --batch_size 8 --model Wan2.1-T2V-14B --reward outputs/pavrm/reward --data ...

One iteration has two phases, each with an update of its own:

    SFT      x_s = (1 - s) x_0 + s noise                     a real clip, at a random noise level s
             loss = |v(x_s, t) - (noise - x_0)|^2            flow matching: stay a model of real clips

    reward   x = noise;  k ~ uniform over all solver steps but the last
             k solver steps on x, without gradient           roll out to a random step ...
             one solver step with gradient  ->  x_next       ... take one more, and have the result judged
             loss = weight * relu(2 - sigmoid(PAVRM(x_next, t_next)))       in effect weight * (2 - reward)

The gradient flows through the frozen PAVRM and through that one step only. Nothing is decoded, so memory is that of
one training step. Departures from the published code are listed in the README.
"""
import argparse
from pathlib import Path

import torch

import parallel
from data import VAE_FILE, Clips, Order, collate, to_uint8, write_video
from files import InputError, load_weights
from model import WanModel
from reward import PAVRM, reward_loss
from solver import TrainingSchedule, UniPC, add_noise, flow_matching_target, guided, walk
from vae import WanVAE


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train a Wan model against a PAVRM reward.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="official directory of the model to train")
    parser.add_argument("--reward", default="demo/reward", help="reward model, written by train_pavrm.py")
    parser.add_argument("--data", default="demo/train/good.jsonl", help="index of encoded clips (data.py): real ones, that move well")
    parser.add_argument("--output", default="outputs/prfl", help="directory of this run: model/, checkpoints/, samples/, log.jsonl")
    parser.add_argument("--phases", nargs="+", default=["sft", "reward"], choices=["sft", "reward"], help="phases of an iteration")
    parser.add_argument("--steps", type=int, default=100, help="iterations; the published number is not known")
    parser.add_argument("--batch_size", type=int, default=2, help="clips a micro-step, over all processes")
    parser.add_argument("--accumulation", type=int, default=5, help="micro-steps a phase and iteration; each has its own k")
    parser.add_argument("--lr", type=float, default=5e-6, help="learning rate, constant")
    parser.add_argument("--weight_decay", type=float, default=0.01, help="AdamW's weight decay")
    parser.add_argument("--max_norm", type=float, default=1.0, help="gradient norm above which it is clipped")
    parser.add_argument("--reward_weight", type=float, default=0.1, help="weight of the reward loss (lambda)")
    parser.add_argument("--rollout_steps", type=int, default=40, help="UniPC steps from noise to clip (K); k is one of 0 .. K - 2")
    parser.add_argument("--shift", type=float, default=5.0, help="shift of the noise levels, in both phases and in the samples")
    parser.add_argument("--long_caption", type=float, default=0.7, help="probability of the long caption, else the short one")
    parser.add_argument("--drop_prompt", type=float, default=0.1, help="probability of the empty prompt instead")
    parser.add_argument("--samples", type=int, default=2, help="sample videos that are written, of the data's first captions")
    parser.add_argument("--sample_every", type=int, default=50, help="iterations between them; 0 writes none")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance of the sample videos; rollouts have none")
    parser.add_argument("--save_every", type=int, default=50, help="iterations between checkpoints; there is one at the end too")
    parser.add_argument("--checkpoint_blocks", action="store_true", help="keep only the blocks' inputs for backward and compute the "
                        "rest again: a third slower, and what large models need")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    parser.add_argument("--seed", type=int, default=0, help="of the data order, the noise and every other draw")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------- the method

def sft_loss(policy, x0, noise, sigma, t, texts, condition):
    """Flow-matching loss (scalar): x0, noise (B, C, F, H, W), noise level sigma (B,) and its timestep t (B,)."""
    velocity = policy(add_noise(x0, noise, sigma), t, texts, **condition)
    return (velocity - flow_matching_target(x0, noise)).square().mean()


def rewarded_step(policy, pavrm, solver, noise, k, texts, condition):
    """Roll out to step k and score one step more: x_next (B, C, F, H, W) and the logit (B,), both with gradient.

    The latents stay float32 throughout. The reward sees the policy's own text states. `solver` remembers the steps
    before (they are constants here), so one more step by hand goes on where `walk` stopped.
    """
    def velocity(x, t):
        return policy(x, t, texts, **condition)

    with torch.no_grad():
        x = walk(velocity, noise, solver, steps=k)
    t, t_next = (solver.timesteps[i].float().expand(len(noise)).to(noise.device) for i in (k, k + 1))
    x_next = solver.step(velocity(x, t), k, x)
    return x_next, pavrm(x_next, t_next, texts, **condition)


# ---------------------------------------------------------------------------------------------- training

def main(argv=None):
    args = parse_args(argv)
    device = parallel.start()
    parallel.check_run(args)
    if args.rollout_steps < 2:
        raise InputError(f"--rollout_steps {args.rollout_steps} leaves no step to reward; give at least 2")
    clips = Clips(args.data)
    clips.check()
    empty_prompt = clips.prompts["empty"].to(device)
    order = Order([entry["shape"] for entry in clips.entries], args.batch_size, args.seed)
    schedule = TrainingSchedule(args.shift)

    # Both models as structure only, without weights, to see that everything fits before anything large is loaded.
    policy = WanModel.on_meta(args.model)
    collate([clips.load(0)], policy.config, "cpu")
    pavrm = PAVRM.on_meta(args.reward).requires_grad_(False) if "reward" in args.phases else None
    for name in ("in_dim", "text_dim", "text_len", "use_clip") if pavrm else ():
        ours, theirs = getattr(policy.config, name), getattr(pavrm.dit.config, name)
        if ours != theirs:
            raise InputError(f"the reward model {args.reward} has {name} {theirs}, but {args.model} has {ours}; "
                             f"train it on a model of this kind with train_pavrm.py")
    vae = WanVAE.from_pretrained(Path(args.model, VAE_FILE), device=device) if args.sample_every else None

    # Shard each over all processes (the modules named one by one compute in float32), give each shard its memory, then
    # read the weights into it.
    parallel.shard(policy, policy.blocks, [policy.time_embedding, policy.time_projection, policy.head], device)
    load_weights(policy.to_empty(device=device), args.model)
    policy.checkpoint_blocks = args.checkpoint_blocks
    if pavrm:
        dit = pavrm.dit
        parallel.shard(pavrm, dit.blocks, [dit.time_embedding, dit.time_projection, pavrm.query_attention, pavrm.mlp], device)
        load_weights(pavrm.to_empty(device=device), args.reward)
        dit.checkpoint_blocks = args.checkpoint_blocks

    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    first_step = parallel.load_checkpoint(args.output, policy, optimizer) if args.resume else 0
    log = parallel.Log(args.output, args, args.steps, first_step, device)
    log.say(f"training {args.model} on {len(clips)} clips; sample videos go to {args.output}/samples")

    def micro_batch(micro_step, phase):
        """This process's part of a micro-step: x_0 and noise (B, C, F, H, W), text states, image condition, and keys
        for further draws, one a clip. Both phases of an iteration see the same clips and captions."""
        share = parallel.share(order[micro_step])  # (place in the batch, clip)
        keys = [(args.seed, micro_step, place) for place, _ in share]
        samples = [clips.load(i) for _, i in share]
        x0, condition = collate(samples, policy.config, device)
        texts = [choose_caption(sample, empty_prompt, args, key) for sample, key in zip(samples, keys)]
        noise = torch.stack([parallel.noise(x0.shape[1:], *key, phase) for key in keys]).to(device)
        return x0, noise, texts, condition, keys

    for step in range(first_step, args.steps):
        micro_steps = range(step * args.accumulation, (step + 1) * args.accumulation)
        logged = {}

        if "sft" in args.phases:
            optimizer.zero_grad()
            losses = []
            for micro_step in micro_steps:
                x0, noise, texts, condition, keys = micro_batch(micro_step, "sft")
                levels = [schedule.at(parallel.uniform(*key, "timestep")) for key in keys]
                sigma, t = (torch.tensor(column, dtype=torch.float32, device=device) for column in zip(*levels))    # (B,)
                loss = sft_loss(policy, x0, noise, sigma, t, texts, condition)
                (loss / args.accumulation).backward()
                losses.append(loss.detach())
            logged["sft_norm"] = parallel.clip_gradients(policy.parameters(), args.max_norm)
            optimizer.step()
            logged["sft_loss"] = parallel.mean(torch.stack(losses))

        if "reward" in args.phases:
            optimizer.zero_grad()
            losses, scores, ks = [], [], []
            for micro_step in micro_steps:
                _, noise, texts, condition, _ = micro_batch(micro_step, "reward")
                # One k for all processes: with different ones they would meet in different collectives.
                k = int(parallel.uniform(args.seed, micro_step, "k") * (args.rollout_steps - 1))
                solver = UniPC(args.rollout_steps, args.shift)
                _, logit = rewarded_step(policy, pavrm, solver, noise, k, texts, condition)
                loss = reward_loss(logit, args.reward_weight)
                (loss / args.accumulation).backward()
                losses.append(loss.detach())
                scores.append(logit.detach().sigmoid().mean())
                ks.append(k)
            logged["reward_norm"] = parallel.clip_gradients(policy.parameters(), args.max_norm)
            optimizer.step()
            logged |= {"reward_loss": parallel.mean(torch.stack(losses)), "reward": parallel.mean(torch.stack(scores)), "k": ks}

        done = step + 1
        log(done, **logged)
        if args.sample_every and (done % args.sample_every == 0 or done == args.steps):
            write_samples(policy, vae, clips, Path(args.output, "samples", f"step_{done:06d}"), args, device)
        if done % args.save_every == 0 or done == args.steps:
            parallel.save_checkpoint(args.output, done, policy, optimizer)
        log.pause()

    policy.save_pretrained(Path(args.output, "model"))
    log.say(f"the trained model is in {args.output}/model")


def choose_caption(sample, empty_prompt, args, key):
    """The text states of the long or the short caption, or of the empty prompt."""
    if parallel.uniform(*key, "drop") < args.drop_prompt:
        return empty_prompt
    name = "text_long" if parallel.uniform(*key, "caption") < args.long_caption else "text_short"
    return sample[name].to(empty_prompt.device)


@torch.no_grad()
def write_samples(policy, vae, clips, directory, args, device):
    """Videos of the first captions, with the same noise every time, so that one sees what training changes."""
    negative = clips.prompts["negative"].to(device)
    for n, counts in parallel.deal(min(args.samples, len(clips))):
        sample = clips.load(n)
        x0, condition = collate([sample], policy.config, device)
        text = sample["text_long"].to(device)

        def velocity(x, t, negative_prompt):
            return policy(x, t, [negative if negative_prompt else text], **condition)

        noise = parallel.noise(x0.shape, args.seed, n, "sample").to(device)
        latents = walk(guided(velocity, args.guidance), noise, UniPC(args.rollout_steps, args.shift))
        if counts:
            write_video(directory / f"{n}.mp4", to_uint8(vae.decode(latents)[0].cpu()), sample["entry"].get("fps", 16))


if __name__ == "__main__":
    parallel.run(main)

