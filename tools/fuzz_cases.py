"""The wrong inputs of fuzz.py: the rules that make them, and why some may be accepted."""
import argparse
import json
import math
import random
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from clip import CLIP_FILE
from t5 import SPIECE_FILE, T5_FILE
from tools import bench
from tools.fuzz_world import COMMANDS, SCRIPTS, read_document, write_document
from vae import VAE_FILE

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Case(NamedTuple):
    """One command with one thing wrong."""
    command: str           # its name in COMMANDS
    wrong: str             # what is wrong, in words
    argv: list
    change: object = None  # function of the copied world's path that makes a file wrong
    kind: str = ""         # of the rule
    argument: str = ""     # why it may be accepted
    largest: int = 0       # bytes that a file may have, 0 for any number
    moved: bool = False    # whether the results may be elsewhere, but in place of no other file


# ------------------------------------------------------------------------------ flags

VALUES = ["nan", "inf", "-inf", "-1", "0", "1.5", "9" * 30, "word", "", "²"]
TEXTS = ["word", "", "9" * 300, "nan", ".", "gone/there", "random.bin"]
PAIRS = ["0x0", "-16x16", "nanx16", f"{'9' * 30}x16", "16x", "40x24", "²x²"]  # for --size
COUNTS_IN = [  # (pattern of "script flag", the command in which it counts if that is not the script's first)
    ("train_prfl (samples|sample_.*|val|stop_if_hacked)", "train_prfl samples"),
    ("train_prfl lora_.*", "train_prfl lora"), ("train_prfl rwr_.*", "train_prfl rwr"),
    ("train_pavrm lora_.*", "train_pavrm lora"),
    ("sample (best_of|reward|labels|drop_at|keep)", "sample best"),
    ("sample (image|last_image)", "sample image"), ("sample count", "sample many"),
    ("score (video|prompt|model|size|frames|fps)", "score video"), ("data label", "data check"),
    ("bench (phases|k)", "bench prfl"), ("bench lora.*", "bench lora"),
    ("bench (guidance|solver_steps)", "bench sample"), ("bench (video|vae_dim)", "bench encode")]


class Found(Exception):
    """Carries a script's parser out of it."""


def parser_of(script, argv):
    def found(parser, *_):
        raise Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", found), \
            mock.patch("sys.argv", ["script.py", *argv]):
        try:
            script.main()
        except Found as carrier:
            return carrier.args[0]


def flag_cases():
    """Each flag of each script with each of the values above; each flag once without its value."""
    parsers = [(name, name, parser_of(script, [])) for name, script in SCRIPTS.items()]
    parsers.append(("bench", "bench plan", parser_of(bench, ["--plan", "prfl"])))
    for script, usual, parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            command = usual
            for pattern, other in COUNTS_IN:
                if usual == script and re.fullmatch(pattern, f"{script} {action.dest}"):
                    command = other
            base = COMMANDS[command].argv
            values = TEXTS if action.type is None and not action.choices else VALUES
            if action.dest == "size":
                values = values + PAIRS
            if not action.option_strings:
                for value in values:
                    yield flag_case(command, f"{action.dest} {value}", [value, *base[1:]])
                continue
            flag = action.option_strings[-1]
            if action.nargs == 0:
                values = ["word", ""]
            for value in values:
                if isinstance(action.nargs, int) and action.nargs > 1:
                    yield flag_case(command, f"{flag} {value}", [*base, flag, *[value] * action.nargs])
                else:
                    yield flag_case(command, f"{flag}={value}", [*base, f"{flag}={value}"])
            if action.nargs != 0:
                yield flag_case(command, flag, [*base, flag])


def flag_case(command, wrong, argv):
    wrong = wrong if len(wrong) < 60 else f"{wrong[:40]}..."
    moved = re.match(r"--(output|save_file)", wrong) or command == "score convert"
    return Case(command, wrong, argv, kind="flag", moved=bool(moved))


def argument_cases():
    """Words that are no flags, and files of flags that cannot be read."""
    contents = {"quote.args": b"--seed '1", "bytes.args": b"\xff\xfe\x00", "words.args": b"--no_such_flag 3"}

    def write(name, directory):
        if name in contents:
            (directory / name).write_bytes(contents[name])

    words = ["--no_such_flag", "--see", "stray", "@gone.args", "@.", *(f"@{name}" for name in contents)]
    for command in SCRIPTS:
        for word in words:
            yield Case(command, word, [*COMMANDS[command].argv, word], partial(write, word[1:]), "flag")


# ------------------------------------------------------------------------------ JSON

DOCUMENTS = {
    "t2v/config.json": ["train_prfl", "sample"],
    "reward/config.json": ["score", "train_prfl"],
    "t2v/sampling.json": ["sample", "data"],
    f"sharded/{WEIGHTS}.index.json": ["train_prfl sharded"],
    "clips/index.jsonl": ["train_prfl", "train_pavrm pairs", "score"],
    "published/a.json": ["train_prfl published"],
    "list.json": ["data", "data check", "label"],
    "list.jsonl": ["data jsonl"],
    "run/run.json": ["train_prfl resume", "plot"],
    "run/log.jsonl": ["plot", "train_prfl resume"],
    "run/samples/step_000000/evaluation.json": ["train_prfl resume samples"],
    "pavrm/log.jsonl": ["plot pavrm"],
    "scores/scores.json": ["plot scores"],
    "made/clips.json": ["sample many"],
}
WRONG = [None, "word", "", True, -1, 0.5, 10 ** 30, math.nan, []]


def places(value, path=()):
    """The path of each field below a JSON value. Of a list, and of objects that are alike, the first counts;
    of an object with many fields, four do."""
    items = []
    if isinstance(value, dict):
        alike = all(isinstance(inner, dict) for inner in value.values())
        items = list(value.items())[:1 if alike else 4 if len(value) > 20 else None]
    elif isinstance(value, list):
        items = [(0, inner) for inner in value[:1]]
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def set_field(file, path, new, directory):
    """Put `new` into a field; ... removes it."""
    holder = {"all": read_document(directory / file)}
    target, *path = holder, "all", *path
    for key in path[:-1]:
        target = target[key]
    if new is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = new(target[path[-1]]) if callable(new) else new
    write_document(directory / file, holder["all"])


def field_cases(world):
    """Each field of each JSON file: missing, of another type, huge, nested; and the whole value so."""
    changes = {"missing": ..., "in a list": lambda old: [old], "in an object": lambda old: {"a": old}}
    changes |= {json.dumps(value)[:12]: value for value in WRONG}
    for file, commands in DOCUMENTS.items():
        document = read_document(world / file)
        for path in [(), *places(document)]:
            for words, new in changes.items():
                if path == () and new is ...:
                    continue  # a file that is missing: see below
                wrong = f"{file}: {'.'.join(map(str, path)) or 'all'} {words}"
                for command in commands:
                    yield Case(command, wrong, COMMANDS[command].argv, partial(set_field, file, path, new),
                               "field")


# ------------------------------------------------------------------------------ text

def table_cases():
    """A list in CSV whose columns, quotes or cells are wrong, and texts that are not UTF-8."""
    head = "video_path,source_id,short_caption,long_caption,pair_id,physics_quality,human_quality"
    row = 'b.mp4,b,"a ball","a red ball",p,1,1'
    texts = {
        "empty caption": row.replace('"a ball"', "").replace('"a red ball"', ""),
        "comma in a caption": row.replace('"a ball"', "a ball, red"),
        "open quote": row.replace('"a red ball"', '"a red ball'), "line of two clips": f"{row},{row}",
        "short line": "b.mp4,b", "NUL": row.replace("ball", "ba\0ll"),
        "latin": row.replace("ball", "b\xe4ll"), "label": row.replace("1,1", "fine,1"),
        "label NaN": row.replace("1,1", "nan,1"),
        "label -1": row.replace("1,1", "-1,1"), "id ..": row.replace(",b,", ",..,"),
        "id in capitals": row.replace(",b,", ",A,"), "id again": row.replace(",b,", ",a,"),
        "id with a line break": row.replace(",b,", ',"a\nb",'), "no video": row.replace("b.mp4", ""),
        "another video": row.replace("b.mp4", "gone.mp4")}
    tables = {words: f"{head}\na.mp4,a,ball,ball,p,0,1\n{text}\n" for words, text in texts.items()}
    tables |= {"no header": f"{row}\n{row}\n", "semicolons": f"{head}\n{row}\n".replace(",", ";"),
               "column twice": f"{head},video_path\n{row},b.mp4\n", "header alone": f"{head}\n",
               "misspelt label": f"{head.replace('physics', 'fysics')}\n{row}\n"}

    def write(file, text, encoding, directory):
        (directory / file).write_bytes(text.encode(encoding))

    for words, text in tables.items():
        yield Case("data csv", f"list.csv: {words}", COMMANDS["data csv"].argv,
                   partial(write, "list.csv", text, "latin-1"), "text")
    for words, text in {"latin": "ein B\xe4r\n", "blank": "\n \n", "long": "a ball " * 3000}.items():
        yield Case("sample prompts", f"prompts.txt: {words}", COMMANDS["sample prompts"].argv,
                   partial(write, "prompts.txt", text, "latin-1"), "text")


# ------------------------------------------------------------------------------ tensors

TENSORS = {
    f"t2v/{WEIGHTS}": ["train_prfl", "train_pavrm", "sample"],
    f"t2v/{VAE_FILE}": ["sample", "data", "train_prfl samples"],
    f"t2v/{T5_FILE}": ["sample", "data"],
    f"i2v/{CLIP_FILE}": ["data image"],
    "reward/pavrm.safetensors": ["train_prfl", "score", "sample best"],
    "clips/a.safetensors": ["train_prfl", "train_pavrm", "score"],
    "clips/prompts.safetensors": ["train_prfl"],
    "convert/query.pth": ["score convert"],
    "convert/mlp.pth": ["score convert"],
    "lora/q.safetensors": ["lora", "train_prfl lora"],
    "published/a_latents.npy": ["train_prfl published"],
    "published/a_short.npy": ["train_prfl published"],
    "run/samples/step_000000/0.safetensors": ["train_prfl resume samples"],
}


def read_tensors(path):
    if path.suffix == ".npy":
        return {"array": torch.from_numpy(np.load(path))}
    return torch.load(path) if path.suffix == ".pth" else load_file(path)


def write_tensors(path, tensors):
    if path.suffix == ".npy":
        np.save(path, tensors["array"].numpy())
    elif path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def with_value(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[len(tensor.view(-1)) // 2] = value
        return tensor
    return change


CHANGES = {"NaN": with_value(math.nan), "inf": with_value(math.inf), "-inf": with_value(-math.inf),
           "huge": with_value(1e38), "one row less": lambda tensor: tensor[:-1],
           "one axis more": lambda tensor: tensor[None], "empty": lambda tensor: tensor[:0],
           "int64": torch.Tensor.long, "bool": torch.Tensor.bool, "float16": torch.Tensor.half,
           "float64": torch.Tensor.double, "complex": lambda tensor: tensor.to(torch.complex64)}


def change_tensor(file, name, change, directory):
    """Change one tensor of a file; None removes it."""
    tensors = read_tensors(directory / file)
    if change:
        tensors[name] = change(tensors[name])
    else:
        tensors["another name"] = tensors.pop(name)
    write_tensors(directory / file, tensors)


def tensor_cases(world):
    """The first, the middle and the last tensor of each file, with each of the changes, and renamed."""
    for file, commands in TENSORS.items():
        names = list(read_tensors(world / file))
        for name in dict.fromkeys([names[0], names[len(names) // 2], names[-1]]):
            for words, change in (CHANGES | {"renamed": None}).items():
                if file.endswith(".npy") and not change:
                    continue
                for command in commands:
                    yield Case(command, f"{file}: {name} {words}", COMMANDS[command].argv,
                               partial(change_tensor, file, name, change), "tensor")


# ------------------------------------------------------------------------------ files

FILES = {
    f"t2v/{SPIECE_FILE}": ["sample", "data"],
    "a.mp4": ["data", "data check", "score video", "bench encode"],
    "image.png": ["sample image"],
    "prompts.txt": ["sample prompts"],
    "list.csv": ["data csv"],
    "published/p.list": ["train_prfl published"],
    "encoded/prompts.safetensors": ["data again"],
    "encoded/clips/a.safetensors": ["data again"],
    "run/checkpoints/step_000001/.metadata": ["train_prfl resume"],
    "run/checkpoints/step_000001/__0_0.distcp": ["train_prfl resume"],
}


def zero(path):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(64) + content[middle + 64:])


def replace(make):
    def change(path):
        path.unlink()
        make(path)
    return change


FAULTS = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3]),
    "random": lambda path: path.write_bytes(random.Random(0).randbytes(1000)),
    "a directory": replace(Path.mkdir),
    "a link to nowhere": replace(lambda path: path.symlink_to("nowhere")),
    "a link to itself": replace(lambda path: path.symlink_to(path.name)),
    "unreadable": lambda path: path.chmod(0),
    "64 bytes zero": zero,
}


def file_cases():
    """Each file that a script reads with each fault. Bytes that are zero show only where there is a checksum
    or a syntax: weights may be anything."""
    for file, commands in (DOCUMENTS | TENSORS | FILES).items():
        for words, fault in FAULTS.items():
            if words == "64 bytes zero" and file in TENSORS:
                continue
            for command in commands:
                yield Case(command, f"{file}: {words}", COMMANDS[command].argv,
                           lambda directory, file=file, fault=fault: fault(directory / file), "file")


# ------------------------------------------------------------------------------ results

RESULTS = {
    "train_prfl": ["model", "checkpoints", "log.jsonl", "run.json"], "train_pavrm": ["reward", "log.jsonl"],
    "score": ["scores.json"], "score convert": ["config.json"], "sample output": ["0-0.mp4", "clips.json"],
    "data": ["index.jsonl", "prompts.safetensors", "clips/a.safetensors"]}


def place_cases():
    """The place of the results is a file, a link to nowhere, not writable, full, or another thing's."""
    def put(path, directory):
        (directory / "out" / path).mkdir(parents=True)
        (directory / "out" / path / "mine.txt").write_text("mine")

    changes = {"a file": lambda directory: (directory / "out").write_text("mine"),
               "a link to nowhere": lambda directory: (directory / "out").symlink_to("nowhere/at/all"),
               "not writable": lambda directory: (directory / "out").mkdir(0o555)}
    for command, names in RESULTS.items():
        argv = COMMANDS[command].argv
        for words, change in changes.items():
            yield Case(command, f"out is {words}", argv, change, "place")
        yield Case(command, "the disk is full", argv, kind="place", largest=3000)
        for name in names:
            yield Case(command, f"out/{name} is somebody's directory", argv, partial(put, name), "place")


# ------------------------------------------------------------------------------ what may be accepted

WHY = [  # (pattern of "command: what is wrong", why it is right to accept it)
    (r".*: --(output|save_file)=.+", "any name may be that of results"),
    (r"demo: --output=.+", "any name may be that of results"),
    (r".*: --(prompt|negative_prompt)=.+", "any text may be a prompt"),
    (r"sample: --negative_prompt=", "no negative prompt"),
    (r".*: --(lr|head_lr|weight_decay|reward_weight|kl_weight|warmup|ema|long_caption|drop_prompt|lora_rank"
     r"|samples|sample_every|export_every)=0", "0 turns it off, as its help says"),
    (r".*guidance=0", "the negative prompt alone: a scale like others"),
    (r".*: --(seed|k|train_blocks|timesteps|eval_timesteps|warmup)=0", "counted from 0"),
    (r"train_pavrm: --train_blocks", "nothing after the flag: the heads alone"),
    (r"label: --port=0", "any free port"),
    (r".*: --(lr|head_lr|weight_decay|max_norm|shift|reward_weight|kl_weight|lora_alpha|rwr_temperature"
     r"|timeout|fps|\w*guidance)=1.5", "a value like others"),

    (r".*/config.json: eps 0.5", "a value like others"),
    (r".*/config.json: (eps|text_len) missing", "that of the official models takes its place"),
    (r".*sampling.json: .* missing", "the published setting takes its place"),
    (r".*sampling.json: (shift|guidance|fps) 0.5", "a value like others"),
    (r".*sampling.json: (negative_prompt|prompt.0) (\"word\"|\"\")", "any text may be a prompt"),
    (r"label: list.json: 0.\w+_quality (?!missing|null|true|\"\").*", ""),  # somebody's label would be lost
    (r"label: list.json: .*", "labelling changes one label, and all else stays as it is"),
    (r"data.*: list.jsonl?: 0 missing", "a clip fewer is a list too"),
    (r"data.*: list.*caption (missing|null|\"\")", "the other caption stands in for it"),
    (r"data.*: list.*(caption|source_id|pair_id) .*", "any text or number may be a caption or a name"),
    (r"data.*: list.*_quality (missing|null|\"\")", "not annotated, and the index says so"),
    (r"data.*: list.*_quality true", "true is 1"),
    (r"(score|train_\w+)( \w+)?: clips/index.jsonl: 0 missing", "a clip fewer is an index too"),
    (r"(score|train_\w+)( \w+)?: clips/index.jsonl: 0.(source_id|pair_id|\w+_caption) .*",
     "any text or number may be a caption or a name"),
    (r"(score|train_\w+)( \w+)?: clips/index.jsonl: 0.labels.\w+ (missing|null|\"\"|true)",
     "not annotated, or good, as the same words say in a list"),
    (r"plot.*: .*/(log.jsonl|scores.json): .*", "what is a finite number is drawn, and nothing else"),
    (r"train_prfl resume: run/log.jsonl: .*", "whole lines of earlier steps stay as they are, others go"),
    (r"sample many: made/clips.json: .*", "the entries of other videos stay as they are"),

    (r".*(float16|float64)", "converted when it is loaded"),
    (r".*(safetensors|pth): .* huge", "finite, and so a weight like others"),
    (r"(score|train_\w+): clips/a.safetensors: text_\w+ one row less", "a caption of fewer tokens"),
    (r".*: token_embedding.weight one row less", "the row of no token, of which umT5 has 84"),
    (r".*a.mp4: 64 bytes zero", "a video has no checksum, and its decoder conceals damage"),
    (r"data again: encoded/.*: (missing|a link to .*)", "encoded again, as what is not there"),
    (r"sample prompts: prompts.txt: cut off", "a text has no mark at its end"),
    (r"sample prompts: prompts.txt: long", "cut to the tokens that the model takes, as officially"),
    (r"data image: i2v/models_clip.*: missing", "the image-to-video models of Wan2.2 have no CLIP"),
    (r"train_prfl resume samples: run/samples/.*: (missing|a directory|a link to .*)",
     "a run that began without samples has none"),
]


def argument(case):
    """Why a case may be accepted, "" if it must not be."""
    name = f"{case.command}: {case.wrong}"
    return next((why for pattern, why in WHY if re.fullmatch(pattern, name)), "")


# ------------------------------------------------------------------------------ all

def right_case(command):
    """A command as it is, with nothing wrong."""
    return Case(command, "as it is", COMMANDS[command].argv, kind="right")


def all_cases(world):
    cases = [*map(right_case, COMMANDS), *flag_cases(), *argument_cases(), *field_cases(world),
             *table_cases(), *tensor_cases(world), *file_cases(), *place_cases()]
    return [case._replace(argument=argument(case)) for case in cases]
