"""Does anything wrong go through? Give every script wrong inputs, made by rule, and count what happens.

    python -m tools.fuzz                      # all cases, two at a time
    python -m tools.fuzz --every 40           # each fortieth, as the suite does
    python -m tools.fuzz --only "sample: --"   # those whose name contains this

A case is a command with one thing wrong: a flag, a field of a JSON file, a tensor, a file, the place of the
results (fuzz_cases.py). It runs in a fork of this process, in a copy of a tiny world (fuzz_world.py), and
ends in one of these ways:

    refused    exit code 1 or 2, one short sentence, nothing half-written
    same       accepted, and the results are those of the right input, bit for bit: the value has no effect
    argued     accepted, the results are whole and finite, and a rule says why this is right
    wrong      accepted, for no reason, or with results that are not whole and finite
    traceback, hang, unclear (not one short sentence), torn (something half-written), touched (a file that is
               none of the results was changed)

After the first three nothing is wrong. Each of the others makes this script end with exit code 1.
"""
import ctypes
import gc
import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

import cli

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import demo
import label
from files import InputError, remove
from tools.fuzz_cases import DOCUMENTS, all_cases, right_case
from tools.fuzz_world import COMMANDS, make_world, script_of
from video import read_video

GOOD = ["refused", "same", "argued"]
BAD = ["wrong", "traceback", "hang", "unclear", "torn", "touched"]
MEMORY = 6 * 2**30  # bytes that a case may have; without a limit, a huge number could take the machine down
OTHER_LINES = re.compile(r"\s|.*Warning: |\[W|$")  # on stderr, beside the sentence: warnings and their code
RULES_OF_ROOT = 0x20080522  # the version of Linux's capset that is used below


# ------------------------------------------------------------------------------ running

def fork(function, *inputs):
    """Call a function in a process of its own; returns the number of that process.

    This process only ever forks, so that its forks begin alike: without threads, groups or models.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            function(*inputs)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
    return pid


def outcomes(cases, world, jobs, seconds):
    """Yield (case, outcome, details) for each case, `jobs` at a time."""
    right = {}    # command: (outcome, details, results) of the right input, as soon as it is needed
    running = {}  # pid: (case, directory)
    cases = iter(enumerate(cases))
    while True:
        while len(running) < jobs and (following := next(cases, None)):
            number, case = following
            directory = world.with_name(f"case{number}")
            running[fork(attend, case, world, directory, seconds)] = case, directory
        if not running:
            return
        case, directory = running.pop(os.wait()[0])
        outcome, details, results = outcome_in(directory)
        if outcome == "accepted":
            if case.command not in right:
                directory = world.with_name("right")
                os.waitpid(fork(attend, right_case(case.command), world, directory, seconds), 0)
                right[case.command] = outcome_in(directory)
            if results == right[case.command][2]:
                outcome, details = "same", "the results are those of the right input"
            else:
                outcome = "wrong"
        yield case, outcome, details


def attend(case, world, directory, seconds):
    """Run a case in a copy of the world, and write its outcome beside that copy."""
    shutil.copytree(world, directory, symlinks=True)
    if case.change:
        case.change(directory)
    before = stamps(directory)
    known = [fault_of(directory / name) for name in DOCUMENTS]  # a line that stays in a log stays as it is
    _, status = os.waitpid(fork(act, case, directory, seconds), 0)
    outcome = judge(case, directory, before, os.waitstatus_to_exitcode(status), known)
    Path(f"{directory}.json").write_text(json.dumps(outcome))


def outcome_in(directory):
    """What `attend` has written; the directory and all that belongs to it are removed."""
    outcome = json.loads(Path(f"{directory}.json").read_text())
    for end in ("", ".out", ".err", ".json"):
        remove(Path(f"{directory}{end}"))
    return outcome


def act(case, directory, seconds):
    """Run a case's script, as a user would, in this process."""
    os.chdir(directory)
    for descriptor, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{directory}{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.alarm(seconds)  # a hang ends by SIGALRM
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if case.largest:  # as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.largest, case.largest))
    # Root reads and writes everything. Without its capabilities it does not.
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(RULES_OF_ROOT, 0), (ctypes.c_uint32 * 6)())
    torch.cuda.is_available = lambda: False
    label.Server.serve_forever = label_and_leave
    demo.run = demo.build = lambda *_: None  # only the flags: the demo itself takes minutes
    sys.argv = [f"{case.command.split()[0]}.py", *case.argv]
    code = 0
    try:
        cli.run(script_of(case.command).main)
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def label_and_leave(server):
    """In place of the label page's server: one clip is labelled, then Ctrl-C."""
    server.set_label(0, 1)
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------ judging

def stamps(directory):
    """{name: what changes as soon as the file does}, of all files below a directory."""
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            stat = os.lstat(path)
            found[os.path.relpath(path, directory)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


def judge(case, directory, before, code, known):
    """(outcome, details, results) of a case that has ended; "accepted" is not decided yet.

    before: the `stamps` of its input. known: faults that this has.
    """
    printed, said = (Path(f"{directory}{end}").read_text(errors="replace") for end in (".out", ".err"))
    end = "\n".join(said.strip().splitlines()[-4:])[-600:]
    after = stamps(directory)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    written = [name for name in changed if name in after]
    others = [name for name in changed if not name.startswith(COMMANDS[case.command].writes)]
    if case.moved:  # only --save_file names a file, which it may replace
        others = [name for name in others if name in before and case.wrong != f"--save_file={name}"]
    faults = [fault_of(directory / name) for name in written]
    faults = [fault for fault in faults if fault and fault not in known]
    results = results_of(directory, written) or printed

    if code == -signal.SIGALRM:
        return "hang", end, results
    if code not in (0, 1, 2) or "Traceback (most" in said:
        return "traceback", f"exit code {code}; {end}", results
    if others:
        return "touched", f"{', '.join(others[:4])}; {end}", results
    if faults:
        return "torn" if code else "wrong", f"{'; '.join(faults[:3])}; {end}", results
    if case.kind == "right":
        return "wrong" if code else "same", end, results
    if code:
        outcome = "refused" if is_sentence(said) or case.command == "data check" else "unclear"
        return outcome, end, results
    if case.argument:
        return "argued", case.argument, results
    return "wrong" if case.kind == "flag" else "accepted", printed[-200:], results


def is_sentence(said):
    """Whether a program has said what is wrong as the project does: "error: " and one short sentence."""
    lines = said.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    others = [line for line in lines if line not in errors and not OTHER_LINES.match(line)]
    return len(errors) == 1 and len(errors[0]) < 600 and not others


def fault_of(path):
    """What is wrong with a file that was written: it is left over, not whole, or has values like NaN."""
    if path.name.endswith((".new", ".old")):
        return f"{path.name} is left over"
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        elif path.name == ".metadata":  # of a checkpoint
            whole = path.with_name("whole.pt")
            dcp_to_torch_save(path.parent, whole)
            tensors = torch.load(whole)
        else:
            tensors = {}
        if not all_finite(tensors):
            return f"{path.name} has values that are not finite"
        if path.suffix in (".json", ".jsonl"):
            text = path.read_text()
            for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
                json.loads(part, parse_constant=refuse)
        elif path.suffix == ".mp4":
            read_video(path)
        elif path.suffix == ".png" and not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
            return f"{path.name} is cut off"
    except Exception as error:
        return f"{path.name} is not whole: {error}"


def refuse(constant):
    raise ValueError(constant)


def all_finite(value):
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    return not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.isfinite().all()


def results_of(directory, names):
    """{name: hash} of those files that do not depend on when and how they were made."""
    results = {}
    for name in names:
        path = directory / name
        if not path.is_file() or path.name in ("run.json", "lock") or "checkpoints" in name:
            continue
        content = path.read_bytes()
        if path.name == "log.jsonl":
            content = re.sub(rb'"(seconds|gigabytes)": [^,}]*', b"", content)
        results[name] = hashlib.sha256(content).hexdigest()
    return results


# ------------------------------------------------------------------------------ the command

def fuzz(args):
    """Run the cases that the flags choose and print the table; returns how many went wrong."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory))
    try:
        world = root / "world"
        world.mkdir()
        if os.waitpid(fork(make_world, world), 0)[1]:
            raise InputError("the tiny world could not be made; see above")
        for name in (root / "modules").read_text().split():  # once, and not again in each case
            with suppress(Exception):
                importlib.import_module(name)
        gc.freeze()
        cases = [case for case in all_cases(world) if args.only in f"{case.command}: {case.wrong}"]
        cases = cases[args.first::args.every]
        table, accepted, bad = {}, Counter(), []
        for case, outcome, details in outcomes(cases, world, args.jobs, args.seconds):
            script = case.command.split()[0]
            table.setdefault(script, Counter())[outcome] += 1
            if outcome in ("same", "argued") and case.kind != "right":
                accepted[f"{script}, {case.kind}: {details}"] += 1
            if outcome in BAD:
                bad.append(f"{outcome}: {case.command}: {case.wrong}")
                print(bad[-1], details, sep="\n    ", flush=True)
    finally:
        shutil.rmtree(root)
    print(f"\n{'':12}" + "".join(f"{outcome:>10}" for outcome in GOOD + BAD))
    for script, count in [*table.items(), ("all", sum(table.values(), Counter()))]:
        print(f"{script:12}" + "".join(f"{count[outcome]:10}" for outcome in GOOD + BAD))
    print("\naccepted, and why:")
    for reason, count in sorted(accepted.items()):
        print(f"{count:5}  {reason}")
    print(f"\n{len(cases)} cases, {len(bad)} went wrong")
    return len(bad)


def main(argv=None):
    parser = cli.Parser("Give every script wrong inputs, made by rule, and count what happens.")
    parser.prog = "python -m tools.fuzz"
    add = parser.add_argument
    add("--every", type=cli.whole(1), default=1, help="run each n-th case only")
    add("--first", type=cli.whole(0), default=0, help="number of the first case")
    add("--only", default="", help="run only cases whose name contains this")
    add("--jobs", type=cli.whole(1, 100), default=2, help="cases at a time")
    add("--seconds", type=cli.whole(1), default=60, help="a case that takes longer hangs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    return 1 if fuzz(args) else 0


if __name__ == "__main__":
    cli.run(main)
