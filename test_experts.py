"""The two transformers of Wan2.2 A14B."""
import torch

from experts import WanExperts
from testdata.golden import draw
from testdata.helpers import tiny


def test_experts_are_chosen_by_timestep(tmp_path):
    for seed, noise in enumerate(["high", "low"]):
        tiny(seed).save_pretrained(tmp_path / f"{noise}_noise_model")
    experts = WanExperts.from_pretrained(tmp_path)
    inputs = dict(x=draw((1, 16, 2, 4, 4), 1), context=[draw((3, 8), 2)])
    with torch.no_grad():
        for t, seed in [(875.0, 0), (874.9, 1)]:
            t = torch.tensor([t])
            assert torch.equal(experts(t=t, **inputs), tiny(seed)(t=t, **inputs))
