"""Clips: decode and write video, read and check annotations, encode once, load in a resumable order.

    python data.py --check clips.json                                 # every fault of a list, and its balance
    python data.py --list clips.json --model Wan2.1-I2V-14B-480P --output data
    torchrun --nproc_per_node=8 data.py --list ... --model ... --output ...            # eight share the work

Training sees neither videos nor the VAE nor the text encoder: every clip is encoded once, to

    OUTPUT/index.jsonl            one line a clip, in the list's order: source, captions, labels, shape, settings
    OUTPUT/prompts.safetensors    `empty` and `negative`: text states of the two prompts that belong to no clip
    OUTPUT/clips/ID.safetensors   latents (16, F, H, W) float32; text_short, text_long (n, text_dim) bfloat16; for
                                  image-to-video condition (16, F, H, W) float32 and clip (tokens, 1280) bfloat16

Each clip's file says in its header what it was made from, so a run that was stopped goes on where it was, and a
changed caption or video is encoded again. Labels live in the index alone: changing them encodes nothing. What the
published code has encoded (a `.list` of meta JSON files that name `.npy` arrays) is read as it is.

Departures from the published code: an absent label is None, not 0; a clip that cannot be read is an error, not
silently another clip; the order is new in each epoch and can be resumed at any step.
"""
import argparse
import csv
import difflib
import hashlib
import io
import json
import math
import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from itertools import groupby, islice
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace
from tqdm import tqdm

import parallel
from clip import CLIPVisionModel
from files import InputError, open_safetensors, read_json, write_safetensors, written_whole
from t5 import Tokenizer, UMT5Encoder, encode_prompts
from vae import WanVAE

LABELS = ("physics_quality", "human_quality", "text_alignment", "blur_quality")
TASKS = LABELS + ("motion_quality",)  # physics AND human
I2V = ("i2v", "flf2v")  # model types that are given frames of the clip
PUBLISHED = {"size": [832, 480], "frames": 81, "fps": 16}
VAE_FILE = "Wan2.1_VAE.pth"
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
SPIECE_FILE = "google/umt5-xxl/spiece.model"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"  # Wan2.1 image-to-video only
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走")


# ---------------------------------------------------------------------------------------------- video

def read_video(path, fps=16, frames=None, size=None):
    """Decode a clip to uint8 (T, H, W, 3).

    At each time 0, 1/fps, 2/fps, ... the source frame is taken that a player would show then. T is 1 + 4n, as the
    VAE wants it: exactly `frames` if given, else as many as the clip has. `size` = (width, height): scaled to
    cover it, then cut to it around the centre. Decodes no more than it needs.
    Raises InputError if the file is missing, damaged, cut short, no video, or has fewer than `frames` (5) frames.
    """
    if frames is not None and frames % 4 != 1:
        raise InputError(f"{frames} frames do not fit the VAE; ask for 1 + 4n, such as 81")
    pictures = [_picture(frame, size) for frame in islice(_shown_frames(path, fps), frames)]
    _check_length(path, len(pictures), frames, fps)
    return torch.stack(pictures[: 1 + (len(pictures) - 1) // 4 * 4])  # (T, H, W, 3)


def read_image(path, size=None):
    """A jpg or png as float (3, H, W) in [-1, 1]; `size` as in `read_video`. Raises InputError likewise."""
    return to_tensor(_picture(next(_shown_frames(path, 1)), size)[None])[:, 0]  # (3, H, W)


def write_video(path, video, fps=16):
    """Write uint8 (T, H, W, 3) as an H.264 mp4 that plays anywhere. Raises InputError if H or W is odd."""
    height, width = video.shape[1:3]
    if height % 2 or width % 2:
        raise InputError(f"{path}: {width}x{height} would not play everywhere; make both sides even")
    with written_whole(path) as beside:
        with av.open(str(beside), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=_rate(fps), options={"crf": "16"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            # Say which matrix turned RGB into YUV, or every player guesses its own colours.
            codec = stream.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = Colorspace.ITU709
            codec.color_range = ColorRange.MPEG
            for picture in video.cpu().numpy():
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def to_tensor(video):
    """uint8 (T, H, W, 3) -> float (3, T, H, W) in [-1, 1]."""
    return video.permute(3, 0, 1, 2).float() / 127.5 - 1


def to_uint8(video):
    """float (3, T, H, W), clamped to [-1, 1] -> uint8 (T, H, W, 3)."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


def clip_statistics(video):
    """What tells degenerate video, of uint8 (T, H, W, 3), as numbers from 0 to 1: the mean difference between neighbouring
    frames, the deviation of brightness, and the mean distance between the largest and the smallest colour channel."""
    video = video.float() / 255
    return {"motion_energy": video.diff(dim=0).abs().mean().item(), "contrast": video.mean(-1).std().item(),
            "saturation": (video.amax(-1) - video.amin(-1)).mean().item()}


def _shown_frames(path, fps):
    """Yield the decoded frame that is on the screen 0, 1/fps, 2/fps, ... seconds after the first one appears."""
    damaged = f"{path} is damaged, cut short or no video; copy or make it again"
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; check the path")
    try:
        # An open file, not its name: FFmpeg would take some names for patterns or for addresses.
        with open(path, "rb") as file, av.open(file) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no video stream; give a file with pictures")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            tick, step = stream.time_base, 1 / _rate(fps)
            # Stamps are whole ticks, so a frame may be stamped half a tick late: 62.5 ms as 63 in an mkv.
            due = min(tick / 2, Fraction(1, 1000))
            shown = first = end = None
            for frame in container.decode(stream):
                if frame.is_corrupt or frame.pts is None:
                    raise InputError(damaged)
                now = frame.pts * tick
                while shown is not None and first + due < now:
                    yield shown
                    due += step
                first = now if first is None else first
                shown, end = frame, now + (frame.duration or 0) * tick
            if shown is None:
                raise InputError(damaged)
            # A file that was cut still announces its whole length. (The container's may be that of its sound.)
            length = stream.duration and stream.duration * tick
            if length is None and container.duration and len(container.streams) == 1:
                length = Fraction(container.duration, av.time_base)
            if length and stream.average_rate and end - first < length - Fraction(3, 2) / stream.average_rate:
                raise InputError(f"{path} stops after {float(end - first):.2f} of {float(length):.2f} seconds; "
                                 f"copy or make it again")
            while first + due < end:
                yield shown
                due += step
    except (av.FFmpegError, OSError):
        raise InputError(damaged) from None


def _check_length(path, found, frames, fps):
    if found < (frames or 5):
        raise InputError(f"{path} has {found} frames at {fps} fps and needs {frames or 5}; "
                         f"give a longer clip or ask for fewer")


def _rate(fps):
    if fps <= 0:
        raise InputError(f"{fps} frames a second are none; give a number above 0")
    return Fraction(fps).limit_denominator(1001)  # 23.976... is 24000/1001


def _picture(frame, size):
    """A decoded frame -> uint8 (H, W, 3): upright, scaled to cover `size` and cut to it."""
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    picture = torch.rot90(picture, round(frame.rotation / 90))  # phones store upright video lying down
    rows, columns, _ = picture.shape
    if size is None or tuple(size) == (columns, rows):
        return picture
    width, height = size
    scale = max(width / columns, height / rows)
    scaled = max(height, round(rows * scale)), max(width, round(columns * scale))
    picture = F.interpolate(picture.permute(2, 0, 1)[None].float(), scaled, mode="bicubic", antialias=True)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    picture = picture[0, :, top:top + height, left:left + width]  # (3, height, width)
    return picture.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


# ---------------------------------------------------------------------------------------------- annotations

def read_list(path):
    """Read an annotation list: .json (a list), .jsonl, or .csv with a header; `video` and `prompt` are read too.

    Returns dicts: line (in a .json the entry's number), source_id (default: the video's name), video_path (beside
    the list if relative), short_caption, long_caption (each stands in for the other), labels {name: 1, 0 or None},
    pair_id or None. Labels that mean nothing stay as they are for `faults` to report.
    Raises InputError if the list as a whole cannot be read.
    """
    path = Path(path)
    if path.suffix == ".json":
        found = read_json(path)
        numbered = list(enumerate(found, 1)) if isinstance(found, list) else []
    elif path.suffix == ".jsonl":
        numbered = _json_lines(path)
    elif path.suffix == ".csv":
        reader = csv.DictReader(_text(path))
        numbered = [(reader.line_num, row) for row in reader]
    else:
        raise InputError(f"{path} is no annotation list; give a .json, .jsonl or .csv file")
    if not numbered or not all(isinstance(given, dict) for _, given in numbered):
        raise InputError(f"{path} is no list of clips; write one object with video_path and captions for each")
    return [_entry(path, line, given) for line, given in numbered]


def _text(path):
    try:
        return io.StringIO(Path(path).read_text(encoding="utf-8-sig"), newline="")  # spreadsheets begin with a BOM
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def _json_lines(path):
    numbered = []
    for line, text in enumerate(_text(path), 1):
        try:
            numbered += [(line, json.loads(text))] if text.strip() else []
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {line} is not valid JSON ({error}); mend it") from None
    return numbered


def _entry(path, line, given):
    if isinstance(given.get("labels"), dict):
        given = given | given["labels"]

    def text(*names):
        values = ("" if given.get(name) is None else str(given[name]).strip() for name in names)
        return next(filter(None, values), "")

    video = text("video_path", "video")
    misspelt = {name: given[name] for name in given if name and name not in LABELS and (
        name.endswith(("_quality", "_alignment")) or difflib.get_close_matches(name, LABELS))}
    return {"line": line, "source_id": text("source_id") or Path(video).stem,
            "video_path": str(path.parent / video) if video else None,
            "short_caption": text("short_caption", "prompt", "long_caption"),
            "long_caption": text("long_caption", "prompt", "short_caption"),
            "labels": _labels(given) | misspelt, "pair_id": text("pair_id") or None}


def _labels(given):
    """{name: 1, 0 or None} of every label; a value that means nothing stays as it is."""
    meaning = {"1": 1, "1.0": 1, "good": 1, "0": 0, "0.0": 0, "poor": 0, "": None, "none": None, "null": None}
    return {name: meaning.get(str(given.get(name)).strip().lower(), given.get(name)) for name in LABELS}


def label(labels, task):
    """1, 0 or None (not annotated). motion_quality is physics_quality AND human_quality: 0 as soon as one of them
    is known to be 0, 1 if both are 1, else None."""
    if task not in TASKS:
        raise InputError(f"{task} is no task; choose from {', '.join(TASKS)}")
    parts = ("physics_quality", "human_quality") if task == "motion_quality" else (task,)
    values = [labels.get(name) for name in parts]
    return 0 if 0 in values else 1 if all(value == 1 for value in values) else None


def faults(entries, task=None, frames=None, fps=16):
    """Yield a sentence for every fault of a list from `read_list`, each with its line. Decodes all that is used.

    With `task`, a clip that is not annotated for it is a fault; `frames` at `fps` is what a clip must have (5).
    """
    taken = {}
    for entry in tqdm(entries, desc="checking", disable=None):
        name, path = entry["source_id"], entry["video_path"]
        where = f"line {entry['line']} ({name}): "
        if path is None:
            yield where + "video_path is missing"
        else:
            try:
                _check_length(path, sum(1 for _ in islice(_shown_frames(path, fps), frames)), frames, fps)
            except InputError as error:
                yield where + str(error)
        if not entry["short_caption"]:  # then the long one is empty too
            yield where + "the caption is empty"
        for label_name, value in entry["labels"].items():
            if label_name not in LABELS:
                yield where + f"{label_name} is no label; the labels are {', '.join(LABELS)}"
            elif value not in (0, 1, None):
                yield where + f"{label_name} is {value!r}; write 1 or good, 0 or poor, or null for not annotated"
        if task and label(entry["labels"], task) is None:
            yield where + f"{task} is not annotated"
        if name in taken:
            yield where + f"source_id is that of line {taken[name]} too; give each clip its own"
        elif Path(name).name != name or len(name.encode()) > 200:
            yield where + "source_id cannot name a file; leave out slashes and keep it short"
        taken.setdefault(name, entry["line"])


def balance(entries):
    """A table: for each task, how many clips are good, poor and not annotated."""
    rows = [f"{'':16}{'good':>8}{'poor':>8}{'absent':>8}"]
    for task in TASKS:
        count = Counter(label(entry["labels"], task) for entry in entries)
        rows.append(f"{task:16}{count[1]:8}{count[0]:8}{count[None]:8}")
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------- encoding

class Encoder:
    """The frozen models of one official model directory, each loaded when it is first needed."""

    def __init__(self, model_dir, device):
        self.directory, self.device = Path(model_dir), device
        self._states = lru_cache(maxsize=1000)(self._encode_prompt)  # many clips share a caption
        expert = self.directory / "low_noise_model"  # Wan2.2 A14B: two transformers whose configurations agree
        config = read_json((expert if expert.is_dir() else self.directory) / "config.json")
        self.model_type, self.text_len = config.get("model_type"), config.get("text_len", 512)
        if self.model_type not in ("t2v", "i2v", "flf2v"):
            raise InputError(f"{model_dir} is a {self.model_type} model; clips are encoded for t2v, i2v and flf2v")
        own = self.directory / "sampling.json"  # of a model that is not of the published size: what it is used with
        self.sampling = {name: value for name, value in (read_json(own) if own.is_file() else {}).items() if name in PUBLISHED}
        self.given = {"t2v": [], "i2v": [0], "flf2v": [0, -1]}[self.model_type]  # frames that the model is given
        self.has_clip = bool(self.given) and (self.directory / CLIP_FILE).is_file()

    def settings(self):
        """What decides the encoded values, beside the clip and its size."""
        files = {"vae": VAE_FILE, "t5": T5_FILE} | ({"clip": CLIP_FILE} if self.has_clip else {})
        hashes = {name: fast_hash(self.directory / file) for name, file in files.items()}
        return {"model_type": self.model_type, "text_len": self.text_len, "hashes": hashes}

    @cached_property
    def video_encoder(self):
        return WanVAE.from_pretrained(self.directory / VAE_FILE, device=self.device)  # float32

    @cached_property
    def text_encoder(self):
        if not (self.directory / T5_FILE).exists():
            raise InputError(f"{self.directory} holds no text encoder; give the official model directory")
        tokenizer = Tokenizer(self.directory / SPIECE_FILE, self.text_len)
        return UMT5Encoder.from_pretrained(self.directory / T5_FILE, torch.bfloat16, self.device), tokenizer

    @cached_property
    def image_encoder(self):  # float32: it sees one or two pictures a clip
        return CLIPVisionModel.from_pretrained(self.directory / CLIP_FILE, torch.float32, self.device)

    def text(self, prompts):
        """List of str -> list of bfloat16 (n_i, text_dim), each trimmed to its tokens."""
        return [self._states(prompt).clone() for prompt in prompts]

    def _encode_prompt(self, prompt):
        return encode_prompts(*self.text_encoder, [prompt])[0].bfloat16().cpu()

    @property
    def negative_prompt(self):
        """The usual negative prompt, which Wan2.1's image-to-video models extend."""
        more = ["", "镜头晃动，", "镜头切换，镜头晃动，"][len(self.given)] if self.has_clip else ""
        return more + NEGATIVE_PROMPT

    def prompts(self):
        """The states of the empty and of the negative prompt."""
        return dict(zip(("empty", "negative"), self.text(["", self.negative_prompt])))

    @torch.no_grad()
    def image_latents(self, images, frames):
        """The given frames (1 or 2, 3, H, W) in [-1, 1] in an else grey video -> its latents (16, F, H/8, W/8)."""
        video = torch.zeros(1, 3, frames, *images.shape[2:], device=self.device)  # zero is grey
        video[0, :, self.given] = images.transpose(0, 1).to(self.device)
        return self.video_encoder.encode(video)[0]

    @torch.no_grad()
    def encode(self, videos, captions):
        """B videos of one shape, uint8 (T, H, W, 3), and their (short, long) captions -> the tensors of each clip's file."""
        videos = torch.stack([to_tensor(video) for video in videos]).to(self.device)  # (B, 3, T, H, W)
        clips = [{"latents": latents} for latents in self.video_encoder.encode(videos)]  # (16, F, H/8, W/8) each
        for clip, video, pair in zip(clips, videos, captions):
            images = video[:, self.given].transpose(0, 1)  # (0 to 2, 3, H, W)
            if self.given:
                clip["condition"] = self.image_latents(images, video.shape[1])  # (16, F, H/8, W/8)
            if self.has_clip:
                clip["clip"] = self.image_encoder(images).flatten(0, 1).bfloat16()  # (257 or 514, 1280)
            clip["text_short"], clip["text_long"] = self.text(pair)  # (n, text_dim)
        return [{name: tensor.cpu().contiguous() for name, tensor in clip.items()} for clip in clips]


def fast_hash(path):
    """sha256 over a file's size, first and last MiB: tells files apart without reading 11 GB of weights."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; check the path")
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(str(size).encode() + file.read(2**20))
        file.seek(max(0, size - 2**20))
        digest.update(file.read())
    return digest.hexdigest()


def encode_clips(entries, model_dir, output, size=None, frames=None, fps=None, device=None, batch_size=1):
    """Encode those clips of a list that are not encoded yet and write the index; returns the index's path.

    `size` = (width, height), turned for clips of the other orientation. size, frames and fps default to what
    `output` was encoded with before, else to the model's sampling.json, else to the published setting; `device` to
    this rank's GPU, or the CPU. `batch_size` clips are encoded at once.
    Under torchrun each rank takes its share, and rank 0 writes the index when all clips are there.
    Raises InputError for all faults of the list before anything is encoded, and if `output` holds clips that were
    encoded by another model or with other settings.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    encoder = Encoder(model_dir, device or (gpu if torch.cuda.is_available() else "cpu"))

    # One directory holds one kind of data: the settings are those of whatever is there.
    output, prompts = Path(output), Path(output, "prompts.safetensors")
    before = _made_from(prompts).get("settings")
    asked = {"size": size and list(size), "frames": frames, "fps": fps}
    usual = before or PUBLISHED | encoder.sampling
    settings = encoder.settings() | {name: value or usual[name] for name, value in asked.items()}
    for file in [prompts, *output.glob("clips/*.safetensors")]:
        other = _made_from(file).get("settings", settings)
        if other != settings:
            names = " and ".join(name for name in settings if settings[name] != other.get(name))
            raise InputError(f"{file} was encoded with other {names}; choose another output or the same settings")
    if any(side % 16 for side in settings["size"]):
        raise InputError(f"{settings['size']} is no size for the model; both sides must be multiples of 16")
    found = list(faults(entries, frames=settings["frames"], fps=settings["fps"]))
    if found:
        raise InputError(f"the list has {len(found)} faults, nothing was encoded:\n  " + "\n  ".join(found))

    # A file whose header says that it was made from the same is done.
    if rank == 0 and not before:
        write_safetensors(prompts, encoder.prompts(), {"made_from": json.dumps({"settings": settings})})
    files = [output / "clips" / f"{entry['source_id']}.safetensors" for entry in entries]
    wanted = [{"settings": settings, "video": fast_hash(entry["video_path"]),
               "captions": [entry["short_caption"], entry["long_caption"]]} for entry in entries]
    def read(i):
        path, size = entries[i]["video_path"], settings["size"]
        rows, columns, _ = read_video(path, frames=1)[0].shape
        if (columns < rows) != (size[0] < size[1]):
            size = size[::-1]
        return read_video(path, settings["fps"], settings["frames"], size)

    todo = [i for i in range(rank, len(entries), world) if _made_from(files[i]) != wanted[i]]
    progress = tqdm(total=len(todo), desc="encoding", disable=None if rank == 0 else True)  # None: only on a terminal
    for start in range(0, len(todo), batch_size):
        videos = {i: read(i) for i in todo[start:start + batch_size]}
        for _, group in groupby(videos, key=lambda i: videos[i].shape):
            group = list(group)
            for i, tensors in zip(group, encoder.encode([videos[i] for i in group], [wanted[i]["captions"] for i in group])):
                for name, tensor in tensors.items():
                    if not tensor.isfinite().all():
                        raise InputError(f"{entries[i]['video_path']} gave {name} that are NaN or infinite; "
                                         f"check the files in {model_dir}")
                write_safetensors(files[i], tensors, {"made_from": json.dumps(wanted[i])})
                progress.update()

    # One rank writes the index, in the list's order, whichever rank was faster.
    if rank == 0:
        while any(_made_from(file) != made_from for file, made_from in zip(files, wanted)):
            time.sleep(1)  # another rank is still at work; if it fails, torchrun ends this one too
        with written_whole(output / "index.jsonl") as beside, open(beside, "w", encoding="utf-8") as index:
            for entry, file in zip(entries, files):
                shape = open_safetensors(file).get_slice("latents").get_shape()
                line = {"file": f"clips/{file.name}"} | entry | {"shape": shape} | settings
                del line["line"]  # where it stood in the list
                index.write(json.dumps(line, ensure_ascii=False) + "\n")
    return output / "index.jsonl"


def _made_from(file):
    return json.loads((open_safetensors(file).metadata() or {}).get("made_from", "{}")) if file.is_file() else {}


# ---------------------------------------------------------------------------------------------- the dataset

ARRAYS = {  # the keys under which published metas name a clip's arrays; the first one that is there counts
    "latents": ("video_vae_latent_path", "vae_latent_path", "latents_path"),
    "condition": ("f1_black_path", "latents_condition_path"),
    "clip": ("image_embeds", "imgclip_path"),
    "text_short": ("save_textshort_path", "textshort_path", "text_en_path"),
    "text_long": ("textlong_path", "text_en_path", "save_textshort_path", "textshort_path")}


class Clips:
    """Encoded clips: our index.jsonl, a published `.list` (a meta JSON a line), or a list of meta JSON paths.

    `entries`: dicts with source_id, short_caption, long_caption, labels, pair_id, shape (16, F, H, W), and more.
    """

    def __init__(self, path):
        metas = path if isinstance(path, (list, tuple)) else None
        self.folder = Path(metas[0] if metas else path).parent
        if metas is None and Path(path).suffix == ".list":
            metas = [_beside(line.strip(), self.folder) for line in _text(path) if line.strip()]
        if metas is None:
            self.entries = [entry for _, entry in _json_lines(path)]
            for entry in self.entries:
                entry["file"] = self.folder / entry.get("file", "")
        else:
            self.entries = [_published(Path(meta)) for meta in metas]
        if not self.entries or not all("shape" in entry for entry in self.entries):
            raise InputError(f"{path} is no index of encoded clips; give the index.jsonl that data.py writes")
        for entry in self.entries:
            entry["shape"], entry["labels"] = tuple(entry["shape"]), _labels(entry["labels"])
            for name, value in entry["labels"].items():
                if value not in (0, 1, None):
                    raise InputError(f"clip {entry['source_id']}: {name} is {value!r}; write 1, 0 or null")

    def __len__(self):
        return len(self.entries)

    def select(self, *tasks):
        """The indices of the clips that are annotated for at least one of the tasks."""
        return [i for i, entry in enumerate(self.entries) if any(label(entry["labels"], task) is not None for task in tasks)]

    @classmethod
    def two_lists(cls, better, worse):
        """The published form of pairs: two lists of clips, the first ones better than those of the same prompt in the second."""
        clips, others = cls(better), cls(worse)
        for part, quality in ((clips, 1), (others, 0)):
            for entry in part.entries:
                entry["labels"] = dict.fromkeys(LABELS, quality)
                entry["pair_id"] = entry.get("pair_id") or entry["short_caption"]
        clips.entries += others.entries
        return clips

    def pairs(self, task):
        """(better, worse): the indices of two clips that share a pair_id and differ in the task's label, of every such two."""
        groups = {}
        for i in self.select(task):
            if self.entries[i].get("pair_id"):
                groups.setdefault(self.entries[i]["pair_id"], ([], []))[label(self.entries[i]["labels"], task)].append(i)
        found = [(better, worse) for poor, good in groups.values() for better in good for worse in poor]
        for better, worse in found:
            if self.entries[better]["short_caption"] != self.entries[worse]["short_caption"]:
                raise InputError(f"clips {self.entries[better]['source_id']} and {self.entries[worse]['source_id']} share the pair_id "
                                 f"{self.entries[better]['pair_id']} and have different captions; pair clips of one prompt")
            if self.entries[better]["shape"] != self.entries[worse]["shape"]:
                raise InputError(f"clips {self.entries[better]['source_id']} and {self.entries[worse]['source_id']} are a pair and have "
                                 f"different shapes; encode them with one --size and --frames")
        return found

    @property
    def prompts(self):
        """{"empty", "negative"}: text states (n, text_dim), from prompts.safetensors beside the index or list."""
        tensors = open_safetensors(self.folder / "prompts.safetensors")
        return {name: tensors.get_tensor(name) for name in ("empty", "negative")}

    def check(self):
        """Raise InputError, naming clips and files, unless all clips' tensors are there in the right shapes."""
        found = []
        for entry in self.entries:
            try:
                self._headers(entry)
            except InputError as error:
                found.append(str(error))
        if found:
            raise InputError(f"{len(found)} of {len(self)} clips cannot be used:\n  " + "\n  ".join(found))

    def load(self, i):
        """One clip: latents (16, F, H, W), condition (16 or 20, F, H, W) or None, clip (tokens, dim) or None,
        text_short, text_long (n, text_dim), entry. Raises InputError if a value is missing, NaN or infinite."""
        entry, tensors = self.entries[i], {"condition": None, "clip": None}
        for name, (file, _, read) in self._headers(entry).items():
            tensors[name] = read()
            if not tensors[name].isfinite().all():
                raise InputError(f"clip {entry['source_id']}: {file} has NaN or infinite {name}; encode it again")
        return tensors | {"entry": entry}

    def _headers(self, entry):
        """{name: (file, shape, read)} of a clip's tensors, their shapes checked; `read()` fetches the values."""
        headers, (channels, *grid) = {}, entry["shape"]
        try:
            for name, file in entry.get("arrays", {}).items():
                array = _array(file, name)
                headers[name] = file, array.shape, lambda array=array: torch.from_numpy(array.copy())
            if "file" in entry:
                file = entry["file"]
                tensors = open_safetensors(file)
                for name in tensors.keys():
                    shape = tuple(tensors.get_slice(name).get_shape())
                    headers[name] = file, shape, partial(tensors.get_tensor, name)
            needed = ["latents", "text_short", "text_long"] + ["condition"] * (entry.get("model_type") in I2V)
            for name in needed:
                if name not in headers:
                    raise InputError(f"{name} is missing in {entry.get('file', 'its meta file')}; encode it again")
            right = {"latents": [(channels, *grid)], "condition": [(channels, *grid), (channels + 4, *grid)]}
            for name, (file, shape, _) in headers.items():
                if len(shape) != (4 if name in right else 2) or shape not in right.get(name, [shape]):
                    raise InputError(f"{file} holds {name} of the wrong shape {list(shape)}; encode it again")
        except InputError as error:
            raise InputError(f"clip {entry['source_id']}: {error}") from None
        return headers


def _published(meta):
    """The entry of a clip that the published code has encoded, from its meta JSON."""
    given = read_json(meta)
    paths = {name: next((given[key] for key in keys if given.get(key)), None) for name, keys in ARRAYS.items()}
    arrays = {name: _beside(path, meta.parent) for name, path in paths.items() if path}
    if "latents" not in arrays:
        raise InputError(f"{meta} names no latents ({', '.join(ARRAYS['latents'])}); give a meta file")
    prompt = given.get("prompt", "")
    return {"source_id": str(given.get("source_id") or meta.stem), "pair_id": given.get("pair_id"),
            "short_caption": given.get("short_caption", prompt), "long_caption": given.get("long_caption", prompt),
            "labels": given, "shape": _array(arrays["latents"], "latents").shape, "arrays": arrays}


def _beside(path, folder):
    """Published files name others as seen from where the code ran; look beside the naming file first."""
    return folder / path if (folder / path).exists() else Path(path)


def _array(file, name):
    """A published array, memory-mapped, without its batch axis; the tokens of CLIP's pictures are joined."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        return array.reshape(-1, array.shape[-1]) if name == "clip" else array[0]
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; check the path") from None
    except (ValueError, EOFError, IndexError) as error:
        raise InputError(f"{file} is damaged or no array ({error}); copy or make it again") from None


def choose_caption(sample, empty_prompt, long_caption, drop_prompt, *key):
    """The text states of a clip's long caption, with probability `long_caption`, or of its short one; with probability
    `drop_prompt` those of the empty prompt instead. `key` decides the draws."""
    if parallel.uniform(*key, "drop") < drop_prompt:
        return empty_prompt
    name = "text_long" if parallel.uniform(*key, "caption") < long_caption else "text_short"
    return sample[name].to(empty_prompt.device)


def condition_input(condition, model_type):
    """What an image-to-video model takes beside the noisy latents: y (B, 20, F, H, W), 4 channels of mask first.

    `condition` is (B, 16, F, H, W); one with its mask (20 channels) is returned as it is. The mask marks the given
    pixel frames, four to a latent frame, where the first frame's mark counts four times: so i2v has ones in latent
    frame 0, and flf2v also in the last channel of the last latent frame.
    """
    if condition.shape[1] == 20:
        return condition
    if model_type not in I2V or condition.shape[1] != 16:
        raise InputError(f"a {model_type} model takes no condition of {condition.shape[1]} channels; check both")
    mask = torch.zeros_like(condition[:, :4])  # (B, 4, F, H, W)
    mask[:, :, 0] = 1
    if model_type == "flf2v":
        mask[:, 3, -1] = 1
    return torch.cat([mask, condition], dim=1)  # (B, 20, F, H, W)


def ahead(load, items):
    """Yield (item, load(item)) for each item; the next one is loaded by a thread meanwhile, so that nobody waits for it."""
    with ThreadPoolExecutor(1) as thread:
        before = None
        for item in items:
            following = item, thread.submit(load, item)
            if before:
                yield before[0], before[1].result()
            before = following
        if before:
            yield before[0], before[1].result()


def collate(samples, config, device):
    """Samples from `Clips.load` -> latents (B, C, F, H, W) and the image condition a model of this config takes.

    The condition is {} for text to video, else {"y": (B, 20, F, H, W)}, and "clip_fea": (B, tokens, 1280) where
    config.use_clip. Raises InputError, naming the clip, where the model needs what was not encoded.
    """
    names = {"latents": "latents"}
    if config.model_type in I2V:
        names |= {"y": "condition"} | ({"clip_fea": "clip"} if config.use_clip else {})
    batch = {}
    for sample in samples:
        if sample["text_short"].shape[1] != config.text_dim:
            raise InputError(f"clip {sample['entry']['source_id']} has text states of width {sample['text_short'].shape[1]}, but the model "
                             f"takes {config.text_dim}; encode it with data.py --model of that kind")
    for argument, name in names.items():
        for sample in samples:
            if sample[name] is None:
                raise InputError(f"clip {sample['entry']['source_id']} was encoded without {name}, which this "
                                 f"{config.model_type} model needs; encode it with data.py --model of that kind")
        batch[argument] = torch.stack([sample[name] for sample in samples]).to(device)
    if "y" in batch:
        batch["y"] = condition_input(batch["y"], config.model_type)
    return batch.pop("latents"), batch


class Order:
    """Which clips make up batch number 0, 1, 2, ...: a pure function of (seed, number), so a run resumes from its
    step number alone, and any number of ranks sees the same batches.

    Each epoch draws every clip once, in a new permutation. A batch holds clips of one shape; a shape's last batch
    is filled up from the beginning of that shape. `subset`: only these indices (default all).
    """

    def __init__(self, shapes, batch_size, seed, subset=None):
        self.batch_size, self.seed, self.groups = batch_size, seed, {}
        for i in range(len(shapes)) if subset is None else subset:
            self.groups.setdefault(tuple(shapes[i]), []).append(i)
        if not self.groups:
            raise InputError("no clip is left to train on; check the index and its labels")
        self.batches_per_epoch = sum(math.ceil(len(group) / batch_size) for group in self.groups.values())

    def __getitem__(self, number):
        epoch, place = divmod(number, self.batches_per_epoch)
        draw, batches = random.Random(f"order {self.seed} {epoch}"), []
        for group in self.groups.values():
            clips = draw.sample(group, len(group))
            for start in range(0, len(clips), self.batch_size):
                batches.append([clips[i % len(clips)] for i in range(start, start + self.batch_size)])
        draw.shuffle(batches)
        return batches[place]


# ---------------------------------------------------------------------------------------------- the command

def parse_size(text):
    """"832x480" -> (832, 480)."""
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is no size; write width x height, such as 832x480")
    return int(width), int(height)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check a list of annotated clips, or encode them for training.")
    before = "(default: as --output was encoded before, else the model's sampling.json, else "
    parser.add_argument("--check", metavar="LIST", help="report the faults of this list and its balance")
    parser.add_argument("--task", choices=TASKS, help="with --check: what every clip must be annotated for")
    parser.add_argument("--list", default="demo/clips/clips.json", help="the clips: .json, .jsonl or .csv; for a "
                        "published .list only its prompts.safetensors is made (default: %(default)s)")
    parser.add_argument("--model", default="demo/model", help="official model directory (default: %(default)s)")
    parser.add_argument("--output", default="outputs/data", help="where encoded clips go (default: %(default)s)")
    parser.add_argument("--size", type=parse_size,
                        help=f"width x height, turned for upright clips {before}832x480)")
    parser.add_argument("--frames", type=int, help=f"1 + 4n frames a clip {before}81); "
                        "with --check the fewest that a clip may have (default: 5)")
    parser.add_argument("--fps", type=float, help=f"frames a second {before}16)")
    parser.add_argument("--batch_size", type=int, default=1, help="clips encoded at once; more pays for small ones "
                        "(default: %(default)s)")
    args = parser.parse_args(argv)

    if args.check:
        entries = read_list(args.check)
        found = list(faults(entries, args.task, args.frames, args.fps or PUBLISHED["fps"]))
        print("\n".join([*found, f"{len(entries)} clips, {len(found)} faults", balance(entries)]))
        return 1 if found else 0
    if args.list.endswith(".list"):
        prompts = Encoder(args.model, "cuda" if torch.cuda.is_available() else "cpu").prompts()
        write_safetensors(Path(args.list).parent / "prompts.safetensors", prompts)
        return 0
    entries = read_list(args.list)
    index = encode_clips(entries, args.model, args.output, args.size, args.frames, args.fps, batch_size=args.batch_size)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{len(entries)} clips are encoded: {index}")
    return 0


if __name__ == "__main__":
    parallel.run(main)
