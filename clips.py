"""What training reads: labels, encoded clips, the order in which they come, captions and image conditions.

data.py encodes each clip once, and `Clips` reads the result; it also reads what the published code has
encoded. Training needs neither videos nor the models that encode, so none of those is imported here.

Departures from the published code: an absent label is None, not 0; a clip that cannot be read is an error,
not silently another clip; each epoch has a new order, and a run can resume at any step.
"""
import itertools
import math
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

import parallel
from files import InputError, check_file, is_finite, parse_json, read_json, read_safetensors, read_text
from forms import ANNOTATIONS, ARRAYS, ENTRY, LABELS, META

NOT_IN_NAMES = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff/\\\\]")  # line breaks, slashes, ...
I2V = ("i2v", "flf2v")  # model types that are given frames of the clip


# ------------------------------------------------------------------------------ labels

def read_labels(given):
    """{name: 1, 0 or None} of the four annotations; a value without a meaning stays as it is."""
    meaning = {"1": 1, "1.0": 1, "good": 1, "true": 1, "0": 0, "0.0": 0, "poor": 0, "false": 0,
               "": None, "none": None, "null": None}
    labels = {}
    for name in ANNOTATIONS:
        value = given.get(name)
        labels[name] = meaning.get(str(value).strip().lower(), value)
    return labels


def names_a_file(source_id):
    """Whether a file can have this name on any system: results are named after clips."""
    plain = source_id not in ("", ".", "..") and not NOT_IN_NAMES.search(source_id)
    return plain and len(source_id.encode()) <= 200


def label_of(labels, name):
    """1, 0 or None (not annotated). motion_quality is 0 as soon as one of its two parts is known to be 0,
    1 if both are 1, else None."""
    if name not in LABELS:
        raise InputError(f"{name} is not a label; choose from {', '.join(LABELS)}")
    parts = ("physics_quality", "human_quality") if name == "motion_quality" else (name,)
    values = [labels.get(part) for part in parts]
    if 0 in values:
        return 0
    return 1 if all(value == 1 for value in values) else None


# ------------------------------------------------------------------------------ text files

def read_json_lines(path, form=object):
    """[(line number, value)] of a .jsonl file, without its empty lines. The form: see files.check_form."""
    numbered = []
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if text.strip():
            numbered.append((line, parse_json(text, f"{path}, line {line}", form)))
    return numbered


# ------------------------------------------------------------------------------ encoded clips

class Clips:
    """Encoded clips: our index.jsonl, a published `.list` (one meta JSON per line), or a list of meta JSON
    paths.

    `entries`: dicts with source_id, short_caption, long_caption, labels, pair_id, shape (16, F, H, W), and
    more.
    """

    def __init__(self, path):
        metas = None
        if isinstance(path, (list, tuple)):
            metas = path
            self.folder = Path(metas[0]).parent
        else:
            self.folder = Path(path).parent
            if Path(path).suffix == ".list":
                lines = [line.strip() for line in read_text(path).split("\n")]
                metas = [_beside(line, self.folder) for line in lines if line]

        if metas is None:
            self.entries = [entry for _, entry in read_json_lines(path, ENTRY)]
            for entry in self.entries:
                entry["file"] = self.folder / entry["file"]
                if not names_a_file(entry["source_id"]):  # results are named after it
                    raise InputError(f"{path}: the source_id {entry['source_id']!r} cannot name a file; "
                                     f"leave out slashes")
        else:
            self.entries = [_published(Path(meta)) for meta in metas]
        if not self.entries:
            raise InputError(f"{path} is empty; give the index.jsonl that data.py writes")

        for entry in self.entries:
            entry["shape"] = tuple(entry["shape"])
            entry["labels"] = read_labels(entry["labels"])
            for name, value in entry["labels"].items():
                if value not in (0, 1, None):
                    raise InputError(f"clip {entry['source_id']}: {name} is {value!r}; write 1, 0 or null")

    def __len__(self):
        return len(self.entries)

    def select(self, *labels):
        """The indices of the clips that are annotated for at least one of the labels."""
        chosen = []
        for i, entry in enumerate(self.entries):
            if any(label_of(entry["labels"], name) is not None for name in labels):
                chosen.append(i)
        return chosen

    @classmethod
    def two_lists(cls, better, worse):
        """The published form of pairs: a clip in the first list is better than those of the same prompt in
        the second."""
        clips, others = cls(better), cls(worse)
        for part, quality in ((clips, 1), (others, 0)):
            for entry in part.entries:
                entry["labels"] = dict.fromkeys(ANNOTATIONS, quality)
                entry["pair_id"] = entry.get("pair_id") or entry["short_caption"]
        clips.entries += others.entries
        return clips

    def pairs(self, label):
        """[(better, worse)]: the indices of every two clips that share a pair_id and differ in the label."""
        groups = {}  # pair_id: (poor clips, good clips)
        for i in self.select(label):
            entry = self.entries[i]
            if entry.get("pair_id"):
                poor_and_good = groups.setdefault(entry["pair_id"], ([], []))
                poor_and_good[label_of(entry["labels"], label)].append(i)
        found = []
        for poor, good in groups.values():
            found += itertools.product(good, poor)

        for better, worse in found:
            a, b = self.entries[better], self.entries[worse]
            if a["short_caption"] != b["short_caption"]:
                raise InputError(f"clips {a['source_id']} and {b['source_id']} share the pair_id "
                                 f"{a['pair_id']} and have different captions; pair clips of one prompt")
            if a["shape"] != b["shape"]:
                raise InputError(f"clips {a['source_id']} and {b['source_id']} are a pair and have different "
                                 f"shapes; encode them with one --size and --frames")
        return found

    @property
    def prompts(self):
        """{"empty", "negative"}: text states (n, text_dim), from prompts.safetensors beside the index or
        list."""
        file = self.folder / "prompts.safetensors"
        states = {name: read() for name, _, read in read_safetensors(file)}
        for name in ("empty", "negative"):
            state = states.get(name)
            if state is None or state.ndim != 2 or not len(state) or not _is_sound(state):
                raise InputError(f"{file}: {name} is missing, NaN, infinite or not (tokens, channels); "
                                 f"write it again with data.py")
        return states

    def check(self):
        """Raise InputError, naming clips and files, unless all tensors exist and have the right shapes."""
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
        text_short, text_long (n, text_dim), entry.

        Raises InputError if a value is missing, NaN or infinite.
        """
        entry = self.entries[i]
        sample = {"condition": None, "clip": None, "entry": entry}
        for name, (file, _, read) in self._headers(entry).items():
            sample[name] = read()
            if not _is_sound(sample[name]):
                raise InputError(f"clip {entry['source_id']}: {file} has NaN or infinite {name}, or other "
                                 f"than floating-point numbers; encode it again")
        return sample

    def _headers(self, entry):
        """{name: (file, shape, read)} of a clip's tensors, their shapes checked; `read()` fetches the
        values."""
        headers = {}
        channels, *grid = entry["shape"]
        try:
            for name, file in entry.get("arrays", {}).items():
                array = _array(file, name)
                headers[name] = file, array.shape, partial(_copied, array)
            if "file" in entry:
                for name, shape, read in read_safetensors(entry["file"]):
                    headers[name] = entry["file"], shape, read

            needed = ["latents", "text_short", "text_long"]
            if entry.get("model_type") in I2V:
                needed.append("condition")
            for name in needed:
                if name not in headers:
                    file = entry.get("file", "its meta file")
                    raise InputError(f"{name} is missing in {file}; encode it again")
            right = {"latents": [(channels, *grid)], "condition": [(channels, *grid), (channels + 4, *grid)]}
            for name, (file, shape, _) in headers.items():
                axes = 4 if name in right else 2
                if len(shape) != axes or 0 in shape or shape not in right.get(name, [shape]):
                    raise InputError(f"{file} holds {name} of the wrong shape {list(shape)}; encode it again")
        except InputError as error:
            raise InputError(f"clip {entry['source_id']}: {error}") from None
        return headers


def _published(meta):
    """The entry of a clip that the published code has encoded, from its meta JSON."""
    given = read_json(meta, META)
    arrays = {}
    for name, keys in ARRAYS.items():
        paths = [given[key] for key in keys if given.get(key)]
        if paths:
            arrays[name] = _beside(paths[0], meta.parent)
    if "latents" not in arrays:
        raise InputError(f"{meta} names no latents ({', '.join(ARRAYS['latents'])}); give a meta file")
    prompt = given.get("prompt", "")
    return {"source_id": str(given.get("source_id") or meta.stem), "pair_id": given.get("pair_id"),
            "short_caption": given.get("short_caption", prompt),
            "long_caption": given.get("long_caption", prompt),
            "labels": given, "shape": _array(arrays["latents"], "latents").shape, "arrays": arrays}


def _beside(path, folder):
    """Published files name others relative to where the code ran; look next to the naming file first."""
    return folder / path if (folder / path).exists() else Path(path)


def _array(file, name):
    """A published array, memory-mapped, without its batch axis; the tokens of CLIP's pictures are joined."""
    check_file(file)
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if array.dtype.kind != "f":
            raise ValueError(f"it holds {array.dtype}")
        return array.reshape(-1, array.shape[-1]) if name == "clip" else array[0]
    except Exception as error:  # numpy raises many kinds; nothing from the file has been run
        raise InputError(f"{file} is damaged or not an array ({error}); copy or make it again") from None


def _is_sound(tensor):
    return tensor.is_floating_point() and is_finite(tensor)


def _copied(array):
    return torch.from_numpy(array.copy())  # a memory map is read-only


# ------------------------------------------------------------------------------ batches

class Order:
    """Which clips make up batch number 0, 1, 2, ...: a pure function of (seed, number), so a run resumes from
    its step number alone, and any number of ranks sees the same batches.

    Each epoch draws every clip once, in a new permutation. A batch holds clips of one shape; a shape's last
    batch is filled up from the beginning of that shape. `subset`: only these indices (default all).
    `repeated`: a sentence for each shape with fewer clips than a batch, whose batch repeats clips.
    Threads may look batches up at the same time.
    """

    def __init__(self, shapes, batch_size, seed, subset=None):
        self.batch_size, self.seed = batch_size, seed
        self.groups = {}  # shape: indices
        if subset is None:
            subset = range(len(shapes))
        for i in subset:
            self.groups.setdefault(tuple(shapes[i]), []).append(i)
        if not self.groups:
            raise InputError("no clip is left to train on; check the index and its labels")
        groups = self.groups.values()
        self.batches_per_epoch = sum(math.ceil(len(group) / batch_size) for group in groups)
        self.repeated = []
        for shape, group in self.groups.items():
            if len(group) < batch_size:
                self.repeated.append(
                    f"batches of shape {list(shape)} repeat clips, because only {len(group)} have this shape "
                    f"and --batch_size is {batch_size}; add clips of this shape, leave it out, or lower "
                    f"--batch_size")
        self.epochs = {}  # the two that were drawn last: a thread that reads ahead may be in the next epoch
        self.lock = threading.Lock()

    def __getitem__(self, number):
        epoch, place = divmod(number, self.batches_per_epoch)
        with self.lock:
            if epoch not in self.epochs:
                if len(self.epochs) == 2:
                    del self.epochs[next(iter(self.epochs))]
                self.epochs[epoch] = self._draw(epoch)
            return list(self.epochs[epoch][place])

    def _draw(self, epoch):
        """All batches of an epoch."""
        draw = random.Random(f"order {self.seed} {epoch}")
        batches = []
        for group in self.groups.values():
            clips = draw.sample(group, len(group))
            for start in range(0, len(clips), self.batch_size):
                batches.append([clips[i % len(clips)] for i in range(start, start + self.batch_size)])
        draw.shuffle(batches)
        return batches


def prefetch(load, items):
    """Yield (item, load(item)) for each item, while a thread loads the next one."""
    with ThreadPoolExecutor(1) as thread:
        before = None
        for item in items:
            following = item, thread.submit(load, item)
            if before:
                yield before[0], before[1].result()
            before = following
        if before:
            yield before[0], before[1].result()


def choose_caption(sample, empty_prompt, long_caption, drop_prompt, *key):
    """The text states (n, text_dim) that a clip comes with: those of its long caption with probability
    `long_caption`, else of its short one; with probability `drop_prompt` those of the empty prompt instead.
    `key` decides the draws."""
    if parallel.uniform(*key, "drop") < drop_prompt:
        return empty_prompt
    name = "text_long" if parallel.uniform(*key, "caption") < long_caption else "text_short"
    return sample[name].to(empty_prompt.device)


def collate(samples, config, device):
    """Samples from `Clips.load` -> latents (B, C, F, H, W) and a model's image condition.

    The condition is {} for text to video, else {"y": (B, 20, F, H, W)}, and "clip_fea": (B, tokens, 1280)
    where config.use_clip. Raises InputError, naming the clip, if it was encoded without what the model needs.
    """
    names = {"latents": "latents"}  # the model's argument: its name in a sample
    if config.model_type in I2V:
        names["y"] = "condition"
        if config.use_clip:
            names["clip_fea"] = "clip"
    for sample in samples:
        width = sample["text_short"].shape[1]
        if width != config.text_dim:
            raise InputError(f"clip {sample['entry']['source_id']} has text states of width {width}, but the "
                             f"model takes {config.text_dim}; encode it with data.py --model of that kind")
    batch = {}
    for argument, name in names.items():
        for sample in samples:
            if sample[name] is None:
                raise InputError(f"clip {sample['entry']['source_id']} was encoded without {name}, which "
                                 f"this {config.model_type} model needs; encode it with data.py --model of "
                                 f"that kind")
        batch[argument] = torch.stack([sample[name] for sample in samples]).to(device)
    if "y" in batch:
        batch["y"] = condition_input(batch["y"], config.model_type)
    return batch.pop("latents"), batch


def condition_input(condition, model_type):
    """The image condition y (B, 20, F, H, W) of an image-to-video model; the mask's 4 channels come first.

    `condition` is (B, 16, F, H, W); one that has its mask (20 channels) is returned as it is. The mask marks
    the given pixel frames, four to a latent frame. The first pixel frame alone makes latent frame 0, and its
    mark counts four times: i2v has ones in latent frame 0, flf2v also in the last channel of the last one.
    """
    if condition.shape[1] == 20:
        return condition
    if model_type not in I2V or condition.shape[1] != 16:
        raise InputError(f"a {model_type} model cannot use a condition of {condition.shape[1]} channels; "
                         f"give 16 channels to an i2v or flf2v model")
    mask = torch.zeros_like(condition[:, :4])  # (B, 4, F, H, W)
    mask[:, :, 0] = 1
    if model_type == "flf2v":
        mask[:, 3, -1] = 1
    return torch.cat([mask, condition], dim=1)  # (B, 20, F, H, W)
