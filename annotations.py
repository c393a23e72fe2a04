"""Lists of annotated clips: read them, and find every fault before a clip is encoded.

A list is .json, .jsonl or .csv; an entry names a video and its captions, and may have labels:

    [{"video_path": "a.mp4", "short_caption": "a ball", "long_caption": "a red ...", "physics_quality": 1}]

A label is 1 (good) or 0 (poor). One that is absent or null is not annotated, and never counts as 0.
"""
import csv
import difflib
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

from clips import ANNOTATIONS, LABELS, label_of, names_a_file, read_json_lines, read_labels
from files import InputError, read_json, read_text
from video import check_video

TEXTS = ("video_path", "video", "source_id", "short_caption", "long_caption", "prompt", "pair_id")
NO_TEXT = re.compile("[\x00\ud800-\udfff]")  # NUL, or half a character, as JSON can have it


# ------------------------------------------------------------------------------ reading

def read_list(path):
    """Read an annotation list: .json (a list), .jsonl, or .csv with a header. `video`, `prompt` are read too.

    Returns dicts: line (in a .json the entry's number), source_id (default: the video's name), video_path
    (beside the list if relative), short_caption, long_caption (each stands in for the other), labels
    {name: 1, 0 or None}, pair_id or None, faults (sentences about what was given and could not be taken).
    Labels without a meaning stay as they are, for `list_faults` to report.
    Raises InputError if the list as a whole cannot be read.
    """
    path = Path(path)
    if path.suffix == ".json":
        found = read_json(path)
        numbered = list(enumerate(found, 1)) if isinstance(found, list) else []
    elif path.suffix == ".jsonl":
        numbered = read_json_lines(path)
    elif path.suffix == ".csv":
        numbered = _read_csv(path)
    else:
        raise InputError(f"{path} is not an annotation list; give a .json, .jsonl or .csv file")
    for line, given in numbered or [(1, None)]:
        if not isinstance(given, dict):
            raise InputError(f"{path} is not a list of clips (line {line}); "
                             f"give each an object with video_path and captions")
    return [_entry(path, line, given) for line, given in numbered]


def _read_csv(path):
    """[(line number, {column: field})]. Each line is split alone, so that an open quote cannot swallow the
    next clip."""
    rows, found = [], []
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            fields = next(csv.reader([text], strict=True, skipinitialspace=True))
        except csv.Error as error:
            found.append(f"line {line} cannot be split ({error}); close each quote on the same line, and "
                         f"double quotes inside quotes")
            continue
        rows.append((line, fields))
        if len(fields) != len(rows[0][1]):
            found.append(f"line {line} has {len(fields)} fields, and the header has {len(rows[0][1])}; "
                         f"put fields that contain commas in quotes")
    header = [name.strip() for name in rows[0][1]] if rows else []
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        found.insert(0, f"the header names {' and '.join(twice)} twice; keep one column of each")
    if not {"video", "video_path"} & set(header):
        found.insert(0, "the header names no video; write one such as video,prompt with commas, not "
                        "semicolons or tabs, between columns")
    if found:
        more = f"\n  and {len(found) - 20} more" if len(found) > 20 else ""
        raise InputError(f"{path} cannot be read as a table:\n  " + "\n  ".join(found[:20]) + more)
    return [(line, dict(zip(header, fields, strict=True))) for line, fields in rows[1:]]


def _entry(path, line, given):
    given, found = dict(given), []
    for name in TEXTS:
        value = given.get(name)
        fits = type(value) in (str, int, float) and value == value and not NO_TEXT.search(str(value))
        if value is not None and not fits:
            found.append(f"{name} is {value!r:.60}; write text")
            given[name] = None

    def text(*names):
        """The first of these values that is not empty."""
        for name in names:
            value = given.get(name)
            if value is not None and str(value).strip():
                return str(value).strip()
        return ""

    video = text("video_path", "video")
    return {"line": line, "source_id": text("source_id") or Path(video).stem,
            "video_path": str(path.parent / video) if video else None,
            "short_caption": text("short_caption", "prompt", "long_caption"),
            "long_caption": text("long_caption", "prompt", "short_caption"),
            "labels": _labels(given, found), "pair_id": text("pair_id") or None, "faults": found}


def _labels(given, found):
    """A clip's labels, which stand in its entry or in "labels" there. What would be lost is added to `found`.
    """
    inside = given.get("labels")
    if inside in (None, ""):
        inside = {}
    elif not isinstance(inside, dict):
        found.append(f'"labels" is {inside!r:.60}; name each label, as in {{"physics_quality": 1}}')
        inside = {}
    for part in (given, inside):
        for name, value in part.items():
            meant = None if name in ANNOTATIONS or value in (None, "") else label_meant(name)
            if meant == "motion_quality":
                found.append(f"{name!r}: motion_quality is physics_quality AND human_quality; "
                             f"label these two instead, or rename it if it is something else")
            elif meant:
                found.append(f"{name!r} is not a label; write {meant}, or rename it if it is something else")

    labels, more = read_labels(given), read_labels(inside)
    for name, value in more.items():
        if None not in (value, labels[name]) and value != labels[name]:
            found.append(f'{name} is {labels[name]!r:.60} beside "labels" and {value!r:.60} in it; keep one')
        if value is not None:
            labels[name] = value
    return labels


@lru_cache(1000)
def label_meant(name):
    """The label that a key is a spelling of, or None: video_quality is somebody else's column."""
    plain = {label.replace("_", ""): label for label in LABELS}
    near = difflib.get_close_matches(re.sub("[^a-z0-9]", "", name.lower()), plain, 1, 0.85)
    return plain[near[0]] if near else None


# ------------------------------------------------------------------------------ faults

def list_faults(entries):
    """For each clip, sentences about the faults that can be found without decoding its video."""
    listed = []
    taken = {}  # source_id: line
    for entry in entries:
        name = entry["source_id"]
        found = list(entry.get("faults", ()))
        if not entry["short_caption"]:  # then the long one is empty too
            found.append("the caption is empty")
        for label_name, value in entry["labels"].items():
            if value not in (0, 1, None):
                found.append(f"{label_name} is {value!r:.60}; write 1 or good, 0 or poor, or null if unknown")
        if not name and entry["video_path"] is None:
            pass  # it would be named after its video
        elif not names_a_file(name):
            found.append("source_id cannot name a file; leave out slashes, backslashes and line breaks, and "
                         "keep it short")
        elif name.casefold() in taken:  # some file systems do not tell A from a
            found.append(f"line {taken[name.casefold()]} has the same source_id (capitals do not count); "
                         f"give each clip its own")
        taken.setdefault(name.casefold(), entry["line"])
        listed.append([where(entry) + sentence for sentence in found])
    return listed


def video_faults(entry, frames, fps):
    """The sentences about a clip's video: (faults, because of which it is refused; warnings)."""
    if entry["video_path"] is None:
        return [where(entry) + "video_path is missing"], []
    try:
        warnings = check_video(entry["video_path"], fps, frames)
    except InputError as error:
        return [where(entry) + str(error)], []
    return [], [where(entry) + sentence for sentence in warnings or ()]


def where(entry):
    name = entry["source_id"]
    return f"line {entry['line']} ({name if name.isprintable() else repr(name)}): "


def balance(entries):
    """A table: for each label, how many clips are good, poor and not annotated."""
    rows = [f"{'':16}{'good':>8}{'poor':>8}{'absent':>8}"]
    for name in LABELS:
        count = Counter(label_of(entry["labels"], name) for entry in entries)
        rows.append(f"{name:16}{count[1]:8}{count[0]:8}{count[None]:8}")
    return "\n".join(rows)
