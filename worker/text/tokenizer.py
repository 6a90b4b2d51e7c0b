"""Text to token ids and back, and messages to text, as the files of a model folder say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Vocabulary
from tokenizers.decoders import ByteLevel

from lorayard.shared.errors import ModelError, Refused

from .special import MAX_TOKENS, is_text, read_json, read_special
from .stream import ByteStream, TextStream, TokenBytes, WindowStream
from .template import ChatTemplate
from .template_files import choose, read_templates
from .vocabulary import as_error, read_vocabulary


class Tokenizer:
    """The tokenizer of a model folder.

    bos_id: what a prompt starts with, or None. eos_ids: every id that ends a text, from config.json,
    generation_config.json and tokenizer_config.json. templates: chat templates by name. vocab_size: one more than the
    largest id that has a token.
    """

    def __init__(
        self, vocabulary: Vocabulary, bos_id: int | None, eos_ids: frozenset[int],
        templates: Mapping[str, ChatTemplate],
    ) -> None:  # fmt: skip
        self._vocabulary = vocabulary
        self._templates = templates
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        ids = vocabulary.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids)
        self._token_bytes = TokenBytes(vocabulary) if isinstance(vocabulary.decoder, ByteLevel) else None

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json or tokenizer.model, the special tokens and the chat templates. Raises ModelError."""
        folder = Path(path)
        config = read_json(folder / "tokenizer_config.json")
        model, generation = (read_json(folder / name) for name in ("config.json", "generation_config.json"))
        told = str(config.get("tokenizer_class") or model.get("tokenizer_class") or ""), str(model.get("model_type"))
        tokens = read_special(folder, config)
        vocabulary = read_vocabulary(folder, config, told, tokens)
        bos_ids, eos_ids = (
            _ids(
                vocabulary,
                tokens.texts.get(f"{name}_token"),
                [data.get(f"{name}_token_id") for data in (model, generation)],
            )
            for name in ("bos", "eos")
        )
        templates = read_templates(folder, config, tokens.texts)
        return cls(vocabulary, bos_ids[0] if bos_ids else None, frozenset(eos_ids), templates)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render` and `encode_chat` can do anything."""
        return bool(self._templates)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text. add_bos None: as tokenizer.json says. Raises Refused("bad_field")."""
        return self.encode_batch([text], add_bos)[0]

    def encode_batch(
        self, texts: Sequence[str], add_bos: bool | None = None, most: int | None = None
    ) -> list[list[int]]:  # fmt: skip
        """As `encode` for several texts, in parallel and without holding the interpreter lock.

        With `most`, a text of more tokens raises Refused("too_large") instead of making a long list.
        """
        for text in texts:
            _check_text(text)
        with as_error(lambda reason: Refused("bad_field", f"the model's tokenizer cannot encode the text: {reason}")):
            encodings = self._vocabulary.encode_batch_fast(list(texts), add_special_tokens=add_bos is None)
        longest = max((len(encoding) for encoding in encodings), default=0)
        if most is not None and longest > most:
            raise Refused("too_large", f"the prompt has {longest} tokens; a job has room for {most}")
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

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:  # fmt: skip
        """The prompt that the model's chat template makes of messages. Raises Refused."""
        return choose(self._templates, tools is not None).render(messages, add_generation_prompt, tools)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
        most: int | None = None,
    ) -> list[int]:  # fmt: skip
        """Token ids of the rendered messages; the template writes the first token itself. `most`: as `encode_batch`.

        Raises Refused.
        """
        return self.encode_batch([self.render(messages, tools=tools)], add_bos=False, most=most)[0]


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise Refused("bad_field", f"a prompt must be text, not {type(text).__name__}")
    if not is_text(text):
        raise Refused("bad_field", "the text has half of a surrogate pair, which is no character")


def _ids(vocabulary: Vocabulary, token: str | None, configured: Sequence[Any]) -> list[int]:
    """Ids from a token's name and from config values, each an id, a list of ids or nothing."""
    named = vocabulary.token_to_id(token) if token is not None else None
    ids = [] if named is None else [named]
    for value in configured:
        for item in value if isinstance(value, list) else [value]:
            if item is not None and (type(item) is not int or not 0 <= item < MAX_TOKENS):
                raise ModelError(
                    f"the config names {str(item)[:60]!r} as the id of a special token; a whole number is expected"
                )
            ids += [] if item is None else [item]
    return ids
