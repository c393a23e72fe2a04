"""What the command lines share: settings of PyTorch, files of flags, numbers and their limits, flags of both
training scripts, errors as one sentence."""
import argparse
import os
import re
import shlex
import signal
import sys
import time
from importlib.metadata import version

# What PyTorch reads when it is imported. So every script imports this file first (pyproject.toml).
# GPU memory comes in segments that grow, which leaves fewer gaps. Pinned memory above 64 MB is not
# rounded up to a power of two; PyTorch before 2.13 does not know that setting and would refuse it.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if tuple(map(int, version("torch").split(".")[:2])) >= (2, 13):
        os.environ["PYTORCH_ALLOC_CONF"] += ",pinned_max_round_threshold_mb:64"
# Idle OpenMP threads spin for a short while only: several times as fast where other work runs, too.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch.distributed as dist

import files
import watch
from files import InputError


class FlagError(InputError):
    """A flag is wrong: exit code 2, as argparse has it."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those that the help describes in words."""

    def _get_help_string(self, action):
        unset = action.default is None or action.default is False or action.default == []
        if unset or "default" in action.help:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Flags with their defaults in --help, and files of flags: `@FILE.args`, in which # begins a comment."""

    def __init__(self, description):
        super().__init__(description=description, fromfile_prefix_chars="@", formatter_class=HelpFormatter,
                         allow_abbrev=False)

    def convert_arg_line_to_args(self, line):
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"a file of flags has the line {line!r} ({error}); check its quotes")

    def parse_known_args(self, args=None, namespace=None):
        try:
            found, rest = super().parse_known_args(args, namespace)
        except RecursionError:
            self.error("a file of flags names itself; take that line out")
        except UnicodeDecodeError:
            self.error("a file of flags is not UTF-8 text; save it as UTF-8")
        for name, value in vars(found).items():  # an empty path would be the current directory, or none
            values = value if isinstance(value, list) else [value]
            if "" in values and value != self.get_default(name) and name not in ("prompt", "negative_prompt"):
                self.error(f"--{name} is empty; give a value, or leave it out")
        return found, rest

    def error(self, message):
        """One sentence, which `run` prints, in place of argparse's usage and exit."""
        message = re.sub("^argument (.+?): ", r"\1 ", " ".join(message.split()))
        message = message.replace(" invalid choice: ", " cannot be ", 1)
        raise FlagError(message if ";" in message else f"{message}; --help shows what is possible")


class Number(files.Number):
    """The type of a flag, and the only check of its value: Number(0, 1) is a finite number from 0 to 1."""

    def __call__(self, text):
        try:
            value = int(text) if self.step else float(text)
        except ValueError:
            value = None
        if not files.fits(value, self):
            raise argparse.ArgumentTypeError(f"{text:.40} is not possible; give {files.describe(self)}")
        return value


def whole(low, high=10**9, step=1):
    """The type of a flag that is a whole number."""
    return Number(low, high, step)


# Those of several scripts.
SEED = whole(0, 2**63 - 1)
FRAMES = whole(1, 10_001, step=4)
SIDE = whole(16, 16_384)
FPS = Number(0.01, 1000)
SHIFT = Number(0.001, 1000)
GUIDANCE = Number(0, 1000)
SOLVER_STEPS = whole(1, 1000)


def parse_size(text):
    """"832x480" -> (832, 480)."""
    try:
        width, height = map(SIDE, text.split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text:.40} is not a size; write width x height, such as 832x480, "
                                         f"each from {SIDE.low} to {SIDE.high:,}") from None
    return width, height


def parse_labels(words, pavrm):
    """["motion_quality=0.7", "text_alignment=0.3"] -> {label: weight}. [] means the first label, weight 1."""
    weights = {}
    for word in words or pavrm.labels[:1]:
        name, _, weight = word.partition("=")
        if name not in pavrm.labels or name in weights:
            raise InputError(f"--labels {word}: this reward model predicts {', '.join(pavrm.labels)}; "
                             f"choose from them, each once")
        try:
            weights[name] = Number(0.001, 1000)(weight or "1")
        except argparse.ArgumentTypeError as error:
            raise InputError(f"--labels {word}: the weight {error}") from None
    return weights


# ------------------------------------------------------------------------------ shared flags

def add_captions(group, long_caption, drop_prompt):
    """Flags about the caption that is drawn for each clip."""
    add = group.add_argument
    add("--long_caption", type=Number(0, 1), default=long_caption,
        help="probability that a clip comes with its long caption instead of its short one")
    add("--drop_prompt", type=Number(0, 1), default=drop_prompt,
        help="probability that a clip comes with the empty prompt instead of a caption")


def add_noise_levels(group):
    """Flags about the noise levels of training; the shift is also that of rollouts and samples."""
    add = group.add_argument
    add("--shift", type=SHIFT, default=5.0, help="how far all noise levels are shifted towards noise")
    add("--timesteps", nargs="+", default=["uniform"],
        help="how the timesteps of noised clips are drawn: uniform (over the shifted table), logit_normal, "
             "or from a list of timesteps")


def add_merged(group):
    """The flag that merges LoRA files into a model."""
    group.add_argument("--lora", nargs="+", default=[], metavar="FILE[=STRENGTH]",
                       help="LoRA files, of whatever program, that are merged into the transformer as it is "
                            "loaded; without a strength: 1")


def add_lora(group):
    """Flags about adapters."""
    add = group.add_argument
    add("--lora_rank", type=whole(0, 10_000), default=0,
        help="rank of LoRA adapters, which train beside frozen weights; 0 trains the weights; published: "
             "128 for PRFL, 32 for Reward FL")
    add("--lora_alpha", type=Number(0.001, 10**6),
        help="numerator of the adapters' scale alpha / rank (default: the rank)")
    add("--lora_targets", nargs="+", default=["q", "k", "v", "o"], help="linear layers that get adapters")


def add_optimization(group, lr, accumulation):
    """Flags about batches and the optimizer, AdamW."""
    add = group.add_argument
    add("--batch_size", type=whole(1, 10_000), default=2,
        help="clips (or pairs) per micro-step, over all processes")
    add("--accumulation", type=whole(1, 10_000), default=accumulation,
        help="micro-steps whose gradients make one update")
    add("--lr", type=Number(0, 10), default=lr, help="learning rate of the transformer")
    add("--lr_schedule", default="constant", choices=["constant", "linear", "cosine"],
        help="course of the learning rate after the warm-up: constant, or falling towards 0")
    add("--warmup", type=whole(0), default=0, help="steps in which the learning rate rises to its value")
    add("--weight_decay", type=Number(0, 1000), default=0.01, help="weight decay of AdamW")
    add("--max_norm", type=Number(1e-6, 10**9), default=1.0,
        help="norm to which larger gradients are clipped")
    add("--ema", type=Number(0, 1), default=0.0,
        help="decay of the moving average of the trained weights, updated once per step; 0 keeps no average")
    add("--seed", type=SEED, default=0, help="seed of the data order, the noise and all other random draws")


def add_execution(parser):
    """Flags that say how a run is computed. All but the precision may change when a run is resumed."""
    add = parser.add_argument_group("processes, memory and precision").add_argument
    add("--sp", type=whole(1, 10_000), default=1,
        help="processes that share a clip's tokens; divides the number of heads")
    add("--dp_replicate", type=whole(1, 100_000), default=1,
        help="copies of the weights, each sharded over an equal part of the processes; 1 needs least memory")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compile the transformer blocks: faster, less memory (default: only on a GPU)")
    add("--activation_checkpointing", action="store_true",
        help="keep only the blocks' inputs for backward and compute the rest again: a third slower, and "
             "needed for large models")
    add("--save_attention", action="store_true",
        help="with --activation_checkpointing: keep the results of attention too")
    add("--offload", nargs="+", default=[], choices=["inputs", "reward", "weights", "ema"],
        help="what is kept in CPU memory. inputs: those of checkpointed blocks; reward: the weights of "
             "models that are not trained; weights: all, with gradients and optimizer state; ema: the moving "
             "average")
    add("--compute_dtype", choices=["float32", "bf16"],
        help="precision of matrix products, attention and frozen weights (default: bf16 on a GPU, float32 on "
             "a CPU)")
    add("--bf16_residual", action="store_true",
        help="round the residual stream to bf16 between blocks, which halves the memory of the blocks' "
             "inputs; the official code keeps it in float32")
    add("--deterministic", action="store_true",
        help="make runs on the same GPUs equal to the last bit, as runs on a CPU always are; slower, "
             "because flash attention replaces cuDNN's and adds gradients in a fixed order")
    add("--timeout", type=Number(0.001, 10**6), default=10,
        help="minutes that a process waits for the others")


def add_checkpoints(parser, save_every):
    """Flags about what a run saves. They may change when it is resumed."""
    add = parser.add_argument_group("checkpoints").add_argument
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    add("--save_every", type=whole(1), default=save_every,
        help="steps between checkpoints; the last step always has one")
    add("--keep_checkpoints", type=whole(1), default=2, help="number of checkpoints to keep, the newest ones")
    add("--export_every", type=whole(0), default=0,
        help="steps between exports of the model to OUTPUT/exports; 0: only the result at the end")
    add("--export_dtype", default="float32", choices=["float32", "bf16"],
        help="precision of exported models: float32, as the official ones, or bf16, which is half as large "
             "but rounds away what training changed by less than 1/512 of a weight")


# ------------------------------------------------------------------------------ errors

def run(main):
    """Run a script's main(). Errors of the input, the disk or another process: one sentence, exit code 1,
    or 2 where a flag is wrong.

    The script ends at once. It does not wait for other processes, which may never come: torchrun stops them.
    """
    failed = 1
    try:
        code = main()
        watch.stop()
    except (InputError, OSError) as error:
        message, failed = str(error), 2 if isinstance(error, FlagError) else 1
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        message = watch.GONE
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(code)
    finally:
        watch.leaving.set()  # what went wrong here is what a user has to see
    if int(os.environ.get("RANK", 0)):
        # Usually all ranks fail the same way and rank 0 prints it first. If this rank alone failed, it prints
        # after three seconds; torchrun's SIGTERM may end it before.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(failed)
