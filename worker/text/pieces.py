"""SentencePiece models (`tokenizer.model`): their pieces and rules.

The `sentencepiece` library checks the file and writes it anew; what its Python interface does not tell (the type of a
piece, the normaliser) is read from that as protocol buffer fields, numbered as in sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor

UNIGRAM, BPE = 1, 2
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


class Piece(NamedTuple):
    """One entry of the vocabulary; its place in the list is its id."""

    text: str
    score: float
    type: int


@dataclass(frozen=True, slots=True)
class PieceModel:
    """What a tokenizer.model says. The text of bos and eos is None where the model has none."""

    pieces: list[Piece]
    algorithm: int
    byte_fallback: bool
    unk_id: int
    bos: str | None
    eos: str | None
    unk: str
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def read_pieces(data: bytes) -> PieceModel:
    """The model in the bytes of a file. Raises RuntimeError or ValueError if it is none."""
    model = SentencePieceProcessor(model_proto=data).serialized_model_proto()
    fields = list(_fields(model))
    trainer, normalizer = (dict(_fields(_last(fields, number))) for number in (2, 3))
    entries = [dict(_fields(value)) for number, value in fields if number == 1]
    if trainer.get(3, UNIGRAM) not in (UNIGRAM, BPE):
        raise ValueError("it splits into words or characters; unigram or BPE is expected")
    return PieceModel(
        pieces=[Piece(_text(entry, 1, ""), _float(entry), entry.get(3, NORMAL)) for entry in entries],
        algorithm=trainer.get(3, UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        unk_id=trainer.get(40, 0),
        bos=_text(trainer, 46, "<s>") if trainer.get(41, 1) < 1 << 31 else None,
        eos=_text(trainer, 47, "</s>") if trainer.get(42, 2) < 1 << 31 else None,
        unk=_text(trainer, 45, "<unk>"),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer: whole numbers, or bytes for everything else."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value: Any
        if tag & 7 == 0:
            value, at = _varint(message, at)
        elif tag & 7 in (1, 5):
            size = 8 if tag & 7 == 1 else 4
            value, at = message[at : at + size], at + size
        elif tag & 7 == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        else:
            raise ValueError("a field of an unknown kind")
        if at > len(message):
            raise ValueError("it ends within a field")
        yield tag >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends within a number")
        byte = message[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _last(fields: list[tuple[int, Any]], number: int) -> bytes:
    return next((value for found, value in reversed(fields) if found == number), b"")


def _text(fields: dict[int, Any], number: int, default: str) -> str:
    value: bytes | None = fields.get(number)
    return default if value is None else value.decode()


def _float(fields: dict[int, Any]) -> float:
    value: float = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return value
