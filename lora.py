"""LoRA: train a small update of low rank beside frozen weights (Hu et al. 2021, arXiv 2106.09685).

W x + b becomes W x + b + (alpha / rank) B A x. W stays as it was loaded. A and B are stored in float32 and
compute in the layer's dtype. In saved models the update is merged into W, so they load wherever the official
ones do. The adapter is also saved by itself.

    python lora.py --merge Wan2.1-T2V-14B style.safetensors motion.safetensors=0.6 --output merged
"""
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import cli

import torch
from torch import nn

from files import (
    InputError,
    fill,
    full_tensor,
    is_main,
    read_json,
    read_weights,
    save_weights,
    write_safetensors,
)
from lora_files import merging, read_lora


class LoRALinear(nn.Linear):
    """A frozen linear layer with a trained update of low rank."""

    def __init__(self, linear, rank, alpha):
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, device=device)   # float32
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, device=device)  # float32
        self.scale = alpha / rank
        self.adapter_on = True

    def forward(self, x):
        out = super().forward(x)
        if self.adapter_on:
            inner = self.scale * self.lora_A(x.to(self.lora_A.weight.dtype))  # (..., rank)
            out = out + self.lora_B(inner).to(out.dtype)
        return out

    def merged(self, weight):
        """The weight with its update merged in, float32."""
        return weight.float() + self.scale * (self.lora_B.weight @ self.lora_A.weight)


def add_lora(model, rank, alpha, targets=("q", "k", "v", "o")):
    """Freeze `model` and add adapters to linear layers of its blocks. targets: their names, as q or ffn.0."""
    model.requires_grad_(False)
    for target in targets:
        for block in model.blocks:
            chosen = [name for name, layer in block.named_modules()
                      if isinstance(layer, nn.Linear) and f".{name}".endswith(f".{target}")]
            if not chosen:
                raise InputError(f"no linear layer of a block is called {target}; choose LoRA targets from "
                                 f"q k v o k_img v_img ffn.0 ffn.2")
            for name in chosen:
                block.set_submodule(name, LoRALinear(block.get_submodule(name), rank, alpha))


def adapters(module):
    """{name: layer} of all layers with an adapter."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def read_adapter(module, path):
    """{weight: Change} of the LoRA file at `path`, whose values the adapters of `module` are to start with.

    Raises InputError unless it has the rank and the layers of the adapters, and nothing else.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in official_state(module).items()}
    changes = read_lora(path, shapes)
    for name, change in changes.items():
        if change.diff:
            raise InputError(f"{path} has a whole difference of {name}, with which no adapter can start; "
                             f"merge the file with --lora")
    expected = {f"{name}.weight": layer.lora_A.out_features for name, layer in adapters(module).items()}
    found = {name: change.rank for name, change in changes.items()}
    for name in sorted(expected | found):
        ours, theirs = expected.get(name, 0), found.get(name, 0)
        if ours != theirs:
            raise InputError(f"{path} has rank {theirs} at {name}, and the adapters have rank {ours}; choose "
                             f"--lora_rank and --lora_targets as the file has them")
    return changes


def start_lora(module, seed, changes=None):
    """Set the initial values, the same on all ranks: those of a file (`read_adapter`), or new ones.

    A new A starts as torch initialises a linear layer, B at zero, so that the model does not change yet.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layer in adapters(module).items():
        rank, width = layer.lora_A.weight.shape
        a = (2 * torch.rand(rank, width, generator=generator) - 1) / width ** 0.5
        b = torch.zeros(layer.lora_B.weight.shape)
        if changes:
            change = changes[f"{name}.weight"]
            a = change.a().view_as(a)
            b = change.b().float().view_as(b) * (change.scale / layer.scale)
        fill(layer.lora_A.weight, a)
        fill(layer.lora_B.weight, b)


@contextmanager
def without_adapters(module):
    """The model as it was before training: `with without_adapters(policy): ...`"""
    for layer in adapters(module).values():
        layer.adapter_on = False
    try:
        yield
    finally:
        for layer in adapters(module).values():
            layer.adapter_on = True


def official_state(module):
    """The state dict with official names, without adapters."""
    return {name: tensor for name, tensor in module.state_dict().items() if ".lora_" not in name}


def merges(module):
    """{name: function} for save_weights: W -> W + (alpha / rank) B A in float32, one weight at a time."""
    return {f"{name}.weight": layer.merged for name, layer in adapters(module).items()}


@torch.no_grad()
def save_adapter(module, path):
    """Write only the adapters, with the names that diffusers and ComfyUI load.

    alpha / rank is multiplied into B, because programs differ in where they look for alpha. Under torchrun
    every rank calls it.
    """
    tensors = {}
    for name, layer in adapters(module).items():
        for part, scale in (("lora_A", 1.0), ("lora_B", layer.scale)):
            tensor = full_tensor(getattr(layer, part).weight)
            tensors[f"diffusion_model.{name}.{part}.weight"] = (scale * tensor).cpu()
    if is_main():
        write_safetensors(path, tensors, {"format": "pt"})


# ------------------------------------------------------------------------------ the command

def main(argv=None):
    parser = cli.Parser("Merge LoRA files, of whatever program, into a model.")
    parser.add_argument("--merge", nargs="+", required=True, metavar=("BASE", "FILE[=STRENGTH]"),
                        help="official directory of a transformer, then LoRA files; without a strength: 1")
    parser.add_argument("--output", required=True, metavar="DIR",
                        help="directory to write, in BASE's layout and its weights' widest precision")
    args = parser.parse_args(argv)
    base, *texts = args.merge
    if not texts:
        raise InputError(f"--merge {base} names no LoRA file; give at least one after the model")
    if Path(args.output).exists():
        raise InputError(f"--output {args.output} is there already; choose another place")
    config = read_json(Path(base, "config.json"), dict)
    merge = merging(texts, base)
    state = {name: read() for name, _, read in read_weights(base)}  # mapped from the disk, not in memory
    dtype = reduce(torch.promote_types, [tensor.dtype for tensor in state.values()])
    save_weights(args.output, state, config, dtype=dtype, merge=merge)
    print(f"{args.output}: {base} with {len(merge)} of {len(state)} weights changed")


if __name__ == "__main__":
    cli.run(main)
