"""The VAE agrees with the official one, needs no more memory for longer videos, and refuses wrong videos."""
import json

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from files import InputError
from testdata.golden import agree, draw, fill_
from testdata.helpers import ROOT, golden
from vae import WanVAE


@pytest.mark.parametrize("name", ["vae_wan21", "vae_wan21_one_frame"])
def test_official_values(name):
    values, meta = golden(name)
    seed = int(meta["seed"])
    vae = WanVAE(dim=8)
    fill_(vae.state_dict(), seed)
    video = (0.5 * draw(json.loads(meta["shape"]), seed + 1)).clamp(-1, 1)
    z = vae.encode(video)
    assert agree(z, values["z"], 1e-5)
    assert agree(vae.decode(values["z"]), values["decode_z"], 1e-5)
    noise = draw(z.shape, seed + 2).requires_grad_()
    decoded = vae.decode(noise)
    assert agree(decoded, values["decode_random"], 1e-5)
    (decoded * draw(decoded.shape, seed + 3)).sum().backward()
    assert agree(noise.grad, values["grad_random"], 1e-4)


def test_names_and_shapes_are_the_official_ones():
    with torch.device("meta"):
        ours = {name: list(tensor.shape) for name, tensor in WanVAE().state_dict().items()}
    manifest = json.loads((ROOT / "testdata/manifests/Wan2.1_VAE.pth.json").read_text())
    assert ours == {name: shape for name, (_, shape) in manifest.items()}


def test_the_past_does_not_depend_on_the_future():
    vae = WanVAE(dim=8).requires_grad_(False)
    long = torch.rand(1, 3, 13, 16, 16) * 2 - 1
    assert torch.allclose(vae.encode(long)[:, :, :3], vae.encode(long[:, :, :9]), atol=1e-5)
    z = torch.randn(1, 16, 4, 2, 2)
    assert torch.allclose(vae.decode(z)[:, :, :9], vae.decode(z[:, :, :3]), atol=1e-5)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_what_is_held_does_not_grow_with_the_length(half):
    """The walk sees at most four frames, or one latent frame, at a time, and its cache has a fixed size."""
    vae = WanVAE(dim=4).requires_grad_(False)
    calls = []
    getattr(vae, half).register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    held = []
    for frames in (9, 21):
        calls.clear()
        if half == "encoder":
            vae.encode(torch.zeros(1, 3, frames, 16, 16))
        else:
            vae.decode(torch.zeros(1, 16, (frames + 3) // 4, 2, 2))
        cache = calls[-1][1]
        tensors = [tensor for tensor in cache.values() if torch.is_tensor(tensor)]
        longest = max(chunk.shape[2] for chunk, _ in calls)
        held.append((longest, sum(tensor.untyped_storage().nbytes() for tensor in tensors)))
    assert held[0] == held[1] and held[0][0] == {"encoder": 4, "decoder": 1}[half]


class Saved:
    """`with Saved() as saved:` counts the bytes that autograd saves, each storage once."""

    def __enter__(self):
        self.kept = {}
        self.hooks = saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self):
        return sum(self.kept.values())


def test_decoding_again_changes_nothing_but_memory():
    """The same pixels and gradient; what is kept for a further latent frame is that frame and its cache."""
    vae = WanVAE(dim=4)
    fill_(vae.state_dict(), 0)
    vae.requires_grad_(False)
    kept, found, calls, decoder = {}, {}, {}, []
    vae.decoder.register_forward_pre_hook(lambda module, inputs: decoder.append(inputs))
    for recompute in (False, True):
        for frames in (3, 5):
            z = draw((1, 16, frames, 4, 6), 1).requires_grad_()
            with Saved() as saved:
                video = vae.decode(z, recompute=recompute)
            kept[recompute, frames] = saved.bytes
            decoder.clear()
            (video * draw(video.shape, 2)).sum().backward()
            calls[recompute] = len(decoder)
            found[recompute, frames] = video.detach(), z.grad
    for frames in (3, 5):
        (video, grad), (again, grad_again) = found[False, frames], found[True, frames]
        assert agree(again, video, 1e-6) and agree(grad_again, grad, 1e-5)
    assert calls == {False: 0, True: 5}
    _, cache = decoder[0]
    held = sum(tensor.untyped_storage().nbytes() for tensor in cache.values() if torch.is_tensor(tensor))
    assert all(frame.shape[2] == 1 for frame, _ in decoder)
    per_frame = (kept[True, 5] - kept[True, 3]) / 2
    assert held <= per_frame < 1.02 * held
    assert kept[True, 5] < kept[False, 5] / 5


def test_pth_round_trip(tmp_path):
    vae = WanVAE(dim=8)
    torch.save(vae.state_dict(), tmp_path / "vae.pth")
    loaded = WanVAE.from_pretrained(tmp_path / "vae.pth")
    states = zip(vae.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


def test_refuses_another_file(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="encoder.conv1.weight is missing; .*VAE is in Wan2.1_VAE.pth"):
        WanVAE.from_pretrained(tmp_path / "other.pth")


@pytest.mark.parametrize("name, shape, message", [
    ("conv2.weight", (16,), r"conv2.weight is .16.; expected a list of 5; a Wan"),
    ("encoder.conv1.weight", (), "encoder.conv1.weight is ..; expected a list of 5"),
    ("conv2.weight", (8, 8, 1, 1, 1), "z_dim is 8"),
    ("encoder.conv1.weight", (0, 3, 3, 3, 3), "encoder.conv1.weight has no values"),
    ("encoder.conv1.weight", (10000, 3, 3, 3, 3), "another model"),
])
def test_refuses_a_tensor_of_another_shape(tmp_path, name, shape, message):
    state = WanVAE(dim=4).state_dict()
    torch.save(state | {name: torch.zeros(()).expand(shape)}, tmp_path / "vae.pth")
    with pytest.raises(InputError, match=message):
        WanVAE.from_pretrained(tmp_path / "vae.pth")


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 16, 12)])
def test_refuses_what_it_cannot_encode(shape):
    with pytest.raises(InputError, match="1 \\+ 4n frames"):
        WanVAE(dim=8).encode(torch.zeros(shape))
