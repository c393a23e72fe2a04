"""PAVRM agrees with the official one, in values, losses and gradients, and is one directory on disk."""
import pytest
import torch

from files import InputError
from model import WanModel
from reward import PAVRM, bce_loss, bradley_terry_loss, classification_measures, reward_loss
from test_model import golden_inputs, tiny
from test_vae import golden
from testdata.golden import agree, draw, fill_


def fill_pavrm(config, num_blocks, dit_seed, head_seed):
    pavrm = PAVRM(WanModel(config), num_blocks)
    fill_(pavrm.dit.state_dict(), dit_seed)
    fill_({name: tensor for name, tensor in pavrm.state_dict().items() if not name.startswith("dit.")}, head_seed)
    return pavrm


@pytest.mark.parametrize("name", ["pavrm_t2v", "pavrm_i2v"])
def test_official_values(name):
    values, meta = golden(name)
    inputs, config, seed = golden_inputs(meta)
    pavrm = fill_pavrm(config, int(meta["k"]), seed, seed + 7)
    other = {**inputs, "x": draw(inputs["x"].shape, seed + 5)}
    inputs["x"].requires_grad_()

    def gradients_agree(kind):
        for key in (key for key in values if key.startswith(f"grad_{kind}.")):
            name = key.removeprefix(f"grad_{kind}.")
            parameter = pavrm.get_parameter(name if not name.startswith("blocks") else f"dit.{name}")
            assert agree(parameter.grad, values[key], 1e-4), key
        pavrm.zero_grad()

    logit = pavrm(**inputs)
    assert agree(logit, values["logit"], 1e-5) and agree(logit.sigmoid(), values["reward"], 1e-5)
    loss = bce_loss(logit, values["labels"])
    assert agree(loss.view(1), values["bce"], 1e-5)
    loss.backward()
    gradients_agree("bce")

    logit_other = pavrm(**other)
    assert agree(logit_other, values["logit_other"], 1e-5)
    loss = bradley_terry_loss(pavrm(**inputs), logit_other)
    assert agree(loss.view(1), values["bt"], 1e-5)
    loss.backward()
    gradients_agree("bt")

    inputs["x"].grad = None
    loss = reward_loss(pavrm(**inputs))
    assert agree(loss.view(1), values["refl"], 1e-5)
    loss.backward()
    assert agree(inputs["x"].grad, values["grad_x_refl"], 1e-4)


def test_a_clip_scores_the_same_alone_and_in_a_batch():
    pavrm = PAVRM(tiny(), num_blocks=2)
    x, t = draw((3, 16, 2, 4, 4), 1), torch.tensor([100.0, 500.0, 900.0])
    context = [draw((n, 8), 2 + n) for n in (3, 1, 5)]
    together = pavrm(x, t, context)
    alone = torch.cat([pavrm(x[i:i + 1], t[i:i + 1], context[i:i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_gradient_lives_at_a_large_logit():
    """Through a sigmoid in bf16 it would be exactly zero here."""
    logit = torch.tensor([8.0], requires_grad=True)
    bce_loss(logit, torch.tensor([1.0])).backward()
    assert -5e-4 < logit.grad.item() < -1e-4


def test_reward_loss_by_hand():
    assert reward_loss(torch.tensor([0.0, 100.0])).item() == pytest.approx(0.1 * (1.5 + 1.0) / 2)


def test_measures_by_hand():
    logit, label = torch.tensor([2.0, 1.0, -1.0, -2.0, 3.0]), torch.tensor([1, 0, 1, 0, 1])
    measures = classification_measures(logit, label)
    assert measures["accuracy"] == pytest.approx(3 / 5)
    assert measures["precision"] == measures["recall"] == pytest.approx(2 / 3) == measures["f1"]


def test_save_and_load(tmp_path):
    pavrm = PAVRM(tiny(), num_blocks=2, tasks=["human_quality"])
    pavrm.save_pretrained(tmp_path / "reward")
    loaded = PAVRM.from_pretrained(tmp_path / "reward")
    assert loaded.tasks == ["human_quality"] and len(loaded.dit.blocks) == 2
    inputs = dict(x=draw((1, 16, 2, 4, 4), 1), t=torch.tensor([500.0]), context=[draw((3, 8), 2)])
    assert torch.equal(pavrm(**inputs), loaded(**inputs))
    half = PAVRM.from_pretrained(tmp_path / "reward", dtype=torch.bfloat16)
    assert half(**inputs).dtype == torch.float32 and half.mlp.fc1.weight.dtype == torch.float32


def test_a_transformer_is_no_reward_model(tmp_path):
    tiny().save_pretrained(tmp_path / "dit")
    with pytest.raises(InputError, match="does not describe a reward model"):
        PAVRM.from_pretrained(tmp_path / "dit")
    with pytest.raises(InputError, match="holds no reward model"):
        PAVRM.from_pretrained(tmp_path / "nothing")
