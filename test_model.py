"""Every variant of the transformer agrees with the official one, and reads and writes its files."""
import json

import pytest
import torch
from safetensors.torch import save_file

import files
from files import InputError
from model import WanConfig, WanModel
from testdata.golden import agree, draw, fill_
from testdata.helpers import ROOT, TINY, checkpointing, golden, golden_inputs, tiny


@pytest.mark.parametrize("name", ["wan21_t2v", "wan21_i2v", "wan21_flf2v", "wan22_i2v", "wan22_ti2v"])
def test_official_values(name):
    values, meta = golden(f"dit_{name}")
    inputs, config, seed = golden_inputs(meta)
    model = WanModel(config)
    fill_(model.state_dict(), seed)
    inputs["x"].requires_grad_()
    out = model(**inputs)
    assert agree(out, values["out"], 1e-5)
    for depth in range(config.num_layers):
        assert agree(model.features(**inputs, num_blocks=depth + 1), values[f"block_out.{depth}"], 1e-5)
    (out * draw(out.shape, seed + 4)).sum().backward()
    assert agree(inputs["x"].grad, values["grad_x"], 1e-4)
    gradients = [key for key in values if key.startswith("grad.")]
    assert len(gradients) == 5
    for key in gradients:
        assert agree(model.get_parameter(key.removeprefix("grad.")).grad, values[key], 1e-4), key


@pytest.mark.parametrize("name", [
    "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.1-I2V-14B", "Wan2.1-FLF2V-14B-720P",
    "Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B", "Wan2.2-TI2V-5B"])
def test_names_and_shapes_are_the_official_ones(name):
    official = files.read_json(ROOT / "testdata/manifests/config_json.json")[name]
    use_clip = False if name == "Wan2.2-I2V-A14B" else None
    config = WanConfig.from_dict({**official, "use_clip": use_clip})
    with torch.device("meta"):
        ours = {key: list(tensor.shape) for key, tensor in WanModel(config).state_dict().items()}
    manifest = files.read_json(ROOT / f"testdata/manifests/{name}.dit.json")
    assert ours == {key: shape for key, (_, shape) in manifest.items()}
    assert config.official() == official  # what we write as config.json


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 60_000])
def test_save_and_load(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(files, "SHARD_BYTES", shard_bytes)
    model = tiny()
    model.save_pretrained(tmp_path / "saved")
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    if shard_bytes == 5_000_000_000:
        assert [shard.name for shard in shards] == ["diffusion_pytorch_model.safetensors"]
    else:
        assert len(shards) > 2 and all(shard.stat().st_size < 70_000 for shard in shards)
        index = files.read_json(tmp_path / "saved/diffusion_pytorch_model.safetensors.index.json")
        assert set(index["weight_map"]) == set(model.state_dict())
    loaded = WanModel.from_pretrained(tmp_path / "saved")
    state = loaded.state_dict()
    assert set(state) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_bf16_stays_near_float32(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "saved")
    half = WanModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    inputs = dict(x=draw((1, 16, 2, 4, 4), 1), t=torch.tensor([500.0]), context=[draw((3, 8), 2)])
    with torch.no_grad():
        a, b = model(**inputs), half(**inputs)
    assert b.dtype == torch.float32 and half.features(**inputs, num_blocks=1).dtype == torch.float32
    assert agree(b, a, 3e-2)


def test_wan22_i2v_is_told_from_wan21_by_its_names(tmp_path):
    tiny(model_type="i2v", in_dim=36, use_clip=False).save_pretrained(tmp_path / "wan22")
    tiny(model_type="i2v", in_dim=36).save_pretrained(tmp_path / "wan21")
    assert not WanModel.from_pretrained(tmp_path / "wan22").config.use_clip
    assert WanModel.from_pretrained(tmp_path / "wan21").config.use_clip


def test_padding_is_attended():
    """Padded and unpadded prompts are the same; a longer text_len is not, because zeros are attended too."""
    model, inputs = tiny(), dict(x=draw((1, 16, 2, 4, 4), 1), t=torch.tensor([500.0]))
    states = draw((3, 8), 2)
    padded = torch.cat([states, torch.zeros(13, 8)])
    with torch.no_grad():
        out = model(**inputs, context=[states])
        assert torch.equal(out, model(**inputs, context=padded[None]))
        longer = tiny(text_len=32)
        assert not torch.allclose(out, longer(**inputs, context=[states]), rtol=1e-3)


def test_checkpointed_blocks_change_no_gradient():
    inputs = dict(x=draw((1, 16, 2, 4, 4), 1), t=torch.tensor([500.0]), context=[draw((3, 8), 2)])
    gradients = []
    for checkpointed in (False, True):
        model = tiny()
        model.run_block = checkpointing if checkpointed else model.run_block
        model(**inputs).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_bf16_on_cuda_stays_near_float32_on_the_cpu(tmp_path):
    model = tiny(dim=128, num_heads=4)
    model.save_pretrained(tmp_path / "saved")
    half = WanModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16, device="cuda")
    x = draw((2, 16, 3, 8, 8), 1)
    t = torch.tensor([100.0, 900.0])
    context = [draw((3, 8), 2), draw((5, 8), 3)]
    with torch.no_grad():
        out = half(x.cuda(), t.cuda(), [states.cuda() for states in context])
        assert agree(out.cpu(), model(x, t, context), 5e-2)


# ------------------------------------------------------------------------------ wrong input

def test_another_models_checkpoint_is_refused_by_the_tensors_names(tmp_path):
    tiny().save_pretrained(tmp_path / "saved")
    wider = {**TINY, "ffn_dim": 80}
    (tmp_path / "saved/config.json").write_text(json.dumps(wider))
    sentence = r"another model: blocks\.0\.ffn\.0\.weight is \[64, 48\], expected \[80, 48\]"
    with pytest.raises(InputError, match=sentence):
        WanModel.from_pretrained(tmp_path / "saved")
    state = tiny().state_dict()
    state["blocks.0.self_attn.key.weight"] = state.pop("blocks.0.self_attn.k.weight")
    save_file(state, tmp_path / "saved/diffusion_pytorch_model.safetensors")
    (tmp_path / "saved/config.json").write_text(json.dumps(TINY))
    with pytest.raises(InputError, match="k.weight is missing.*key.weight is not expected"):
        WanModel.from_pretrained(tmp_path / "saved")


def test_truncated_safetensors(tmp_path):
    tiny().save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="diffusion_pytorch_model.safetensors is damaged"):
        WanModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("changes, message", [
    ({"num_layers": 10**6}, "config.json: num_layers is 1000000; expected a whole number from 1 to 200"),
    ({"dim": 10**9}, "config.json: dim is 1000000000; expected"),
    ({"dim": "48"}, 'config.json: dim is "48"; expected a whole number'),
    ({"eps": float("nan")}, "config.json: eps is NaN; expected a number from 0 to 1"),
    ({"num_heads": 5}, "config.json: dim is 48, with 5 heads; expected a multiple of twice num_heads"),
    ({"num_heads": 16}, "dim is 48, with 16 heads"),  # 3 channels per head cannot turn in pairs
    ({"model_type": "vace"}, 'config.json: model_type is "vace"; expected flf2v or i2v or t2v or ti2v'),
    ({"model_type": ["t2v"]}, "config.json: model_type is a list"),
])
def test_an_absurd_config_is_refused_before_anything_is_built(tmp_path, monkeypatch, changes, message):
    tiny().save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text(json.dumps({**TINY, **changes}))
    monkeypatch.setattr(WanModel, "__init__", None)
    with pytest.raises(InputError, match=message):
        WanModel.from_pretrained(tmp_path / "saved")


def test_a_large_config_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    """By the shapes in its files: this one would need a terabyte."""
    tiny().save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text(json.dumps({**TINY, "dim": 20000, "ffn_dim": 100000}))
    monkeypatch.setattr(WanModel, "to_empty", None)
    with pytest.raises(InputError, match="a checkpoint of another model: .*expected .*20000"):
        WanModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("inputs, message", [
    (dict(context=[torch.zeros(3, 9)]), "text states of width 9 do not fit this model's text_dim, 8"),
    (dict(x=torch.zeros(1, 36, 2, 4, 4)), "takes 16 channels"),
    (dict(x=torch.zeros(1, 16, 2, 3, 4)), "2x2 patches"),
    (dict(context=[torch.zeros(17, 8)]), "text_len 16"),
])
def test_wrong_inputs(inputs, message):
    right = dict(x=torch.zeros(1, 16, 2, 4, 4), t=torch.tensor([1.0]), context=[torch.zeros(3, 8)])
    with pytest.raises(InputError, match=message):
        tiny()(**{**right, **inputs})
