"""umT5, the text encoder of the Wan models, and its tokenizer.

A prompt becomes, in three steps, the text states that the video transformer attends to:

    text --clean--> plain text --Tokenizer--> ids (n,) --UMT5Encoder--> states (n, dim)

`encode_prompts` does all three. The encoder is T5's: pre-norm blocks of self-attention and a gated feed-forward,
whose linear layers have no biases. Three things set it apart from the transformers of textbooks: positions enter
only as a learned number added to the attention scores, looked up by the distance between two tokens; the scores
are not divided by sqrt(head size); and every block has its own table of these numbers (T5 shares one).
"""
import html
import math
import re
import unicodedata
from pathlib import Path

import sentencepiece
import torch
from torch import nn

from files import InputError, load_weights, weight_shapes

try:
    import ftfy
except ImportError:
    ftfy = None

PAD, END, UNKNOWN = 0, 1, 3  # ids in umT5's vocabulary
MAX_DISTANCE = 128  # tokens at least this far apart share the last position bucket


# ---------------------------------------------------------------------------------------------- text to ids

def _character_table():
    """{code point: replacement} of the single characters that ftfy replaces or drops."""
    table = {}
    for code in range(0x80, 0xa0):  # C1 control codes stand for what Windows-1252 has there; five places are empty
        table[code] = bytes([code]).decode("cp1252", errors="ignore") or chr(code)
    compatible = [*range(0xff01, 0xfff0)]  # full-width Latin and half-width Asian forms
    compatible += [0x132, 0x133, 0x149, *range(0x1c4, 0x1cd), *range(0x1f1, 0x1f4)]  # digraphs of Latin alphabets
    compatible += range(0xfb00, 0xfb07)  # ligatures of typesetting: ff fi fl ffi ffl ſt st
    for code in compatible:
        table[code] = unicodedata.normalize("NFKC", chr(code))
    table[0xfb05] = "ſt"  # NFKC would turn the long s into a plain one
    table |= dict.fromkeys([0x2bc, *range(0x2018, 0x201c)], "'")
    table |= dict.fromkeys(range(0x201c, 0x2020), '"')
    table |= dict.fromkeys([*range(0x09), 0x0b, *range(0x0e, 0x20), 0x7f])  # control characters: None drops them
    table |= dict.fromkeys([*range(0x206a, 0x2070), 0xfeff, *range(0xfff9, 0xfffd)])  # marks nobody should see
    return table


CHARACTERS = _character_table()


def fix_text(text):
    """What `ftfy.fix_text` does by rule, from the standard library; not its repair of mojibake, which is a guess.

    HTML entities become their characters (unless the text holds a "<", so may be HTML itself); terminal colours
    and control characters go; full-width letters, ligatures and curly quotes become plain ones; halves of
    surrogate pairs are joined or replaced; accents join their letters (NFC). White space is left to `clean`.
    """
    before = None
    while text != before:  # one repair may uncover the next: &amp;rdquo; -> &rdquo; -> ” -> "
        before = text
        if "<" not in text:
            text = re.sub(r"&#?[0-9A-Za-z]{1,24};", lambda entity: html.unescape(entity[0]), text)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON may hold halves, "\ud83d"
        text = re.sub(r"\x1b\[[\d;]*[a-zA-Z]", "", text)
        text = unicodedata.normalize("NFC", text.translate(CHARACTERS))
    return text


def clean(text):
    """The text as umT5 is to see it: characters repaired, HTML entities unescaped twice, white space folded.

    The repair is `ftfy.fix_text`, as in the official code, where ftfy is installed. Without it ours does the same
    but for mojibake (UTF-8 once read as another encoding: "schÃ¶n" for "schön"), which is then left as it is.
    """
    text = ftfy.fix_text(text) if ftfy else fix_text(text)
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """umT5's sentencepiece tokenizer, with the ids of the official fast one (`tokenizer.json`).

    path: the `spiece.model` of the model directory (`google/umt5-xxl/spiece.model`). text_len: ids a prompt, the
    end among them. Raises InputError where the file is missing, damaged or another model's.
    """

    def __init__(self, path, text_len=512):
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist; give the spiece.model of the directory google/umt5-xxl")
        self.text_len = text_len
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path} is damaged or no sentencepiece model ({error}); copy it again") from None
        if (self.model.eos_id(), self.model.unk_id()) != (END, UNKNOWN):
            raise InputError(f"{path} is the tokenizer of another model (end {self.model.eos_id()}, unknown "
                             f"{self.model.unk_id()}, expected {END} and {UNKNOWN}); use umT5's spiece.model")

    def __call__(self, prompts):
        """prompts: list of B str -> ids, mask: both (B, text_len) int64; mask is 1 on tokens, 0 on padding."""
        ids = torch.full((len(prompts), self.text_len), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = self.encode(prompt)
            ids[row, :len(tokens)] = torch.tensor(tokens)
            mask[row, :len(tokens)] = 1
        return ids, mask

    def encode(self, prompt):
        """One prompt's ids as a list: at most text_len - 1 pieces, then the end."""
        tokens = []
        for token in self.model.encode(clean(prompt)):
            if self.model.is_byte(token):  # sentencepiece may spell an unknown character in bytes; the fast
                token = UNKNOWN            # tokenizer calls it unknown, and makes one id of a run of them
            if token != UNKNOWN or tokens[-1:] != [UNKNOWN]:
                tokens.append(token)
        return tokens[:self.text_len - 1] + [END]


# ---------------------------------------------------------------------------------------------- ids to states

def position_buckets(n, num_buckets, device=None):
    """The bucket of every (query, key) pair of n tokens, by key - query: (n, n) int64.

    Half of the buckets are for keys behind or at the query, half for keys ahead. Of each half, half again hold one
    distance each, the others growing ranges of distances up to MAX_DISTANCE (T5, section 2.1).
    """
    position = torch.arange(n, device=device)
    relative = position[None, :] - position[:, None]  # (query, key)
    half = num_buckets // 2
    exact = half // 2
    distance = relative.abs()
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact)  # 1 at MAX_DISTANCE
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

    def forward(self, x, bias):
        q, k, v = (linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for linear in (self.q, self.k, self.v))  # (B, heads, n, head size)
        scores = q @ k.transpose(-1, -2) + bias  # (B, heads, n, n), not divided by sqrt(head size), see above
        weights = scores.float().softmax(-1).type_as(v)  # (B, heads, n, n), summed in float32
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
        bias = bias.masked_fill(padding, torch.finfo(bias.dtype).min)  # (B, heads, n, n), no weight on padding
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
        """ids (B, n), mask (B, n), 0 on padding -> states (B, n, dim); the rows of the padding mean nothing."""
        x = self.token_embedding(ids)  # (B, n, dim)
        buckets = position_buckets(ids.shape[1], self.num_buckets, ids.device)  # (n, n)
        padding = (mask == 0)[:, None, None, :]  # (B, 1, 1, n), broadcast over heads and queries
        for block in self.blocks:
            x = block(x, buckets, padding)  # (B, n, dim)
        return self.norm(x)  # (B, n, dim)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.bfloat16, device="cpu"):
        """The frozen encoder of a checkpoint (`models_t5_umt5-xxl-enc-bf16.pth`); sizes are read off its shapes.

        dtype: bfloat16, as the official code runs it, or float32; float16 would overflow. Raises InputError where
        the file is missing, damaged or another model's.
        """
        shapes = weight_shapes(path)
        try:
            vocab_size, dim = shapes["token_embedding.weight"]
            dim_attn, _ = shapes["blocks.0.attn.q.weight"]
            dim_ffn, _ = shapes["blocks.0.ffn.fc1.weight"]
            num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        except KeyError as missing:
            raise InputError(f"{path} is not a umT5 encoder ({missing} is missing); "
                             f"give the official models_t5_umt5-xxl-enc-bf16.pth") from None
        num_layers = sum(name.endswith(".attn.q.weight") for name in shapes)
        with torch.device("meta"):  # shapes without memory; the weights are then read straight into their place
            encoder = cls(vocab_size, dim, dim_attn, dim_ffn, num_heads, num_layers, num_buckets)
        return load_weights(encoder.to(dtype).to_empty(device=device), path).eval().requires_grad_(False)


@torch.no_grad()
def encode_prompts(encoder, tokenizer, prompts):
    """prompts: list of B str -> list of B text states (n_i, dim), n_i <= text_len, without the padding's rows."""
    ids, mask = tokenizer(prompts)  # (B, text_len)
    lengths = mask.sum(1).tolist()
    longest = max(lengths)  # padding changes no other row, so what is padding in every prompt need not be computed
    device = encoder.token_embedding.weight.device
    states = encoder(ids[:, :longest].to(device), mask[:, :longest].to(device))  # (B, longest, dim)
    return [state[:length] for state, length in zip(states, lengths)]
