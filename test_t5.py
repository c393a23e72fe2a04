"""umT5 and its tokenizer: the official values, names and shapes, and what a prompt becomes."""
import json
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import sentencepiece
import torch

import t5
from files import InputError
from t5 import Tokenizer, UMT5Encoder, clean, encode_prompts, position_buckets
from testdata.golden import agree, fill_
from testdata.helpers import ROOT, golden

TINY = dict(vocab_size=90, dim=32, dim_attn=48, dim_ffn=56, num_heads=3, num_layers=2, num_buckets=16)
SENTENCES = ["the cat sat on the mat, and the dog ran to the door.", "a video of a small cat (high quality)",
             "two dogs run on the beach at sunset; waves & wind", "it's a \"quoted\" word, 12345",
             "office files flow"]


def tiny_encoder():
    encoder = UMT5Encoder(**TINY)
    fill_(encoder.state_dict(), 5)
    return encoder


def train_spiece(directory, byte_fallback):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(directory / "spiece"),
        byte_fallback=byte_fallback, vocab_size=400, hard_vocab_limit=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2)
    return directory / "spiece.model"


@pytest.fixture(scope="module", params=[False, True], ids=["unknown", "byte_fallback"])
def spiece(request, tmp_path_factory):
    return train_spiece(tmp_path_factory.mktemp("spiece"), request.param)


@pytest.fixture(autouse=True)
def without_ftfy(monkeypatch):
    """Whether or not ftfy is installed, the tests see the same."""
    monkeypatch.setattr(t5, "ftfy", None)


# ------------------------------------------------------------------------------ the encoder

def test_agrees_with_the_official_encoder():
    values, meta = golden("umt5")
    config = json.loads(meta["cfg"])
    encoder = UMT5Encoder(vocab_size=config.pop("vocab"), **config)
    fill_(encoder.state_dict(), int(meta["seed"]))
    assert agree(encoder(values["ids"], values["mask"]), values["out"], 2e-6)  # 3e-7 measured


def test_names_and_shapes_are_those_of_the_official_file():
    manifest = json.loads((ROOT / "testdata/manifests/models_t5_umt5-xxl-enc-bf16.pth.json").read_text())
    with torch.device("meta"):
        encoder = UMT5Encoder(256384, 4096, 4096, 10240, 64, 24, 32)
    assert {name: list(tensor.shape) for name, tensor in encoder.state_dict().items()} == {
        name: shape for name, (_, shape) in manifest.items()}


def test_position_buckets():
    buckets = position_buckets(200, 32)
    first_of_bucket = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]  # from 8 on 8 * 2^(i / 2), up
    for bucket, (first, beyond) in enumerate(pairwise([*first_of_bucket, 200])):
        for distance in (first, beyond - 1):
            assert buckets[199, 199 - distance] == bucket  # a key behind the query
            if distance:
                assert buckets[0, distance] == bucket + 16  # a key ahead


def test_padding_changes_nothing():
    ids, encoder = torch.arange(40, 60)[None], tiny_encoder()
    mask = (torch.arange(20) < 7).long()[None]
    states = encoder(ids, mask)[:, :7]
    other = torch.where(mask == 1, ids, 3)
    torch.testing.assert_close(encoder(other, mask)[:, :7], states)
    torch.testing.assert_close(encoder(ids[:, :7], mask[:, :7]), states)
    assert (encoder(ids, torch.ones_like(mask))[:, :7] - states).abs().max() > 1e-2  # the mask matters


def test_bf16_is_close_to_float32():
    ids, encoder = torch.arange(4, 24)[None], tiny_encoder()
    expected = encoder(ids, torch.ones_like(ids))
    states = encoder.bfloat16()(ids, torch.ones_like(ids))
    assert states.dtype == torch.bfloat16
    assert (states - expected).abs().max() < 0.05 * expected.abs().max()


def test_from_pretrained_reads_the_sizes_off_the_file(tmp_path):
    original = tiny_encoder()
    torch.save(original.state_dict(), tmp_path / "t5.pth")
    encoder = UMT5Encoder.from_pretrained(tmp_path / "t5.pth", dtype=torch.float32)
    ids = torch.arange(4, 24)[None]
    assert torch.equal(encoder(ids, ids > 0), original(ids, ids > 0))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    by_default = UMT5Encoder.from_pretrained(tmp_path / "t5.pth")
    assert {parameter.dtype for parameter in by_default.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("removed, reason", [("token_embedding.weight", "the umT5 encoder is in"),
                                             ("blocks.1.norm2.weight", "is missing")])
def test_from_pretrained_refuses_another_model(tmp_path, removed, reason):
    state = tiny_encoder().state_dict()
    del state[removed]
    torch.save(state, tmp_path / "t5.pth")
    with pytest.raises(InputError, match=reason):
        UMT5Encoder.from_pretrained(tmp_path / "t5.pth")


@pytest.mark.parametrize("name, shape, message", [
    ("token_embedding.weight", (16,), "token_embedding.weight is .16.; expected a list of 2"),
    ("blocks.0.pos_embedding.embedding.weight", (2, 4), "embedding.weight.0. is 2; expected a whole numb"),
    ("blocks.0.pos_embedding.embedding.weight", (32, 5), "5 heads cannot share"),
    ("blocks.0.attn.q.weight", (0, 4), "blocks.0.attn.q.weight has no values"),
])
def test_from_pretrained_refuses_a_tensor_of_another_shape(tmp_path, name, shape, message):
    torch.save(tiny_encoder().state_dict() | {name: torch.zeros(shape)}, tmp_path / "t5.pth")
    with pytest.raises(InputError, match=message):
        UMT5Encoder.from_pretrained(tmp_path / "t5.pth")


def test_the_tokenizer_of_a_larger_model_is_refused(spiece):
    encoder = tiny_encoder()
    encoder.token_embedding = torch.nn.Embedding(2, TINY["dim"])
    with pytest.raises(InputError, match="tokenizer knows more tokens .* than the text encoder has"):
        encode_prompts(encoder, Tokenizer(spiece, text_len=32), ["a small cat"])


def test_encode_prompts_drops_the_padding(spiece):
    tokenizer, encoder = Tokenizer(spiece, text_len=32), tiny_encoder()
    encoder.token_embedding = torch.nn.Embedding(400, TINY["dim"])
    prompts = ["a small cat", "", "two dogs run on the beach"]
    ids, mask = tokenizer(prompts)
    states = encode_prompts(encoder, tokenizer, prompts)
    assert [len(state) for state in states] == mask.sum(1).tolist() and len(states[1]) == 1
    for i, state in enumerate(states):
        torch.testing.assert_close(state, encoder(ids, mask)[i, :len(state)])
    assert encode_prompts(encoder.to("meta"), tokenizer, prompts)[2].is_meta  # it runs where the encoder is


# ------------------------------------------------------------------------------ the text

@pytest.mark.parametrize("text, expected", [
    ("过曝，静态", "过曝,静态"),  # full-width comma
    ("Ｗａｎ！\u3000ﾃﾚﾋﾞ", "Wan! テレビ"),  # full width, ideographic space, half width
    ("‘it’s’ “so”", "'it's' \"so\""),
    ("oﬃce ﬁle", "office file"),
    ("Ĳs ǆez ﬅop", "IJs džez ſtop"),  # letters that look like two; the long s is a letter of its own
    ("c\x00a\x1ft\x7f\ufeff", "cat"),
    ("\x1b[31mred\x1b[0m", "red"),  # terminal colours
    ("wait\x85 \x93now\x94", 'wait… "now"'),  # Windows-1252 read as Latin-1
    ("cafe\u0301", "café"),
    ("\ud83d\ude00 \ud83d!", "😀 \ufffd!"),  # surrogates, as a JSON file may hold them
    ("salt &amp;amp; pepper", "salt & pepper"),
    ("&amp;rdquo;", '"'),  # found only once the first repair is done
    ("<b> &amp;lt;i&amp;gt; &rdquo;", "<b> <i> ”"),  # may be HTML: not repaired, and then unescaped twice
    ("&rdquo;\n<b>&rdquo;\n&rdquo;", '" <b>” ”'),  # from the line with the "<" on
    ("&lt; &amp;amp;rdquo;", '< "'),  # a "<" that was an entity does not make it HTML
    ("P&EACUTE;REZ &QUOT;&RDQUO; &nTILDE;", 'PÉREZ "" &nTILDE;'),  # names in capitals
    ("STRA&SZLIG;E", "STRASSE"),
    ("  a\t\tcat \r\n sat\u00a0down\u2028 ", "a cat sat down"),
    ("", ""),
])
def test_clean(text, expected):
    assert clean(text) == expected


OFFICIAL = json.loads((ROOT / "testdata/golden/text_clean.json").read_text())["rows"]


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in OFFICIAL} - {"mojibake"}))
def test_clean_agrees_with_the_official_function(kind):
    for row in OFFICIAL:
        if row["kind"] == kind:
            assert clean(row["raw"]) == row["clean"], row


def test_clean_with_ftfy_agrees_with_the_official_function(monkeypatch):
    monkeypatch.setattr(t5, "ftfy", pytest.importorskip("ftfy", reason="needs ftfy"))
    for row in OFFICIAL:
        assert clean(row["raw"]) == row["clean"], row


def test_ftfy_repairs_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(t5, "ftfy", SimpleNamespace(fix_text=lambda text: text.replace("Ã¶", "ö")))
    assert clean("schÃ¶n  &amp;amp;") == "schön &"


# ------------------------------------------------------------------------------ the tokenizer

def pieces(tokenizer, prompt):
    return [tokenizer.model.id_to_piece(token) for token in tokenizer.encode(prompt)]


def test_tokens_are_the_pieces_of_the_clean_text_and_the_end(spiece):
    tokenizer = Tokenizer(spiece)
    tokens = tokenizer.encode("the\n“dog” ran，")
    assert tokenizer.model.decode(tokens) == 'the "dog" ran,'
    assert tokens[-1] == 1 and tokens.count(1) == 1 and 3 not in tokens


def test_prompts_are_padded_and_masked(spiece):
    tokenizer = Tokenizer(spiece, text_len=40)
    ids, mask = tokenizer(["a cat", "", "the dog ran"])
    assert ids.shape == mask.shape == (3, 40) and ids.dtype == torch.int64
    for row, prompt in enumerate(["a cat", "", "the dog ran"]):
        n = len(tokenizer.encode(prompt))
        assert ids[row, :n].tolist() == tokenizer.encode(prompt) and not ids[row, n:].any()
        assert mask[row].tolist() == [1] * n + [0] * (40 - n)


def test_the_empty_prompt_is_one_token(spiece):
    tokenizer = Tokenizer(spiece)
    assert tokenizer.encode("") == tokenizer.encode(" \n\u3000") == [1]


def test_a_long_prompt_is_cut_and_still_ends(spiece):
    whole = Tokenizer(spiece).encode("the cat sat on the mat")
    assert Tokenizer(spiece, text_len=6).encode("the cat sat on the mat") == whole[:5] + [1]
    assert Tokenizer(spiece, text_len=len(whole)).encode("the cat sat on the mat") == whole


def test_a_run_of_unknown_characters_is_one_token(spiece):
    tokenizer = Tokenizer(spiece)
    a, b = pieces(tokenizer, "a cat"), pieces(tokenizer, "sat")
    assert pieces(tokenizer, "a cat 🦙🦙漢 sat") == a[:-1] + ["▁", "<unk>"] + b
    assert pieces(tokenizer, "a cat 🦙 漢 sat") == a[:-1] + ["▁", "<unk>", "▁", "<unk>"] + b
    assert pieces(tokenizer, "a cat🦙") == a[:-1] + ["<unk>", "</s>"]


def test_a_run_is_one_token_before_the_prompt_is_cut(spiece):
    assert Tokenizer(spiece, text_len=4).encode("🦙" * 9 + "a")[1] == 3
    assert len(Tokenizer(spiece, text_len=4).encode("🦙" * 9 + "a")) == 4  # ▁, unknown, a, end


@pytest.mark.parametrize("content, reason", [
    (None, "does not exist"), (b"", "damaged"), (b"no model" * 99, "damaged")])
def test_a_missing_or_broken_file_is_reported_in_one_sentence(tmp_path, content, reason):
    path = tmp_path / "spiece.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} .*{reason}[^\n]*$"):
        Tokenizer(path)


def test_a_cut_file_is_reported(spiece, tmp_path):
    (tmp_path / "spiece.model").write_bytes(spiece.read_bytes()[:-100])
    with pytest.raises(InputError, match="spiece.model is damaged"):
        Tokenizer(tmp_path / "spiece.model")


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(tmp_path / "t5"), vocab_size=400,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    with pytest.raises(InputError, match="another model"):
        Tokenizer(tmp_path / "t5.model")
