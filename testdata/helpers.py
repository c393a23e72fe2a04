"""Plain helpers that several test files need: tiny models, runs of a training script, ways to look inside.

The fixtures that go with them are in conftest.py. `world` makes the directory in which `run` trains.
"""
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import parallel
from clips import Order
from files import weight_shapes, write_json
from model import WanConfig, WanModel
from reward import PAVRM
from testdata.golden import draw, fill_
from vae import VAE_FILE, WanVAE

ROOT = Path(__file__).resolve().parent.parent  # of the repository

# ------------------------------------------------------------------------------ tiny models

TINY = dict(model_type="t2v", dim=48, ffn_dim=64, freq_dim=32, in_dim=16, out_dim=16, num_heads=4,
            num_layers=3, text_len=16, text_dim=8)


def tiny(seed=0, **changes):
    """A transformer of three small blocks, with weights that depend on `seed`."""
    model = WanModel({**TINY, **changes})
    fill_(model.state_dict(), seed)
    return model


def fill_pavrm(config, num_blocks, dit_seed, head_seed):
    """A reward model with weights that depend on the two seeds."""
    pavrm = PAVRM(WanModel(config), num_blocks)
    fill_(pavrm.dit.state_dict(), dit_seed)
    heads = {name: tensor for name, tensor in pavrm.state_dict().items() if not name.startswith("dit.")}
    fill_(heads, head_seed)
    return pavrm


def fill_vae(directory):
    """Put a small VAE into a model's directory."""
    vae = WanVAE(dim=4)
    fill_(vae.state_dict(), 0)
    torch.save(vae.state_dict(), Path(directory, VAE_FILE))


def lora_pairs(layers, directory="model", rank=3, seed=0):
    """{layer: (A, B)} of a LoRA for the model in a directory, with values that depend on the seed."""
    shapes = weight_shapes(directory)
    pairs = {}
    for i, layer in enumerate(layers):
        out, *wide = shapes[f"{layer}.weight"]
        pairs[layer] = 0.1 * draw((rank, *wide), seed + 2 * i), 0.1 * draw((out, rank), seed + 2 * i + 1)
    return pairs


def write_lora(path, pairs):
    """Write A and B under the names of this project; returns the path as text."""
    tensors = {}
    for layer, matrices in pairs.items():
        for part, matrix in zip("AB", matrices, strict=True):
            tensors[f"diffusion_model.{layer}.lora_{part}.weight"] = matrix
    save_file(tensors, path)
    return str(path)


def checkpointing(block, *inputs):
    """In place of a model's `run_block`: activation checkpointing."""
    return checkpoint(block, *inputs, use_reentrant=False)


# ------------------------------------------------------------------------------ reference values

def golden(name):
    """(tensors, metadata) of a file of reference values."""
    with safe_open(ROOT / f"testdata/golden/{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def golden_inputs(meta):
    """What a golden file's metadata describes: forward's keyword arguments, configuration, weights' seed."""
    config, shape, seed = json.loads(meta["cfg"]), json.loads(meta["shape"]), int(meta["seed"])
    lens, t, images = json.loads(meta["lens"]), json.loads(meta["t"]), int(meta["clip_n"])
    inputs = dict(x=draw(shape, seed + 1), t=torch.tensor(t),
                  context=[draw((n, config["text_dim"]), seed + 10 + i) for i, n in enumerate(lens)])
    if config["in_dim"] > config["out_dim"]:
        inputs["y"] = draw((shape[0], config["in_dim"] - config["out_dim"], *shape[2:]), seed + 2)
    if images:
        inputs["clip_fea"] = draw((images * shape[0], 257, 1280), seed + 3)
    if meta.get("pertoken") == "True":  # the first latent frame is given: its tokens are at timestep 0
        tokens_per_frame = shape[3] // 2 * shape[4] // 2
        inputs["t"] = torch.tensor(t).repeat_interleave(shape[2] * tokens_per_frame).view(shape[0], -1)
        inputs["t"][:, :tokens_per_frame] = 0
    config = WanConfig.from_dict({**config, "use_clip": bool(images)})
    return inputs, config, seed


# ------------------------------------------------------------------------------ the fixture `world`

SHAPE = (16, 2, 4, 4)  # of the latents
SEVERAL = ["--labels", "physics_quality", "text_alignment", "blur_quality"]  # of the fixture `several_labels`


def latents(clips):
    return torch.stack([draw(SHAPE, 10 + i) for i in clips])


def short_texts(clips):
    return [draw((2, 8), 20 + i).bfloat16() for i in clips]


def long_texts(clips):
    return [draw((5, 8), 30 + i).bfloat16() for i in clips]


def noises(micro_step, purpose, places=2):
    """The noise that training draws for the clips of a micro-step."""
    return torch.stack([parallel.noise(SHAPE, 0, micro_step, place, purpose) for place in range(places)])


def batch(micro_step, size=2):
    """The clips that training takes in a micro-step."""
    return Order([SHAPE] * 8, size, 0)[micro_step]


def write_index(lines):
    Path("clips/index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def brightening(count, height=32, width=48):
    """uint8 (count, H, W, 3): each frame is brighter than the one before."""
    return (40 * torch.arange(count, dtype=torch.uint8))[:, None, None, None].expand(count, height, width, 3)


# ------------------------------------------------------------------------------ runs of a training script

PAVRM_FLAGS = ["--train", "clips/index.jsonl", "--val", "clips/index.jsonl", "--batch_size", "4",
               "--lr", "1e-3", "--head_lr", "1e-3", "--eval_every", "100", "--eval_timesteps", "600"]
PRFL_FLAGS = ["--data", "clips/index.jsonl", "--reward", "reward", "--skip_poor", "none", "--batch_size", "2",
              "--lr", "1e-3", "--solver_steps", "6", "--accumulation", "2", "--sample_every", "0"]
REWARD_FL_FLAGS = ["--data", "clips/index.jsonl", "--reward", "bright.py", "--batch_size", "2",
                   "--lr", "1e-3", "--solver_steps", "4", "--first_step", "2", "--lora_rank", "3",
                   "--sample_every", "0"]


def flags_of(script, output, *flags):
    """The flags of a small run of a training script in the world; `flags` are added."""
    inputs = {"train_pavrm": PAVRM_FLAGS, "train_prfl": PRFL_FLAGS, "train_reward_fl": REWARD_FL_FLAGS}
    return ["--model", "model", *inputs[script.__name__], "--output", output, *flags]


def run(script, output, *flags):
    """Run a training script in this process; returns its log, a list of dicts."""
    try:
        script.main(flags_of(script, output, *flags))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return read_log(output)


def torchrun(processes, script, *flags):
    """Run a script in several processes and fail with the end of its output if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    done = subprocess.run([*command, str(script), *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


DRIVER = """
import importlib, json, os, sys
import torch.distributed as dist
import records, train_pavrm, train_prfl, train_reward_fl, watch

ranks = int(sys.argv[1])
children = []
for rank in range(ranks):  # forked, so that everything is imported only once
    children.append(os.fork())
    if children[-1] == 0:
        break
else:
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
dist.init_process_group("gloo", init_method="file://" + os.path.abspath("store"), rank=rank, world_size=ranks)
dist.init_process_group = lambda *_, **__: None  # the processes stay together from run to run
save = records.Checkpoints.save
for name, flags, resumed in json.load(open("jobs.json")):
    records.Checkpoints.save = save if resumed else lambda *_: None
    importlib.import_module(name).main(flags)
watch.stop()
"""


def spawn(processes, jobs):
    """Run [(script, flags)] one after the other, each in all of `processes` processes.

    The processes meet through a file, so no port is needed. Only runs that are resumed save checkpoints.
    """
    outputs = [flags[flags.index("--output") + 1] for _, flags in jobs]
    resumed = [outputs.count(output) > 1 for output in outputs]
    described = []
    for (script, flags), again in zip(jobs, resumed, strict=True):
        described.append((script.__name__, flags, again))
    write_json("jobs.json", described)
    Path("store").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-c", DRIVER, str(processes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def read_log(output):
    return [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]


def steps(log):
    """The lines of a log that belong to a step."""
    return [line for line in log if "evaluation" not in line]


def evaluations(log):
    return [line["evaluation"] for line in log if "evaluation" in line]


def numbers(log):
    """What must not depend on when, or by how many processes, a step was done."""
    varying = ("seconds", "gigabytes")
    return [{name: value for name, value in line.items() if name not in varying} for line in log]


def flat(line):
    """A log line's numbers by name, those of its evaluation too."""
    found = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= {f"{name} {inner}": number for inner, number in flat(value).items()}
        elif not isinstance(value, list):
            found[name] = value
    return found


def weights_of(path):
    """The tensors of a directory in the official layout (of one file), or of a file."""
    return load_file(next(Path(path).glob("*.safetensors")) if Path(path).is_dir() else path)


# ------------------------------------------------------------------------------ looking inside

def watched(monkeypatch, script, output, *flags):
    """Run a training script and look at what it does.

    Returns its log's lines of steps, its models in the order in which they were sharded, and for each
    clipping the gathered gradients {name: tensor} of the first model, the trained one, before it.
    """
    models, gradients = [], []
    shard, clip = parallel.shard, parallel.clip_gradients

    def watched_shard(model, *rest):
        models.append(model)
        return shard(model, *rest)

    def watched_clip(parameters, max_norm):
        found = {}
        for name, parameter in models[0].named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.full_tensor().clone()
        gradients.append(found)
        return clip(parameters, max_norm)

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "shard", watched_shard)
        patch.setattr(parallel, "clip_gradients", watched_clip)
        return steps(run(script, output, *flags)), models, gradients


def gradients_of(model, loss):
    """{name: gradient} of a loss computed by hand."""
    model.zero_grad()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def gradients_agree(a, b, tolerance=1e-4):
    """Whether two dicts of gradients have the same names and values.

    The tolerance is a share of each tensor's largest value, or of a thousandth of the largest of all if that
    is more.
    """
    if set(a) != set(b):
        return False
    largest = max(tensor.abs().max().item() for tensor in b.values())
    for name, tensor in b.items():
        scale = max(tensor.abs().max().item(), 1e-3 * largest)
        if (a[name] - tensor).abs().max() > tolerance * scale:
            return False
    return True


class Calls(TorchDispatchMode):
    """`with Calls(name) as counted:` counts an operator's calls: all, and its forward's during backward."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.all = 0
        self.backward = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if self.name in str(op) and "backward" not in str(op):
            self.all += 1
            self.backward += torch._C._current_autograd_node() is not None
        return op(*args, **(kwargs or {}))
