"""Logits at several noise levels by hand, measures by hand, and ROC AUC against its definition over pairs."""
import math

import pytest
import torch

import evaluation
from evaluation import classification_measures, fixed_noise, measure, process_logits, roc_auc, table
from reward import PAVRM, ProcessReward
from solver import TrainingSchedule
from testdata.golden import draw, fill_
from testdata.helpers import SHAPE, fill_pavrm, tiny

# ------------------------------------------------------------------------------ logits

def test_logits_by_hand():
    """x_t = (1 - s) x_0 + s noise at the table's nearest level; the batch size changes nothing."""
    pavrm = PAVRM(tiny(), 2, ["physics_quality", "text_alignment"])
    fill_(pavrm.state_dict(), 5)
    x0, noise, text = draw((1, *SHAPE), 1), draw((1, *SHAPE), 2), draw((3, 8), 3)
    timesteps = [201, 600, 1000]
    expected = []
    for t in timesteps:
        sigma = TrainingSchedule(3.0).near(t)
        x = (1 - sigma) * x0 + sigma * noise
        with torch.no_grad():
            expected.append(pavrm(x, torch.tensor([float(t)]), [text], labels=pavrm.labels))
    expected = torch.cat(expected)                                     # (3, 2)
    for batch_size in (1, 2, 3):
        logits = process_logits(pavrm, x0, text, {}, noise, timesteps, batch_size=batch_size, shift=3.0)
        assert torch.allclose(logits, expected, atol=1e-5)
        assert not logits.requires_grad
    second = process_logits(pavrm, x0, text, {}, noise, timesteps, ["text_alignment"], shift=3.0)
    assert torch.allclose(second, expected[:, 1:], atol=1e-5)
    assert (expected[0] - expected[1]).abs().min() > 1e-3              # the noise level counts


def test_the_condition_is_repeated_for_each_noise_level():
    pavrm = fill_pavrm(tiny(model_type="i2v", in_dim=36, use_clip=False).config, 1, 5, 6)
    x0, noise, text = draw((1, *SHAPE), 1), draw((1, *SHAPE), 2), draw((3, 8), 3)
    y = draw((1, 20, *SHAPE[1:]), 4)
    together = process_logits(pavrm, x0, text, {"y": y}, noise, [201, 800], batch_size=2)
    alone = process_logits(pavrm, x0, text, {"y": y}, noise, [201, 800])
    other = process_logits(pavrm, x0, text, {"y": -y}, noise, [201, 800])
    assert torch.allclose(together, alone, atol=1e-5) and not torch.allclose(together, other, atol=1e-3)


def test_a_clip_has_its_own_noise_or_that_of_its_pair():
    def noise(seed=0, **entry):
        return fixed_noise({"latents": torch.empty(SHAPE), "entry": entry}, seed)

    first = noise(source_id="a")
    assert first.shape == (1, *SHAPE) and torch.equal(first, noise(source_id="a", pair_id=None))
    assert not torch.equal(first, noise(source_id="b"))
    assert not torch.equal(first, noise(seed=1, source_id="a"))
    assert torch.equal(noise(source_id="a", pair_id="p"), noise(source_id="b", pair_id="p"))


def test_the_reward_has_the_same_noise_levels_everywhere():
    assert evaluation.REWARD_TIMESTEPS == ProcessReward.timesteps == evaluation.EVALUATION_TIMESTEPS[:-1]


# ------------------------------------------------------------------------------ measures

def test_measures_by_hand():
    logit, label = torch.tensor([2.0, 1.0, -1.0, -2.0, 3.0]), torch.tensor([1, 0, 1, 0, 1])
    measures = classification_measures(logit, label)
    assert measures["accuracy"] == pytest.approx(3 / 5)
    assert measures["precision"] == measures["recall"] == pytest.approx(2 / 3) == measures["f1"]
    assert measures["auc"] == pytest.approx(5 / 6)  # of 3 x 2 pairs only (-1, 1) is in the wrong order
    losses = [math.log(1 + math.exp(-value)) for value in (2, -1, -1, 2, 3)]  # minus them if poor
    assert measures["loss"] == pytest.approx(sum(losses) / 5)
    assert classification_measures(logit, torch.zeros(5))["f1"] == 0
    assert classification_measures(-logit.abs(), label)["precision"] == 0


def test_calibration_error_by_hand():
    """Bins of a tenth: 0.62 and 0.68 share one, half of which is good; 0.95 and 0.05 are alone, and good."""
    rewards, label = torch.tensor([0.62, 0.68, 0.95, 0.05]), torch.tensor([1, 0, 1, 1])
    measures = classification_measures(rewards.logit(), label)
    assert measures["ece"] == pytest.approx(2 / 4 * abs(0.65 - 0.5) + 1 / 4 * 0.05 + 1 / 4 * 0.95, abs=1e-5)
    certain = classification_measures(torch.tensor([90.0, -90.0]), torch.tensor([1, 0]))
    assert certain["ece"] == pytest.approx(0) and certain["accuracy"] == 1  # a reward of 1 is in the last bin


def auc_over_pairs(logit, true):
    """The definition of ROC AUC, over all (good, poor) pairs."""
    right = 0
    for good in logit[true].tolist():
        for poor in logit[~true].tolist():
            right += 1 if good > poor else 0.5 if good == poor else 0
    return right / (true.sum().item() * (~true).sum().item())


@pytest.mark.parametrize("values", [2, 5, 1000])
def test_auc_by_ranks_is_auc_over_pairs(values):
    """With many ties, with few and with none; the order of the clips does not matter."""
    generator = torch.Generator().manual_seed(values)
    for n in (2, 3, 10, 101):
        logit = torch.randint(values, (n,), generator=generator) / 7 - 1
        true = torch.rand(n, generator=generator) < 0.4
        true[0], true[1] = True, False
        assert roc_auc(logit, true) == pytest.approx(auc_over_pairs(logit, true), abs=1e-12)
        assert roc_auc(logit.flip(0), true.flip(0)) == roc_auc(logit, true)
        assert roc_auc(-logit, true) == pytest.approx(1 - roc_auc(logit, true), abs=1e-12)


def test_auc_of_many_clips_is_exact():
    """The ranks of 40,000 clips add up to more than float32 can count."""
    n = 20_000
    logit = torch.cat([torch.arange(n), torch.arange(n, 2 * n)]).float()
    true = torch.arange(2 * n) >= n
    logit[n] = n - 1      # a good clip as low as the best poor one but ...
    logit[0] = 2 * n - 1  # ... this, as high as the best good one: two ties, and n - 1 pairs out of order
    assert roc_auc(logit, true) == (n * n - n) / (n * n)


def test_auc_needs_both_classes():
    logit = torch.tensor([1.0, 2.0])
    assert roc_auc(logit, torch.tensor([True, True])) is None is roc_auc(logit, torch.tensor([False, False]))
    assert roc_auc(logit, torch.tensor([False, True])) == 1
    assert roc_auc(logit, torch.tensor([True, False])) == 0
    assert roc_auc(torch.tensor([math.inf, math.inf]), torch.tensor([True, False])) == 0.5
    assert classification_measures(logit, torch.ones(2))["auc"] is None


# ------------------------------------------------------------------------------ tables

class Four:
    """Stands in for `Clips`: four clips, of which the last is not annotated."""
    entries = [{"labels": {"physics_quality": value}} for value in (1, 0, 0, None)]


def test_clips_without_a_label_do_not_count():
    pavrm = PAVRM(tiny(), 1, ["text_alignment", "physics_quality"])
    logits = torch.zeros(4, 2, 2)                                      # (clips, timesteps, labels)
    logits[:, 0, 1] = torch.tensor([1.0, -1.0, 2.0, -9.0])
    measures = measure(logits, Four, [0, 1, 2, 3], pavrm, [201, 600])
    assert list(measures) == ["physics_quality"] and list(measures["physics_quality"]) == [201, 600]
    expected = classification_measures(torch.tensor([1.0, -1.0, 2.0]), torch.tensor([1, 0, 0]))
    assert measures["physics_quality"][201] == expected
    assert measures["physics_quality"][201]["accuracy"] == pytest.approx(2 / 3)
    assert measure(logits[3:], Four, [3], pavrm, [201, 600]) == {}
    chosen = measure(logits[[2, 0]], Four, [2, 0], pavrm, [201])       # rows of the logits follow the indices
    expected = classification_measures(torch.tensor([2.0, 1.0]), torch.tensor([0, 1]))
    assert chosen["physics_quality"][201] == expected


def test_pairs_are_measured_by_their_order():
    pavrm, logits = PAVRM(tiny(), 1, ["physics_quality"]), torch.tensor([1.0, 0.5, 2.0, 9.0]).view(4, 1, 1)
    measures = measure(logits, Four, [0, 1, 2, 3], pavrm, [600], pairs=[(0, 1), (0, 2)])
    loss = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(1))) / 2
    assert list(measures) == ["physics_quality"] and list(measures["physics_quality"]) == [600]
    assert measures["physics_quality"][600] == pytest.approx({"pair_accuracy": 0.5, "auc": 0.5, "loss": loss})
    ties = measure(torch.ones(4, 1, 1), Four, [0, 1, 2, 3], pavrm, [600], pairs=[(0, 1)])
    assert ties["physics_quality"][600]["pair_accuracy"] == 0.5


def test_the_table_has_a_line_per_label_and_timestep():
    rows = {201: {"accuracy": 0.75, "auc": None}, 1000: {"accuracy": 1.0, "auc": 0.5}}
    measures = {"physics_quality": rows}
    assert table(measures) == ["  physics_quality, timestep  201:  accuracy 0.750  auc -",
                               "  physics_quality, timestep 1000:  accuracy 1.000  auc 0.500"]
    assert table({}) == []
