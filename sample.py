"""Make videos: text to video, image to video, first and last frame to video.

    python sample.py                                                               # the tiny world
    python sample.py --model Wan2.1-T2V-1.3B --prompt "A cat plays the piano." --size 832x480 --output cat.mp4
    python sample.py --model Wan2.1-I2V-14B-480P --prompt "The bear stands up." --image bear.jpg
    python sample.py --model Wan2.1-T2V-14B --transformer outputs/prfl/model ...   # what training has made of it

Noise is drawn, the solver follows the guided velocity from it to a clip's latents, the VAE decodes them.
Numbers that are not given on the command line are those of `sampling.json` in the model directory, where it has one,
else the published ones of the model.
"""
import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import parallel
from data import Encoder, condition_input, parse_size, read_image, to_uint8, write_video
from files import InputError, read_json
from model import WanModel
from solver import SOLVERS, guided, walk

PUBLISHED = {"t2v": dict(steps=50, shift=5.0, guidance=5.0, size=[832, 480], frames=81, fps=16),
             "i2v": dict(steps=40, shift=5.0, guidance=5.0, size=[832, 480], frames=81, fps=16),
             "flf2v": dict(steps=50, shift=16.0, guidance=5.0, size=[1280, 720], frames=81, fps=16)}


def parse_args(argv=None):
    own = "(default: the model's own)"
    parser = argparse.ArgumentParser(description="Text, or text and images, to video.")
    parser.add_argument("--model", default="demo/model", help="official model directory (default: %(default)s)")
    parser.add_argument("--transformer", help="directory of another transformer to use with it, such as a trained one")
    parser.add_argument("--prompt", nargs="+", help="one prompt a video; the tiny world has one by default")
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
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the second prompt has the next seed, and so on (default: 0)")
    parser.add_argument("--output", default="outputs/sample.mp4", help="file to write; several prompts are numbered (default: %(default)s)")
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
    if Path(args.output).is_dir():  # which would be replaced, with all that it holds
        raise InputError(f"--output {args.output} is a directory; give a file name, such as {args.output}/sample.mp4")
    own = Path(args.model, "sampling.json")
    for name, value in {**PUBLISHED[model_type], **(read_json(own) if own.is_file() else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not args.prompt or not all(prompt.strip() for prompt in args.prompt):
        raise InputError("the prompt is empty; give one with --prompt")
    for name in ("steps", "fps"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name} {getattr(args, name)} makes no video; give a number above 0")
    if args.frames < 1 or args.frames % 4 != 1:
        raise InputError(f"--frames {args.frames} does not fit the VAE; give 1 + 4n, such as 81")
    for name, needed in [("image", model_type != "t2v"), ("last_image", model_type == "flf2v")]:
        if needed != bool(getattr(args, name)):
            raise InputError(f"the {model_type} model {args.model} {'needs' if needed else 'takes no'} --{name}")
    return model_type


def size_for(image, width, height):
    """(width, height) of the image's aspect ratio and about the area width x height, in multiples of 16."""
    rows, columns = image.shape[1:]
    area = width * height  # in whole numbers: a rounded root of 480 squared may fall short of it, and then loses 16
    return math.isqrt(area * columns // rows) // 16 * 16, math.isqrt(area * rows // columns) // 16 * 16


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

    # The condition. The text encoder is large and has nothing more to do afterwards.
    encoder = Encoder(args.model, device)
    negative_prompt = encoder.negative_prompt if args.negative_prompt is None else args.negative_prompt
    *texts, negative = (states.to(device) for states in encoder.text([*args.prompt, negative_prompt]))  # (n_i, text_dim)
    del encoder.text_encoder
    condition = {}
    if images:
        frames = torch.stack([F.interpolate(image[None], (height, width), mode="bicubic")[0] for image in images])
        condition["y"] = condition_input(encoder.image_latents(frames, args.frames)[None], model_type)  # (1, 20, F, h, w)
        if encoder.has_clip:  # it sees the images as they are, squashed to its square
            condition["clip_fea"] = torch.cat([encoder.image_encoder(image[None].to(device)) for image in images])

    model = WanModel.from_pretrained(args.transformer or args.model, dtype, device).eval()
    for number, text in enumerate(texts):
        generator = torch.Generator(device).manual_seed(args.seed + number)
        shape = (1, 16, (args.frames - 1) // 4 + 1, height // 8, width // 8)
        noise = torch.randn(shape, generator=generator, device=device)

        def velocity(x, t, negative_prompt):
            return model(x, t, [negative if negative_prompt else text], **condition)

        latents = walk(guided(velocity, args.guidance), noise, SOLVERS[args.solver](args.steps, args.shift), progress="sampling")
        video = to_uint8(encoder.video_encoder.decode(latents)[0].cpu())                   # (T, H, W, 3)
        path = Path(args.output)
        if len(texts) > 1:
            path = path.with_stem(f"{path.stem}-{number}")
        write_video(path, video, args.fps)
        print(f"{path}: {args.frames} frames of {width}x{height}, seed {args.seed + number}, {args.prompt[number]!r}")


if __name__ == "__main__":
    parallel.run(main)
