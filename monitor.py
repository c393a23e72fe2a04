"""Watch a generator while it trains: sample fixed prompts and seeds, and measure signs of reward hacking."""
import math
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import parallel
from clips import collate
from files import InputError, is_finite, is_main, read_json, read_safetensors, write_json, write_safetensors
from solver import SOLVERS, TrainingSchedule, add_noise, guided, walk
from video import clip_statistics, to_uint8, write_video

STATISTICS = ["motion_energy", "contrast", "saturation"]
DISTANCE_LIMIT = 0.5  # of velocities, whose own mean square is about 2; PRFL with SFT stays below 0.1
CHANGE_LIMIT = 1.5    # the factor by which the frames' statistics may change, up or down


@torch.no_grad()
def evaluate(policy, reward, vae, clips, step, args, device, log):
    """Sample clips of fixed prompts and seeds, write them to OUTPUT/samples, and measure them, in the log as
    well:

    reward             mean reward of the clips, noised again to the reward's timesteps
    saturated          share of clips whose reward is above 95 % of the largest
    velocity_distance  mean |v - v_start|^2 on the prompt's own clip, noised; v_start is from before training
    motion_energy, contrast, saturation       of the decoded frames, see video.clip_statistics

    Returns whether they look hacked.
    """
    directory = Path(args.output, "samples", f"step_{step:06d}")
    first = Path(args.output, "samples", "step_000000")
    names = ["reward", "saturated"] if reward else []
    names = ["velocity_distance", *names, *STATISTICS]
    count = min(args.samples, len(clips))
    rows = torch.zeros(count, len(names))
    for n, counts in parallel.shard_indices(count):
        sample = clips.load(n)
        measures, velocities, video = measure_sample(policy, reward, vae, clips, n, sample, args, device)
        if step == 0 and counts:
            write_safetensors(first / f"{n}.safetensors", velocities)
        measures["velocity_distance"] = distance_to_start(velocities, first / f"{n}.safetensors", step)
        if counts:
            rows[n] = torch.tensor([measures[name] for name in names])
            log.later(write_video, directory / f"{n}.mp4", video, sample["entry"].get("fps", 16))
    dist.all_reduce(rows)  # each rank has zeros where others have worked

    means = dict(zip(names, rows.mean(0).tolist(), strict=True))
    measures = {name: value for name, value in means.items() if math.isfinite(value)}
    log.write({"step": step, "evaluation": measures})
    log.say("  samples:  " + "  ".join(f"{name} {value:.4g}" for name, value in measures.items()))
    reason = [None]
    if is_main():
        write_json(directory / "evaluation.json", measures)
        if step > 0 and (first / "evaluation.json").is_file():
            start = read_json(first / "evaluation.json", dict.fromkeys(measures, float))
            reason = [hacked(measures, start)]
    dist.broadcast_object_list(reason)
    if reason[0]:
        log.say(f"  the samples look hacked: {reason[0]}")
    return bool(reason[0])


def measure_sample(policy, reward, vae, clips, n, sample, args, device):
    """Make the clip of one prompt: its measures, the policy's velocities on the prompt's own clip, and its
    frames."""
    x0, condition = collate([sample], policy.config, device)
    texts = [sample["text_long"].to(device)]
    negative = [clips.prompts["negative"].to(device)]
    schedule = TrainingSchedule(args.shift)

    def velocity(x, t, negative_prompt=False):
        return policy(x, t, negative if negative_prompt else texts, **condition)

    noise = parallel.noise(x0.shape, args.seed, n, "sample").to(device)
    solver = SOLVERS[args.solver](args.solver_steps, args.shift)
    latents = walk(guided(velocity, args.sample_guidance), noise, solver)

    measures = {}
    if reward:
        fresh = parallel.noise(x0.shape, args.seed, n, "score").to(device)
        batch = SimpleNamespace(texts=texts, condition=condition)
        values = []
        for t in reward.timesteps:
            sigma = torch.tensor([schedule.near(t)], device=device)
            time = torch.tensor([float(t)], device=device)
            values.append(reward.value(reward.scores(add_noise(latents, fresh, sigma), time, batch)))
        measures["reward"] = torch.cat(values).mean().item()
        measures["saturated"] = float(measures["reward"] > 0.95 * reward.largest)

    velocities = {}
    for t in (250, 500, 750):
        time = torch.tensor([float(t)], device=device)
        velocities[f"t{t}"] = velocity(add_noise(x0, noise, schedule.near(t)), time).cpu()
    video = to_uint8(vae.decode(latents)[0].cpu())                     # (T, H, W, 3)
    return measures | clip_statistics(video), velocities, video


def distance_to_start(velocities, path, step):
    """Mean |v - v_start|^2 against the velocities in a file; NaN if the run began without samples."""
    if step == 0:
        return 0.0
    if not path.is_file():
        return math.nan
    start = {name: read() for name, _, read in read_safetensors(path)}
    total = 0.0
    for name, v in velocities.items():
        before = start.get(name)
        if before is None or (before.shape, before.dtype) != (v.shape, v.dtype) or not is_finite(before):
            raise InputError(f"{path} does not hold the velocities from before training; "
                             f"remove the file to continue without velocity_distance")
        total += (v - before).square().mean().item() / len(velocities)
    return total


def hacked(measures, start):
    """Why samples look like reward hacking, or None. `start`: the same measures before training.

    The reward has risen, and either the velocity is far from where it began, or every reward is saturated and
    the frames have changed. Both of `measures` and `start` are dicts as `evaluate` writes them.
    """
    if measures.get("reward", 0) <= start.get("reward", 0):
        return None
    risen = f"the reward rose from {start['reward']:.3f} to {measures['reward']:.3f}"
    distance = measures.get("velocity_distance", 0)
    if distance > DISTANCE_LIMIT:
        return f"{risen} while the velocity moved by {distance:.2f} (limit {DISTANCE_LIMIT})"
    for name in STATISTICS:
        factor = measures[name] / max(start[name], 1e-9)
        if measures["saturated"] == 1 and not 1 / CHANGE_LIMIT < factor < CHANGE_LIMIT:
            return f"{risen}, all rewards are saturated, and {name} is {factor:.2f} times that of the start"
    return None
