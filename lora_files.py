"""Read LoRA files, of whatever program, and merge them into weights.

    W' = W + strength * (alpha / rank) * B A        in float32, one weight at a time

All programs save A (rank, in) and B (out, rank) of some layers, and some save alpha beside them. They
differ in their names:

    diffusion_model.blocks.0.self_attn.q.lora_A.weight          this project, ComfyUI, diffusion-pipe
    diffusion_model.blocks.0.self_attn.q.lora_down.weight       lightx2v, ComfyUI
    blocks.0.self_attn.q.lora_A.default.weight                  DiffSynth
    lora_unet_blocks_0_self_attn_q.lora_down.weight             kohya, musubi-tuner, VideoX-Fun (lora_unet__)
    transformer.blocks.0.attn1.to_q.lora_A.weight               diffusers
    base_model.model.blocks.0.attn1.to_q.lora_A.weight          peft

Distilled models also come with whole differences: X.diff of a weight, X.diff_b of a bias, and X.diff_m of a
modulation. A file that holds anything else is refused, because without that part it would be another LoRA.
"""
import math
from collections import defaultdict
from functools import partial
from typing import NamedTuple

from files import (
    NOTHING,
    InputError,
    Number,
    check_form,
    describe,
    fits,
    is_finite,
    open_safetensors,
    parse_json,
    read_json,
    read_weights,
    weight_files,
    weight_shapes,
)

PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "pipe.dit.", "dit.", "lora_unet__",
            "lora_unet_", "lora_transformer_", "lycoris_")
SUFFIXES = {  # the end of a key: what it is, and of which tensor of a layer
    ".lora_A.weight": ("A", "weight"), ".lora_A.default.weight": ("A", "weight"),
    ".lora_B.weight": ("B", "weight"), ".lora_B.default.weight": ("B", "weight"),
    ".lora_down.weight": ("A", "weight"), ".lora_up.weight": ("B", "weight"), ".alpha": ("alpha", "weight"),
    ".diff_m": ("diff", "modulation"), ".modulation.diff": ("diff", "modulation"),  # before .diff
    ".diff": ("diff", "weight"), ".diff_b": ("diff", "bias")}
DIFFUSERS = {  # parts of official names: those of diffusers
    "self_attn": "attn1", "cross_attn": "attn2", "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0",
    "k_img": "add_k_proj", "v_img": "add_v_proj", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2", "head.head": "proj_out"}
PEFT = {"lora_alpha": Number(0, 10**6), "use_rslora?": (bool, None), "alpha_pattern?": ({str: NOTHING}, None)}
STRENGTH = Number(-100, 100)


class Change(NamedTuple):
    """What a LoRA file adds to one weight: scale * B A, or a whole difference, or both.

    a, b and diff read a tensor or rows of it, as `read` of files.read_weights; None: there is none.
    """
    a: object
    b: object
    diff: object
    rank: int
    scale: float  # alpha / rank

    def added(self, weight, rows, strength):
        """The weight, or these rows of it, with the change, float32."""
        if self.b:  # the product is float32, and so is its sum with a bf16 weight
            product = self.b(rows).float().flatten(1) @ self.a().float().flatten(1)
            weight = weight + strength * self.scale * product.view_as(weight)
        if self.diff:
            weight = weight + strength * self.diff(rows).float()
        return weight


# ------------------------------------------------------------------------------ reading

def read_lora(path, shapes):
    """{weight: Change} of a LoRA file, for a model whose weights are `shapes`, {official name: shape}.

    Raises InputError, which names what is unknown, does not fit the model, lacks its other half, or is not
    finite.
    """
    layers = spellings(shapes)
    found = defaultdict(dict)  # {weight: {A, B, alpha or diff: (shape, read)}}
    keys, unknown = [], []
    for key, shape, read in read_weights(path):
        keys.append(key)
        suffix = next(filter(key.endswith, SUFFIXES), "")
        part, kind = SUFFIXES.get(suffix, (None, None))
        layer = key.removesuffix(suffix)
        for prefix in PREFIXES:
            layer = layer.removeprefix(prefix)
        name = f"{layers.get(layer)}.{kind}"
        if name not in shapes:
            unknown.append(key)
        elif part in found[name]:
            raise InputError(f"{path}: {part} of {name} is there twice, the second time as {key}; "
                             f"give a file with one LoRA")
        elif not is_number(read(), part):
            raise InputError(f"{path}: {key} has values that are not finite numbers; copy or make the file "
                             f"again")
        else:
            found[name][part] = shape, read
    if not keys:
        raise InputError(f"{path} is empty; copy or make the file again")
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(f"{path} has {unknown[0]}{more}, which no LoRA of this model has; "
                         f"give one that was trained on this model")
    config = peft_config(path, keys)
    return {name: change(parts, shapes[name], config, f"{path}: {name}") for name, parts in found.items()}


def spellings(shapes):
    """{a program's name of a layer: its official name}."""
    layers = {}
    for name in shapes:
        layer = name.rpartition(".")[0]
        theirs = f".{layer}."
        for ours, other in DIFFUSERS.items():
            theirs = theirs.replace(f".{ours}.", f".{other}.")
        for spelling in (layer, theirs.strip(".")):
            layers[spelling] = layers[spelling.replace(".", "_")] = layer
    return layers


def is_number(values, part):
    """Whether all values are finite, and of a floating-point type; alpha may also be a whole number."""
    if part == "alpha" and not values.is_complex():
        values = values.float()
    return values.is_floating_point() and is_finite(values.float())


def change(parts, shape, config, where):
    """The Change of a weight of this shape from its {part: (shape, read)}; InputError unless they fit."""
    sizes = {part: size for part, (size, _) in parts.items()}
    reads = {part: read for part, (_, read) in parts.items()}
    if sizes.get("diff", shape) != shape:
        raise InputError(f"{where} is {list(shape)} in this model, which a difference of "
                         f"{list(sizes['diff'])} does not fit; give a LoRA that was trained on it")
    if parts.keys() == {"diff"}:
        return Change(None, None, reads["diff"], 0, 1.0)
    for part in "AB":
        if part not in parts:
            raise InputError(f"{where} has no {part} beside its {' and '.join(sorted(parts))}; "
                             f"copy or make the file again")
    rank, *inner = sizes["A"] or (0,)
    out, *between = sizes["B"] or (0,)
    fitting = (shape[0], math.prod(shape[1:]), rank)
    if rank == 0 or (out, math.prod(inner), math.prod(between)) != fitting:
        raise InputError(f"{where} is {list(shape)} in this model, which A {list(sizes['A'])} and "
                         f"B {list(sizes['B'])} do not fit; give a LoRA that was trained on it")
    scale = 1.0
    if "alpha" in parts:
        if math.prod(sizes["alpha"]) != 1:
            raise InputError(f"{where} has an alpha of {list(sizes['alpha'])}, which should be one number; "
                             f"copy or make the file again")
        scale = reads["alpha"]().item() / rank
    elif config:
        scale = config["lora_alpha"] / (rank ** 0.5 if config.get("use_rslora") else rank)
    return Change(reads["A"], reads["B"], reads.get("diff"), rank, scale)


def peft_config(path, keys):
    """peft's settings, which say what alpha is where the file does not; {}: alpha is the rank.

    peft writes them beside its file, diffusers into its file.
    """
    file = weight_files(path)[0]
    beside = file.with_name("adapter_config.json")
    if beside.is_file() and keys[0].startswith("base_model.model."):
        return read_json(beside, PEFT)
    metadata = open_safetensors(file).metadata() if file.suffix == ".safetensors" else None
    packed = (metadata or {}).get("lora_adapter_metadata")
    if packed is None:
        return {}
    where = f"{file}: lora_adapter_metadata"
    values = parse_json(packed, where, dict)
    values = {name.removeprefix("transformer."): value for name, value in values.items()}
    return check_form(values, PEFT, where)


# ------------------------------------------------------------------------------ merging

def merging(texts, directory):
    """{weight: function}, for load_weights and save_weights, that merge LoRA files into the official model in
    `directory`. texts: FILE or FILE=STRENGTH.

    function(weight, rows=None) returns the weight, or these rows of it, with all changes, float32. Raises
    InputError if a file does not fit the model.
    """
    shapes = weight_shapes(directory)
    changes = defaultdict(list)  # {weight: [(Change, strength)]}
    for text in texts:
        path, strength = parse(text)
        for name, found in read_lora(path, shapes).items():
            changes[name].append((found, strength))

    def merge(found, weight, rows=None):
        for each, strength in found:
            weight = each.added(weight, rows, strength)
        return weight
    return {name: partial(merge, found) for name, found in changes.items()}


def parse(text):
    """"style.safetensors=0.8" -> ("style.safetensors", 0.8)."""
    path, _, strength = text.rpartition("=")
    try:
        strength = float(strength)
    except ValueError:
        return text, 1.0
    if not path:
        return text, 1.0
    if not fits(strength, STRENGTH):
        raise InputError(f"{text}: the strength is not possible; give {describe(STRENGTH)}")
    return path, strength
