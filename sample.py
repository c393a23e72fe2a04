"""Make videos: text to video, image to video, first and last frame to video.

    python sample.py                                                          # the tiny world
    python sample.py --model Wan2.1-T2V-1.3B --prompt "A cat plays the piano." --save_file cat.mp4
    python sample.py --model Wan2.1-I2V-14B-480P --prompt "The bear stands up." --image bear.jpg
    python sample.py --model Wan2.1-T2V-14B --transformer outputs/prfl/model  # a trained transformer
    python sample.py --best_of 8 --drop_at 12 --keep 3                        # the seed that PAVRM likes best
    python sample.py --prompts prompts.txt --output clips --count 4           # clips to label with label.py

The solver follows the guided velocity from noise to the latents of a clip, and the VAE decodes them. A reward
model can choose between seeds before anything is decoded. It judges finished latents. After --drop_at steps
it judges unfinished ones too, and only the promising seeds are finished.

Settings that are not given come from `sampling.json` in the model directory. If it has none, they are the
published settings of the model.
"""
import math
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import cli

import torch
import torch.nn.functional as F

import gpu
import parallel
from annotations import read_list
from clips import condition_input
from encode import Encoder
from evaluation import process_logits
from files import InputError, atomic_write, check_form, is_finite, read_json, write_json
from forms import KIND, SAMPLING
from lora_files import merging
from model import WanModel
from reward import PAVRM, REWARD_TIMESTEPS, check_fit
from solver import SOLVERS, guided, timestep, walk
from video import read_image, to_uint8, write_video

PUBLISHED = {"t2v": dict(solver_steps=50, shift=5.0, guidance=5.0, size=[832, 480], frames=81, fps=16),
             "i2v": dict(solver_steps=40, shift=5.0, guidance=5.0, size=[832, 480], frames=81, fps=16),
             "flf2v": dict(solver_steps=50, shift=16.0, guidance=5.0, size=[1280, 720], frames=81, fps=16)}


# ------------------------------------------------------------------------------ what is asked for

def parse_args(argv=None):
    own = "(default: the model's own)"
    parser = cli.Parser("Make videos from text, or from text and images.")
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="demo/model", help="official model directory")
    group.add_argument("--transformer", metavar="DIR",
                       help="directory of another transformer of the same kind, such as a trained one "
                            "(default: the transformer in --model)")
    cli.add_merged(group)

    group = parser.add_argument_group("prompts and images")
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+",
                         help="prompts, one video each (default: that of the model's sampling.json, if any)")
    prompts.add_argument("--prompts", metavar="FILE",
                         help="text file with one prompt per line, in place of --prompt")
    group.add_argument("--negative_prompt", help="what the video should not show (default: Wan's usual one)")
    group.add_argument("--image", help="first frame, for image to video; it decides the aspect ratio")
    group.add_argument("--last_image", help="last frame, for first-and-last-frame models")

    group = parser.add_argument_group("sampling")
    group.add_argument("--solver", default="unipc", choices=SOLVERS, help="method that follows the velocity")
    group.add_argument("--solver_steps", type=cli.SOLVER_STEPS,
                       help=f"steps of the solver from noise to a clip {own}")
    group.add_argument("--shift", type=cli.SHIFT,
                       help="how far noise levels are shifted towards noise; I2V at 480P: 3; "
                            f"T2V-1.3B: 8 to 12 {own}")
    group.add_argument("--guidance", type=cli.GUIDANCE,
                       help=f"scale of classifier-free guidance; 1 is none; T2V-1.3B: 6 {own}")
    group.add_argument("--size", type=cli.parse_size,
                       help=f"width x height of the video; with --image only their product counts {own}")
    group.add_argument("--frames", type=cli.FRAMES, help=f"frames of the video, 1 + 4n {own}")
    group.add_argument("--fps", type=cli.FPS, help=f"frames per second of the video {own}")
    group.add_argument("--seed", type=cli.SEED, default=0,
                       help="seed of the noise; each further video has the next seed")

    group = parser.add_argument_group("choice between seeds")
    group.add_argument("--best_of", type=cli.whole(1, 1000), metavar="N",
                       help="sample N seeds per prompt and write the one with the best reward (default: one "
                            "seed, without a reward model)")
    group.add_argument("--reward", default="demo/reward", help="directory of the reward model that chooses")
    group.add_argument("--labels", nargs="+",
                       help="the label that makes the reward, or a weighted sum, such as motion_quality=0.7 "
                            "text_alignment=0.3 (default: the first label of the reward model)")
    group.add_argument("--drop_at", type=cli.whole(1, 1000), metavar="STEP",
                       help="solver steps after which only the best seeds go on (default: all are finished)")
    group.add_argument("--keep", type=cli.whole(1, 1000), metavar="M",
                       help="number of seeds that go on after --drop_at (default: half of N, rounded up)")

    group = parser.add_argument_group("results")
    place = group.add_mutually_exclusive_group()
    place.add_argument("--save_file", metavar="FILE", default="outputs/sample.mp4",
                       help="file to write; with several prompts the files are numbered")
    place.add_argument("--output", metavar="DIR",
                       help="directory for many videos, in place of --save_file: PROMPT_NUMBER-SEED.mp4 and "
                            "their list, clips.json; existing videos are kept")
    group.add_argument("--count", type=cli.whole(1, 100_000), metavar="N",
                       help="videos per prompt, with --output (default: 1)")
    return parser.parse_args(argv)


def model_type_of(args):
    """The type of the model: t2v, i2v or flf2v. Raises InputError if this script cannot sample with it."""
    if Path(args.model, "low_noise_model").is_dir():
        raise InputError(f"{args.model} is Wan2.2 A14B, whose two transformers this script cannot use yet; "
                         f"use a Wan2.1 model")
    model_type = read_json(Path(args.model, "config.json"), KIND)["model_type"]
    if model_type == "ti2v":
        raise InputError(f"{args.model} is Wan2.2 TI2V, whose VAE this project does not have yet; "
                         f"use a t2v or i2v model")
    if model_type not in PUBLISHED:
        raise InputError(f"{args.model}/config.json does not describe a Wan model (model_type {model_type!r})"
                         f"; give an official directory")
    if args.transformer:
        kind = read_json(Path(args.transformer, "config.json"), KIND)["model_type"]
        if kind != model_type:
            raise InputError(f"--transformer {args.transformer} is a {kind} model, but {args.model} is a "
                             f"{model_type} model; give two of one kind")
    return model_type


def fill_in(args, model_type):
    """Fill in the settings that were not given: from the model's sampling.json, else the published ones."""
    if args.prompts:
        args.prompt = read_prompts(args.prompts)
    settings = dict(PUBLISHED[model_type])
    own = Path(args.model, "sampling.json")
    if own.is_file():
        settings.update(read_json(own, SAMPLING))
    for name, value in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.drop_at and args.best_of and args.keep is None:
        args.keep = (args.best_of + 1) // 2


def read_prompts(path):
    """The lines of a text file that are not blank."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--prompts {path:.100} cannot be read ({reason}); give a UTF-8 text file") from None
    return [line.strip() for line in lines if line.strip()]


def check(args, model_type):
    """Raise InputError for settings that are impossible, or that do not belong together."""
    if not args.output and Path(args.save_file).is_dir():
        raise InputError(f"--save_file {args.save_file} is a directory; "
                         f"give a file name, such as {args.save_file}/sample.mp4")
    if not args.prompt or not all(prompt.strip() for prompt in args.prompt):
        raise InputError("the prompt is empty; give one with --prompt, or one per line of --prompts")
    if any("\0" in prompt for prompt in args.prompt):
        raise InputError("a prompt holds a NUL character; take it out of --prompts")

    for name, needed in [("image", model_type != "t2v"), ("last_image", model_type == "flf2v")]:
        given = bool(getattr(args, name))
        if needed and not given:
            raise InputError(f"the {model_type} model {args.model} needs --{name}")
        if given and not needed:
            raise InputError(f"the {model_type} model {args.model} does not take --{name}")
    needs = {"count": "output", "labels": "best_of", "drop_at": "best_of", "keep": "drop_at"}
    for name, needed in needs.items():
        if getattr(args, name) is not None and getattr(args, needed) is None:
            raise InputError(f"--{name} does nothing without --{needed}; give both, or leave it out")
    if args.output and args.best_of:
        raise InputError("--output keeps the video of every seed and --best_of only one; give one of the two")

    steps = len(SOLVERS[args.solver](args.solver_steps, args.shift).timesteps)
    if args.drop_at and args.drop_at >= steps:
        raise InputError(f"--drop_at {args.drop_at} is not within the {steps} solver steps; "
                         f"give 1 to {steps - 1}")
    if args.drop_at and args.keep > args.best_of:
        raise InputError(f"--keep {args.keep} of {args.best_of} seeds is impossible; "
                         f"give 1 to {args.best_of}")


def size_for(image, width, height):
    """(width, height) of the image's aspect ratio and about the area width x height, in multiples of 16."""
    rows, columns = image.shape[1:]
    area = width * height  # in integers: a rounded root of 480 squared may fall short of 480 and lose 16
    return math.isqrt(area * columns // rows) // 16 * 16, math.isqrt(area * rows // columns) // 16 * 16


# ------------------------------------------------------------------------------ what is written

class Job(NamedTuple):
    """One video to make."""
    number: int    # of its prompt
    seeds: range   # of several, the one with the best reward is written
    path: Path
    entry: dict    # what clips.json says about it; None for --save_file


def jobs_of(args):
    """The videos to make. With --output, those that exist are left out.

    Raises InputError if one of those was made with other settings.
    """
    if args.output:
        return jobs_in(args)
    n = args.best_of or 1
    path = Path(args.save_file)
    jobs = []
    for number in range(len(args.prompt)):
        first = args.seed + number * n
        name = f"{path.stem}-{number}" if len(args.prompt) > 1 else path.stem
        jobs.append(Job(number, range(first, first + n), path.with_stem(name), None))
    return jobs


def jobs_in(args):
    """`jobs_of` a directory: one video per prompt and seed, each with an entry in clips.json."""
    names = ("model", "transformer", "lora", "negative_prompt", "image", "last_image", "solver",
             "solver_steps", "shift", "guidance", "size", "frames", "fps")
    settings = {name: getattr(args, name) for name in names}
    settings["size"] = list(args.size)  # as JSON returns it
    entries, ids = listed(args.output)
    existing = dict(zip(ids, entries, strict=True))
    n = args.count or 1
    jobs = []
    for i in range(len(args.prompt) * n):
        number = i // n
        seed = args.seed + i
        prompt = args.prompt[number]
        path = Path(args.output, f"{number}-{seed}.mp4")
        made_with = {"prompt": prompt, **settings}
        if path.stem in existing:
            before = existing[path.stem].get("made_with") or made_with
            check_form(before, dict, f"{args.output}/clips.json: made_with of {path.stem}")
            before = {"lora": [], **before}  # older entries do not have it
            if before != made_with:
                differing = [name for name in made_with if made_with[name] != before.get(name)]
                raise InputError(f"{path} was made with other {' and '.join(differing)}; "
                                 f"choose another --output or --seed")
            if path.is_file():
                continue
        elif path.exists():
            raise InputError(f"{path} is there already, but not in clips.json; "
                             f"move it away, or choose another --output or --seed")
        entry = {"source_id": path.stem, "video_path": path.name, "short_caption": prompt,
                 "long_caption": prompt, "pair_id": str(number), "made_with": made_with}
        jobs.append(Job(number, range(seed, seed + 1), path, entry))
    return jobs


def listed(directory):
    """(entries, their source_ids) of the directory's clips.json as it is now; both are empty without one."""
    path = Path(directory, "clips.json")
    if not path.is_file():
        return [], []
    return read_json(path), [entry["source_id"] for entry in read_list(path)]


def check_writable(directory):
    """Make the directory and try to write to it: this should not fail after an hour of sampling."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=directory).close()
    except OSError as error:
        raise InputError(f"{directory} cannot be written to ({error.strerror}); "
                         f"choose another place for the videos") from None


def check_sample(values, seed, prompt):
    """Raise InputError unless all values (latents, rewards or pixels) are finite."""
    if not is_finite(values):
        raise InputError(f"seed {seed} of {prompt!r} became NaN or infinite, and is not written; "
                         f"try other settings, or look at the weights of the model")


# ------------------------------------------------------------------------------ the choice between seeds

def mean_reward(logits, weights):
    """The reward, a number, of logits (T, labels): weighted over the labels, the mean over T timesteps."""
    return (logits.sigmoid() @ weights).mean().item()


def best(rewards, count, when):
    """The `count` seeds with the largest rewards, of {seed: reward}; all rewards are printed."""
    kept = sorted(rewards, key=rewards.get, reverse=True)[:count]
    for seed, reward in rewards.items():
        print(f"  seed {seed}: reward {reward:.3f} {when}{', kept' if seed in kept else ''}")
    return kept


# ------------------------------------------------------------------------------ the command

def move(models, device):
    """Move those models that are there."""
    for model in models:
        if model is not None:
            model.to(device)


def guided_velocity(model, text, negative, condition, guidance):
    """velocity(x, t) of the model for one prompt."""
    def velocity(x, t, negative_prompt):
        return model(x, t, [negative if negative_prompt else text], **condition)
    return guided(velocity, guidance)


@torch.no_grad()
def main(argv=None):
    # ---- what is asked for; whatever is impossible is refused before anything large is loaded
    args = parse_args(argv)
    model_type = model_type_of(args)
    fill_in(args, model_type)
    check(args, model_type)
    images = [read_image(path) for path in (args.image, args.last_image) if path]  # (3, H, W) in [-1, 1] each
    width, height = size_for(images[0], *args.size) if images else args.size
    if min(width, height) < 16 or width % 16 or height % 16:
        raise InputError(f"a video of {width}x{height} does not fit the model; "
                         f"give a --size in multiples of 16")
    jobs = jobs_of(args)
    transformer = args.transformer or args.model
    WanModel.on_meta(transformer)
    merge = merging(args.lora, transformer)
    if args.best_of:
        pavrm = PAVRM.on_meta(args.reward)
        check_fit(pavrm, WanModel.on_meta(transformer), args.reward, transformer)
        labels = cli.parse_labels(args.labels, pavrm)  # {label: weight}
    if not jobs:
        print(f"all videos are in {args.output} already")
        return
    check_writable(jobs[0].path.parent)
    device = gpu.start()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    # ---- condition: the prompts and images; their encoders are large and leave memory again
    encoder = Encoder(args.model, device)
    negative_prompt = encoder.negative_prompt if args.negative_prompt is None else args.negative_prompt
    *texts, negative = encoder.text([*args.prompt, negative_prompt])    # (n_i, text_dim) each
    negative = negative.to(device)
    del encoder.text_encoder
    condition = {}
    if images:
        frames = [F.interpolate(image[None], (height, width), mode="bicubic")[0] for image in images]
        given = encoder.image_latents(torch.stack(frames), args.frames)[None]
        condition["y"] = condition_input(given, model_type)             # (1, 20, F, h, w)
        if encoder.has_clip:  # it sees the images as they are, squashed to its square
            seen = [encoder.image_encoder(image[None].to(device)) for image in images]
            condition["clip_fea"] = torch.cat(seen)                     # (1 or 2, 257, 1280)
            del encoder.image_encoder

    # ---- models
    model = WanModel.from_pretrained(transformer, dtype, device, merge).eval()
    shape = (1, 16, (args.frames - 1) // 4 + 1, height // 8, width // 8)
    pavrm = None
    if args.best_of:
        pavrm = PAVRM.from_pretrained(args.reward, dtype, device)
        weights = torch.tensor(list(labels.values()), device=device)
        reward_noise = parallel.noise(shape, "best_of").to(device)      # the same for all seeds and prompts

    for job in jobs:
        # ---- the noise of each seed, and a solver for each: solvers remember earlier steps
        move([model, pavrm], device)  # from where they were during the last video's decoding
        text, prompt = texts[job.number].to(device), args.prompt[job.number]
        velocity = guided_velocity(model, text, negative, condition, args.guidance)
        latents, solvers = {}, {}
        for seed in job.seeds:
            generator = torch.Generator(device).manual_seed(seed)
            latents[seed] = torch.randn(shape, generator=generator, device=device)
            solvers[seed] = SOLVERS[args.solver](args.solver_steps, args.shift)

        # ---- the first steps; the reward model judges latents that are still noisy, and drops the worst
        if args.drop_at:
            rewards = {}
            for seed, x in latents.items():
                x = walk(velocity, x, solvers[seed], 0, args.drop_at, progress=f"seed {seed}")
                t = timestep(solvers[seed], args.drop_at, x)
                logits = pavrm(x, t, [text], **condition, labels=list(labels))  # (1, labels)
                check_sample(logits, seed, prompt)
                latents[seed], rewards[seed] = x, mean_reward(logits, weights)
            steps = len(solvers[seed].timesteps)  # not always args.solver_steps
            kept = best(rewards, args.keep, f"after {args.drop_at} of {steps} steps")
            latents = {seed: x for seed, x in latents.items() if seed in kept}
            dropped = args.best_of - args.keep
            saved = dropped * (steps - args.drop_at)
            full = args.best_of * steps
            print(f"  {dropped} of {args.best_of} seeds dropped: {saved} of {full} solver steps saved, "
                  f"{saved / full:.0%}")

        # ---- the remaining steps; of several seeds the best is written
        first = args.drop_at or 0
        for seed, x in latents.items():
            latents[seed] = walk(velocity, x, solvers[seed], first, progress=f"seed {seed}")
            check_sample(latents[seed], seed, prompt)
        if args.best_of:
            rewards = {}
            for seed, x in latents.items():
                logits = process_logits(pavrm, x, text, condition, reward_noise, REWARD_TIMESTEPS,
                                        list(labels))                   # (T, labels)
                check_sample(logits, seed, prompt)
                rewards[seed] = mean_reward(logits, weights)
            kept = best(rewards, 1, "finished")
            latents = {kept[0]: latents[kept[0]]}
        (seed, x), = latents.items()

        # ---- pixels; the VAE gets the memory of the models, which wait in CPU memory for the next video
        if job is jobs[-1]:
            model = pavrm = velocity = None
        move([model, pavrm], "cpu")
        pixels = encoder.video_encoder.decode(x)[0]                     # (3, T, H, W)
        check_sample(pixels, seed, prompt)
        with atomic_write(job.path) as beside:
            write_video(beside, to_uint8(pixels.cpu()), args.fps)
            if job.entry:  # listed before it is there, so that a run that was cut off knows it as its own
                entries, ids = listed(args.output)  # again: clips may have been labelled in the meantime
                if job.path.stem not in ids:
                    write_json(job.path.with_name("clips.json"), [*entries, job.entry])
        print(f"{job.path}: {args.frames} frames of {width}x{height}, seed {seed}, {prompt!r}")


if __name__ == "__main__":
    cli.run(main)
