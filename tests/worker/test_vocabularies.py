"""Tokenizers trained here in the styles of public families: equal to transformers, and to SentencePiece itself."""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Vocabulary
from transformers import AutoTokenizer

from lorayard.shared.errors import ModelError, NotSupported
from lorayard.worker import Tokenizer

WORDS = (
    "the cat sat on a mat and the dog ran over it, hello world! naïve café über Straße 日本語 です 123 45 it's we're"
)
TEXTS = [
    *(f"{WORDS[at:]} {WORDS[:at]}\n\n  def f(x):\n\treturn x + {at}" for at in range(len(WORDS))),
    *(str(number) for number in range(400)),
]
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
HOSTILE = [
    "", " ", "  ", "\n", "\n\n  \t x", "a\x00b\x07\x1b[0m", "▁", "▁▁a", " ▁ a", "<s>", "<s>a</s> b",
    " <s> a", "<unk>", "<0x41>",
    "<|im_start|>user\n x<|im_end|>", "<|im_sta", "it's WE'RE", "naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦🏳️‍🌈 family",
    "\u202eright to left\u202c", "e\u0301 \u00e9", "\ufffd", "\ufeffbom", "İ ß ﬁ Ⅷ ½", "𝒳 \U0010ffff", "\r\n mixed\r",
    "a \u00a0 b",
    "1234567 12.5e-3", "\\ud83d", "hello<reserved>world", "<extra> the<extra>cat", "\u2028 \u2029\u3000", "x" * 300,
]  # fmt: skip


def special(text: str) -> AddedToken:
    return AddedToken(text, special=True)


def bytes_bpe(split: str | None, normalizer: Any = None) -> Vocabulary:
    """Byte-level BPE, words split by a pattern (GPT-2's own if none)."""
    vocabulary = Vocabulary(models.BPE(ignore_merges=split is not None))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    vocabulary.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level]) if split else level
    )
    vocabulary.decoder = decoders.ByteLevel()
    if normalizer is not None:
        vocabulary.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[], initial_alphabet=alphabet, show_progress=False)
    vocabulary.train_from_iterator(TEXTS, trainer)
    vocabulary.add_special_tokens([special(text) for text in ("<|begin|>", *SPECIAL[3:])])
    return vocabulary


def spaces_bpe(prepend: bool) -> Vocabulary:
    """BPE over text with marks for spaces and byte fallback, as converters of Llama 2 and Gemma write it."""
    source = sentencepiece("bpe")
    model = SentencePieceProcessor(model_proto=source)
    vocab = {model.id_to_piece(id): id for id in range(model.get_piece_size())}
    merges = [
        (text[:at], text[at:])
        for text in vocab
        for at in range(1, len(text))
        if text[:at] in vocab and text[at:] in vocab
    ]
    core = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    vocabulary = Vocabulary(core)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prepend:
        vocabulary.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        vocabulary.normalizer = normalizers.Replace(" ", "▁")
        vocabulary.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    vocabulary.decoder = decoders.Sequence(steps)
    vocabulary.add_special_tokens([special(text) for text in SPECIAL])
    return vocabulary


@cache
def sentencepiece(kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    defaults = {"vocab_size": 420, "byte_fallback": True, "character_coverage": 0.99, "hard_vocab_limit": False,
                "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                "split_digits": True, "minloglevel": 2}  # fmt: skip
    SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=out, model_type=kind, **defaults | options)
    return out.getvalue()


def with_bos(vocabulary: Vocabulary, text: str) -> Vocabulary:
    ids = [(text, vocabulary.token_to_id(text))]
    vocabulary.post_processor = processors.TemplateProcessing(single=f"{text} $A", special_tokens=ids)
    return vocabulary


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "").replace(r"|\s+", r"|\s+(?!\S)|\s+")
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ADDED = {"added_tokens_decoder": {
    "420": {"content": "<reserved>", "special": False, "normalized": False, "lstrip": False, "rstrip": True},
    "421": {"content": "<extra>", "special": True, "normalized": False, "lstrip": True},
}}  # fmt: skip
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
FAMILIES: dict[str, tuple[Callable[[], Vocabulary | bytes], str, dict[str, Any], dict[str, Any]]] = {
    "llama 3": (lambda: with_bos(bytes_bpe(LLAMA3), "<|begin|>"), "llama", FAST | {"bos_token": "<|begin|>"}, {}),
    "llama 3 misnamed": (lambda: with_bos(bytes_bpe(LLAMA3), "<|begin|>"), "llama", LLAMA, {}),
    "qwen 2": (lambda: bytes_bpe(QWEN2, normalizers.NFC()), "qwen2",
               {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True, "eos_token": "<|im_end|>",
                "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<new>"]}, {}),
    "qwen 3": (lambda: bytes_bpe(QWEN2, normalizers.NFC()), "qwen3", {"tokenizer_class": "Qwen2Tokenizer"}, {}),
    "distilled qwen": (lambda: bytes_bpe(QWEN2, normalizers.NFC()), "qwen2", LLAMA, {}),
    "gpt 2": (lambda: bytes_bpe(None), "llama", FAST, {}),
    "llama 2": (lambda: with_bos(spaces_bpe(True), "<s>"), "llama", LLAMA, {}),
    "llama 2 fast": (lambda: with_bos(spaces_bpe(True), "<s>"), "llama",
                     LLAMA | {"tokenizer_class": "LlamaTokenizerFast"}, {}),
    "llama 2 legacy": (lambda: spaces_bpe(True), "llama", LLAMA | {"legacy": True}, {}),
    "llama 2 no prefix": (lambda: spaces_bpe(True), "llama", LLAMA | {"add_prefix_space": False}, {}),
    "llama 2 as is": (lambda: with_bos(spaces_bpe(True), "<s>"), "llama", FAST, {}),
    "mistral": (lambda: with_bos(spaces_bpe(True), "<s>"), "mistral", LLAMA, {}),
    "gemma": (lambda: with_bos(spaces_bpe(False), "<s>"), "gemma2",
              {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, {}),
    "no class": (lambda: spaces_bpe(True), "llama", {}, {}),
    "gemma without class": (lambda: spaces_bpe(False), "gemma3_text", {}, {}),
    "added": (lambda: spaces_bpe(True), "llama", LLAMA | ADDED, {}),
    "added as is": (lambda: with_bos(bytes_bpe(None), "<|begin|>"), "llama",
                    FAST | ADDED | {"image_token": "<image>"}, {}),
    "older files": (lambda: spaces_bpe(True), "llama", FAST,
                    {"special_tokens_map.json": {"bos_token": {"content": "<s>"}, "pad_token": "<pad>"},
                     "added_tokens.json": {"<reserved>": 421, "<extra>": 422}}),
    "split special": (lambda: spaces_bpe(True), "llama", FAST | {"split_special_tokens": True}, {}),
    "piece llama": (lambda: sentencepiece("bpe"), "llama", LLAMA | {"add_bos_token": True}, {}),
    "piece llama ends": (lambda: sentencepiece("bpe"), "llama", LLAMA | {"add_eos_token": True, "legacy": True}, {}),
    "piece llama added": (lambda: sentencepiece("bpe"), "llama", LLAMA | ADDED, {}),
    "piece llama bare": (lambda: sentencepiece("bpe"), "llama", {"tokenizer_class": "LlamaTokenizer"}, {}),
    "piece gemma": (lambda: sentencepiece("bpe", user_defined_symbols="<extra>"), "gemma",
                    {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}, {}),
    "piece mistral": (lambda: sentencepiece("bpe"), "mistral", LLAMA | {"add_bos_token": True}, {}),
    "piece mistral added": (lambda: sentencepiece("bpe"), "mistral", LLAMA | ADDED | {"legacy": False}, {}),
    "piece unigram": (lambda: sentencepiece("unigram"), "mistral", LLAMA | {"add_bos_token": True}, {}),
    "piece normalised": (lambda: sentencepiece("unigram", normalization_rule_name="nmt_nfkc", byte_fallback=False,
                                               remove_extra_whitespaces=True), "mistral", FAST, {}),
    "piece own symbols": (lambda: sentencepiece("bpe", user_defined_symbols="<extra>,the c",
                                                remove_extra_whitespaces=True), "mistral", LLAMA, {}),
    "piece no prefix": (lambda: sentencepiece("bpe", add_dummy_prefix=False), "mistral", LLAMA, {}),
}  # fmt: skip


def write(folder: Path, family: str, **changes: Any) -> Path:
    make, kind, config, files = FAMILIES[family]
    made = make()
    folder.mkdir(exist_ok=True)
    if isinstance(made, bytes):
        (folder / "tokenizer.model").write_bytes(made)
    else:
        (folder / "tokenizer.json").write_text(made.to_str())
    others = {"tokenizer_config.json": config | changes, "config.json": {"model_type": kind}}
    for name, data in (files | others).items():
        (folder / name).write_text(json.dumps(data))
    return folder


def random_text(draw: random.Random) -> str:
    """Words, spaces, control characters, special tokens and characters from anywhere but the surrogates."""
    parts = []
    for _ in range(draw.randrange(1, 16)):
        kind = draw.randrange(6)
        if kind == 0:
            code = draw.choice([draw.randrange(0x80), draw.randrange(0x3000), draw.randrange(0x110000)])
            parts.append(chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd")
        else:
            pool = [WORDS.split(), [" ", "  ", "\n", "\t", "▁"], SPECIAL, HOSTILE, [" "]][kind - 1]
            parts.append(draw.choice(pool))
    return "".join(parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_transformers(tmp_path: Path, family: str) -> None:
    """On the hostile texts and on 70 random ones, 2,000 over all families; back from these ids and from random ones."""
    folder = write(tmp_path / "model", family)
    tokenizer, reference = Tokenizer.from_directory(folder), AutoTokenizer.from_pretrained(folder)
    draw = random.Random(family)
    assert tokenizer.vocab_size == 1 + max(reference.get_vocab().values())
    for text in HOSTILE + [random_text(draw) for _ in range(70)]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), repr(text)
        assert tokenizer.encode(text, add_bos=False) == reference.encode(text, add_special_tokens=False), repr(text)
        drawn = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(12))]
        for row in (ids, drawn):
            assert tokenizer.decode(row) == reference.decode(row, skip_special_tokens=True), row
            stream = tokenizer.stream()
            assert "".join([stream.push([id]) for id in row]) + stream.finish() == tokenizer.decode(row), row


def test_there_are_two_thousand_random_strings() -> None:
    assert 70 * len(FAMILIES) >= 2000


PLAIN = [name for name in FAMILIES if name.startswith("piece") and "added" not in name and name != "piece gemma"]
"""Without what SentencePiece does not know; Gemma's puts no space in front, whatever the model says."""


@pytest.mark.parametrize("family", PLAIN)
def test_a_piece_model_equals_sentencepiece(tmp_path: Path, family: str) -> None:
    """Text without special tokens, whose spelling SentencePiece itself does not read as tokens."""
    tokenizer = Tokenizer.from_directory(write(tmp_path / "model", family))
    own = SentencePieceProcessor(model_file=str(tmp_path / "model" / "tokenizer.model"))
    draw = random.Random(family)
    for _ in range(100):
        text = " ".join(draw.choice(WORDS.split()) + draw.choice(["", "", "\n", "é", "𝒳", "  x"]) for _ in range(8))
        assert tokenizer.encode(text, add_bos=False) == own.encode(text), repr(text)


@pytest.mark.parametrize("family", ["llama 3", "qwen 2", "llama 2", "gemma", "piece llama", "piece unigram", "gpt 2"])
@pytest.mark.parametrize("letter", ["a", " ", "é", "👩", "\n", "<"])
def test_much_of_one_letter_is_fast(tmp_path_factory: pytest.TempPathFactory, family: str, letter: str) -> None:
    folder = tmp_path_factory.getbasetemp() / family.replace(" ", "-")
    tokenizer = Tokenizer.from_directory(write(folder, family))
    start = time.process_time()
    ids = tokenizer.encode(letter * 100_000)
    assert time.process_time() - start < 2 and tokenizer.decode(ids).strip(" ") == letter.strip(" ") * 100_000


def test_clean_up_is_refused_where_it_would_change_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "piece unigram", clean_up_tokenization_spaces=True)
    with pytest.raises(NotSupported, match="clean_up_tokenization_spaces"):
        Tokenizer.from_directory(folder)
    folder = write(tmp_path / "other", "llama 2", clean_up_tokenization_spaces=True)
    tokenizer, reference = Tokenizer.from_directory(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("the cat , sat .")
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True) == "the cat , sat ."


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("tokenizer.model", b"", "is not a tokenizer"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "is not a tokenizer"),
        ("tokenizer.json", b'{"version": "1.0"}', "is not a tokenizer"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": "a"}}', "'x' is not the id of a token"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}', "must map ids to tokens"),
        ("tokenizer_config.json", b'{"bos_token": {"content": 3}}', "must be text or a map with content"),
        ("tokenizer_config.json", b'{"bos_token": "\\ud83d"}', "must be text or a map with content"),
        ("tokenizer_config.json", b'{"extra_special_tokens": 3}', "must be a list or a map"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    folder = write(tmp_path / "model", "piece llama")
    (folder / name).write_bytes(data)
    with pytest.raises(ModelError, match=f"{name}.*{words}"):
        Tokenizer.from_directory(folder)
