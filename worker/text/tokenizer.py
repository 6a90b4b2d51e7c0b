"""Text to token ids and back, from a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Vocabulary

from lorayard.shared.errors import ModelError, Refused

from ..files import JsonFile
from .stream import ByteStream, TextStream, TokenBytes, WindowStream
from .template import ChatTemplate
from .trial import checked_template


class Tokenizer:
    """The tokenizer of a model folder.

    bos_id: what a prompt starts with, or None. eos_ids: every id that ends a text, from config.json,
    generation_config.json and tokenizer_config.json. vocab_size: one more than the largest id that has a token.
    """

    def __init__(
        self, vocabulary: Vocabulary, bos_id: int | None, eos_ids: frozenset[int], template: ChatTemplate | None
    ) -> None:
        vocabulary.no_truncation()
        vocabulary.no_padding()
        self._vocabulary = vocabulary
        self._template = template
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        ids = vocabulary.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids)
        decoder = json.loads(vocabulary.to_str())["decoder"] or {}
        self._token_bytes = TokenBytes(vocabulary) if decoder.get("type") == "ByteLevel" else None

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, the special tokens and the chat template. Raises ModelError."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"{file} is missing: the model folder needs a Hugging Face tokenizer.json")
        try:
            vocabulary = Vocabulary.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{file} is not a tokenizer: {error}") from None
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(config)
        others = [_read_json(folder / name) for name in ("config.json", "generation_config.json")]
        bos_ids = _ids(vocabulary, special.get("bos_token"), [other.get("bos_token_id") for other in others])
        eos_ids = _ids(vocabulary, special.get("eos_token"), [other.get("eos_token_id") for other in others])
        source = _template_source(folder, config)
        template = checked_template(source, special) if source else None
        return cls(vocabulary, bos_ids[0] if bos_ids else None, frozenset(eos_ids), template)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render` and `encode_chat` can do anything."""
        return self._template is not None

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text. add_bos None: as tokenizer.json says. Raises Refused("bad_field")."""
        return self.encode_batch([text], add_bos)[0]

    def encode_batch(self, texts: Sequence[str], add_bos: bool | None = None) -> list[list[int]]:
        """As `encode` for several texts, in parallel and without holding the interpreter lock."""
        for text in texts:
            _check_text(text)
        encodings = self._vocabulary.encode_batch_fast(list(texts), add_special_tokens=add_bos is None)
        rows: list[list[int]] = [encoding.ids for encoding in encodings]
        if add_bos and self.bos_id is not None:
            return [row if row[:1] == [self.bos_id] else [self.bos_id, *row] for row in rows]
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens have none, broken bytes are U+FFFD."""
        text: str = self._vocabulary.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """A new stream: what its `push` and `finish` return is, together, `decode` of all that was pushed."""
        return ByteStream(self._token_bytes) if self._token_bytes else WindowStream(self._vocabulary)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt that the model's chat template makes of messages. Raises Refused."""
        if self._template is None:
            raise Refused("bad_field", "messages: the model has no chat template; send a prompt")
        return self._template.render(messages, add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of the rendered messages; the template writes the first token itself. Raises Refused."""
        return self.encode(self.render(messages), add_bos=False)


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise Refused("bad_field", f"a prompt must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused("bad_field", f"the text has half of a surrogate pair at character {error.start}") from None


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON map, empty if there is no such file."""
    return JsonFile(file, ModelError).data if file.is_file() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens of tokenizer_config.json, as a template sees them."""
    found = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"):
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found[name] = content
    return found


def _ids(vocabulary: Vocabulary, token: str | None, configured: Sequence[Any]) -> list[int]:
    """Ids from a token's name and from config values, each an id, a list of ids or nothing."""
    named = vocabulary.token_to_id(token) if token is not None else None
    ids = [] if named is None else [named]
    for value in configured:
        for item in value if isinstance(value, list) else [value]:
            if item is not None and type(item) is not int:
                raise ModelError(f"the config names {item!r} as the id of a special token; a whole number is expected")
            ids += [] if item is None else [item]
    return ids


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, else the one of tokenizer_config.json (of several, `default`)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if source is not None and not isinstance(source, str):
        raise ModelError(f"{folder / 'tokenizer_config.json'}: chat_template must be text")
    return source
