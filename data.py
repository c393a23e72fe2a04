"""The data stage: check a list of annotated videos, and encode each of them once for training.

    python data.py --check clips.json --model Wan2.1-I2V-14B-480P     # every fault of a list, and its balance
    python data.py --list clips.json --model Wan2.1-I2V-14B-480P --output data
    torchrun --nproc_per_node=8 data.py --list ... --model ... --output ...            # eight share the work

PAVRM learns from generated clips with labels, the SFT phase of PRFL from real clips. Both begin as a list:

    [{"video_path": "a.mp4", "short_caption": "a ball", "long_caption": "a red ...", "physics_quality": 1}]

Training sees neither videos nor the VAE nor the text encoder. Every clip is encoded once, to

    OUTPUT/index.jsonl            one line per clip, in the list's order: captions, labels, shape, settings
    OUTPUT/prompts.safetensors    `empty` and `negative`: text states of the prompts that belong to no clip
    OUTPUT/clips/ID.safetensors   latents (16, F, H, W) float32; text_short, text_long (n, text_dim) bfloat16;
                                  for image-to-video condition, like latents, and clip (tokens, 1280) bfloat16

The header of a clip's file says what it was made from. So a run that was stopped continues where it was, and
a clip with a new caption or video is encoded again. Labels are only in the index: new ones re-encode nothing.
"""
import os
from itertools import chain
from pathlib import Path

import cli

import torch
import torch.distributed as dist

import parallel
from annotations import balance, read_list, where
from clips import LABELS, label_of
from encode import Encoder, choose_settings, encode_clips, look_through
from files import InputError, read_text, write_safetensors


def parse_args(argv=None):
    parser = cli.Parser("Check a list of annotated clips, or encode the clips for training.")
    add = parser.add_argument_group("what").add_argument
    add("--list", default="demo/clips/clips.json",
        help="clips to encode: a .json, .jsonl or .csv list; for a published .list, whose clips are already "
             "encoded, only prompts.safetensors is written, next to it")
    add("--check", metavar="LIST",
        help="only report every fault because of which this list would be refused with --model, --output, "
             "--size, --frames and --fps, and count its labels (default: encode --list)")
    add("--label", choices=LABELS,
        help="with --check: report clips without an annotation of this label (default: it may be absent)")

    add = parser.add_argument_group("where").add_argument
    add("--model", default="demo/model",
        help="official directory of the model to be trained, whose VAE, text and image encoders are used")
    add("--output", default="outputs/data", help="directory of the encoded clips and their index")

    add = parser.add_argument_group("how encoded").add_argument
    before = "(default: that of the clips in --output, else of the model's sampling.json, else"
    add("--size", type=cli.parse_size,
        help=f"width x height in pixels, multiples of 16, turned for upright clips {before} 832x480)")
    add("--frames", type=cli.FRAMES,
        help=f"frames per clip, 1 + 4n {before} 81)")
    add("--fps", type=cli.FPS,
        help=f"frames per second {before} 16)")
    add("--batch_size", type=cli.whole(1, 10_000), default=1,
        help="clips that a process encodes at once; more is faster if clips are small")
    return parser.parse_args(argv)


def check(args):
    """Print the faults of a list, how many clips have which label, and how many encoding would refuse."""
    entries = read_list(args.check)
    output = Path(args.output)
    settings = choose_settings(Encoder(args.model, "cpu"), output, args.size, args.frames, args.fps)
    _, _, found, warnings = look_through(entries, output, settings)
    refused = sum(map(bool, found))
    for entry, sentences in zip(entries, found, strict=True):
        if args.label and label_of(entry["labels"], args.label) is None:
            sentences.append(f"{where(entry)}{args.label} is not annotated")
    found = list(chain(*found))

    for warning in warnings:
        print(f"warning: {warning}")
    print("\n".join([*found, f"{len(entries)} clips, {len(found)} faults", balance(entries)]))
    width, height = settings["size"]
    print(f"{refused or 'none'} of {len(entries)} clips would be refused "
          f"({settings['frames']} frames at {settings['fps']:g} fps, {width}x{height})"
          f"{'; until they are fixed or removed, nothing is encoded' if refused else ''}")
    return 1 if found else 0


def main(argv=None):
    args = parse_args(argv)
    if args.check:
        return check(args)
    if args.label:
        raise InputError("--label does nothing without --check; give both, or leave it out")
    if args.list.endswith(".list"):
        read_text(args.list)  # raises an error if it does not exist
        encoder = Encoder(args.model, "cuda" if torch.cuda.is_available() else "cpu")
        write_safetensors(Path(args.list).parent / "prompts.safetensors", encoder.prompts())
        return 0
    device = parallel.start() if "RANK" in os.environ else None  # torchrun sets RANK
    entries = read_list(args.list)
    index = encode_clips(entries, args.model, args.output, args.size, args.frames, args.fps, device,
                         args.batch_size)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{len(entries)} clips are encoded: {index}")
    return 0


if __name__ == "__main__":
    cli.run(main)
