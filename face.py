"""Faces as a reward on pixels: is the person of the reference clip still the same person?

    score = mean of cos(embedding of a generated frame's face, embedding of a reference frame's face)

A detector (SCRFD or CenterFace) finds the largest face of each frame, without gradient: a box and five
landmarks. A similarity transform takes the landmarks to a template, and the crop there goes into an
embedder (ArcFace or another). The crop is bilinear, so the score has a gradient in the pixels. This is the
reward of ROLL's Reward FL (IPRO, arXiv 2510.14255).

Pictures are RGB in [-1, 1], (3, H, W). Points are (x, y) in pixels; pixel i lies at coordinate i. A network
is any module that turns a batch of pictures into a list of outputs.
"""
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from files import NOTHING, InputError, Number, check_form

# Where ArcFace wants the eyes, the nose and the corners of the mouth in a crop of 112 pixels.
ARCFACE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655),
           (70.7299, 92.2041))

# The same face in the crop of dlib's network, 150 pixels with more of the head around it.
DLIB = tuple(((x - 56.07) * 1.523 + 75, (y - 65.2) * 1.523 + 64.5) for x, y in ARCFACE)

# The settings of FaceIdentity. What ends in `_values` are the numbers that black and white become for a
# network. `mean` and `deviation` are those of the cosine, which differ from embedder to embedder: ArcFace's
# are ROLL's; dlib's were measured between the frames of one real clip.
PRESETS = {
    "antelopev2": dict(
        detector="scrfd", detector_size=(640, 640), detector_values=(-127.5 / 128, 127.5 / 128),
        threshold=0.5, overlap=0.4, crop_size=112, crop_values=(-1, 1), template=ARCFACE,
        mean=0.54, deviation=0.16),
    "centerface_dlib": dict(
        detector="centerface", detector_size=(640, 640), detector_values=(0, 255),
        threshold=0.5, overlap=0.4, crop_size=150, crop_values=(0, 255), template=DLIB,
        mean=0.95, deviation=0.03)}

# The form of FaceIdentity's settings (files.check_form): a preset, and what differs from it.
SIDE = Number(32, 4096, 32)  # the detectors halve a picture five times
SETTINGS = {
    "preset": set(PRESETS), "detector?": {"scrfd", "centerface"}, "detector_size?": [SIDE, SIDE],
    "detector_values?": [float, float], "threshold?": Number(0, 1), "overlap?": Number(0, 1),
    "crop_size?": range(16, 1025), "crop_values?": [float, float], "template?": [[float, float]] * 5,
    "mean?": Number(-1, 1), "deviation?": Number(0.0001, 2), str: NOTHING}


# ------------------------------------------------------------------------------ geometry

def similarity(landmarks, template):
    """The matrix (2, 3), float64, that takes points of the picture to points of the crop.

    It rotates, scales and shifts, without reflection, and brings the landmarks (5, 2) as near to the template
    (5, 2) as it can (least squares; Umeyama 1991). Landmarks that all lie in one point give NaN.
    """
    landmarks = landmarks.double()
    template = template.to(landmarks)
    source = landmarks - landmarks.mean(0)
    target = template - template.mean(0)
    spread = source.square().sum()
    # A rotation and scaling of the plane is [[a, -b], [b, a]], so the sum of squares has a simple minimum.
    a = (source * target).sum() / spread
    b = (source[:, 0] * target[:, 1] - source[:, 1] * target[:, 0]).sum() / spread
    turn = torch.stack([torch.stack([a, -b]), torch.stack([b, a])])    # (2, 2)
    shift = template.mean(0) - turn @ landmarks.mean(0)
    return torch.cat([turn, shift[:, None]], dim=1)


def crop(image, matrix, size):
    """The square crop (3, size, size) of image (3, H, W); `similarity` gives the matrix (2, 3).

    Bilinear, black (-1) outside the picture, differentiable in the image. F.grid_sample would do, but on a
    GPU its gradient adds in any order, which --deterministic forbids.
    """
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    height, width = image.shape[1:]
    matrix = matrix.double()
    along = torch.arange(size, device=matrix.device)
    y, x = torch.meshgrid(along, along, indexing="ij")
    points = torch.stack([x, y], dim=-1).double() - matrix[:, 2]       # (size, size, 2) in the crop
    points = points @ matrix[:, :2].inverse().T                        # in the picture
    x = points[..., 0].clamp(-1, width) + 1                            # in the padded picture
    y = points[..., 1].clamp(-1, height) + 1
    left, top = x.floor(), y.floor()
    x, y = (x - left).to(image), (y - top).to(image)                   # shares of the right and lower pixel

    padded = F.pad(image, (1, 2, 1, 2), value=-1)                      # (3, H + 3, W + 3)
    left, top = left.long().to(image.device), top.long().to(image.device)
    upper = padded[:, top, left] * (1 - x) + padded[:, top, left + 1] * x
    lower = padded[:, top + 1, left] * (1 - x) + padded[:, top + 1, left + 1] * x
    return upper * (1 - y) + lower * y                                 # (3, size, size)


def fit(image, size):
    """Scale image (3, H, W) to fit into size = (h, w), at the top left, and pad it with black.

    Returns the picture (3, h, w) and the scale, new height over old. A picture that shrinks is antialiased,
    unlike by OpenCV and so insightface.
    """
    height, width = image.shape[1:]
    if height / width > size[0] / size[1]:
        new_height = size[0]
        new_width = max(1, int(new_height / (height / width)))
    else:
        new_width = size[1]
        new_height = max(1, int(new_width * (height / width)))
    small = F.interpolate(image[None].float(), (new_height, new_width), mode="bilinear", antialias=True)[0]
    padding = (0, size[1] - new_width, 0, size[0] - new_height)
    return F.pad(small, padding, value=-1), new_height / height


def in_values(pictures, values):
    """Pictures in [-1, 1] in the numbers of a network; values: what black and white become."""
    black, white = values
    return (pictures + 1) / 2 * (white - black) + black


# ------------------------------------------------------------------------------ detection

def decode_scrfd(outputs, size, threshold=0.5, overlap=0.4):
    """Faces in the outputs of SCRFD for one picture: boxes (n, 5) and landmarks (n, 5, 2), on the CPU.

    outputs: scores (n, 1) at strides 8, 16 and 32, distances (n, 4) at these, landmarks (n, 10) at these.
    size: (h, w) of the network's input. Boxes are x1, y1, x2, y2, score in pixels of that input, best first.
    """
    if len(outputs) != 9:
        raise InputError(f"the face detector has {len(outputs)} outputs and SCRFD with landmarks has 9; "
                         f"take a file with landmarks, such as scrfd_10g_bnkps.onnx, or another detector")
    scores, boxes, landmarks = [], [], []
    for i, stride in enumerate((8, 16, 32)):
        score, distance, offset = [output.float().flatten(0, -2) for output in outputs[i::3]]
        y, x = torch.meshgrid(torch.arange(size[0] // stride), torch.arange(size[1] // stride), indexing="ij")
        centres = torch.stack([x, y], dim=-1).flatten(0, 1) * stride
        centres = centres.repeat_interleave(2, dim=0).to(distance)     # (n, 2): two anchors in each cell
        if len(centres) != len(score):
            raise InputError(f"the face detector gives {len(score)} scores at stride {stride} for "
                             f"{size[1]}x{size[0]} pixels, and SCRFD {len(centres)}; "
                             f"check the detector and the settings' detector_size")
        corners = [centres - distance[:, :2] * stride, centres + distance[:, 2:] * stride]
        scores.append(score[:, 0])
        boxes.append(torch.cat(corners, dim=1))                        # (n, 4)
        landmarks.append(centres[:, None] + offset.unflatten(1, (5, 2)) * stride)
    return _best(torch.cat(scores), torch.cat(boxes), torch.cat(landmarks), threshold, overlap)


def decode_centerface(outputs, threshold=0.5, overlap=0.4):
    """Faces in the outputs of CenterFace for one picture, as `decode_scrfd` returns them.

    outputs: score (1, 1, h, w), scale (1, 2, h, w), offset (1, 2, h, w) and landmark (1, 10, h, w), at a
    quarter of the input's size, y before x.
    """
    if [output.shape[1] for output in outputs] != [1, 2, 2, 10]:
        raise InputError("the face detector's outputs are not CenterFace's, of 1, 2, 2 and 10 channels; "
                         "take centerface.onnx, or set detector to what the file is")
    score, scale, offset, landmark = [output[0].float().flatten(1).T for output in outputs]  # (h w, C)
    height, width = outputs[0].shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = torch.stack([x, y], dim=-1).flatten(0, 1).to(offset)       # (h w, 2)
    sides = 4 * scale.flip(1).exp()                                    # width, height
    corner = 4 * (cells + offset.flip(1) + 0.5) - sides / 2            # the box's upper left one
    points = corner[:, None] + landmark.unflatten(1, (5, 2)).flip(2) * sides[:, None]
    boxes = torch.cat([corner, corner + sides], dim=1)                 # (h w, 4)
    return _best(score[:, 0], boxes, points, threshold, overlap)


def _best(scores, boxes, landmarks, threshold, overlap):
    """Boxes (n, 5) and landmarks with a good score, best first, without those that overlap a better one.

    Non-maximum suppression as in insightface: a box from 0 to 9 is 10 pixels wide. (insightface does it in
    pixels of the picture, where that 1 weighs a little differently.)
    """
    good = scores >= threshold
    boxes = torch.cat([boxes, scores[:, None]], dim=1)[good].cpu()
    order = boxes[:, 4].argsort(descending=True, stable=True)
    boxes, landmarks = boxes[order], landmarks[good].cpu()[order]
    areas = (boxes[:, 2:4] - boxes[:, :2] + 1).prod(1)
    left, kept = torch.arange(len(boxes)), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best.item())
        low = torch.maximum(boxes[best, :2], boxes[left, :2])
        high = torch.minimum(boxes[best, 2:4], boxes[left, 2:4])
        common = (high - low + 1).clamp(min=0).prod(1)
        left = left[common / (areas[best] + areas[left] - common) <= overlap]
    return boxes[kept], landmarks[kept]


class Detector:
    """Finds faces in a picture of any size, with SCRFD or CenterFace; it has no gradient."""

    def __init__(self, net, kind, size, values, threshold, overlap):
        self.net = net
        self.kind = kind
        self.size = tuple(size)
        self.values = values
        self.limits = (threshold, overlap)

    @torch.no_grad()
    def __call__(self, image):
        """Image (3, H, W) -> boxes (n, 5), landmarks (n, 5, 2), in pixels of the image, best first."""
        picture, scale = fit(image, self.size)
        outputs = self.net(in_values(picture, self.values)[None])
        if self.kind == "scrfd":
            boxes, landmarks = decode_scrfd(outputs, self.size, *self.limits)
        else:
            boxes, landmarks = decode_centerface(outputs, *self.limits)
        return boxes / boxes.new_tensor([scale, scale, scale, scale, 1]), landmarks / scale


def largest(boxes, landmarks):
    """Box (5,) and landmarks (5, 2) of the face with the largest area, or None if there is no face."""
    if not len(boxes):
        return None
    i = (boxes[:, 2:4] - boxes[:, :2]).prod(1).argmax()
    return boxes[i], landmarks[i]


# ------------------------------------------------------------------------------ identity

class Embedder:
    """Turns faces into vectors, with gradient in the pictures."""

    def __init__(self, net, crop_size, template, values):
        self.net = net
        self.crop_size = crop_size
        self.template = template                                       # (5, 2)
        self.values = values

    def __call__(self, landmarks, *images):
        """Landmarks (n, 5, 2) of one face in each of n images (3, H, W) -> vectors (n, D) of any length."""
        crops = []
        for points, image in zip(landmarks, images, strict=True):
            crops.append(crop(image, similarity(points, self.template), self.crop_size))
        return self.net(in_values(torch.stack(crops), self.values))[0].float()


def cosines(a, b):
    """The cosine of each of a (F, D) with each of b (G, D): (F, G)."""
    return F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T


def identity_score(generated, real, generated_found, real_found):
    """The mean cosine between faces of generated (F, D) and of real frames (G, D): a number, ().

    generated_found (F,) and real_found (G,) say which frames have a face; the others do not count. Frame 0 of
    `real` is the first frame that the generator was given, and does not count either. Where no pair is left,
    the score is 0 and has no gradient.
    """
    ours = generated[generated_found]
    theirs = real[1:][real_found[1:]]
    if not len(ours) or not len(theirs):
        return generated.new_zeros(())
    return cosines(ours, theirs).mean()


# The faces of a clip, one for each frame: vectors (F, D), zero where no face was found, and found (F,), bool,
# both on the clip's device; boxes (F, 5) and landmarks (F, 5, 2), on the CPU.
Faces = namedtuple("Faces", "vectors found boxes landmarks")


class FaceIdentity:
    """Scores how much the faces of a generated clip are those of a reference clip.

    The networks are frozen, in float32 and on the clips' device. settings: the name of a preset and what
    differs from it, a dict of the form SETTINGS. chunk: how many faces are embedded at a time. Backward
    computes a chunk's activations again, so that no more than one chunk's are in memory.
    """

    def __init__(self, detector_net, embedder_net, settings, chunk=8):
        check_form(settings, SETTINGS, "the settings of FaceIdentity")
        preset = PRESETS[settings["preset"]]
        own = {**preset, **settings}
        template = torch.tensor(own["template"])
        if "template" not in settings:  # the preset's, drawn for the preset's size
            template = template * (own["crop_size"] / preset["crop_size"])
        self.detector = Detector(detector_net, own["detector"], own["detector_size"], own["detector_values"],
                                 own["threshold"], own["overlap"])
        self.embedder = Embedder(embedder_net, own["crop_size"], template, own["crop_values"])
        self.mean = own["mean"]
        self.deviation = own["deviation"]
        self.chunk = chunk

    def detect(self, video):
        """found (F,), boxes (F, 5) and landmarks (F, 5, 2) of the largest face in each frame of a video.

        video: (F, 3, H, W). All are on the CPU, and boxes and landmarks zero where nothing was found.
        """
        assert video.ndim == 4 and video.shape[1] == 3, f"{tuple(video.shape)} is not (F, 3, H, W)"
        found = torch.zeros(len(video), dtype=torch.bool)
        boxes, landmarks = torch.zeros(len(video), 5), torch.zeros(len(video), 5, 2)
        for i, frame in enumerate(video.detach()):
            face = largest(*self.detector(frame))
            # A detector can be wrong: landmarks that are infinite, or all in one point, are no face.
            if face is not None and similarity(face[1], self.embedder.template)[:, :2].det() > 0:
                found[i] = True
                boxes[i], landmarks[i] = face
        return found, boxes, landmarks

    def faces(self, video):
        """The Faces of video (F, 3, H, W) in [-1, 1]; their vectors have a gradient in the video."""
        found, boxes, landmarks = self.detect(video)
        frames = video.unbind()
        numbers = found.nonzero().flatten()
        parts = []
        for some in numbers.split(self.chunk):
            images = [frames[i] for i in some]
            if images:  # an empty tensor is split into one empty part
                parts.append(checkpoint(self.embedder, landmarks[some], *images, use_reentrant=False))
        if not parts:
            return Faces(video.new_zeros(len(video), 1), found.to(video.device), boxes, landmarks)
        known = torch.cat(parts)                                       # (faces, D)
        vectors = known.new_zeros(len(video), known.shape[1])
        vectors = vectors.index_copy(0, numbers.to(known.device), known)                       # (F, D)
        return Faces(vectors, found.to(video.device), boxes, landmarks)

    def score(self, generated, reference):
        """How much the person of the generated clip is the reference's: score (), found (F,), details.

        generated: video (F, 3, H, W) in [-1, 1], in which the score has a gradient. reference: another video
        (G, 3, H, W), or `faces` of it. The score is a mean cosine. It is 0 and has no gradient if the
        generated clip has no face, or the reference none after its frame 0; then details["pairs"] is 0.
        details: the generated clip's boxes and landmarks; cosines (F,), the mean cosine of each frame's
        face, 0 without one; pairs, the number of pairs of frames.
        """
        if torch.is_tensor(reference):
            with torch.no_grad():
                reference = self.faces(reference)
        ours = self.faces(generated)
        score = identity_score(ours.vectors, reference.vectors, ours.found, reference.found)
        theirs = reference.vectors[1:][reference.found[1:]]
        pairs = int(ours.found.sum()) * len(theirs)
        each = torch.zeros(len(generated))
        if pairs:
            each = cosines(ours.vectors.detach(), theirs).mean(1).cpu()
        details = {"boxes": ours.boxes, "landmarks": ours.landmarks, "cosines": each, "pairs": pairs}
        return score, ours.found, details
