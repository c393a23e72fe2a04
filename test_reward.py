"""PAVRM agrees with the official one in values and gradients, is one directory, and is PRFL's reward."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from files import InputError
from reward import PAVRM, ProcessReward, QueryAttention, bce_loss, bradley_terry_loss, check_fit, reward_loss
from testdata.golden import agree, draw
from testdata.helpers import fill_pavrm, golden, golden_inputs, tiny

INPUTS = dict(x=draw((2, 16, 2, 4, 4), 1), t=torch.tensor([500.0, 900.0]),
              context=[draw((3, 8), 2), draw((5, 8), 3)])


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


# ------------------------------------------------------------------------------ losses

def test_the_gradient_lives_at_a_large_logit():
    """Through a sigmoid in bf16 it would be exactly zero here."""
    logit = torch.tensor([8.0], requires_grad=True)
    bce_loss(logit, torch.tensor([1.0])).backward()
    assert -5e-4 < logit.grad.item() < -1e-4


def test_losses_of_labels_and_pairs_by_hand():
    logits, labels = torch.tensor([[0.0, 2.0], [-1.0, 5.0]]), torch.tensor([[1.0, math.nan], [0.0, 1.0]])
    terms = [math.log(2), 0.0, math.log(1 + math.exp(-1)), math.log(1 + math.exp(-5))]
    assert bce_loss(logits, labels, reduction="none").flatten().tolist() == pytest.approx(terms)
    assert bce_loss(logits, labels).item() == pytest.approx(sum(terms) / 3)  # over the labels that exist
    better, worse = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    terms = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))]
    assert bradley_terry_loss(better, worse, reduction="none").tolist() == pytest.approx(terms)
    assert bradley_terry_loss(better, worse).item() == pytest.approx(sum(terms) / 2)


def test_a_missing_label_has_no_gradient():
    logits = torch.tensor([0.0, 2.0, -1.0], requires_grad=True)
    bce_loss(logits, torch.tensor([1.0, math.nan, 0.0])).backward()
    assert logits.grad.tolist() == pytest.approx([-0.25, 0, 1 / (1 + math.e) / 2])


def test_reward_loss_by_hand():
    assert reward_loss(torch.tensor([0.0, 100.0])).item() == pytest.approx(0.1 * (1.5 + 1.0) / 2)
    assert reward_loss(torch.tensor([0.0, 2.0]), 3, "logit").item() == pytest.approx(3 * -1.0)
    loss = reward_loss(torch.tensor([0.0, 2.0]), 1, "log_sigmoid").item()
    assert loss == pytest.approx((math.log(2) + math.log(1 + math.exp(-2))) / 2)
    gradients = {}
    for form in ("hinge", "log_sigmoid", "logit"):  # where the reward is low, high
        logit = torch.tensor([-9.0, 9.0], requires_grad=True)
        reward_loss(logit, 1, form).backward()
        gradients[form] = (-2 * logit.grad).tolist()
    assert gradients["hinge"] == pytest.approx([1.2e-4, 1.2e-4], rel=0.05)
    assert gradients["log_sigmoid"] == pytest.approx([1, 1.2e-4], rel=0.05) and gradients["logit"] == [1, 1]


# ------------------------------------------------------------------------------ heads

def test_several_queries_by_hand():
    """Each query attends by itself, in eight heads; what they get, and they themselves, are averaged."""
    torch.manual_seed(0)
    pool, tokens = QueryAttention(16, num_queries=3), draw((2, 5, 16), 1)
    mha = pool.multihead_attn
    torch.nn.init.normal_(mha.in_proj_bias)
    torch.nn.init.normal_(mha.out_proj.bias)
    weights, biases = mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)
    q = F.linear(pool.queries, weights[0], biases[0])
    k, v = (F.linear(tokens, weights[i], biases[i]) for i in (1, 2))
    found, weights = torch.zeros(2, 3, 16), torch.zeros(2, 3, 5)
    for head in range(8):
        part = slice(2 * head, 2 * head + 2)
        attention = (q[:, part] @ k[..., part].transpose(1, 2) / 2 ** 0.5).softmax(-1)         # (2, 3, 5)
        found[..., part] = attention @ v[..., part]
        weights += attention / 8
    expected = (mha.out_proj(found) + pool.queries).mean(1)
    assert torch.allclose(pool(tokens), expected, atol=1e-5)
    seen = pool.attend(tokens)[1].mean((1, 2))                                                    # (2, 5)
    assert torch.allclose(seen, weights.mean(1), atol=1e-5) and torch.allclose(seen.sum(1), torch.ones(2))


@pytest.mark.parametrize("pool, num_queries, pooled", [
    ("mean", 1, lambda pavrm, tokens: tokens.mean(1)), ("max", 1, lambda pavrm, tokens: tokens.max(1).values),
    ("query", 3, lambda pavrm, tokens: pavrm.query_attention(tokens))])
def test_pools(tmp_path, pool, num_queries, pooled):
    pavrm = PAVRM(tiny(), 2, pool=pool, num_queries=num_queries)
    with torch.no_grad():
        logit = pavrm(**INPUTS)
        tokens = pavrm.dit.features(**INPUTS, num_blocks=2)
        hidden = F.relu(pavrm.mlp.fc2(F.relu(pavrm.mlp.fc1(pooled(pavrm, tokens)))))
        assert torch.allclose(logit, pavrm.mlp.fc3(hidden).squeeze(1), atol=1e-6) and logit.shape == (2,)
        pavrm.save_pretrained(tmp_path / "reward")
        loaded = PAVRM.from_pretrained(tmp_path / "reward")
        assert torch.equal(loaded(**INPUTS), logit)
        assert loaded.settings == {"pool": pool, "num_queries": num_queries}


def test_each_label_has_a_head_of_its_own(tmp_path):
    """Over shared tokens: in the order that is asked for, also after saving; the first has the published
    names."""
    pavrm = PAVRM(tiny(), 1, ["physics_quality", "text_alignment", "blur_quality"])
    with torch.no_grad():
        three = pavrm(**INPUTS, labels=pavrm.labels)
        assert three.shape == (2, 3) and torch.equal(pavrm(**INPUTS), three[:, 0])
        assert torch.equal(pavrm(**INPUTS, labels=["blur_quality", "physics_quality"]), three[:, [2, 0]])
        pavrm.save_pretrained(tmp_path / "reward")
        assert torch.equal(PAVRM.from_pretrained(tmp_path / "reward")(**INPUTS, labels=pavrm.labels), three)
    names = {name for name in pavrm.state_dict() if not name.startswith("dit.")}
    published = {"query_attention.queries", "mlp.fc3.bias", "other_heads.text_alignment.mlp.fc3.bias"}
    assert published < names and len(names) == 3 * 11


# ------------------------------------------------------------------------------ one directory

def test_save_and_load(tmp_path):
    pavrm = PAVRM(tiny(), num_blocks=2, labels=["human_quality"])
    pavrm.save_pretrained(tmp_path / "reward")
    loaded = PAVRM.from_pretrained(tmp_path / "reward")
    assert loaded.labels == ["human_quality"] and len(loaded.dit.blocks) == 2
    inputs = dict(x=draw((1, 16, 2, 4, 4), 1), t=torch.tensor([500.0]), context=[draw((3, 8), 2)])
    assert torch.equal(pavrm(**inputs), loaded(**inputs))
    half = PAVRM.from_pretrained(tmp_path / "reward", dtype=torch.bfloat16)
    assert half(**inputs).dtype == torch.float32 and half.mlp.fc1.weight.dtype == torch.float32


def test_a_transformer_is_no_reward_model(tmp_path):
    tiny().save_pretrained(tmp_path / "dit")
    with pytest.raises(InputError, match="pavrm is missing; .* written by train_pavrm.py"):
        PAVRM.from_pretrained(tmp_path / "dit")
    with pytest.raises(InputError, match="holds no reward model"):
        PAVRM.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("changes, message", [
    ({"num_blocks": 10**6}, "config.json: pavrm.num_blocks is 1000000; expected"),
    ({"num_blocks": 4}, "num_blocks is 4; the transformer has 3"),
    ({"labels": []}, "config.json: pavrm.labels is a list; expected a list that is not empty"),
    ({"labels": "motion_quality"}, 'config.json: pavrm.labels is "motion_quality"; expected a list'),
    ({"labels": ["a.b"]}, 'config.json: pavrm.labels.0. is "a.b"; expected blur_quality or'),
    ({"labels": ["blur_quality"] * 2}, "labels are blur_quality, blur_quality; give each label once"),
    ({"pool": "sum"}, 'config.json: pavrm.pool is "sum"; expected max or mean or query'),
    ({"use_clip": None}, "config.json: pavrm.use_clip is null; expected true or false; give a direc"),
    ({"gate": 1}, "config.json: pavrm.gate is 1; expected no such key"),
])
def test_a_wrong_configuration_is_refused(tmp_path, changes, message):
    PAVRM(tiny(), 2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pavrm"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        PAVRM.from_pretrained(tmp_path)


def test_the_query_pool_needs_eight_heads():
    with pytest.raises(InputError, match="dim is 36; the query pool needs a multiple of 8"):
        PAVRM(tiny(dim=36, num_heads=2), 1)
    PAVRM(tiny(dim=36, num_heads=2), 1, pool="mean")


def test_a_reward_model_of_another_kind_of_model_is_refused():
    pavrm = PAVRM(tiny(model_type="i2v", in_dim=36), 1)
    check_fit(pavrm, tiny(model_type="i2v", in_dim=36), "reward", "model")
    with pytest.raises(InputError, match="reward has in_dim 36, and model has 16"):
        check_fit(pavrm, tiny(), "reward", "model")
    with pytest.raises(InputError, match="reward has use_clip True, and model has False"):
        check_fit(pavrm, tiny(model_type="i2v", in_dim=36, use_clip=False), "reward", "model")


# ------------------------------------------------------------------------------ the reward of PRFL



def test_the_process_reward_by_hand():
    """A sigmoid squashes each label; then they are weighted and added, and so are their losses."""
    pavrm = PAVRM(tiny(), 2, ["physics_quality", "text_alignment", "blur_quality"])
    weights = {"blur_quality": 0.3, "physics_quality": 0.5}
    reward = ProcessReward(pavrm, weights, loss_weight=0.2, form="logit")
    batch = SimpleNamespace(texts=INPUTS["context"], condition={})
    with torch.no_grad():
        scores = reward.scores(INPUTS["x"], INPUTS["t"], batch)
        physics, _, blur = pavrm(**INPUTS, labels=pavrm.labels).unbind(1)
    assert torch.equal(scores, torch.stack([blur, physics], 1))
    assert torch.allclose(reward.value(scores), 0.3 * blur.sigmoid() + 0.5 * physics.sigmoid())
    expected = -0.2 * (0.3 * blur.mean() + 0.5 * physics.mean())
    assert reward.loss(scores).item() == pytest.approx(expected.item())
    assert reward.largest == pytest.approx(0.8) and reward.timesteps == [201, 400, 600, 800]
    hinge = ProcessReward(pavrm, weights)
    expected = 0.1 * (0.3 * (2 - blur.sigmoid()) + 0.5 * (2 - physics.sigmoid())).mean()
    assert hinge.loss(scores).item() == pytest.approx(expected.item())
