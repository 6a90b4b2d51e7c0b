"""Text out of tokens as they come, never a part of a character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer as Vocabulary
from tokenizers.pre_tokenizers import ByteLevel


class TextStream(Protocol):
    """One text being generated."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that the tokens complete."""

    def finish(self) -> str:
        """What is still held back; U+FFFD for bytes that no longer become a character."""


def byte_characters() -> dict[str, int]:
    """The characters in which byte-level vocabularies write bytes: printable Latin-1 as itself, others from U+0100."""
    alphabet = set(ByteLevel.alphabet())
    plain = {chr(byte): byte for byte in range(256) if chr(byte) in alphabet}
    others = sorted(alphabet - set(plain))
    missing = [byte for byte in range(256) if chr(byte) not in alphabet]
    return plain | dict(zip(others, missing, strict=True))


def special_ids(vocabulary: Vocabulary) -> set[int]:
    """Ids that are not text."""
    return {id for id, token in vocabulary.get_added_tokens_decoder().items() if token.special}


class TokenBytes:
    """The bytes of each token of a byte-level vocabulary; special and unknown ids have none."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._special = special_ids(vocabulary)
        self._bytes = byte_characters()
        self._known: dict[int, bytes] = {}

    def __getitem__(self, id: int) -> bytes:
        found = self._known.get(id)
        if found is None:
            found = self._known[id] = self._look_up(id)
        return found

    def _look_up(self, id: int) -> bytes:
        token = None if id in self._special else self._vocabulary.id_to_token(id)
        if token is None:
            return b""
        if all(character in self._bytes for character in token):
            return bytes(self._bytes[character] for character in token)
        return token.encode()


class ByteStream:
    """For byte-level vocabularies: each token is some bytes, decoded as UTF-8 when complete."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        """The text that the tokens complete."""
        return self._decoder.decode(b"".join(self._token_bytes[id] for id in ids))

    def finish(self) -> str:
        """U+FFFD for bytes of an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """For every other vocabulary: a window of tokens is decoded twice, without and with the new ones.

    Where unknown characters are spelled in byte tokens (`<0xE2>`), a run of them is held until it ends: one bad byte
    makes the library print the whole run as U+FFFD.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._special = special_ids(vocabulary)
        self._shown: list[int] = []
        self._held: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """The text that the tokens complete."""
        self._held += [id for id in ids if id not in self._special and self._vocabulary.id_to_token(id) is not None]
        last = self._vocabulary.id_to_token(self._held[-1]) if self._held else None
        if last is None or re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", last):
            return ""
        before, text = self._decode(self._shown), self._decode(self._shown + self._held)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(before):
            return ""
        return self._advance(text[len(before) :])

    def finish(self) -> str:
        """What is still held back."""
        return self._advance(self._decode(self._shown + self._held)[len(self._decode(self._shown)) :])

    def _advance(self, text: str) -> str:
        self._shown, self._held = self._held, []
        return text

    def _decode(self, ids: list[int]) -> str:
        text: str = self._vocabulary.decode(ids, skip_special_tokens=True)
        return text
