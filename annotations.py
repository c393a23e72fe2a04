"""Lists of annotated clips: read them, and find every fault before a clip is encoded.

A list is .json, .jsonl or .csv; an entry names a video and its captions, and may have labels:

    [{"video_path": "a.mp4", "short_caption": "a ball", "long_caption": "a red ...", "physics_quality": 1}]

A label is 1 (good) or 0 (poor). One that is absent or null is not annotated, and never counts as 0.
"""
import csv
import difflib
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from clips import ANNOTATIONS, LABELS, label_of, read_json_lines, read_labels, read_text
from files import InputError, read_json
from video import check_video


def read_list(path):
    """Read an annotation list: .json (a list), .jsonl, or .csv with a header. `video`, `prompt` are read too.

    Returns dicts: line (in a .json the entry's number), source_id (default: the video's name), video_path
    (beside the list if relative), short_caption, long_caption (each stands in for the other), labels
    {name: 1, 0 or None}, pair_id or None. Labels without a meaning stay as they are, for `faults` to report.
    Raises InputError if the list as a whole cannot be read.
    """
    path = Path(path)
    if path.suffix == ".json":
        found = read_json(path)
        numbered = list(enumerate(found, 1)) if isinstance(found, list) else []
    elif path.suffix == ".jsonl":
        numbered = read_json_lines(path)
    elif path.suffix == ".csv":
        reader = csv.DictReader(read_text(path))
        numbered = [(reader.line_num, row) for row in reader]
    else:
        raise InputError(f"{path} is not an annotation list; give a .json, .jsonl or .csv file")
    if not numbered or not all(isinstance(given, dict) for _, given in numbered):
        raise InputError(f"{path} is not a list of clips; give each an object with video_path and captions")
    return [_entry(path, line, given) for line, given in numbered]


def _entry(path, line, given):
    if isinstance(given.get("labels"), dict):
        given = given | given["labels"]

    def text(*names):
        """The first of these values that is not empty."""
        for name in names:
            value = given.get(name)
            if value is not None and str(value).strip():
                return str(value).strip()
        return ""

    misspelt = {}
    for name in given:
        if not name or name in ANNOTATIONS:
            continue
        if name.endswith(("_quality", "_alignment")) or difflib.get_close_matches(name, ANNOTATIONS):
            misspelt[name] = given[name]
    video = text("video_path", "video")
    return {"line": line, "source_id": text("source_id") or Path(video).stem,
            "video_path": str(path.parent / video) if video else None,
            "short_caption": text("short_caption", "prompt", "long_caption"),
            "long_caption": text("long_caption", "prompt", "short_caption"),
            "labels": read_labels(given) | misspelt, "pair_id": text("pair_id") or None}


def faults(entries, label=None, frames=None, fps=16):
    """Yield a sentence for every fault of a list from `read_list`, each with its line. Decodes all videos.

    With `label`, a clip that is not annotated for it is a fault. A clip needs `frames` (5) at `fps`.
    """
    listed = list_faults(entries, label)
    for entry, sentences in zip(tqdm(entries, desc="checking", disable=None), listed, strict=True):
        yield from video_faults(entry, frames, fps)
        yield from sentences


def list_faults(entries, label=None):
    """For each clip, sentences about the faults that can be found without decoding its video."""
    listed = []
    taken = {}  # source_id: line
    for entry in entries:
        name = entry["source_id"]
        found = []
        if not entry["short_caption"]:  # then the long one is empty too
            found.append("the caption is empty")
        for label_name, value in entry["labels"].items():
            if label_name not in ANNOTATIONS:
                found.append(f"{label_name} is not a label; the labels are {', '.join(ANNOTATIONS)}")
            elif value not in (0, 1, None):
                found.append(f"{label_name} is {value!r}; write 1 or good, 0 or poor, or null if unknown")
        if label and label_of(entry["labels"], label) is None:
            found.append(f"{label} is not annotated")
        if name in taken:
            found.append(f"line {taken[name]} has the same source_id; give each clip its own")
        elif Path(name).name != name or len(name.encode()) > 200:
            found.append("source_id cannot name a file; leave out slashes and keep it short")
        taken.setdefault(name, entry["line"])
        listed.append([_where(entry) + sentence for sentence in found])
    return listed


def video_faults(entry, frames, fps):
    """[a sentence] if a clip's video is missing, damaged or too short, else []."""
    if entry["video_path"] is None:
        return [_where(entry) + "video_path is missing"]
    try:
        check_video(entry["video_path"], fps, frames)
    except InputError as error:
        return [_where(entry) + str(error)]
    return []


def _where(entry):
    return f"line {entry['line']} ({entry['source_id']}): "


def balance(entries):
    """A table: for each label, how many clips are good, poor and not annotated."""
    rows = [f"{'':16}{'good':>8}{'poor':>8}{'absent':>8}"]
    for name in LABELS:
        count = Counter(label_of(entry["labels"], name) for entry in entries)
        rows.append(f"{name:16}{count[1]:8}{count[0]:8}{count[None]:8}")
    return "\n".join(rows)
