"""The image tower of CLIP ViT-H/14: how Wan2.1's image-to-video models see the first (and last) frame.

The image is resized to a square of 224 pixels, whatever its shape, and cut into patches of 14. The patches
and one class token run through a pre-norm transformer. CLIP itself then turns them into one vector, to
compare it with a text. Wan needs the parts of the picture, so it takes all tokens before the last block: 1 +
16 * 16 = 257 tokens of 1280 channels. The rest (last block, `post_norm`, `head`) is not used; it exists so
that the official file loads strictly.
"""
import torch
import torch.nn.functional as F
from torch import nn

from files import InputError, check_form, load_weights, weight_shapes

# In the directory of a Wan2.1 image-to-video model.
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images: red, green, blue in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, n, 3, heads, head size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, n, head size)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, n, head size)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, n, dim)


class Block(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))  # (B, n, dim)
        return x + self.mlp(self.norm2(x))  # (B, n, dim)


class VisionTransformer(nn.Module):
    def __init__(self, image_size, patch_size, dim, num_heads, num_layers, out_dim):
        super().__init__()
        num_patches = (image_size // patch_size) ** 2
        self.patch_embedding = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size, bias=False)
        self.cls_embedding = nn.Parameter(torch.randn(1, 1, dim) * dim**-0.5)
        self.pos_embedding = nn.Parameter(torch.randn(1, 1 + num_patches, dim) * dim**-0.5)
        self.pre_norm = nn.LayerNorm(dim, eps=1e-5)
        self.transformer = nn.Sequential(*(Block(dim, num_heads) for _ in range(num_layers)))
        self.post_norm = nn.LayerNorm(dim, eps=1e-5)  # not used, see above
        self.head = nn.Parameter(torch.randn(dim, out_dim) * dim**-0.5)  # not used

    def forward(self, image):
        patches = self.patch_embedding(image).flatten(2).transpose(1, 2)  # (B, patches, dim), row by row
        class_token = self.cls_embedding.expand(len(image), -1, -1)  # (B, 1, dim)
        x = torch.cat([class_token, patches], dim=1)  # (B, 1 + patches, dim)
        x = self.pre_norm(x + self.pos_embedding)  # (B, 1 + patches, dim)
        return self.transformer[:-1](x)  # (B, 1 + patches, dim), without the last block


class CLIPVisionModel(nn.Module):
    """The image tower; parameter names and shapes as in the official CLIP file, under `visual.`."""

    def __init__(self, image_size=224, patch_size=14, dim=1280, num_heads=16, num_layers=32, out_dim=1024):
        super().__init__()
        self.image_size = image_size
        self.visual = VisionTransformer(image_size, patch_size, dim, num_heads, num_layers, out_dim)

    def forward(self, image):
        """image (B, 3, H, W) in [-1, 1], any H and W -> tokens (B, 1 + patches, dim), class token first."""
        size = (self.image_size, self.image_size)
        image = F.interpolate(image.float(), size, mode="bicubic", align_corners=False, antialias=False)
        mean = image.new_tensor(MEAN).view(3, 1, 1)
        std = image.new_tensor(STD).view(3, 1, 1)
        image = ((image + 1) / 2 - mean) / std  # (B, 3, *size), each colour about N(0, 1)
        return self.visual(image.to(self.visual.head.dtype))  # (B, 1 + patches, dim)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """The frozen image tower of a checkpoint (CLIP_FILE).

        Sizes are read from its shapes; the text tower in the same file is skipped. Raises InputError if the
        file is missing, damaged or of another model.
        """
        size = range(2, 10_001)
        form = {"visual.patch_embedding.weight": [size] * 4, "visual.head": [size] * 2,
                "visual.pos_embedding": [int, size, size]}
        shapes = check_form(weight_shapes(path), form, path, f"the CLIP image tower is in {CLIP_FILE}")
        dim, _, patch_size, _ = shapes["visual.patch_embedding.weight"]
        _, num_tokens, _ = shapes["visual.pos_embedding"]
        _, out_dim = shapes["visual.head"]
        if dim % 80:
            raise InputError(f"{path} is not CLIP ViT-H (its width is {dim}, not a multiple of 80); "
                             f"give the official {CLIP_FILE}")
        num_heads = dim // 80  # heads of 80 channels, as in ViT-H; no shape in the file tells their number
        image_size = round((num_tokens - 1) ** 0.5) * patch_size
        num_layers = sum(name.startswith("visual.") and name.endswith(".attn.proj.weight") for name in shapes)
        with torch.device("meta"):  # shapes without memory; the weights are then read into place
            model = cls(image_size, patch_size, dim, num_heads, num_layers, out_dim)
        load_weights(model.to(dtype), path, ignore=("textual.", "log_scale"), device=device)
        return model.eval().requires_grad_(False)
