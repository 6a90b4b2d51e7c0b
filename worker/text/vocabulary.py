"""The vocabulary of a model folder: tokenizer.json if there is one, else the SentencePiece model tokenizer.model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Vocabulary

from lorayard.shared.errors import LorayardError, ModelError, NotSupported

from .pieces import BPE, CONTROL, USER_DEFINED, PieceModel, read_pieces
from .pipelines import DEFAULTS, class_merges, from_pieces, rebuilt, tokenizer_class
from .special import FLAGS, MAX_TOKENS, SpecialTokens

FILES = ("tokenizer.json", "tokenizer.model")
MAX_BYTES = 256 << 20
MAX_GROWTH = 256
PROBE = "Hello  world\n 123 naïve 日本 👩\u200d👩\u200d👧 \x00▁<s></s>"
"""Some of everything: a tokenizer that cannot encode and decode it is refused when it loads."""


def read_vocabulary(
    folder: Path, config: Mapping[str, Any], told: tuple[str, str], tokens: SpecialTokens
) -> Vocabulary:
    """config: tokenizer_config.json. told: the tokenizer class and model type that the folder names.

    Completes `tokens` with what the vocabulary itself says of them. Raises ModelError.
    """
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise ModelError(f"{folder} has neither {' nor '.join(FILES)}, one of which is the model's tokenizer")
    with as_error(lambda reason: ModelError(f"{file} is not a tokenizer: {reason}")):
        if file.stat().st_size > MAX_BYTES:
            raise ModelError(f"{file} has more than {MAX_BYTES >> 20} MiB, which no tokenizer needs")
        data = file.read_bytes()
        name = tokenizer_class(*told, byte_level=b'"ByteLevel"' in data)
        for kind, text in DEFAULTS.get(name, {}).items():
            if kind not in config:
                tokens.named.setdefault(kind, AddedToken(text, special=True))
        make = _from_json if file.name == "tokenizer.json" else _from_pieces
        vocabulary = make(data, name, config, tokens)
        tokens.add_to(vocabulary)
        if max(vocabulary.get_vocab().values()) >= MAX_TOKENS:
            raise ModelError(f"{file} has a token with an id of more than {MAX_TOKENS}")
        if file.name == "tokenizer.model" or vocabulary.post_processor is None:
            vocabulary.post_processor = _ends(vocabulary, config if file.name == "tokenizer.model" else {}, tokens)
        vocabulary.encode_special_tokens = config.get("split_special_tokens") is True
        vocabulary.no_truncation()
        vocabulary.no_padding()
        vocabulary.decode(vocabulary.encode(PROBE).ids)
    if config.get("clean_up_tokenization_spaces") is True and type(vocabulary.model).__name__ != "BPE":
        raise NotSupported(f"{folder / 'tokenizer_config.json'}: clean_up_tokenization_spaces is not supported")
    return vocabulary


@contextmanager
def as_error(make: Callable[[str], LorayardError]) -> Iterator[None]:
    """Raise what `make` makes of the words of the library's errors, which are of any class; a panic is no Exception."""
    try:
        yield
    except (LorayardError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise make(" ".join(str(error).split())[:200]) from None


def _from_json(data: bytes, name: str, config: Mapping[str, Any], tokens: SpecialTokens) -> Vocabulary:
    vocabulary = Vocabulary.from_buffer(data)
    told = json.loads(data)
    if max(_growth(told.get("normalizer")), _growth(told.get("decoder"))) > MAX_GROWTH:
        raise ModelError("its replacements could make much text of little")
    model = told["model"]
    if name not in DEFAULTS or model.get("type") != "BPE":
        return vocabulary
    anew = rebuilt(name, model["vocab"], model["merges"], config) | {"post_processor": told["post_processor"]}
    if not tokens.added:
        anew["added_tokens"] = told["added_tokens"]
    return Vocabulary.from_str(json.dumps(anew))


def _growth(step: Any) -> int:
    """How long a text may become, at most, of one character, by the replacements of a normaliser or decoder."""
    if not isinstance(step, dict):
        return 1
    inner = [*(step.get("normalizers") or ()), *(step.get("decoders") or ())]
    return (1 + len(step.get("content") or step.get("prepend") or "")) * math.prod(map(_growth, inner))


def _from_pieces(data: bytes, name: str, config: Mapping[str, Any], tokens: SpecialTokens) -> Vocabulary:
    model = read_pieces(data)
    marked = [CONTROL]  # of the others, the tokenizer itself keeps the model's own symbols whole
    if name in DEFAULTS and model.algorithm == BPE:
        marked.append(USER_DEFINED)
        vocab = {piece.text: id for id, piece in enumerate(model.pieces)}
        anew = rebuilt(name, vocab, class_merges(model), config)
    else:
        names = {id: token.content for id, token in tokens.added.items()}
        anew = from_pieces(model, names, legacy=config.get("legacy", True) is not False)
        _name_ends(model, tokens)
    if not tokens.extra:
        tokens.extra = [AddedToken(text, normalized=False, special=type == CONTROL)
                        for text, _, type in model.pieces if type in marked]  # fmt: skip
    return Vocabulary.from_str(json.dumps(anew))


def _name_ends(model: PieceModel, tokens: SpecialTokens) -> None:
    """Where no file names them, the model's own bos, eos and unk are the special tokens."""
    if model.add_dummy_prefix:  # matched in the text as it came, so that each part between them gets its space
        tokens.added = {id: _as_it_came(token) for id, token in tokens.added.items()}
    for name, text in (("bos_token", model.bos), ("eos_token", model.eos), ("unk_token", model.unk)):
        if text is not None:
            tokens.named.setdefault(name, AddedToken(text, special=True))


def _as_it_came(token: AddedToken) -> AddedToken:
    flags = {name: getattr(token, name) for name in FLAGS if name != "normalized"}
    return AddedToken(token.content, normalized=False, **flags)


def _ends(vocabulary: Vocabulary, config: Mapping[str, Any], tokens: SpecialTokens) -> Any:
    """What puts BOS in front and EOS behind, where tokenizer_config.json asks for them."""
    bos, eos = (
        tokens.texts.get(f"{name}_token") if config.get(f"add_{name}_token") is True else None
        for name in ("bos", "eos")
    )
    single = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
    ids = [(text, vocabulary.token_to_id(text)) for text in (bos, eos) if text]
    return processors.TemplateProcessing(single=single, special_tokens=ids)
