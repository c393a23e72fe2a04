"""CLIP's image tower: the official values, names and shapes, and loading from a file with both towers."""
import json

import pytest
import torch
import torch.nn.functional as F

from clip import MEAN, STD, CLIPVisionModel
from files import InputError
from testdata.golden import agree, draw, fill_
from testdata.helpers import ROOT, golden


def tiny_model():
    model = CLIPVisionModel(image_size=12, patch_size=4, dim=160, num_heads=2, num_layers=3, out_dim=24)
    fill_(model.state_dict(), 6)
    return model


def test_agrees_with_the_official_model():
    values, meta = golden("clip")
    config = json.loads(meta["cfg"])
    assert config.pop("mlp_ratio") == 4
    model = CLIPVisionModel(**config)
    fill_(model.state_dict(), int(meta["seed"]))
    assert agree(model(values["img"]), values["out"], 2e-6)  # 0 measured; 6e-6 if the norms' eps is 1e-6


def test_names_and_shapes_are_those_of_the_official_file():
    manifest = ROOT / "testdata/manifests/models_clip_open-clip-xlm-roberta-large-vit-huge-14.visual.json"
    with torch.device("meta"):
        model = CLIPVisionModel()
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: shape for name, (_, shape) in json.loads(manifest.read_text()).items()}


def test_an_image_is_squashed_to_the_square_and_normalised():
    model, seen = tiny_model(), []
    model.visual.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    colours = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    assert model(colours.expand(2, 3, 7, 30)).shape == (2, 1 + 9, 160)
    expected = (torch.tensor([0.0, 0.5, 1.0]) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(seen[0], expected.view(1, 3, 1, 1).expand(2, 3, 12, 12), rtol=1e-5, atol=1e-5)
    image = draw((1, 3, 30, 50), 1)
    small = F.interpolate(image, (12, 12), mode="bicubic", align_corners=False)  # not antialiased
    torch.testing.assert_close(model(image), model(small))


def test_the_last_block_is_not_run():
    model, image = tiny_model(), draw((1, 3, 12, 12), 2)
    expected = model(image)
    for unused in (model.visual.transformer[-1], model.visual.post_norm):
        for parameter in unused.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
    assert torch.equal(model(image), expected)
    torch.nn.init.zeros_(model.visual.transformer[-2].mlp[2].weight)
    assert not torch.equal(model(image), expected)


def both_towers(model):
    text_tower = {"log_scale": torch.zeros(()), "textual.token_embedding.weight": torch.zeros(9, 8)}
    return model.state_dict() | text_tower


def test_from_pretrained_reads_the_sizes_off_the_file(tmp_path):
    original = tiny_model()
    torch.save(both_towers(original), tmp_path / "clip.pth")
    model = CLIPVisionModel.from_pretrained(tmp_path / "clip.pth")
    image = draw((2, 3, 20, 9), 3)
    assert torch.equal(model(image), original(image))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    half = CLIPVisionModel.from_pretrained(tmp_path / "clip.pth", dtype=torch.bfloat16)(image)
    assert half.dtype == torch.bfloat16
    assert (half - original(image)).abs().max() < 0.05 * half.abs().max()


@pytest.mark.parametrize("change, reason", [
    (lambda state: state.pop("visual.head"), "the CLIP image tower is in"),
    (lambda state: state.pop("visual.transformer.1.norm1.bias"), "is missing"),
    (lambda state: state.update(extra=torch.zeros(3)), "extra is not expected"),
    (lambda state: state.update({"visual.head": torch.zeros(3)}), "visual.head is .3.; expected a list of 2"),
    (lambda state: state.update({"visual.pos_embedding": torch.zeros(1, 1, 80)}), "embedding.1. is 1"),
    (lambda state: state.update({"visual.pos_embedding": torch.zeros(1, 7, 80)}), "another model: "),
    (lambda state: state.update({"visual.patch_embedding.weight": torch.zeros(100, 3, 4, 4)}),
     r"not CLIP ViT-H \(its width is 100, not a multiple of 80\); give the official models_clip_open-clip"),
])
def test_from_pretrained_refuses_another_model(tmp_path, change, reason):
    state = both_towers(tiny_model())
    change(state)
    torch.save(state, tmp_path / "clip.pth")
    with pytest.raises(InputError, match=reason):
        CLIPVisionModel.from_pretrained(tmp_path / "clip.pth")
