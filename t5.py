"""umT5, the text encoder of the Wan models, and its tokenizer.

A prompt becomes, in three steps, the text states that the video transformer attends to:

    text --clean--> plain text --Tokenizer--> ids (n,) --UMT5Encoder--> states (n, dim)

`encode_prompts` does all three. The encoder is T5's: pre-norm blocks of self-attention and a gated
feed-forward, with linear layers that have no biases. It differs from a textbook transformer in three ways.
Positions enter only as a learned number that is added to the attention scores, looked up by the distance
between two tokens. The scores are not divided by sqrt(head size). And every block has its own table of these
numbers (T5 shares one).
"""
import html
import math
import re
import unicodedata
from html.entities import html5
from pathlib import Path

import sentencepiece
import torch
from torch import nn

from files import InputError, check_form, load_weights, weight_shapes

try:
    import ftfy
except ImportError:
    ftfy = None

T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"  # in a model's directory
SPIECE_FILE = "google/umt5-xxl/spiece.model"

PAD, END, UNKNOWN = 0, 1, 3  # ids in umT5's vocabulary
MAX_DISTANCE = 128  # tokens at least this far apart share the last position bucket


# ------------------------------------------------------------------------------ text to ids

def _character_table():
    """{code point: replacement} of the single characters that ftfy replaces or drops."""
    table = {}
    # C1 control codes become what Windows-1252 has in their place; five places are empty.
    for code in range(0x80, 0xa0):
        table[code] = bytes([code]).decode("cp1252", errors="ignore") or chr(code)
    compatible = [*range(0xff01, 0xfff0)]  # full-width Latin and half-width Asian forms
    compatible += [0x132, 0x133, 0x149, *range(0x1c4, 0x1cd), *range(0x1f1, 0x1f4)]  # Latin digraphs
    compatible += range(0xfb00, 0xfb07)  # typographic ligatures: ff fi fl ffi ffl ſt st
    for code in compatible:
        table[code] = unicodedata.normalize("NFKC", chr(code))
    table[0xfb05] = "ſt"  # NFKC would turn the long s into a plain one
    table |= dict.fromkeys([0x2bc, *range(0x2018, 0x201c)], "'")
    table |= dict.fromkeys(range(0x201c, 0x2020), '"')
    # None drops a character: control characters and invisible marks.
    table |= dict.fromkeys([*range(0x09), 0x0b, *range(0x0e, 0x20), 0x7f])
    table |= dict.fromkeys([*range(0x206a, 0x2070), 0xfeff, *range(0xfff9, 0xfffd)])
    return table


def _entity_table():
    """{entity: characters} of the named HTML entities.

    The names in lower case are also known in upper case, where that is not another name: "&EACUTE;" is "É".
    """
    table = {}
    for name, characters in html5.items():
        if not name.endswith(";"):
            continue
        table[f"&{name}"] = characters
        capitals = f"&{name.upper()}"
        if name == name.lower() and html.unescape(capitals) == capitals:
            table[capitals] = characters.upper()
    return table


CHARACTERS = _character_table()
ENTITIES = _entity_table()


def _unescape(match):
    """The characters of one HTML entity; what is not an entity as a whole stays as it is."""
    entity = match[0]
    if not entity.startswith("&#"):
        return ENTITIES.get(entity, entity)
    characters = html.unescape(entity)
    return entity if ";" in characters else characters


def fix_text(text):
    """What `ftfy.fix_text` does by rule, without its repair of mojibake, which is a guess.

    HTML entities become their characters, up to the first line that contains a "<" and may be HTML itself.
    Terminal colours and control characters are removed. Full-width letters, ligatures and curly quotes become
    plain ones. Halves of surrogate pairs are joined or replaced. Accents join their letters (NFC). White
    space is left to `clean`.
    """
    lines = []
    is_html = False
    for line in text.split("\n"):
        is_html = is_html or "<" in line
        before = None
        while line != before:  # one repair may uncover the next: &amp;rdquo; -> &rdquo; -> ” -> "
            before = line
            if not is_html:
                line = re.sub(r"&#?[0-9A-Za-z]{1,24};", _unescape, line)
            # JSON may hold half a surrogate pair, such as "\ud83d".
            line = line.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            line = re.sub(r"\x1b\[[\d;]*[a-zA-Z]", "", line)
            line = unicodedata.normalize("NFC", line.translate(CHARACTERS))
        lines.append(line)
    return "\n".join(lines)


def clean(text):
    """The text as umT5 must see it: characters repaired, HTML entities unescaped twice, white space folded.

    Where ftfy is installed, the repair is `ftfy.fix_text`, as in the official code. Without it, `fix_text`
    above does the same except for mojibake (UTF-8 that was read in another encoding: "schÃ¶n" for "schön"),
    which then stays.
    """
    text = ftfy.fix_text(text) if ftfy else fix_text(text)
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """umT5's sentencepiece tokenizer, with the ids of the official fast one (`tokenizer.json`).

    path: the file SPIECE_FILE of a model's directory. text_len: ids per prompt, including the end. Raises
    InputError if the file is missing, damaged or of another model.
    """

    def __init__(self, path, text_len=512):
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist; give the spiece.model of the directory google/umt5-xxl")
        self.text_len = text_len
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path} is damaged or not a sentencepiece model ({error}); "
                             f"copy it again") from None
        if (self.model.eos_id(), self.model.unk_id()) != (END, UNKNOWN):
            raise InputError(f"{path} is the tokenizer of another model (end {self.model.eos_id()}, unknown "
                             f"{self.model.unk_id()}, expected {END} and {UNKNOWN}); use umT5's spiece.model")

    def __call__(self, prompts):
        """prompts: list of B str -> ids and mask, both (B, text_len) int64; the mask is 0 on padding."""
        ids = torch.full((len(prompts), self.text_len), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = self.encode(prompt)
            ids[row, :len(tokens)] = torch.tensor(tokens)
            mask[row, :len(tokens)] = 1
        return ids, mask

    def encode(self, prompt):
        """The ids of one prompt: a list of at most text_len - 1 pieces and then the end."""
        tokens = []
        for token in self.model.encode(clean(prompt)):
            # sentencepiece may spell an unknown character in bytes. The fast tokenizer calls it unknown, and
            # gives a run of unknown characters one id.
            if self.model.is_byte(token):
                token = UNKNOWN
            if token != UNKNOWN or tokens[-1:] != [UNKNOWN]:
                tokens.append(token)
        return tokens[:self.text_len - 1] + [END]


# ------------------------------------------------------------------------------ ids to states

def position_buckets(n, num_buckets, device=None):
    """The bucket of every (query, key) pair of n tokens, by key - query: (n, n) int64.

    Half of the buckets are for keys at or behind the query, half for keys ahead. In each half, one half of
    the buckets hold a single distance each, the others growing ranges of distances up to MAX_DISTANCE (T5,
    section 2.1).
    """
    position = torch.arange(n, device=device)
    relative = position[None, :] - position[:, None]  # (query, key)
    half = num_buckets // 2
    exact = half // 2
    distance = relative.abs()
    log_distance = torch.log(distance.clamp(min=1).float() / exact)
    ratio = log_distance / math.log(MAX_DISTANCE / exact)  # 1 at MAX_DISTANCE
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (relative > 0)  # (n, n)


class PositionBias(nn.Module):
    def __init__(self, num_buckets, num_heads):
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, buckets):
        return self.embedding(buckets).permute(2, 0, 1)  # (n, n) -> (heads, n, n)


class Attention(nn.Module):
    def __init__(self, dim, dim_attn, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim_attn, bias=False)
        self.k = nn.Linear(dim, dim_attn, bias=False)
        self.v = nn.Linear(dim, dim_attn, bias=False)
        self.o = nn.Linear(dim_attn, dim, bias=False)

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, n, head size)

    def forward(self, x, bias):
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        scores = q @ k.transpose(-1, -2) + bias  # (B, heads, n, n), not divided by sqrt(head size), see above
        weights = scores.float().softmax(-1).type_as(v)  # (B, heads, n, n), computed in float32
        return self.o((weights @ v).transpose(1, 2).flatten(2))  # (B, n, dim)


class GatedFeedForward(nn.Module):
    def __init__(self, dim, dim_ffn):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(dim, dim_ffn, bias=False)
        self.fc2 = nn.Linear(dim_ffn, dim, bias=False)

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.gate(x))  # (B, n, dim)


class Block(nn.Module):
    def __init__(self, dim, dim_attn, dim_ffn, num_heads, num_buckets):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=1e-6)
        self.attn = Attention(dim, dim_attn, num_heads)
        self.norm2 = nn.RMSNorm(dim, eps=1e-6)
        self.ffn = GatedFeedForward(dim, dim_ffn)
        self.pos_embedding = PositionBias(num_buckets, num_heads)

    def forward(self, x, buckets, padding):
        bias = self.pos_embedding(buckets)  # (heads, n, n)
        bias = bias.masked_fill(padding, torch.finfo(bias.dtype).min)  # (B, heads, n, n)
        x = x + self.attn(self.norm1(x), bias)  # (B, n, dim)
        return x + self.ffn(self.norm2(x))  # (B, n, dim)


class UMT5Encoder(nn.Module):
    """The encoder half of umT5; parameter names and shapes as in `models_t5_umt5-xxl-enc-bf16.pth`."""

    def __init__(self, vocab_size, dim, dim_attn, dim_ffn, num_heads, num_layers, num_buckets=32):
        super().__init__()
        self.num_buckets = num_buckets
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(Block(dim, dim_attn, dim_ffn, num_heads, num_buckets)
                                    for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, ids, mask):
        """ids (B, n), mask (B, n), 0 on padding -> states (B, n, dim). Rows of padding have no meaning."""
        x = self.token_embedding(ids)  # (B, n, dim)
        buckets = position_buckets(ids.shape[1], self.num_buckets, ids.device)  # (n, n)
        padding = (mask == 0)[:, None, None, :]  # (B, 1, 1, n), broadcast over heads and queries
        for block in self.blocks:
            x = block(x, buckets, padding)  # (B, n, dim)
        return self.norm(x)  # (B, n, dim)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.bfloat16, device="cpu"):
        """The frozen encoder of a checkpoint (T5_FILE); sizes are read from its shapes.

        dtype: bfloat16, as in the official code, or float32; float16 would overflow. Raises InputError if the
        file is missing, damaged or of another model.
        """
        size = range(1, 1_000_001)
        form = {"token_embedding.weight": [size, size], "blocks.0.attn.q.weight": [size, size],
                "blocks.0.ffn.fc1.weight": [size, size],
                "blocks.0.pos_embedding.embedding.weight": [range(4, 257), size]}
        shapes = check_form(weight_shapes(path), form, path, f"the umT5 encoder is in {T5_FILE}")
        vocab_size, dim = shapes["token_embedding.weight"]
        dim_attn, _ = shapes["blocks.0.attn.q.weight"]
        dim_ffn, _ = shapes["blocks.0.ffn.fc1.weight"]
        num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        if dim_attn % num_heads:
            raise InputError(f"{path}: {num_heads} heads cannot share {dim_attn} channels; "
                             f"give the official {T5_FILE}")
        num_layers = sum(name.endswith(".attn.q.weight") for name in shapes)
        with torch.device("meta"):  # shapes without memory; the weights are then read into place
            encoder = cls(vocab_size, dim, dim_attn, dim_ffn, num_heads, num_layers, num_buckets)
        return load_weights(encoder.to(dtype), path, device=device).eval().requires_grad_(False)


@torch.no_grad()
def encode_prompts(encoder, tokenizer, prompts):
    """prompts: list of B str -> list of B text states (n_i, dim), n_i <= text_len, without padding."""
    ids, mask = tokenizer(prompts)  # (B, text_len)
    if ids.max() >= encoder.token_embedding.num_embeddings:
        raise InputError(f"the tokenizer knows more tokens ({ids.max()}) than the text encoder has; "
                         f"use the two of one model's directory")
    lengths = mask.sum(1).tolist()
    longest = max(lengths)  # padding does not change other rows, so columns of padding alone are not computed
    device = encoder.token_embedding.weight.device
    states = encoder(ids[:, :longest].to(device), mask[:, :longest].to(device))  # (B, longest, dim)
    return [state[:length] for state, length in zip(states, lengths, strict=True)]
