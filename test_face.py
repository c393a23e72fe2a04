"""Faces: reference values, and clips whose faces are marks that a small made-up detector finds."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from face import (
    ARCFACE,
    DLIB,
    PRESETS,
    SETTINGS,
    Detector,
    FaceIdentity,
    crop,
    decode_centerface,
    decode_scrfd,
    fit,
    identity_score,
    largest,
    similarity,
)
from files import InputError, check_form
from testdata.golden import agree, draw, fill_
from testdata.helpers import golden

TEMPLATE = torch.tensor(ARCFACE)


# ------------------------------------------------------------------------------ geometry

def test_alignment():
    """insightface's matrices; crops by float64 interpolation (every fourth pixel), the border included."""
    values, _ = golden("face_align")
    image = values["image"].float() / 127.5 - 1
    assert len(values["landmarks"]) == 6
    for i, landmarks in enumerate(values["landmarks"]):
        matrix = similarity(landmarks, TEMPLATE)
        assert (matrix - values["matrix"][i]).abs().max() < 1e-4
        ours = crop(image, matrix, 112)[:, ::4, ::4]
        assert (ours - values["crop"][i]).abs().max() < 1e-4


def test_the_gradient_of_a_crop():
    """Finite differences, where the crop is half outside the picture."""
    image = draw((3, 7, 9), 0).double().requires_grad_()
    matrix = similarity(torch.tensor([[6.0, 1], [11, 2], [8, 4], [6, 6], [10, 7]]), TEMPLATE * 8 / 112)
    cut = crop(image, matrix, 8)
    assert 5 < (cut == -1).all(0).sum() < 59
    assert torch.autograd.gradcheck(lambda image: crop(image, matrix, 8), image)
    assert crop(image.bfloat16(), matrix, 8).dtype == torch.float32


def test_landmarks_go_to_the_template_of_each_crop_size():
    for size, template in ((112, TEMPLATE), (224, 2 * TEMPLATE), (150, torch.tensor(DLIB))):
        landmarks = template @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]) * 1.7 + torch.tensor([30.0, -5.0])
        matrix = similarity(landmarks, template).float()
        assert torch.allclose(landmarks @ matrix[:, :2].T + matrix[:, 2], template, atol=1e-3)
        assert 0 < template.min() and template.max() < size
    mirrored = similarity(TEMPLATE * torch.tensor([-1.0, 1.0]), TEMPLATE)
    assert mirrored[:, :2].det() > 0  # never a reflection


def test_fit():
    image = torch.ones(3, 90, 200)
    for size, inside, scale in (((96, 64), (28, 64), 28 / 90), ((320, 640), (288, 640), 3.2),
                                ((61, 160), (61, 135), 61 / 90)):
        picture, ours = fit(image, size)
        assert ours == scale and picture.shape == (3, *size)
        expected = F.pad(torch.ones(3, *inside), (0, size[1] - inside[1], 0, size[0] - inside[0]), value=-1)
        assert torch.allclose(picture, expected)
    assert fit(torch.ones(3, 2, 3000), (64, 64))[0].shape == (3, 64, 64)  # too thin to keep its shape


# ------------------------------------------------------------------------------ detection

def test_scrfd():
    """insightface's detection: what the network sees, boxes and landmarks in pixels of the picture."""
    values, _ = golden("face_scrfd")
    kinds = ("score", "distance", "landmark")
    outputs = [values[f"{kind}.{stride}"] for kind in kinds for stride in (8, 16, 32)]
    seen = []

    def net(picture):
        seen.append(picture)
        return outputs

    preset = PRESETS["antelopev2"]
    detector = Detector(net, "scrfd", (160, 128), preset["detector_values"], 0.5, 0.4)
    picture = values["picture_bgr"].flip(2).permute(2, 0, 1).float() / 127.5 - 1
    boxes, landmarks = detector(picture)
    difference = seen[0][..., ::2, ::2] - values["network_input"]
    assert difference.abs().max() * 128 < 1.1  # grey levels: OpenCV rounds to whole ones
    assert boxes.shape == values["boxes"].shape and landmarks.shape == values["landmarks"].shape
    assert (boxes - values["boxes"]).abs().max() < 2e-3
    assert (landmarks - values["landmarks"]).abs().max() < 2e-3

    with_batch_axis = decode_scrfd([output[None] for output in outputs], (160, 128))
    assert torch.equal(with_batch_axis[0], decode_scrfd(outputs, (160, 128))[0])
    with pytest.raises(InputError, match="160 scores at stride 8 for 128x96 pixels, and SCRFD 384; check"):
        decode_scrfd([values["score.16"]] * 9, (96, 128))
    with pytest.raises(InputError, match="has 6 outputs and SCRFD with landmarks has 9"):
        decode_scrfd(outputs[:6], (160, 128))


def centerface_maps(height, width, cells):
    """CenterFace's outputs with a face for each (row, column, score, box height, box width)."""
    score, scale = torch.zeros(1, 1, height, width), torch.zeros(1, 2, height, width)
    offset, landmark = torch.zeros(1, 2, height, width), torch.zeros(1, 10, height, width)
    for row, column, value, high, wide in cells:
        score[0, 0, row, column] = value
        scale[0, :, row, column] = torch.tensor([math.log(high / 4), math.log(wide / 4)])
        offset[0, :, row, column] = torch.tensor([0.25, -0.5])
        landmark[0, :, row, column] = torch.arange(10) / 10
    return [score, scale, offset, landmark]


def test_centerface():
    """By hand: the centre is (4 (x - 0.5 + 0.5), 4 (y + 0.25 + 0.5)); landmarks are parts of the box."""
    cells = [(2, 5, 0.6, 12, 12), (6, 9, 0.5, 4, 4), (3, 2, 0.9, 6, 10), (1, 1, 0.49, 9, 9)]
    cells.append((2, 6, 0.55, 12, 12))  # overlaps the first: of 17 columns of pixels they share 9
    maps = centerface_maps(8, 12, cells)
    boxes, landmarks = decode_centerface(maps)
    expected = torch.tensor([[3, 12, 13, 18, 0.9], [14, 5, 26, 17, 0.6], [34, 25, 38, 29, 0.5]])
    assert torch.allclose(boxes, expected, atol=1e-5)
    points = torch.tensor([[4.0, 12], [6, 13.2], [8, 14.4], [10, 15.6], [12, 16.8]])
    assert torch.allclose(landmarks[0], points, atol=1e-5)
    assert [len(decode_centerface(maps, overlap=share)[0]) for share in (0.52, 0.53)] == [3, 4]
    assert [len(found) for found in decode_centerface(maps, threshold=0.95)] == [0, 0]
    with pytest.raises(InputError, match="not CenterFace's"):
        decode_centerface([maps[0], maps[0]])


def test_the_largest_face():
    boxes = torch.tensor([[0.0, 0, 4, 4, 0.9], [3, 3, 9, 8, 0.7], [-9, 0, -8, 7, 0.6]])
    box, landmarks = largest(boxes, torch.arange(30.0).view(3, 5, 2))
    assert torch.equal(box, boxes[1]) and landmarks[0, 0] == 10
    assert largest(boxes[:0], torch.zeros(0, 5, 2)) is None


# ------------------------------------------------------------------------------ the score

@pytest.mark.parametrize("case", range(4))
def test_the_score_of_roll(case):
    """Its four cases; in the last the real clip has a face in frame 0 only."""
    values, _ = golden("face_score")
    generated, real = values[f"{case}.generated"][0].requires_grad_(), values[f"{case}.real"][0]
    score = identity_score(generated, real, values[f"{case}.found"][0].bool(), real.any(1))
    assert (score - values[f"{case}.score"]).abs() <= 1e-5 * values[f"{case}.score"]
    assert score.requires_grad == (case != 3)
    if case != 3:
        score.backward()
        assert agree(generated.grad, values[f"{case}.grad_generated"][0], 1e-5)


def mark(frame, x, y, size, strength=1.0):
    """Draw a face into frame (3, H, W): a red square of 4 pixels, the centre of a face of so many pixels."""
    frame[:, y:y + 4, x:x + 4] = torch.tensor([2 * strength - 1, -1, size / 32 - 1])[:, None, None]


def find_marks(picture):
    """A detector with CenterFace's outputs: the score is red minus green, the size four times blue * 64."""
    red, green, blue = (F.avg_pool2d(picture, 4) / 255)[0]
    score = (red - green)[None, None]
    scale = (blue * 16 + 1e-9).log().expand(1, 2, *blue.shape)
    places = (TEMPLATE / 112).flip(1).flatten()
    landmark = places[:, None, None].expand(1, 10, *blue.shape)
    return [score, scale, torch.zeros_like(scale), landmark]


class Network(nn.Module):
    """An embedder; `calls` counts the faces of each call."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 12, 5, stride=2), nn.GELU(), nn.Conv2d(12, 6, 5, stride=2),
                                    nn.Flatten(), nn.Linear(294, 16))
        fill_(self.layers.state_dict(), 0)
        self.requires_grad_(False)
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return [self.layers(x)]


def judge(chunk=8):
    settings = {"preset": "centerface_dlib", "detector_size": [64, 96], "crop_size": 40,
                "crop_values": [-1, 1], "template": (TEMPLATE * 40 / 112).tolist()}
    return FaceIdentity(find_marks, Network(), settings, chunk)


def clip(faces, seed=0):
    """Noise with one mark, (x, y, size), in each frame that has one."""
    video = 0.1 * draw((len(faces), 3, 64, 96), seed) - 0.2
    for frame, face in zip(video, faces, strict=True):
        if face is not None:
            mark(frame, *face)
    return video


FACES = [(40, 24, 32), None, (44, 28, 36), (40, 32, 30), (48, 20, 28)]


def test_a_clip_and_its_reference():
    """Only frames with a face count and get a gradient; a reference's vectors can be kept."""
    model, reference = judge(), clip(FACES, 1)
    video = clip(FACES).requires_grad_()
    score, found, details = model.score(video, reference)
    assert found.tolist() == [True, False, True, True, True] and details["pairs"] == 4 * 3
    assert details["cosines"][1] == 0
    assert details["cosines"].sum() / 4 == pytest.approx(score.item(), abs=1e-6)
    assert details["boxes"][0, :4].tolist() == pytest.approx([42 - 16, 26 - 16, 42 + 16, 26 + 16], abs=1e-3)
    score.backward()
    assert video.grad.isfinite().all() and video.grad.flatten(1).any(1).tolist() == found.tolist()

    with torch.no_grad():
        kept = model.faces(reference)
    assert model.score(video, kept)[0].item() == score.item()
    assert kept.vectors[1].eq(0).all() and kept.vectors[0].any()
    same = clip([FACES[0]] * 3)
    assert model.score(same[:1].expand(3, -1, -1, -1), same[:1].expand(2, -1, -1, -1))[0] == pytest.approx(1)


@pytest.mark.parametrize("ours, theirs", [([None] * 4, FACES), (FACES, [FACES[0]] + [None] * 4),
                                          ([None] * 4, [None] * 3)])
def test_without_a_pair_of_faces(ours, theirs):
    """No face in the clip, or none in the reference but in the frame that the generator was given."""
    score, found, details = judge().score(clip(ours).requires_grad_(), clip(theirs, 1))
    assert score.item() == 0 and not score.requires_grad
    assert details["pairs"] == 0 and details["cosines"].eq(0).all()
    assert found.tolist() == [face is not None for face in ours]


def test_a_face_in_frame_0_only_counts_in_the_generated_clip():
    video = clip([FACES[0], None, None]).requires_grad_()
    score, found, details = judge().score(video, clip(FACES, 1))
    assert score.requires_grad and details["pairs"] == 3 and found.tolist() == [True, False, False]


def test_of_two_faces_the_larger_counts():
    video = clip([FACES[0]])
    alone, _, _ = judge().score(video, clip(FACES, 1))
    two = video.clone()
    mark(two[0], 4, 4, 16, strength=1.0)
    two[0, 0, 24:28, 40:44] = 0.8  # the larger one is found with less certainty
    boxes, _ = judge().detector(two[0])
    assert len(boxes) == 2 and boxes[0, 4] > boxes[1, 4]
    _, _, details = judge().score(two, clip(FACES, 1))
    assert details["boxes"][0, 2] - details["boxes"][0, 0] == pytest.approx(32, abs=1e-3)
    assert details["cosines"][0] == pytest.approx(alone.item(), abs=0.05)


def test_a_face_half_outside():
    """What is outside is black, and the rest gets a gradient."""
    model = judge()
    video = clip([(0, 24, 40)]).requires_grad_()
    score, found, details = model.score(video, clip(FACES, 1))
    score.backward()
    assert found.all() and details["boxes"][0, 0] < -15
    cut = crop(video[0], similarity(details["landmarks"][0], model.embedder.template), 40)
    assert (cut[:, :, :8] == -1).all() and (cut[:, :, 24:] != -1).all()
    assert video.grad[0, :, 10:40, :12].any() and video.grad.isfinite().all()


@pytest.mark.parametrize("landmark", [0.5, math.inf, math.nan])
def test_landmarks_in_one_point_are_no_face(landmark):
    model = judge()
    model.detector.net = lambda picture: [*find_marks(picture)[:3], torch.full((1, 10, 16, 24), landmark)]
    assert not model.faces(clip(FACES)).found.any()


def test_chunks():
    """Two faces at a time give the same values and gradients, and keep no activations for backward."""
    model, whole = judge(chunk=2), judge()
    videos = [clip(FACES).requires_grad_() for _ in range(2)]
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def bytes_kept():  # beside the videos themselves
        own = [video.untyped_storage().data_ptr() for video in videos]
        total = sum(size for place, size in kept.items() if place not in own)
        kept.clear()
        return total

    found, _, landmarks = whole.detect(videos[0])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        frames = [videos[0][i] for i in found.nonzero()[:, 0]]
        expected = whole.embedder(landmarks[found], *frames)
        directly = bytes_kept()
        vectors = model.faces(videos[1]).vectors
        chunked = bytes_kept()
    assert directly > 4 * 12 * 18 * 18 * 4 > 100 * chunked
    assert torch.allclose(vectors[found], expected, atol=1e-6)
    assert model.embedder.net.calls == [2, 2]

    (expected * draw(expected.shape, 3)).sum().backward()
    (vectors[found] * draw(expected.shape, 3)).sum().backward()
    assert agree(videos[1].grad, videos[0].grad, 1e-5)
    assert model.embedder.net.calls == [2, 2, 2, 2]  # computed again, as many at a time


# ------------------------------------------------------------------------------ settings

def test_settings():
    for name, preset in PRESETS.items():
        check_form({"preset": name, **preset}, SETTINGS, name)
    for wrong in ({"detector_size": [100, 64]}, {"template": [[1, 2]] * 4}, {"deviation": 0}, {"sizes": 3}):
        with pytest.raises(InputError, match="faces.json: "):
            check_form({"preset": "antelopev2", **wrong}, SETTINGS, "faces.json")
    scaled = FaceIdentity(None, None, {"preset": "antelopev2", "crop_size": 56})
    assert torch.equal(scaled.embedder.template, TEMPLATE / 2)
