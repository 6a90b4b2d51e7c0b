"""Tokenizers as the JSON of the `tokenizers` library, where a folder's own tokenizer.json is missing or not followed.

transformers makes some tokenizers anew from vocabulary and merges alone, whatever else tokenizer.json says; which, and
how, is data here. A SentencePiece model becomes the same kind of thing, so that there is one way to encode and decode.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

from .pieces import NORMAL, UNIGRAM, USER_DEFINED, PieceModel

Json = dict[str, Any]
SPACE = "▁"
"""How vocabularies spell a space."""
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's rule for what a word is (QwenLM, tokenization_note)."""

REGISTERED = {
    "gemma": "GemmaTokenizer", "gemma2": "GemmaTokenizer", "gemma3": "GemmaTokenizer", "gemma3_text": "GemmaTokenizer",
    "mistral": "", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer",
}  # fmt: skip
"""The tokenizer class that transformers has for a model_type; "" follows the files whatever class they name."""

DEFAULTS = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
                       "mask_token": "<mask>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
}  # fmt: skip
"""Special tokens of a class whose files do not say."""


def tokenizer_class(told: str, model_type: str, byte_level: bool) -> str:
    """The class that transformers takes: `told` (tokenizer_class) or the model's own. byte_level: tokenizer.json is."""
    told, own = told.removesuffix("Fast"), REGISTERED.get(model_type)
    if told == "LlamaTokenizer" and byte_level and model_type not in ("mistral", "qwen2"):
        return ""
    if not own or not told or told == own:
        return "" if own == "" else told or own or ""
    return own if model_type == "qwen2" else told


def rebuilt(name: str, vocab: Mapping[str, int], merges: list[Any], config: Mapping[str, Any]) -> Json:
    """The tokenizer of a class of `DEFAULTS`; config: tokenizer_config.json."""
    return _MAKERS[name]({"type": "BPE", "vocab": vocab, "merges": merges}, config)


def _llama(model: Json, config: Mapping[str, Any]) -> Json:
    prefix = config.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if config.get("legacy", False) else "first"
    decoders = [*_BYTES, _STRIP] if prefix else _BYTES
    return _json(model | {"fuse_unk": True, "byte_fallback": True}, pre=_metaspace(scheme), decoders=decoders)


def _gemma(model: Json, config: Mapping[str, Any]) -> Json:
    unk = config.get("unk_token", "<unk>")
    model |= {"fuse_unk": True, "byte_fallback": True, "unk_token": unk["content"] if isinstance(unk, dict) else unk}
    pre = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return _json(model, normalizers=[_replace(" ", SPACE)], pre=pre, decoders=_BYTES)


def _qwen(model: Json, config: Mapping[str, Any]) -> Json:
    words = {"type": "Split", "pattern": {"Regex": QWEN_WORDS}, "behavior": "Isolated", "invert": False}
    prefix = bool(config.get("add_prefix_space"))
    level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": False}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    pre = {"type": "Sequence", "pretokenizers": [words, level]}
    return _json(model, normalizers=[{"type": "NFC"}], pre=pre, decoders=[level])


_MAKERS = {"LlamaTokenizer": _llama, "GemmaTokenizer": _gemma, "Qwen2Tokenizer": _qwen}


def class_merges(model: PieceModel) -> list[tuple[str, str]]:
    """Every way to join two pieces into one, in the order of the ids of what they become."""
    ids = {piece.text: id for id, piece in enumerate(model.pieces)}
    found = [
        (id, len(left), left, right) for text, id in ids.items() for left, right in _halves(text, ids)
    ]  # fmt: skip
    return [(left, right) for *_, left, right in sorted(found)]


def from_pieces(model: PieceModel, names: Mapping[int, str], legacy: bool) -> Json:
    """The tokenizer that encodes like SentencePiece itself. names: other texts of some ids. legacy: a space is put in
    front of each text between special tokens, and not just of the first.
    """
    kept = {piece.text for id, piece in enumerate(model.pieces) if id not in names}
    texts = [
        names[id] if id in names and names[id] not in kept else piece.text for id, piece in enumerate(model.pieces)
    ]
    own = [text for text, piece in zip(texts, model.pieces, strict=True) if piece.type == USER_DEFINED]
    if model.algorithm == UNIGRAM:
        vocab: Any = [[piece.text, piece.score] for piece in model.pieces]
        core = {"type": "Unigram", "vocab": vocab, "unk_id": model.unk_id, "byte_fallback": model.byte_fallback}
    else:
        core = {
            "type": "BPE", "vocab": {text: id for id, text in enumerate(texts)}, "merges": _scored_merges(model, texts),
            "unk_token": model.unk, "fuse_unk": True, "byte_fallback": model.byte_fallback, "ignore_merges": bool(own),
        }  # fmt: skip
    steps = [_metaspace("always" if legacy else "first")] if model.add_dummy_prefix else []
    if own:
        pattern = "|".join(re.escape(text) for text in sorted(own, key=len, reverse=True))
        steps.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    ends = _BYTES if model.byte_fallback else _BYTES[:1]
    if model.add_dummy_prefix:
        ends = [step for step in _BYTES if model.byte_fallback or step["type"] != "ByteFallback"] + [_STRIP]
    pre = {"type": "Sequence", "pretokenizers": steps} if steps else None
    return _json(core, normalizers=_normalizers(model, legacy), pre=pre, decoders=ends)


def _normalizers(model: PieceModel, legacy: bool) -> list[Json]:
    """SentencePiece's, in its order."""
    steps: list[Json] = []
    if model.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
    if model.remove_extra_whitespaces:
        steps += [_replace(r"\A +| +\z", "", "Regex"), _replace(" {2,}", " ", "Regex")]
    if model.escape_whitespaces:
        steps.append(_replace(" ", SPACE))
    if model.add_dummy_prefix and legacy:  # Metaspace takes a mark that is there already for its own
        steps.append(_replace(rf"\A{SPACE}", SPACE * 2, "Regex"))
    return steps


def _scored_merges(model: PieceModel, texts: list[str]) -> list[tuple[str, str]]:
    """Joins of normal pieces, the best score of the result first."""
    normal = {
        text: (-piece.score, id) for id, (text, piece) in enumerate(zip(texts, model.pieces, strict=True))
        if piece.type == NORMAL
    }  # fmt: skip
    found = [(*rank, left, right) for text, rank in normal.items() for left, right in _halves(text, normal)]
    return [(left, right) for *_, left, right in sorted(found)]


def _halves(text: str, known: Mapping[str, Any]) -> list[tuple[str, str]]:
    cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
    return [(left, right) for left, right in cuts if left in known and right in known]


def _json(model: Json, decoders: list[Json], normalizers: list[Json] | None = None, pre: Json | None = None) -> Json:
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": pre, "model": model,
        "decoder": decoders[0] if len(decoders) == 1 else {"type": "Sequence", "decoders": decoders},
    }  # fmt: skip


def _replace(old: str, new: str, kind: str = "String") -> Json:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def _metaspace(scheme: str) -> Json:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


_BYTES: list[Json] = [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
_STRIP: Json = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
