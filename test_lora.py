"""LoRA: an adapter starts without effect, follows its equation, and is saved so that others can read it."""
import weakref

import pytest
import torch
from safetensors import safe_open
from torch import nn

import files
import lora
from files import InputError
from lora import LoRALinear, adapters, add_lora, without_adapters
from model import WanModel
from testdata.golden import draw
from testdata.helpers import checkpointing, tiny

INPUTS = dict(x=draw((1, 16, 2, 4, 4), 1), t=torch.tensor([500.0]), context=[draw((3, 8), 2)])


def merged_state(model):
    """What is saved."""
    state = lora.official_state(model)
    for name, merge in lora.merges(model).items():
        state[name] = merge(state[name])
    return state


def with_adapters(rank=3, alpha=6.0, targets=("q", "k", "v", "o"), started=True):
    """A tiny model with adapters; `started`: at their start, else with other values, as if trained."""
    model = tiny()
    add_lora(model, rank, alpha, targets)
    lora.start_lora(model, 0)
    if not started:
        for i, layer in enumerate(adapters(model).values()):
            layer.lora_B.weight.data = 0.1 * draw(layer.lora_B.weight.shape, i)
    return model


def test_a_layer_by_hand():
    linear = nn.Linear(4, 6)
    layer = LoRALinear(linear, rank=2, alpha=8.0)
    x, a, b = draw((5, 4), 0), layer.lora_A.weight, layer.lora_B.weight
    assert a.shape == (2, 4) and b.shape == (6, 2)
    assert torch.allclose(layer(x), x @ linear.weight.T + linear.bias + 4.0 * (x @ a.T @ b.T), atol=1e-6)


def test_at_the_start_nothing_changes():
    with torch.no_grad():
        assert torch.equal(with_adapters()(**INPUTS), tiny()(**INPUTS))
    layers = adapters(with_adapters()).values()
    assert all(layer.lora_B.weight.count_nonzero() == 0 for layer in layers)
    for layer in layers:  # uniform within 1 / sqrt(width), as torch starts a linear layer
        a = layer.lora_A.weight * layer.in_features ** 0.5
        assert 0.9 < a.abs().max() <= 1 and abs(a.mean()) < 0.25
    assert len({layer.lora_A.weight[0, 0].item() for layer in layers}) == len(layers)


def test_only_adapters_are_trained_and_all_learn_in_the_second_step():
    """With B zero, the first step reaches B alone; A follows."""
    model = with_adapters()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == 3 * 8 * 2
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for reached in (["lora_B"], ["lora_A", "lora_B"]):
        optimizer.zero_grad()
        model(**INPUTS).square().sum().backward()
        for name in names:
            assert bool(model.get_parameter(name).grad.any()) == (name.split(".")[-2] in reached), name
        optimizer.step()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in names)


@pytest.mark.parametrize("targets, expected", [
    (["q"], ["self_attn.q", "cross_attn.q"]),
    (["ffn.0", "ffn.2"], ["ffn.0", "ffn.2"]),
    (["q", "k", "v", "o"], [f"{part}_attn.{name}" for part in ("self", "cross") for name in "qkvo"]),
])
def test_targets(targets, expected):
    model = with_adapters(targets=targets)
    assert set(adapters(model)) == {f"blocks.{i}.{name}" for i in range(3) for name in expected}


def test_image_keys_are_a_target_of_their_own():
    model = tiny(model_type="i2v", in_dim=36)
    add_lora(model, 2, 2.0, ["k_img"])
    assert set(adapters(model)) == {f"blocks.{i}.cross_attn.k_img" for i in range(3)}


@pytest.mark.parametrize("target", ["query", "k_img", "attn.q", "norm_q", "modulation"])
def test_a_target_that_is_no_layer(target):
    sentence = f"no linear layer of a block is called {target}; choose LoRA targets from q k v o"
    with pytest.raises(InputError, match=sentence):
        add_lora(tiny(), 2, 2.0, ["q", target])


def test_merging_is_the_same_function(tmp_path):
    """A saved model has the official names, and W + (alpha / rank) B A, alpha not being the rank."""
    model = with_adapters(started=False)
    merged = tiny()
    merged.load_state_dict(merged_state(model))  # strict: no other names
    with torch.no_grad():
        expected = model(**INPUTS)
        assert not torch.allclose(expected, tiny()(**INPUTS), rtol=1e-2)
        assert torch.allclose(merged(**INPUTS), expected, rtol=1e-4, atol=1e-5)
    layer = model.blocks[1].cross_attn.v
    by_hand = tiny().blocks[1].cross_attn.v.weight + 2.0 * layer.lora_B.weight @ layer.lora_A.weight
    assert torch.allclose(merged.blocks[1].cross_attn.v.weight, by_hand, atol=1e-6)
    model.save_pretrained(tmp_path / "merged")
    loaded = WanModel.from_pretrained(tmp_path / "merged")
    states = zip(loaded.state_dict().values(), merged.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_an_adapter_file_adds_up_to_the_merged_model(tmp_path):
    """Base + B A of the file is the merged model, for programs that ignore alpha or take it for the rank."""
    model = with_adapters(started=False)
    lora.save_adapter(model, tmp_path / "adapter.safetensors")
    with safe_open(tmp_path / "adapter.safetensors", framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    assert metadata == {"format": "pt"} and len(tensors) == 3 * 8 * 2
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in tensors
    base, merged = tiny().state_dict(), merged_state(model)
    for name in adapters(model):
        a, b = (tensors[f"diffusion_model.{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        assert torch.allclose(base[f"{name}.weight"] + b @ a, merged[f"{name}.weight"], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_merged_one_at_a_time(tmp_path, monkeypatch, dtype):
    """So an export never holds a float32 copy of the model, only of what goes into one file."""
    merged, alive, by_hand = [], [], LoRALinear.merged

    def watched(self, weight):
        alive.append(sum(reference() is not None for reference in merged))
        result = by_hand(self, weight)
        merged.append(weakref.ref(result))
        return result

    model = with_adapters(started=False).bfloat16()  # the base; the adapters are float32 again below
    for layer in adapters(model).values():
        layer.lora_A.float(), layer.lora_B.float()
    monkeypatch.setattr(LoRALinear, "merged", watched)
    monkeypatch.setattr(files, "SHARD_BYTES", 20_000)  # room for two of them in float32
    model.save_pretrained(tmp_path / "model", dtype)
    assert len(merged) == 24 and max(alive) == (1 if dtype == torch.float32 else 0)
    loaded = WanModel.from_pretrained(tmp_path / "model")
    name = "blocks.2.cross_attn.o"
    expected = by_hand(model.get_submodule(name), model.get_submodule(name).weight)
    assert torch.equal(loaded.get_submodule(name).weight, expected.to(dtype).float())


def test_without_adapters_it_is_the_model_as_it_was():
    model = with_adapters(started=False)
    with torch.no_grad():
        changed = model(**INPUTS)
        with without_adapters(model):
            assert torch.equal(model(**INPUTS), tiny()(**INPUTS))
        assert torch.equal(model(**INPUTS), changed) and not torch.equal(changed, tiny()(**INPUTS))


def test_checkpointed_blocks_compute_adapters_again():
    """Blocks computed again have their adapters, though the model ran without them in between."""
    gradients = []
    for checkpointed in (False, True):
        model = with_adapters(started=False)
        model.run_block = checkpointing if checkpointed else model.run_block
        out = model(**INPUTS)
        with torch.no_grad(), without_adapters(model):
            model(**INPUTS)
        out.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_weights_load_under_adapters(tmp_path):
    """Frozen weights are read as always; adapters are not part of a checkpoint."""
    tiny(7).save_pretrained(tmp_path / "model")
    model = files.load_weights(with_adapters(started=False), tmp_path / "model")
    with torch.no_grad(), without_adapters(model):
        assert torch.equal(model(**INPUTS), tiny(7)(**INPUTS))


def test_adapters_beside_bf16_weights():
    model = with_adapters(started=False)
    with torch.no_grad():
        expected = model(**INPUTS)
        for parameter in (p for name, p in model.named_parameters() if ".lora_" not in name):
            parameter.data = parameter.data.bfloat16()
        out = model(**INPUTS)
    assert out.dtype == torch.float32 and (out - expected).abs().max() < 0.05 * expected.abs().max()
    assert merged_state(model)["blocks.0.self_attn.q.weight"].dtype == torch.float32  # small updates survive
