"""Stage 2: PRFL, process reward feedback learning (arXiv 2511.21541, section 3.3): train the generator against PAVRM.

    python train_prfl.py                                   # the tiny world, alone
    torchrun --nproc_per_node=8 train_prfl.py --model Wan2.1-T2V-14B --reward outputs/pavrm/reward --data ...

One iteration has two phases, each with an update of its own:

    SFT      x_s = (1 - s) x_0 + s noise                     a real clip, at a random noise level
             loss = |v(x_s, t) - (noise - x_0)|^2            flow matching: stay a model of real clips

    reward   x_K = noise;  k ~ uniform over the steps but the last
             k solver steps from x_K without gradient        roll out to a random step ...
             one solver step with gradient  ->  x_next       ... and take one more
             loss = weight * relu(2 - sigmoid(PAVRM(x_next, t_next)))

The gradient flows through the frozen PAVRM and through that one step only. Nothing is decoded, so memory is that of
one training step. Departures from the published code are listed in the README.
"""
import argparse
from pathlib import Path

import torch

import parallel
from data import TASKS, Clips, Order, collate, label, to_uint8, write_video
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
    parser.add_argument("--data", default="demo/train/index.jsonl", help="index of encoded clips (data.py): real ones, that move well")
    parser.add_argument("--only_good", choices=TASKS, help="leave out the clips whose label for this task is not 1 (default: keep all)")
    parser.add_argument("--output", default="outputs/prfl", help="directory of this run: model/, checkpoints/, samples/, log.jsonl")
    parser.add_argument("--phases", nargs="+", default=["sft", "reward"], choices=["sft", "reward"], help="phases of an iteration")
    parser.add_argument("--steps", type=int, default=200, help="iterations")
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

    The latents stay float32 throughout. The reward sees the policy's own text states.
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
    parallel.open_run(args.output, args.resume)
    clips = Clips(args.data)
    clips.check()
    empty_prompt = clips.prompts["empty"].to(device)
    indices = [i for i, entry in enumerate(clips.entries) if not args.only_good or label(entry["labels"], args.only_good) == 1]
    order = Order([entry["shape"] for entry in clips.entries], args.batch_size, args.seed, indices)
    schedule = TrainingSchedule(args.shift)
    solver = UniPC(args.rollout_steps, args.shift)

    # The policy, and the reward model, frozen in fact: its parameters take no gradient.
    policy = WanModel.on_meta(args.model)
    parallel.shard(policy, policy.blocks, [policy.time_embedding, policy.time_projection, policy.head], device)
    load_weights(policy.to_empty(device=device), args.model)
    if "reward" in args.phases:
        pavrm = PAVRM.on_meta(args.reward).requires_grad_(False)
        if pavrm.dit.config.in_dim != policy.config.in_dim or pavrm.dit.config.text_dim != policy.config.text_dim:
            raise InputError(f"the reward model {args.reward} takes other latents or text states than {args.model}; "
                             f"train it on this model with train_pavrm.py")
        parallel.shard(pavrm, pavrm.dit.blocks, [pavrm.dit.time_embedding, pavrm.dit.time_projection,
                                                 pavrm.query_attention, pavrm.mlp], device)
        load_weights(pavrm.to_empty(device=device), args.reward)
        pavrm.dit.checkpoint_blocks = args.checkpoint_blocks
    policy.checkpoint_blocks = args.checkpoint_blocks

    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    first_step = parallel.load_checkpoint(args.output, policy, optimizer)
    log = parallel.Log(args.output, args, args.steps, first_step, device)

    for step in range(first_step, args.steps):
        logged = {}
        for phase in args.phases:
            optimizer.zero_grad()
            for micro in range(args.accumulation):
                # What this rank does of micro-step number `draw`. Both phases of an iteration see the same clips.
                draw = step * args.accumulation + micro
                share = parallel.share(order[draw])  # (position in the batch, clip)
                samples = [clips.load(i) for _, i in share]
                x0, condition = collate(samples, policy.config, device)                     # (B, C, F, H, W)
                texts = [choose_caption(sample, empty_prompt, args, (args.seed, draw, n)) for (n, _), sample in zip(share, samples)]
                noise = torch.stack([parallel.noise(x0.shape[1:], args.seed, draw, n, phase) for n, _ in share]).to(device)

                if phase == "sft":
                    levels = [schedule.at(parallel.uniform(args.seed, draw, n, "timestep")) for n, _ in share]
                    sigma, t = (torch.tensor(column, dtype=torch.float32, device=device) for column in zip(*levels))  # (B,)
                    loss = sft_loss(policy, x0, noise, sigma, t, texts, condition)
                else:
                    # One k for all ranks: with different ones they would meet in different collectives.
                    k = int(parallel.uniform(args.seed, draw, "k") * (args.rollout_steps - 1))
                    _, logit = rewarded_step(policy, pavrm, solver, noise, k, texts, condition)
                    loss = reward_loss(logit, args.reward_weight)
                    add(logged, "reward", logit.sigmoid().mean().item() / args.accumulation)
                    logged.setdefault("k", []).append(k)
                (loss / args.accumulation).backward()
                add(logged, f"{phase}_loss", loss.item() / args.accumulation)
            logged[f"{phase}_norm"] = parallel.clip_gradients(policy.parameters(), args.max_norm)
            optimizer.step()
        log(step, **{name: parallel.mean(value) if isinstance(value, float) else value for name, value in logged.items()})

        done = step + 1
        if done % args.save_every == 0 or done == args.steps:
            parallel.save_checkpoint(args.output, done, policy, optimizer)
        if args.sample_every and (done % args.sample_every == 0 or done == args.steps):
            write_samples(policy, clips, indices[:args.samples], Path(args.output, "samples", f"step_{done:06d}"), args, device)
        log.pause()

    policy.save_pretrained(Path(args.output, "model"))
    log.say(f"the trained model is in {args.output}/model")


def choose_caption(sample, empty_prompt, args, key):
    """The text states of the long or the short caption, or of the empty prompt."""
    if parallel.uniform(*key, "drop") < args.drop_prompt:
        return empty_prompt
    name = "text_long" if parallel.uniform(*key, "caption") < args.long_caption else "text_short"
    return sample[name].to(empty_prompt.device)


def add(values, name, value):
    values[name] = values.get(name, 0.0) + value


@torch.no_grad()
def write_samples(policy, clips, indices, directory, args, device):
    """Sample videos of the same captions and seeds every time, so that one sees what training changes."""
    vae = WanVAE.from_pretrained(Path(args.model, "Wan2.1_VAE.pth"), device=device)
    negative = clips.prompts["negative"].to(device)
    for n in parallel.deal(len(indices)):
        sample = clips.load(indices[n])
        x0, condition = collate([sample], policy.config, device)
        text = sample["text_long"].to(device)

        def velocity(x, t, negative_prompt):
            return policy(x, t, [negative if negative_prompt else text], **condition)

        noise = parallel.noise(x0.shape, args.seed, n, "sample").to(device)
        latents = walk(guided(velocity, args.guidance), noise, UniPC(args.rollout_steps, args.shift))
        write_video(directory / f"{n}.mp4", to_uint8(vae.decode(latents)[0].cpu()), sample["entry"].get("fps", 16))


if __name__ == "__main__":
    parallel.run(main)

