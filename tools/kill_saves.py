"""Is anything half there when a process is killed while it writes?

    python -m tools.kill_saves    # 50 kills, half a minute

A child process, forked from this one, writes version after version of one kind of output with the functions
that the scripts use, and is killed (SIGKILL) at a random moment. What is then there must be whole, and be the
last version that was written or the one that was being written. Names that begin with a dot and end in .new
or .old are leftovers. The next child starts among them. The last one writes one version undisturbed, and then
they must be gone.
"""
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import cli

import torch
import torch.distributed.checkpoint as dcp

import encode
import files
import label
import parallel
import records
from annotations import read_list
from checkpoint_files import CHECKSUMS, Planner, Reader, checksum
from files import InputError, read_json, read_weights, save_weights, write_json
from video import read_video, write_video

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------------ kinds of output
# write(directory, first) is a generator: it yields a version's number when that is written.
# holds(directory, number) reads all that is there: is it this version?

def write_checkpoints(directory, first):
    """Weights that are all equal to the step, and the state of their optimizer."""
    parallel.start()
    layer = torch.nn.Linear(1000, 300)
    optimizer = torch.optim.AdamW(layer.parameters())
    args = SimpleNamespace(output=directory, keep_checkpoints=2, timeout=10)
    checkpoints = records.Checkpoints(args, layer, optimizer)
    for step in itertools.count(first):
        with torch.no_grad():
            layer.weight.fill_(step)
        checkpoints.save(step)
        checkpoints.finish()
        yield step


def holds_checkpoints(directory, number):
    found = records.checkpoints(directory)
    for step, path in found.items():
        for name, written in read_json(path / CHECKSUMS).items():
            if checksum(path / name) != written:
                return False
        state = {"model": {"weight": torch.empty(300, 1000)}}
        with warnings.catch_warnings(action="ignore"):  # it says that there is one process
            dcp.load(state, storage_reader=Reader(path), planner=Planner(), no_dist=True)
        if not state["model"]["weight"].eq(step).all():
            return False
    return max(found) == number


def write_exports(directory, first):
    """A model in the official layout, cut into several files."""
    files.SHARD_BYTES = 10**6
    for number in itertools.count(first):
        state = {f"weight{i}": torch.full((200_000,), float(number)) for i in range(4)}
        save_weights(directory / "model", state, {"number": number})
        yield number


def holds_exports(directory, number):
    model = directory / "model"
    if not model.exists():
        model = directory / ".model.old"  # a directory is replaced by two renames; this is between them
    tensors = [read() for _, _, read in read_weights(model)]
    same = [tensor.eq(number).all() for tensor in tensors]
    return len(same) == 4 and all(same) and read_json(model / "config.json")["number"] == number


class ConstantEncoder(encode.Encoder):
    """Tensors full of the caption, which is a number, in place of models that take seconds."""

    def text(self, prompts):
        return [torch.full((2, 8), float(prompt or 0)).bfloat16() for prompt in prompts]

    def prompts(self):
        return dict(zip(("empty", "negative"), self.text(["", ""]), strict=True))

    def encode(self, videos, captions):
        return [{"latents": torch.full((16, 2, 400, 400), float(short))} for short, _ in captions]


def write_indices(directory, first):
    """Encoded clips and their index.jsonl. A new caption has each clip encoded again."""
    encode.Encoder = ConstantEncoder
    for i in range(3):
        write_video(directory / f"{i}.mp4", torch.full((5, 32, 32, 3), 40 * i, dtype=torch.uint8))
    for number in itertools.count(first):
        listed = [{"video": f"{i}.mp4", "prompt": str(number)} for i in range(3)]
        write_json(directory / "clips.json", listed)
        encode.encode_clips(read_list(directory / "clips.json"), ROOT / "demo/model", directory / "out",
                            size=(32, 32), frames=5, fps=16, device="cpu")
        yield number


def holds_indices(directory, number):
    if len(read_list(directory / "clips.json")) != 3:
        return False
    for _, _, read in read_weights(directory / "out/prompts.safetensors"):
        if not read().eq(0).all():
            return False
    lines = (directory / "out/index.jsonl").read_text().splitlines()
    lines = [files.parse_json(line, "index.jsonl") for line in lines]
    for line in lines:  # clips are written before the index, so each may be of the next version already
        for _, _, read in read_weights(directory / "out" / line["file"]):
            if read().unique().tolist() not in ([number], [number + 1]):
                return False
    return [line["short_caption"] for line in lines] == 3 * [str(number)]


def write_videos(directory, first):
    """Noise of one mean brightness; more frames than the encoder looks ahead, so that it writes for long."""
    noise = torch.randint(-16, 17, (97, 96, 96, 3))
    for number in itertools.count(first):
        write_video(directory / "clip.mp4", (noise + 20 + 37 * number % 200).clamp(0, 255).to(torch.uint8))
        yield number


def holds_videos(directory, number):
    means = read_video(directory / "clip.mp4").float().mean((1, 2, 3))
    return len(means) == 97 and (means - (20 + 37 * number % 200)).abs().max() < 5


def labels_after(number, clips=200):
    """The labels after so many keys: clip after clip is good, then one after the other poor, and so on."""
    rounds, rest = divmod(number, clips)
    counts = [rounds + (i < rest) for i in range(clips)]
    return [count % 2 if count else None for count in counts]


def write_labels(directory, first):
    """A list into which the label page writes, one key after the other."""
    path = directory / "clips.json"
    if not path.exists():
        (directory / "clip.mp4").touch()
        clips = [{"video": "clip.mp4", "source_id": str(i), "prompt": "a red disc"} for i in range(200)]
        write_json(path, clips)
    with label.Server(path, "blur_quality", port=0) as server:
        for number in itertools.count(first):
            clip = (number - 1) % 200
            server.set_label(server.order.index(clip), labels_after(number)[clip])
            yield number


def holds_labels(directory, number):
    labels = [entry["labels"]["blur_quality"] for entry in read_list(directory / "clips.json")]
    return labels == labels_after(number)


KINDS = {"checkpoints": (write_checkpoints, holds_checkpoints), "exports": (write_exports, holds_exports),
         "indices": (write_indices, holds_indices), "videos": (write_videos, holds_videos),
         "label files": (write_labels, holds_labels)}


# ------------------------------------------------------------------------------ kills

def fork(function, *inputs):
    """Call a function in a child process and return its id. The exit code says whether it returned True."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(1)
        os._exit(0 if function(*inputs) else 2)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def succeeds(function, *inputs):
    """Whether a function returns True, in a child: decoding leaves threads, and no fork survives those."""
    return os.waitpid(fork(function, *inputs), 0)[1] == 0


def write_on(name, directory, first, report):
    """Write version after version, and report each number when it is written."""
    for number in KINDS[name][0](directory, first):
        os.write(report, f"{number}\n".encode())


def write_once(name, directory, number):
    return next(KINDS[name][0](directory, number)) == number


def kill(name, directory, first, moment, during):
    """Let a child write once, and kill it `moment` seconds later, or (during) in the write that comes then.

    Returns the version that is there after it.
    """
    reader, writer = os.pipe()
    process = fork(write_on, name, directory, first, writer)
    os.close(writer)
    with open(reader) as reports:
        reported = reports.readline()
        time.sleep(moment)
        latest = time.time() + 2
        while during and not leftovers(directory) and time.time() < latest:
            pass
        os.kill(process, signal.SIGKILL)
        reported += reports.read()
    if os.waitpid(process, 0)[1] != signal.SIGKILL:
        raise InputError(f"writing {name} failed; the error is above")
    last = int(reported.split()[-1])
    for number in (last, last + 1):
        if succeeds(KINDS[name][1], directory, number):
            return number
    raise InputError(f"{name}: what is in {directory} is neither version {last} nor {last + 1}")


def leftovers(directory):
    """Files and directories under a temporary name. A child may be at work on them."""
    found = []
    for folder, folders, others in os.walk(directory):  # passes over what vanishes meanwhile; rglob fails
        names = [name for name in folders + others if name[0] == "." and name.endswith((".new", ".old"))]
        found += [str(Path(folder, name).relative_to(directory)) for name in names]
    return sorted(found)


def kill_saves(directory, kills, seed=0):
    """Spread the kills over the kinds. Prints what came of them; raises InputError if anything is lost."""
    moments = random.Random(seed)
    for place, name in enumerate(KINDS):
        own = Path(directory, name.replace(" ", "_"))
        own.mkdir()
        share = len(range(place, kills, len(KINDS)))
        number, torn, left = 0, 0, set()
        for i in range(share):
            number = kill(name, own, number + 1, moments.uniform(0, 0.2), during=i % 2)
            found = leftovers(own)
            torn += bool(found)
            left.update(found)
        if not succeeds(write_once, name, own, number + 1) or leftovers(own):
            raise InputError(f"{name}: the next write failed, or left {', '.join(leftovers(own))}")
        print(f"{name}: {share} kills, {torn} of them in the middle of a write, and nothing half there; "
              f"removed by the next write: {', '.join(sorted(left)[:5]) or 'nothing'}", flush=True)


def main(argv=None):
    parser = cli.Parser("Kill processes while they write, and look for what is half there.")
    parser.prog = "python -m tools.kill_saves"
    parser.add_argument("--kills", type=cli.whole(1, 100_000), default=50, help="number of kills")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="seed of the moments at which they come")
    args = parser.parse_args(argv)
    directory = tempfile.mkdtemp(prefix="kill_saves-")
    print(f"in {directory}", flush=True)
    kill_saves(directory, args.kills, args.seed)
    shutil.rmtree(directory)


if __name__ == "__main__":
    cli.run(main)
