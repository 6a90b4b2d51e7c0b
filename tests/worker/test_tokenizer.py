"""The tokenizer against transformers, and streams against whole texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Vocabulary
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from lorayard.demo import BASE
from lorayard.shared.errors import ModelError, Refused
from lorayard.worker import Tokenizer

HOSTILE = [
    "", " ", "\n\n  \t", "a\x00b", "What does len do?", "<|begin|>", "<|end|><|user|>\n x", "<|en", "naïve café",
    "日本語のテキスト", "👩‍👩‍👧‍👦🏳️‍🌈 family", "\u202eright to left\u202c", "e\u0301 \u00e9", "\ufffd", "\ufeffbom",
    "a" * 5000,    "İ ß ﬁ", "𝒳 \U0010ffff", "\r\n mixed\r", "'s 're 've",
]  # fmt: skip
TEXT = st.one_of(st.text(max_size=40), st.sampled_from(HOSTILE))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(BASE)


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(BASE)


@pytest.mark.parametrize("text", HOSTILE)
def test_encode_and_decode_equal_transformers(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerFast, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.encode(text, add_bos=False) == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_any_text_equals_transformers(tokenizer: Tokenizer, reference: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.encode(text) == reference.encode(text)


def test_too_many_tokens_are_refused_before_they_are_a_list(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a b c d")
    assert tokenizer.encode_batch(["a b c d", "a"], most=len(ids))[0] == ids
    with pytest.raises(Refused, match=f"has {len(ids)} tokens; a job has room for {len(ids) - 1}") as refused:
        tokenizer.encode_batch(["a", "a b c d"], most=len(ids) - 1)
    assert refused.value.code == "too_large"
    with pytest.raises(Refused, match="a job has room for 2"):
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}], most=2)


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, frozenset({1}), 1408)


def test_first_token_is_never_doubled(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|begin|>x", add_bos=True) == tokenizer.encode("x", add_bos=True)
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert ids[0] == tokenizer.bos_id and ids.count(0) == 1


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(Refused, match="surrogate"):
        tokenizer.encode("\ud83d")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_whole_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    from_text = TEXT.map(tokenizer.encode)
    ids = data.draw(st.one_of(from_text, st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=60)))
    check_stream(tokenizer, ids, data.draw(st.integers(1, 7)))


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 265), max_size=40), step=st.integers(1, 5))
def test_stream_of_byte_fallback_vocabulary(ids: list[int], step: int) -> None:
    check_stream(FALLBACK, ids, step)


def test_an_emoji_is_never_split(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a👩‍👧b", add_bos=False)
    stream = tokenizer.stream()
    pieces = [stream.push([id]) for id in ids]
    assert len(ids) > 10 and "\ufffd" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == ["a", "👩", "\u200d", "👧", "b"]


def check_stream(tokenizer: Tokenizer, ids: list[int], step: int) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(ids[at : at + step]) for at in range(0, len(ids), step)]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def fallback_tokenizer() -> Tokenizer:
    """Words with a leading mark for a space, and a token for every byte, as Llama 2 has."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + [
        "▁",
        "▁the",
        "▁cat",
        "s",
        "▁é",
        "日",
        "<s>",
        "</s>",
        "▁▁",
        "a",
    ]
    vocabulary = Vocabulary(models.BPE({token: id for id, token in enumerate(tokens)}, [], byte_fallback=True))
    vocabulary.add_special_tokens(["<s>", "</s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    vocabulary.decoder = decoders.Sequence(steps)
    return Tokenizer(vocabulary, 262, frozenset({263}), {})


FALLBACK = fallback_tokenizer()


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("tokenizer.json", "{", "is not a tokenizer"),
        ("config.json", "[]", "must hold a JSON object"),
        ("generation_config.json", '{"eos_token_id": "x"}', "a whole number is expected"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be text"),
        ("tokenizer_config.json", '{"chat_template": "{% for %}"}', "not valid Jinja"),
    ],
)
def test_a_broken_folder_is_refused(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((BASE / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=sentence):
        Tokenizer.from_directory(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_directory(tmp_path)


def test_every_end_id_counts(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((BASE / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|pad|>"}}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.eos_ids == {1, 2, 5, 7} and tokenizer.bos_id == 0
    with pytest.raises(Refused, match="no chat template"):
        tokenizer.render([{"role": "user", "content": "Hi"}])
