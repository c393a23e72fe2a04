"""LoRA files of all programs: the same tiny LoRA under each program's names, merged into a model, refused,
trained beside and trained on from."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import files
import lora
import train_pavrm
import train_prfl
from files import InputError
from lora_files import merging
from model import WanModel
from testdata.golden import draw
from testdata.helpers import lora_pairs, numbers, run, tiny, weights_of, write_lora

LAYERS = {  # official names, and those of diffusers
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q", "blocks.0.self_attn.k": "blocks.0.attn1.to_k",
    "blocks.1.self_attn.v": "blocks.1.attn1.to_v", "blocks.2.self_attn.o": "blocks.2.attn1.to_out.0",
    "blocks.0.cross_attn.q": "blocks.0.attn2.to_q", "blocks.1.cross_attn.o": "blocks.1.attn2.to_out.0",
    "blocks.1.cross_attn.k_img": "blocks.1.attn2.add_k_proj",
    "blocks.2.cross_attn.v_img": "blocks.2.attn2.add_v_proj",
    "blocks.2.ffn.0": "blocks.2.ffn.net.0.proj", "blocks.2.ffn.2": "blocks.2.ffn.net.2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out", "patch_embedding": "patch_embedding"}
AB, DEFAULT = (".lora_A.weight", ".lora_B.weight"), (".lora_A.default.weight", ".lora_B.default.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")
SCHEMES = {  # program: (what it calls a layer, the ends of its keys)
    "ours": ("diffusion_model.{0}", AB), "lightx2v": ("diffusion_model.{0}", DOWN_UP),
    "diffsynth": ("{0}", DEFAULT), "unianimate": ("pipe.dit.{0}", DEFAULT), "bare": ("dit.{0}", AB),
    "diffusers": ("transformer.{2}", AB),
    "peft": ("base_model.model.{2}", AB), "peft, official": ("base_model.model.{0}", AB),
    "musubi": ("lora_unet_{1}", DOWN_UP), "videox-fun": ("lora_unet__{1}", DOWN_UP),
    "kohya": ("lora_unet_{3}", DOWN_UP), "simpletuner": ("lycoris_{3}", DOWN_UP),
    "onetrainer": ("lora_transformer_{3}", DOWN_UP)}


def write(path, pairs, scheme, alpha=None, metadata=None):
    """A LoRA file under a program's names."""
    name, ends = SCHEMES[scheme]
    tensors = {}
    for layer, matrices in pairs.items():
        theirs = LAYERS[layer]
        key = name.format(layer, layer.replace(".", "_"), theirs, theirs.replace(".", "_"))
        for end, matrix in zip(ends, matrices, strict=True):
            tensors[key + end] = matrix
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of an image-to-video model."""
    directory = tmp_path_factory.mktemp("base") / "model"
    tiny(model_type="i2v", in_dim=36).save_pretrained(directory)
    return directory


def merged(base, *texts):
    """{name: tensor} of the base with LoRA files merged."""
    merge = merging(texts, base)
    return {name: merge[name](w) if name in merge else w for name, w in weights_of(base).items()}


def by_hand(state, pairs, scale=1.0):
    """W + scale B A; of a convolution, W is seen as a matrix."""
    state = dict(state)
    for layer, (a, b) in pairs.items():
        weight = state[f"{layer}.weight"]
        state[f"{layer}.weight"] = weight + scale * (b @ a.flatten(1)).view(weight.shape)
    return state


def assert_same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and (a[name] - b[name]).abs().max() <= tolerance, name


# ------------------------------------------------------------------------------ names, alpha, strengths

@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_names_of_each_program_mean_the_same(base, tmp_path, scheme):
    pairs = lora_pairs(LAYERS, base)
    result = merged(base, write(tmp_path / "a.safetensors", pairs, scheme))
    start = weights_of(base)
    assert_same(result, by_hand(start, pairs), 1e-6)
    assert {name for name in start if not torch.equal(result[name], start[name])} \
        == {f"{layer}.weight" for layer in LAYERS}


def test_strengths_and_several_files(base, tmp_path):
    one, two = lora_pairs(LAYERS, base), lora_pairs(["blocks.0.self_attn.q"], base, rank=2, seed=50)
    a, b = write(tmp_path / "a=b.safetensors", one, "musubi"), write(tmp_path / "b.safetensors", two, "peft")
    start = weights_of(base)
    assert_same(merged(base, f"{a}=-0.5", f"{b}=2"), by_hand(by_hand(start, one, -0.5), two, 2), 1e-6)
    assert_same(merged(base, a, b), by_hand(by_hand(start, one), two), 1e-6)
    assert_same(merged(base, f"{a}=0"), start)


@pytest.mark.parametrize("scheme, alpha", [("lightx2v", 12.0), ("musubi", 12), ("diffsynth", [12.0])])
def test_alpha_beside_the_matrices(base, tmp_path, scheme, alpha):
    pairs = lora_pairs(LAYERS, base)
    path = write(tmp_path / "a.safetensors", pairs, scheme, alpha)
    assert_same(merged(base, f"{path}=0.5"), by_hand(weights_of(base), pairs, 0.5 * 12 / 3), 1e-6)


@pytest.mark.parametrize("changes, scale", [({}, 6 / 3), ({"use_rslora": True}, 6 / math.sqrt(3))])
def test_alpha_in_the_settings_of_peft(base, tmp_path, changes, scale):
    """peft writes them beside its file, which may be given as a directory, and diffusers into its file."""
    pairs, start = lora_pairs(LAYERS, base), weights_of(base)
    settings = {"r": 3, "lora_alpha": 6, "alpha_pattern": {}, "use_rslora": False, "bias": "none", **changes}
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(settings))
    path = write(tmp_path / "peft/adapter_model.safetensors", pairs, "peft")
    assert_same(merged(base, path), by_hand(start, pairs, scale), 1e-6)
    assert_same(merged(base, f"{tmp_path}/peft"), by_hand(start, pairs, scale), 1e-6)
    packed = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
    path = write(tmp_path / "a.safetensors", pairs, "diffusers", metadata={"lora_adapter_metadata": packed})
    assert_same(merged(base, path), by_hand(start, pairs, scale), 1e-6)
    path = write(tmp_path / "peft/other.safetensors", pairs, "ours")  # not peft's: its alpha is another's
    assert_same(merged(base, path), by_hand(start, pairs), 1e-6)


def test_whole_differences(base, tmp_path):
    """Of weights, biases, norms and modulations, beside A and B or without them."""
    start = weights_of(base)
    names = {"blocks.0.norm3.diff": "blocks.0.norm3.weight", "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
             "blocks.1.self_attn.norm_q.diff": "blocks.1.self_attn.norm_q.weight",
             "blocks.1.ffn.0.diff_b": "blocks.1.ffn.0.bias", "blocks.2.diff_m": "blocks.2.modulation",
             "head.diff_m": "head.modulation", "blocks.1.modulation.diff": "blocks.1.modulation",
             "img_emb.proj.0.diff": "img_emb.proj.0.weight", "patch_embedding.diff": "patch_embedding.weight",
             "blocks.0.ffn.0.diff": "blocks.0.ffn.0.weight"}
    pairs = lora_pairs(["blocks.0.ffn.0"], base)
    write_lora(tmp_path / "a.safetensors", pairs)
    tensors, expected = load_file(tmp_path / "a.safetensors"), by_hand(start, pairs, 0.5)
    for i, (key, name) in enumerate(names.items()):
        difference = draw(start[name].shape, i)
        tensors[f"diffusion_model.{key}"] = difference
        expected[name] = expected[name] + 0.5 * difference
    save_file(tensors, tmp_path / "a.safetensors")
    assert_same(merged(base, f"{tmp_path}/a.safetensors=0.5"), expected, 1e-6)
    torch.save(tensors, tmp_path / "a.pth")
    assert_same(merged(base, f"{tmp_path}/a.pth=0.5"), expected, 1e-6)


# ------------------------------------------------------------------------------ what is refused

Q = "diffusion_model.blocks.0.self_attn.q"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@pytest.mark.parametrize("changes, sentence", [
    ({f"{Q}.dora_scale": torch.ones(48)}, f"has {Q}.dora_scale, which no LoRA of this model has"),
    ({"lora_te_x.lora_up.weight": torch.ones(1), f"{Q}.hada_w1_a": torch.ones(1)}, "and 1 more, which no"),
    ({"diffusion_model.blocks.3.ffn.0.lora_A.weight": torch.ones(3, 48)}, "has diffusion_model.blocks.3"),
    ({f"{Q}.lora_down.weight": torch.ones(3, 48)}, "A of blocks.0.self_attn.q.weight is there twice"),
    ({A: torch.ones(3, 64)}, r"q.weight is \[48, 48\] in this model, which A \[3, 64\] and B \[48, 3\]"),
    ({B: torch.ones(48, 2)}, r"A \[3, 48\] and B \[48, 2\] do not fit"),
    ({A: torch.ones(0, 48), B: torch.ones(48, 0)}, r"A \[0, 48\] and B \[48, 0\] do not fit"),
    ({A: torch.tensor(1.0)}, r"A \[\] and B \[48, 3\] do not fit"),
    ({B: None}, "q.weight has no B beside its A"),
    ({A: None, B: None, f"{Q}.alpha": torch.tensor(1.0)}, "q.weight has no A beside its alpha"),
    ({B: torch.full((48, 3), math.nan)}, f"{B} has values that are not finite numbers"),
    ({f"{Q}.alpha": torch.tensor(math.inf)}, "alpha has values that are not finite"),
    ({f"{Q}.alpha": torch.ones(3)}, r"has an alpha of \[3\], which should be one number"),
    ({B: torch.ones(48, 3, dtype=torch.int8)}, f"{B} has values that are not finite numbers"),
    ({f"{Q}.diff": torch.ones(48)}, r"which a difference of \[48\] does not fit"),
    ({A: None, B: None}, "is empty"),
])
def test_a_file_that_does_not_fit_is_refused(base, tmp_path, changes, sentence):
    write_lora(tmp_path / "a.safetensors", lora_pairs(["blocks.0.self_attn.q"], base))
    tensors = load_file(tmp_path / "a.safetensors") | changes
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None},
              tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=f"a.safetensors.*{sentence}"):
        merging([f"{tmp_path}/a.safetensors"], base)


@pytest.mark.parametrize("text, sentence", [
    ("gone.safetensors=0.5", "^gone.safetensors does not exist"), ("a=b", "^a=b does not exist"),
    ("1", "^1 does not exist"), ("a=nan", "a=nan: the strength is not possible; give a number from -100 to"),
])
def test_a_wrong_name_or_strength_is_refused(base, text, sentence):
    with pytest.raises(InputError, match=sentence):
        merging([text], base)


@pytest.mark.parametrize("settings, sentence", [
    ({"r": 3}, "adapter_config.json: lora_alpha is missing"),
    ({"lora_alpha": 3, "alpha_pattern": {"q": 4}}, "alpha_pattern.q is 4; expected no such key"),
])
def test_settings_of_peft_that_are_refused(base, tmp_path, settings, sentence):
    path = write(tmp_path / "a.safetensors", lora_pairs(LAYERS, base), "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=sentence):
        merging([path], base)


# ------------------------------------------------------------------------------ the command

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_command_writes_an_official_directory(base, tmp_path, monkeypatch, dtype):
    """Of the base's precision, from a sharded base, rounded once."""
    monkeypatch.setattr(files, "SHARD_BYTES", 2_000_000)
    WanModel.from_pretrained(base).save_pretrained(tmp_path / "base", dtype)
    pairs = lora_pairs(LAYERS, base)
    path = write(tmp_path / "a.safetensors", pairs, "lightx2v", 6.0)
    lora.main(["--merge", str(tmp_path / "base"), f"{path}=0.5", "--output", str(tmp_path / "out")])
    names = [sorted(file.name for file in (tmp_path / place).iterdir()) for place in ("base", "out")]
    assert names[0] == names[1] and len(names[0]) > 3  # config.json, the index, at least two files
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "base/config.json").read_text()
    rounded = {name: tensor.to(dtype).float() for name, tensor in weights_of(base).items()}
    expected = {name: tensor.to(dtype) for name, tensor in by_hand(rounded, pairs).items()}
    found = {name: read() for name, _, read in files.read_weights(tmp_path / "out")}
    for name, tensor in found.items():
        assert tensor.dtype == dtype and torch.allclose(tensor, expected[name], rtol=2 ** -7, atol=1e-6), name
        changed = name.removesuffix(".weight") in LAYERS and name.endswith(".weight")
        assert torch.equal(tensor, rounded[name].to(dtype)) != changed, name
    WanModel.from_pretrained(tmp_path / "out")


def test_what_the_command_refuses(base, tmp_path):
    path = write(tmp_path / "a.safetensors", lora_pairs(LAYERS, base), "ours")
    with pytest.raises(InputError, match="names no LoRA file"):
        lora.main(["--merge", str(base), "--output", str(tmp_path / "out")])
    with pytest.raises(InputError, match="is there already; choose another place"):
        lora.main(["--merge", str(base), path, "--output", str(tmp_path)])


# ------------------------------------------------------------------------------ training

STYLE = ["blocks.0.self_attn.q", "blocks.1.cross_attn.k", "blocks.2.ffn.2", "head.head"]


@pytest.mark.parametrize("script, flags, results", [
    (train_prfl, ["--lora_rank", "2", "--phases", "sft"], ["model", "adapter.safetensors"]),
    (train_prfl, ["--kl_weight", "1", "--phases", "reward"], ["model"]),  # with a frozen copy
    (train_pavrm, ["--lora_rank", "2", "--num_blocks", "2"], ["reward"])])
def test_training_beside_a_merged_lora_is_training_on_the_merged_model(quick, script, flags, results):
    write_lora("style.safetensors", lora_pairs(STYLE))
    lora.main(["--merge", "model", "style.safetensors=0.5", "--output", "merged"])
    flags = [*flags, "--steps", "2", "--seed", "3"]
    beside = numbers(run(script, "beside", *flags, "--lora", "style.safetensors=0.5"))
    assert beside == numbers(run(script, "on", *flags, "--model", "merged"))
    for result in results:
        assert_same(weights_of(f"beside/{result}"), weights_of(f"on/{result}"))


TARGETS = ["q", "k", "ffn.0"]
ADAPTED = [f"blocks.{i}.{name}" for i in range(3)
           for name in ("self_attn.q", "self_attn.k", "cross_attn.q", "cross_attn.k", "ffn.0")]


def test_training_on_from_an_adapter(quick):
    """It starts as the merged model, whatever --lora_alpha is, and at --lr 0 it is saved as it was."""
    write_lora("adapter.safetensors", lora_pairs(ADAPTED))
    lora.main(["--merge", "model", "adapter.safetensors", "--output", "merged"])
    flags = ["--steps", "1", "--phases", "sft", "--lora_rank", "3", "--lora_targets", *TARGETS]
    start = run(train_prfl, "merged_run", *flags, "--model", "merged")[0]
    for name, alpha in [("same", "3"), ("other", "12")]:
        log = run(train_prfl, name, *flags, "--lora_alpha", alpha, "--lora_from", "adapter.safetensors",
                  "--lr", "0")
        assert log[0]["sft_loss"] == pytest.approx(start["sft_loss"], rel=1e-5)
        assert_same(weights_of(f"{name}/adapter.safetensors"), weights_of("adapter.safetensors"), 1e-6)
        assert_same(weights_of(f"{name}/model"), weights_of("merged"), 1e-6)


@pytest.mark.parametrize("flags, sentence", [
    ([], "has rank 3 at blocks.0.cross_attn.k.weight, and the adapters have rank 0; choose --lora_rank"),
    (["--lora_rank", "4", "--lora_targets", *TARGETS], "has rank 3 at .* and the adapters have rank 4"),
    (["--lora_rank", "3"], "has rank 0 at blocks.0.cross_attn.o.weight, and the adapters have rank 3"),
    (["--lora_rank", "3", "--lora_targets", "q"], "has rank 3 at blocks.0.cross_attn.k.weight"),
])
def test_an_adapter_of_other_rank_or_layers_is_not_trained_on(quick, flags, sentence):
    write_lora("adapter.safetensors", lora_pairs(ADAPTED))
    with pytest.raises(InputError, match=sentence):
        run(train_prfl, "run", "--lora_from", "adapter.safetensors", *flags)


def test_a_whole_difference_is_not_trained_on(quick):
    save_file({"blocks.0.diff_m": torch.ones(1, 6, 48)}, "a.safetensors")
    with pytest.raises(InputError, match="whole difference of blocks.0.modulation, with which no adapter"):
        run(train_prfl, "run", "--lora_from", "a.safetensors", "--lora_rank", "3")
