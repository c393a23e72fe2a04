"""Score clips with a reward model at several noise levels, measure how accurate it is, show where it looks.

    python score.py --video a.mp4 b.mp4 --prompt "a red disc moves left slowly"      # videos
    python score.py --data demo/val/index.jsonl                                      # encoded, labelled clips
    python score.py --convert TRANSFORMER query_attention.pth mlp.pth --reward outputs/pavrm/reward

The score of a clip x_0 is the mean of sigmoid(logit(x_t, t, caption)) over timesteps t, with fixed noise.
Videos are encoded first (data.py); a second run finds them encoded. Under torchrun, processes share the work.
"""
from collections import Counter
from pathlib import Path

import cli

import torch
import torch.nn.functional as F

import parallel
import plot
from clips import Clips, collate
from encode import encode_clips
from evaluation import fixed_noise, measure, score_clips, table
from files import InputError, check_form, is_main, load_weights, weight_shapes, write_json
from model import WanModel
from reward import PAVRM, REWARD_TIMESTEPS, QueryAttention
from solver import TrainingSchedule, add_noise
from video import read_video, write_video


def parse_args(argv=None):
    parser = cli.Parser("Score videos or encoded clips with a reward model, at several noise levels.")
    group = parser.add_argument_group("what is scored (one of --video and --data)")
    group.add_argument("--video", nargs="+", help="videos to score")
    group.add_argument("--prompt", nargs="+", help="prompts of the videos: one for all, or one each")
    group.add_argument("--data", metavar="INDEX",
                       help="index of encoded clips, written by data.py; clips with labels are measured too")

    group = parser.add_argument_group("how videos are encoded")
    group.add_argument("--model", default="demo/model",
                       help="official model directory, whose VAE and text encoder encode the videos")
    own = "(default: that of the videos in OUTPUT/encoded, else the model's own)"
    group.add_argument("--size", type=cli.parse_size,
                       help=f"width x height to which videos are scaled and cut {own}")
    group.add_argument("--frames", type=cli.FRAMES, help=f"frames per video, 1 + 4n {own}")
    group.add_argument("--fps", type=cli.FPS, help=f"frames per second at which videos are read {own}")

    group = parser.add_argument_group("reward model")
    group.add_argument("--reward", default="demo/reward",
                       help="directory of the reward model, written by train_pavrm.py")
    group.add_argument("--labels", nargs="+",
                       help="the label that makes the reward, or a weighted sum, such as motion_quality=0.7 "
                            "text_alignment=0.3 (default: the first label of the reward model)")
    group.add_argument("--timesteps", type=cli.whole(0, 1000), nargs="+", default=REWARD_TIMESTEPS,
                       help="noise levels; the reward is the mean over them")
    group.add_argument("--batch_size", type=cli.whole(1, 10_000), default=1,
                       help="noise levels of one clip that are scored at once")
    group.add_argument("--seed", type=cli.SEED, default=0, help="seed of the noise")
    group.add_argument("--convert", nargs=3, metavar=("TRANSFORMER", "QUERY_ATTENTION", "MLP"),
                       help="convert instead of scoring: write the directory --reward from a published "
                            "transformer directory and the two files of its head")

    group = parser.add_argument_group("results")
    group.add_argument("--output", default="outputs/scores",
                       help="directory of scores.json, the pictures and the encoded videos")
    group.add_argument("--attention", action="store_true",
                       help="also write each video with the attention of the query as a heat map")
    group.add_argument("--plot", action="store_true",
                       help="also draw rewards against timesteps, to scores.png (needs matplotlib)")
    args = parser.parse_args(argv)

    if args.convert:
        if args.reward == parser.get_default("reward"):
            raise InputError("--convert would replace the tiny world's reward model; "
                             "give another directory with --reward")
    elif bool(args.video) == bool(args.data):
        raise InputError("exactly one of two inputs is needed; give either --video or --data")
    return args


def from_published(transformer, query_attention, mlp):
    """The PAVRM of a published transformer directory and the two files of its head.

    The directory's config.json may count more blocks than it holds.
    """
    dit = WanModel.on_meta(transformer)
    names = weight_shapes(transformer)
    blocks = [i for i in range(dit.config.num_layers) if f"blocks.{i}.modulation" in names]
    form = {"queries": [range(1, 10_001), int]}
    queries = check_form(weight_shapes(query_attention), form, query_attention)["queries"]
    pavrm = PAVRM(dit, len(blocks), num_queries=queries[0])
    load_weights(dit, transformer, ignore=["head."], device="cpu")
    load_weights(pavrm.query_attention, query_attention)
    load_weights(pavrm.mlp, mlp)
    return pavrm


def list_videos(paths, prompts):
    """The entries of videos for `encode_clips`. Videos of one name in different directories are numbered."""
    if len(prompts) == 1:
        prompts = prompts * len(paths)
    if len(prompts) != len(paths):
        raise InputError(f"{len(paths)} videos have {len(prompts)} prompts; "
                         f"give one --prompt for all, or one each")
    stems = Counter(Path(path).stem.casefold() for path in paths)
    entries = []
    for n, (path, prompt) in enumerate(zip(paths, prompts, strict=True), 1):
        name = Path(path).stem
        if stems[name.casefold()] > 1:
            name = f"{name}-{n}"
        # With one pair_id for all, all are scored with the same noise.
        entries.append({"line": n, "source_id": name, "video_path": path, "short_caption": prompt,
                        "long_caption": prompt, "labels": {}, "pair_id": "video"})
    return entries


# ------------------------------------------------------------------------------ where the model looks

def check_attention(pool, entries):
    """Raise InputError unless the pool has queries and every clip's video is there."""
    if not isinstance(pool, QueryAttention):
        raise InputError("--attention shows where a query looks, and this reward model pools without one; "
                         "leave it out")
    for entry in entries:
        if not Path(entry.get("video_path") or "?").is_file():
            raise InputError(f"--attention needs each clip's video, and {entry['source_id']} has none here; "
                             f"leave it out")


@torch.no_grad()
def attention_video(pavrm, pool, clip, video, timesteps, seed, device):
    """The frames (T, H, W, 3) of a clip under a heat map of a query pool's attention.

    The attention is the mean over timesteps, heads and queries.
    """
    schedule = TrainingSchedule()
    x0, condition = collate([clip], pavrm.dit.config, device)           # (1, C, F, h, w)
    text = clip["text_short"].to(device)
    noise = fixed_noise(clip, seed).to(device)
    weights = 0
    for t in timesteps:
        x = add_noise(x0, noise, schedule.near(t))
        time = torch.tensor([float(t)], device=device)
        tokens = pavrm.dit.features(x, time, [text], **condition, num_blocks=len(pavrm.dit.blocks))
        attention = pool.attend(tokens.float())[1]                      # (1, heads, queries, L)
        weights = weights + attention.mean((1, 2))                      # (1, L)

    # A token covers 2 x 2 latents, a latent 8 x 8 pixels of four frames (in the first latent frame, of one).
    frames, height, width = x0.shape[2], x0.shape[3] // 2, x0.shape[4] // 2
    heat = weights.view(1, frames, height, width)
    heat = F.interpolate(heat, video.shape[1:3], mode="bilinear")[0].cpu()  # (F, H, W)
    latent_frame = (torch.arange(len(video)) + 3) // 4                  # (T,)
    heat = (heat / heat.amax())[latent_frame, ..., None]                # (T, H, W, 1)
    warm = torch.tensor([255.0, 200.0, 0.0])
    cold = torch.tensor([160.0, 0.0, 80.0])
    colour = warm * heat + cold * (1 - heat)                            # (T, H, W, 3)
    return (video * (1 - 0.75 * heat) + colour * 0.75 * heat).round().to(torch.uint8)


# ------------------------------------------------------------------------------ the command

def main(argv=None):
    args = parse_args(argv)
    if args.convert:
        from_published(*args.convert).save_pretrained(args.reward)
        print(f"the reward model is in {args.reward}")
        return

    # ---- what is asked for: structure alone, so that impossible requests are refused early
    device = parallel.start()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    labels = cli.parse_labels(args.labels, PAVRM.on_meta(args.reward))      # {label: weight}

    # ---- clips; the text encoder is gone again before the reward model is loaded
    index = args.data
    if args.video:
        entries = list_videos(args.video, args.prompt or [])
        encoded = Path(args.output, "encoded")
        index = encode_clips(entries, args.model, encoded, args.size, args.frames, args.fps)
    clips = Clips(index)
    clips.check()
    pavrm = PAVRM.from_pretrained(args.reward, dtype, device)
    first_label = next(iter(labels))
    pool = pavrm.heads[2 * pavrm.labels.index(first_label)]
    if args.attention:
        check_attention(pool, clips.entries)

    # ---- scores
    indices = list(range(len(clips)))
    logits = score_clips(pavrm, clips, indices, args.timesteps, device, args.seed, args.batch_size)
    # logits: (N, T, labels)
    measures = measure(logits, clips, indices, pavrm, args.timesteps)
    weights = torch.tensor([labels.get(name, 0.0) for name in pavrm.labels])
    rewards = logits.sigmoid().mean(1) @ weights                        # (N,)
    scores = []
    for entry, reward, clip_logits in zip(clips.entries, rewards, logits, strict=True):
        by_label = {name: clip_logits[:, i].sigmoid().tolist() for i, name in enumerate(pavrm.labels)}
        scores.append({"name": entry["source_id"], "prompt": entry["short_caption"], "reward": reward.item(),
                       "rewards": by_label})

    # ---- results
    path = Path(args.output, "scores.json")
    if is_main():
        content = {"reward_model": args.reward, "timesteps": args.timesteps, "scores": scores}
        if measures:
            content["measures"] = measures
        write_json(path, content)
        for row in scores:
            print(f"{row['reward']:.3f}  {row['name']}  {row['prompt']!r}")
        print("\n".join([*table(measures), f"written: {path}"]))
        if args.plot:
            print(f"written: {plot.draw(path)}")
    if args.attention:
        for n, counts in parallel.shard_indices(len(clips)):
            entry = clips.entries[n]
            _, _, height, width = entry["shape"]
            video = read_video(entry["video_path"], entry["fps"], entry["frames"], (8 * width, 8 * height))
            heat = attention_video(pavrm, pool, clips.load(n), video, args.timesteps, args.seed, device)
            if counts:
                write_video(Path(args.output, f"attention_{entry['source_id']}.mp4"), heat, entry["fps"])


if __name__ == "__main__":
    cli.run(main)
