"""Encode clips for training: latents, the image condition, CLIP tokens and text states, each clip once.

Training then needs neither videos nor the VAE, the text encoder or CLIP. `data.py` is the command.
"""
import hashlib
import json
import sys
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from annotations import list_faults, video_faults
from clip import CLIP_FILE, CLIPVisionModel
from files import InputError, atomic_write, open_safetensors, parse_json, read_json, write_safetensors
from forms import KIND, SAMPLING
from t5 import SPIECE_FILE, T5_FILE, Tokenizer, UMT5Encoder, encode_prompts
from vae import VAE_FILE, WanVAE
from video import read_video, to_tensor

PUBLISHED = {"size": [832, 480], "frames": 81, "fps": 16}
MADE_FROM = {"settings?": {name: SAMPLING[f"{name}?"] for name in PUBLISHED}}  # the header of an encoded file
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，"
    "整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")


# ------------------------------------------------------------------------------ the models that encode

class Encoder:
    """The frozen models of one official model directory, each loaded when it is first needed and freed by
    `del encoder.text_encoder`."""

    def __init__(self, model_dir, device):
        self.directory, self.device = Path(model_dir), device
        self.states = {}  # {prompt: text states}, because many clips share a caption
        expert = self.directory / "low_noise_model"  # Wan2.2 A14B: two transformers, their configs agree
        config = read_json((expert if expert.is_dir() else self.directory) / "config.json", KIND)
        self.model_type = config["model_type"]
        self.text_len = config.get("text_len", 512)
        if self.model_type not in ("t2v", "i2v", "flf2v"):
            raise InputError(f"{model_dir} is a {self.model_type:.20} model; give one for t2v, i2v or flf2v")
        own = self.directory / "sampling.json"  # for models whose size is not the published one
        sampling = read_json(own, SAMPLING) if own.is_file() else {}
        self.sampling = {name: value for name, value in sampling.items() if name in PUBLISHED}
        self.given = {"t2v": [], "i2v": [0], "flf2v": [0, -1]}[self.model_type]  # frames the model is given
        clip = self.directory / CLIP_FILE  # Wan2.2's image-to-video models have none; a broken link counts
        self.has_clip = bool(self.given) and (clip.exists() or clip.is_symlink())

    def settings(self):
        """What decides the encoded values, beside the clip and its size."""
        files = {"vae": VAE_FILE, "t5": T5_FILE}
        if self.has_clip:
            files["clip"] = CLIP_FILE
        hashes = {name: fast_hash(self.directory / file) for name, file in files.items()}
        return {"model_type": self.model_type, "text_len": self.text_len, "hashes": hashes}

    @cached_property
    def video_encoder(self):
        return WanVAE.from_pretrained(self.directory / VAE_FILE, device=self.device)  # float32

    @cached_property
    def text_encoder(self):
        """(model, tokenizer)"""
        if not (self.directory / T5_FILE).exists():
            raise InputError(f"{self.directory} holds no text encoder; give the official model directory")
        tokenizer = Tokenizer(self.directory / SPIECE_FILE, self.text_len)
        encoder = UMT5Encoder.from_pretrained(self.directory / T5_FILE, torch.bfloat16, self.device)
        if tokenizer.model.vocab_size() > encoder.token_embedding.num_embeddings:
            raise InputError(f"{self.directory}: {SPIECE_FILE} has more tokens than {T5_FILE}; "
                             f"use the two files of one model")
        return encoder, tokenizer

    @cached_property
    def image_encoder(self):  # float32 is cheap: it encodes only one or two pictures per clip
        return CLIPVisionModel.from_pretrained(self.directory / CLIP_FILE, torch.float32, self.device)

    def text(self, prompts):
        """List of str -> list of bfloat16 (n_i, text_dim), each trimmed to its tokens."""
        found = []
        for prompt in prompts:
            if prompt not in self.states:
                if len(self.states) == 1000:
                    del self.states[next(iter(self.states))]  # the oldest
                states = encode_prompts(*self.text_encoder, [prompt])[0].bfloat16().cpu()
                if not states.isfinite().all():
                    raise InputError(f"{self.directory / T5_FILE} gave text states that are NaN or infinite; "
                                     f"copy or make it again")
                self.states[prompt] = states
            found.append(self.states[prompt].clone())
        return found

    @property
    def negative_prompt(self):
        """The usual negative prompt, which Wan2.1's image-to-video models extend."""
        more = ["", "镜头晃动，", "镜头切换，镜头晃动，"][len(self.given)] if self.has_clip else ""
        return more + NEGATIVE_PROMPT

    def prompts(self):
        """The states of the empty and of the negative prompt."""
        empty, negative = self.text(["", self.negative_prompt])
        return {"empty": empty, "negative": negative}

    @torch.no_grad()
    def image_latents(self, images, frames):
        """The given frames (1 or 2, 3, H, W) in [-1, 1] in an otherwise grey video -> its latents
        (16, F, H/8, W/8)."""
        video = torch.zeros(1, 3, frames, *images.shape[2:], device=self.device)  # zero is grey
        video[0, :, self.given] = images.transpose(0, 1).to(self.device)
        return self.video_encoder.encode(video)[0]

    @torch.no_grad()
    def encode(self, videos, captions):
        """B videos of one shape, uint8 (T, H, W, 3), and their (short, long) captions -> the tensors of each
        clip's file."""
        videos = torch.stack([to_tensor(video) for video in videos]).to(self.device)     # (B, 3, T, H, W)
        clips = [{"latents": latents} for latents in self.video_encoder.encode(videos)]  # (16, F, H/8, W/8)
        for clip, video, pair in zip(clips, videos, captions, strict=True):
            images = video[:, self.given].transpose(0, 1)                                # (0 to 2, 3, H, W)
            if self.given:
                clip["condition"] = self.image_latents(images, video.shape[1])           # (16, F, H/8, W/8)
            if self.has_clip:
                clip["clip"] = self.image_encoder(images).flatten(0, 1).bfloat16()       # (257 or 514, 1280)
            clip["text_short"], clip["text_long"] = self.text(pair)                      # (n, text_dim)
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


# ------------------------------------------------------------------------------ encoding

def encode_clips(entries, model_dir, output, size=None, frames=None, fps=None, device=None, batch_size=1):
    """Encode the clips of a list that are not encoded yet, and write the index; returns the index's path.

    `size` = (width, height), swapped for clips of the other orientation. size, frames and fps default to what
    `output` was encoded with before, else to the model's sampling.json, else to the published setting;
    `device` to this process's GPU, or the CPU. `batch_size` clips are encoded at once.
    Every rank of a process group takes its share; all must call this. Rank 0 writes the index at the end.
    Raises InputError for all faults of the list before anything is encoded, and if `output` holds clips that
    were encoded by another model or with other settings.
    """
    rank, ranks = _place()
    encoder = Encoder(model_dir, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output = Path(output)
    prompts = output / "prompts.safetensors"
    settings = choose_settings(encoder, output, size, frames, fps)

    # All faults are reported together, before anything is encoded.
    shapes, left, found, warnings = look_through(entries, output, settings)
    if found := list(chain(*found)):
        raise InputError(f"the list has {len(found)} faults, nothing was encoded:\n  " + "\n  ".join(found))

    for warning in warnings if rank == 0 else ():
        print(f"warning: {warning}", file=sys.stderr)
    if rank == 0 and not _made_from(prompts):
        write_safetensors(prompts, encoder.prompts(), {"made_from": json.dumps({"settings": settings})})
    share = sorted(left)[rank::ranks]
    progress = tqdm(total=len(share), desc="encoding", disable=None if rank == 0 else True)
    for start in range(0, len(share), batch_size):
        part = share[start:start + batch_size]
        videos = {i: _read_turned(entries[i]["video_path"], settings) for i in part}
        for _, group in groupby(videos, key=lambda i: videos[i].shape):
            group = list(group)
            encoded = encoder.encode([videos[i] for i in group], [left[i]["captions"] for i in group])
            for i, tensors in zip(group, encoded, strict=True):
                for name, tensor in tensors.items():
                    if not tensor.isfinite().all():
                        raise InputError(f"{entries[i]['video_path']} gave {name} that are NaN or infinite; "
                                         f"check the files in {model_dir}")
                write_safetensors(_file(output, entries[i]), tensors, {"made_from": json.dumps(left[i])})
                shapes[i] = list(tensors["latents"].shape)
                progress.update()

    # One rank writes the index, in the list's order, when all have finished.
    shapes = _merged(shapes)
    if rank == 0:
        lines = []
        for i, entry in enumerate(entries):
            line = {"file": f"clips/{_file(output, entry).name}"} | entry | {"shape": shapes[i]} | settings
            for about_the_list in ("line", "faults"):
                line.pop(about_the_list, None)
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        with atomic_write(output / "index.jsonl") as beside:  # half a character becomes a JSON escape
            beside.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    if dist.is_initialized():
        dist.barrier()  # nobody continues before the index exists
    return output / "index.jsonl"


def look_through(entries, output, settings):
    """What is to be encoded and what is wrong. `encode_clips` begins with this, and --check does this alone.

    Returns {i: shape of the latents} of clips that are encoded already (a rank gets those of its share),
    {i: what its file will be made from} of those that are left, the faults of each clip, and all warnings.
    Only clips that are left are decoded. Every rank of a process group takes its share.
    """
    rank, ranks = _place()
    listed = list_faults(entries)
    shapes, left = {}, {}
    for i in range(rank, len(entries), ranks):
        source = _source(entries[i], settings)
        shape = _encoded_shape(_file(output, entries[i]), source) if source and not listed[i] else None
        if shape:
            shapes[i] = shape
        else:
            left[i] = source
    left = _merged(left)

    looked_at = {}  # i: (faults, warnings)
    share = sorted(left)[rank::ranks]
    for i in tqdm(share, desc="checking", disable=None if rank == 0 else True):  # None: only on a terminal
        looked_at[i] = video_faults(entries[i], settings["frames"], settings["fps"])
    looked_at = _merged(looked_at)
    found = [looked_at.get(i, ([], []))[0] + sentences for i, sentences in enumerate(listed)]
    return shapes, left, found, list(chain(*(looked_at[i][1] for i in sorted(looked_at))))


def choose_settings(encoder, output, size, frames, fps):
    """The settings to encode with, as `encode_clips` says. One directory holds one kind of data."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; give a directory for the encoded clips")
    prompts = output / "prompts.safetensors"
    usual = _made_from(prompts).get("settings") or PUBLISHED | encoder.sampling
    asked = {"size": size and list(size), "frames": frames, "fps": fps}
    settings = encoder.settings() | {name: value or usual[name] for name, value in asked.items()}
    for file in [prompts, *output.glob("clips/*.safetensors")]:
        if not file.is_file():
            continue
        other = _made_from(file).get("settings")
        if other is None:
            raise InputError(f"{file} was not written by data.py; choose another output")
        if other != settings:
            names = " and ".join(name for name in settings if settings[name] != other.get(name))
            raise InputError(f"{file} was encoded with other {names}; "
                             f"choose another output or the same settings")
    if any(side % 16 for side in settings["size"]):
        width, height = settings["size"]
        raise InputError(f"a size of {width}x{height} does not fit the model; make both multiples of 16")
    return settings


def _source(entry, settings):
    """What a clip's file is made from; None if the video cannot be read."""
    try:
        video = fast_hash(entry["video_path"] or "")
    except (InputError, OSError):
        return None
    return {"settings": settings, "video": video, "captions": [entry["short_caption"], entry["long_caption"]]}


def _made_from(file):
    """The source that an encoded file's header names."""
    if not file.is_file():
        return {}
    said = (open_safetensors(file).metadata() or {}).get("made_from", "{}")
    return parse_json(said, f"the header of {file}", MADE_FROM)


def _encoded_shape(file, source):
    """The shape of the latents in a clip's file; None unless it was made from `source`."""
    if _made_from(file) != source:
        return None
    tensors = open_safetensors(file)
    return tensors.get_slice("latents").get_shape() if "latents" in tensors.keys() else None


def _file(output, entry):
    return output / "clips" / f"{entry['source_id']}.safetensors"


def _place():
    """(rank, number of ranks)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _read_turned(path, settings):
    """The frames of a video, uint8 (T, H, W, 3), the sides of the size swapped if it is upright."""
    size = settings["size"]
    rows, columns, _ = read_video(path, frames=1)[0].shape
    if (columns < rows) != (size[0] < size[1]):
        size = size[::-1]
    return read_video(path, settings["fps"], settings["frames"], size)


def _merged(own):
    """The union of all ranks' dicts, on every rank."""
    if not dist.is_initialized():
        return own
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    merged = {}
    for part in parts:
        merged |= part
    return merged
