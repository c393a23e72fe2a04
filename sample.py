"""Make videos: text to video, image to video, first and last frame to video.

    python sample.py                                                               # the tiny world
    python sample.py --model Wan2.1-T2V-1.3B --prompt "A cat plays the piano." --size 832x480 --output cat.mp4
    python sample.py --model Wan2.1-I2V-14B-480P --prompt "The bear stands up." --image bear.jpg
    python sample.py --model Wan2.1-T2V-14B --transformer outputs/prfl/model ...   # what training has made of it
    python sample.py --best_of 8 --drop_at 12 --keep 3                             # of eight seeds the one that PAVRM likes best
    python sample.py --prompts prompts.txt --folder clips --count 4                # clips to label with label.py

Noise is drawn, the solver follows the guided velocity from it to a clip's latents, the VAE decodes them. A reward model
can choose between seeds before anything is decoded: it judges finished latents, and unfinished ones after --drop_at steps,
so that only the promising seeds are finished.
Numbers that are not given on the command line are those of `sampling.json` in the model directory, where it has one,
else the published ones of the model.
"""
import argparse
import math
from pathlib import Path
from tempfile import TemporaryFile

import torch
import torch.nn.functional as F

import parallel
from data import Encoder, condition_input, parse_size, read_image, read_list, to_uint8, write_video
from files import InputError, read_json, write_json
from model import WanModel
from reward import PAVRM, check_fit
from score import REWARD_TIMESTEPS, parse_tasks, process_logits
from solver import SOLVERS, guided, timestep, walk

PUBLISHED = {"t2v": dict(steps=50, shift=5.0, guidance=5.0, size=[832, 480], frames=81, fps=16),
             "i2v": dict(steps=40, shift=5.0, guidance=5.0, size=[832, 480], frames=81, fps=16),
             "flf2v": dict(steps=50, shift=16.0, guidance=5.0, size=[1280, 720], frames=81, fps=16)}


def parse_args(argv=None):
    own = "(default: the model's own)"
    parser = argparse.ArgumentParser(description="Text, or text and images, to video.")
    parser.add_argument("--model", default="demo/model", help="official model directory (default: %(default)s)")
    parser.add_argument("--transformer", help="directory of another transformer to use with it, such as a trained one")
    prompts, place = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", help="one prompt a video; the tiny world has one by default")
    prompts.add_argument("--prompts", metavar="FILE", help="or: a text file with one prompt a line")
    parser.add_argument("--negative_prompt", help="what to keep away from (default: Wan's usual one)")
    parser.add_argument("--image", help="first frame, for image to video; decides the aspect ratio")
    parser.add_argument("--last_image", help="last frame, for models of first and last frame")
    parser.add_argument("--solver", default="unipc", choices=SOLVERS, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, help=f"solver steps {own}")
    parser.add_argument("--shift", type=float, help=f"shift of the noise levels; I2V at 480P: 3; T2V-1.3B: 8 to 12 {own}")
    parser.add_argument("--guidance", type=float, help=f"classifier-free guidance; 1 is none; T2V-1.3B: 6 {own}")
    parser.add_argument("--size", type=parse_size, help=f"width x height; with --image only their product counts {own}")
    parser.add_argument("--frames", type=int, help=f"1 + 4n frames {own}")
    parser.add_argument("--fps", type=float, help=f"frames a second of the file {own}")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the next prompt has the next seed or seeds (default: 0)")
    parser.add_argument("--best_of", type=int, metavar="N", help="sample N seeds a prompt, write the one with the best reward")
    parser.add_argument("--reward", default="demo/reward", help="the reward model for --best_of (default: %(default)s)")
    parser.add_argument("--task", nargs="+", help="its label, or a weighted sum: motion_quality=1 blur_quality=0.5 (default: first)")
    parser.add_argument("--drop_at", type=int, metavar="STEP", help="after so many solver steps go on with the best seeds only")
    parser.add_argument("--keep", type=int, metavar="M", help="how many those are (default: half of N, rounded up)")
    place.add_argument("--output", default="outputs/sample.mp4", help="file to write; several are numbered (default: %(default)s)")
    place.add_argument("--folder", help="or: directory for PROMPT_NUMBER-SEED.mp4 and their clips.json; what is there is kept")
    parser.add_argument("--count", type=int, metavar="N", help="with --folder: N videos a prompt (default: 1)")
    return parser.parse_args(argv)


def fill_in(args):
    """Fill in the numbers that were not given; returns the model type."""
    if Path(args.model, "low_noise_model").is_dir():
        raise InputError(f"{args.model} is Wan2.2 A14B, whose two transformers this script does not sample with yet; "
                         f"use a Wan2.1 model")
    model_type = read_json(Path(args.model, "config.json")).get("model_type")
    if model_type == "ti2v":
        raise InputError(f"{args.model} is Wan2.2 TI2V, whose VAE this project does not have yet; use a t2v or i2v model")
    if model_type not in PUBLISHED:
        raise InputError(f"{args.model}/config.json describes no Wan model (model_type {model_type!r}); give an official directory")
    if args.transformer:
        kind = read_json(Path(args.transformer, "config.json")).get("model_type")
        if kind != model_type:
            raise InputError(f"--transformer {args.transformer} is a {kind} model, but {args.model} is a {model_type} one; "
                             f"give two of one kind")
    if not args.folder and Path(args.output).is_dir():  # which would be replaced, with all that it holds
        raise InputError(f"--output {args.output} is a directory; give a file name, such as {args.output}/sample.mp4")
    own = Path(args.model, "sampling.json")
    for name, value in {**PUBLISHED[model_type], **(read_json(own) if own.is_file() else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.prompts:
        try:
            lines = Path(args.prompts).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts {args.prompts} cannot be read ({error}); give a UTF-8 text file") from None
        args.prompt = [line.strip() for line in lines if line.strip()]
    if not args.prompt or not all(prompt.strip() for prompt in args.prompt):
        raise InputError("the prompt is empty; give one with --prompt, or one a line of --prompts")
    for name in ("steps", "fps", "best_of", "count"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise InputError(f"--{name} {getattr(args, name)} makes no video; give a number above 0")
    if args.frames < 1 or args.frames % 4 != 1:
        raise InputError(f"--frames {args.frames} does not fit the VAE; give 1 + 4n, such as 81")
    for name, needed in [("image", model_type != "t2v"), ("last_image", model_type == "flf2v")]:
        if needed != bool(getattr(args, name)):
            raise InputError(f"the {model_type} model {args.model} {'needs' if needed else 'takes no'} --{name}")
    for name, needed in [("count", "folder"), ("task", "best_of"), ("drop_at", "best_of"), ("keep", "drop_at")]:
        if getattr(args, name) is not None and getattr(args, needed) is None:
            raise InputError(f"--{name} does nothing without --{needed}; give both, or leave it out")
    if args.folder and args.best_of:
        raise InputError("--folder keeps every seed's video and --best_of only one; give one of the two")
    if args.drop_at is not None and not 0 < args.drop_at < args.steps:
        raise InputError(f"--drop_at {args.drop_at} does not lie within the {args.steps} solver steps; give 1 to {args.steps - 1}")
    if args.drop_at and args.keep is None:
        args.keep = (args.best_of + 1) // 2
    if args.drop_at and not 1 <= args.keep <= args.best_of:
        raise InputError(f"--keep {args.keep} of {args.best_of} seeds is impossible; give 1 to {args.best_of}")
    return model_type


def jobs(args):
    """What is to be sampled: (prompt number, seeds, path, entry) of each video. Of several seeds the best is kept.

    In a folder one seed makes one video, which has an entry in clips.json; what is there already is passed over.
    Raises InputError where it was made with other settings.
    """
    todo, n, output, there = [], args.best_of or args.count or 1, Path(args.output), {}
    if args.folder:
        names = "model transformer negative_prompt image last_image solver steps shift guidance size frames fps".split()
        settings = {name: list(args.size) if name == "size" else getattr(args, name) for name in names}
        entries, ids = listed(args.folder)
        there = dict(zip(ids, entries))
    for number, prompt in enumerate(args.prompt):
        seeds = range(args.seed + number * n, args.seed + (number + 1) * n)
        if not args.folder:
            todo.append((number, seeds, output.with_stem(f"{output.stem}-{number}") if len(args.prompt) > 1 else output, None))
            continue
        for seed in seeds:
            path, made_with = Path(args.folder, f"{number}-{seed}.mp4"), {"prompt": prompt, **settings}
            other = there.get(path.stem, {}).get("made_with") or made_with
            if other != made_with:
                differing = " and ".join(name for name in made_with if made_with[name] != other.get(name))
                raise InputError(f"{path} was made with other {differing}; choose another --folder or --seed")
            if path.stem not in there or not path.is_file():
                todo.append((number, [seed], path, {
                    "source_id": path.stem, "video_path": path.name, "short_caption": prompt, "long_caption": prompt,
                    "pair_id": str(number), "made_with": made_with}))
    return todo


def listed(folder):
    """A folder's clips.json as it stands, and the source_id of each of its entries."""
    path = Path(folder, "clips.json")
    return (read_json(path), [entry["source_id"] for entry in read_list(path)]) if path.is_file() else ([], [])


def check_writable(directory):
    """Make the directory, and see that a file can be made in it: that should not fail after an hour of sampling."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=directory).close()
    except OSError as error:
        raise InputError(f"{directory} cannot be written to ({error.strerror}); choose another place for the videos") from None


def size_for(image, width, height):
    """(width, height) of the image's aspect ratio and about the area width x height, in multiples of 16."""
    rows, columns = image.shape[1:]
    area = width * height  # in whole numbers: a rounded root of 480 squared may fall short of it, and then loses 16
    return math.isqrt(area * columns // rows) // 16 * 16, math.isqrt(area * rows // columns) // 16 * 16


def best(latents, reward, count, when):
    """Of the latents {seed: x} the `count` with the largest reward(seed, x); all rewards are printed."""
    rewards = {seed: reward(seed, x) for seed, x in latents.items()}
    kept = sorted(rewards, key=rewards.get, reverse=True)[:count]
    for seed, value in rewards.items():
        print(f"  seed {seed}: reward {value:.3f} {when}{', kept' if seed in kept else ''}")
    return {seed: x for seed, x in latents.items() if seed in kept}


@torch.no_grad()
def main(argv=None):
    args = parse_args(argv)
    model_type = fill_in(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    width, height = args.size
    images = [read_image(path) for path in (args.image, args.last_image) if path]          # (3, H, W) in [-1, 1] each
    if images:
        width, height = size_for(images[0], width, height)
    if min(width, height) < 16 or width % 16 or height % 16:
        raise InputError(f"a video of {width}x{height} does not fit the model; give a --size in multiples of 16")
    tasks, todo = {}, jobs(args)
    if args.best_of:  # before anything large is loaded
        pavrm, directory = PAVRM.on_meta(args.reward), args.transformer or args.model
        check_fit(pavrm, WanModel.on_meta(directory), args.reward, directory)
        tasks = parse_tasks(args.task, pavrm)
    if not todo:
        print(f"all videos are in {args.folder} already")
        return
    check_writable(todo[0][2].parent)

    # The condition. The text encoder is large and has nothing more to do afterwards.
    encoder = Encoder(args.model, device)
    negative_prompt = encoder.negative_prompt if args.negative_prompt is None else args.negative_prompt
    *texts, negative = encoder.text([*args.prompt, negative_prompt])                       # (n_i, text_dim) each
    negative = negative.to(device)
    del encoder.text_encoder
    condition = {}
    if images:
        frames = torch.stack([F.interpolate(image[None], (height, width), mode="bicubic")[0] for image in images])
        condition["y"] = condition_input(encoder.image_latents(frames, args.frames)[None], model_type)  # (1, 20, F, h, w)
        if encoder.has_clip:  # it sees the images as they are, squashed to its square
            condition["clip_fea"] = torch.cat([encoder.image_encoder(image[None].to(device)) for image in images])

    model = WanModel.from_pretrained(args.transformer or args.model, dtype, device).eval()
    pavrm = PAVRM.from_pretrained(args.reward, dtype, device) if args.best_of else None
    shape = (1, 16, (args.frames - 1) // 4 + 1, height // 8, width // 8)
    weights, reward_noise = torch.tensor(list(tasks.values()), device=device), parallel.noise(shape, "best_of").to(device)
    for number, seeds, path, entry in todo:
        text = texts[number].to(device)
        latents = {seed: torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device) for seed in seeds}
        solvers = {seed: SOLVERS[args.solver](args.steps, args.shift) for seed in seeds}   # one each: they remember steps

        def velocity(x, t, negative_prompt):
            return model(x, t, [negative if negative_prompt else text], **condition)

        def advance(first, last):
            for seed, x in latents.items():
                latents[seed] = walk(guided(velocity, args.guidance), x, solvers[seed], first, last, progress=f"seed {seed}")

        def process_reward(seed, x):
            logits = pavrm(x, timestep(solvers[seed], args.drop_at, x), [text], **condition, tasks=list(tasks))
            return (logits.sigmoid() @ weights).item()

        def reward(seed, x):
            logits = process_logits(pavrm, x, text, condition, reward_noise, REWARD_TIMESTEPS, list(tasks))
            return (logits.sigmoid() @ weights).mean().item()

        if args.drop_at:
            advance(0, args.drop_at)
            latents = best(latents, process_reward, args.keep, f"after {args.drop_at} of {args.steps} steps")
            dropped, full = args.best_of - args.keep, args.best_of * args.steps
            saved = dropped * (args.steps - args.drop_at)
            print(f"  {dropped} of {args.best_of} seeds dropped: {saved} of {full} solver steps saved, {saved / full:.0%}")
        advance(args.drop_at or 0, args.steps)
        if args.best_of:
            latents = best(latents, reward, 1, "finished")
        (seed, x), = latents.items()
        video = to_uint8(encoder.video_encoder.decode(x)[0].cpu())                           # (T, H, W, 3)
        write_video(path, video, args.fps)
        if entry:  # the list is read again: clips may have been labelled meanwhile
            entries, ids = listed(args.folder)
            if path.stem not in ids:
                write_json(path.with_name("clips.json"), [*entries, entry])
        print(f"{path}: {args.frames} frames of {width}x{height}, seed {seed}, {args.prompt[number]!r}")


if __name__ == "__main__":
    parallel.run(main)
