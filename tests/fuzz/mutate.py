"""Small hostile changes of valid input: of bytes, of JSON-like values and of safetensors files."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 4096, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 63, -(1 << 63), 10**30, 0.5,
    -0.0, 1e-30, 1e308, float("nan"), float("inf"), "", " ", "x", "1", "-1", "a" * 5000, "\ud83d", "\u0000", "é" * 9,
    "../../etc/passwd", "/etc/passwd", "{{", "%s%s", "F32", "I64", "BOOL", "weight", "(a+)+$", "[", "\\", "model",
    "default", "auto",
]  # fmt: skip


def deep(depth: int, kind: str = "list") -> Any:
    """Lists or maps within each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def hostile_value(draw: random.Random) -> Any:
    """A value that is rarely expected."""
    kind = draw.randrange(12)
    if kind < 8:
        return draw.choice(SCALARS)
    if kind == 8:
        return deep(draw.choice([1, 3, 70, 150]), draw.choice(["list", "map"]))
    if kind == 9:
        return [draw.choice(SCALARS)] * draw.choice([0, 1, 2, 5, 3000])
    if kind == 10:
        return {str(draw.choice(SCALARS)): draw.choice(SCALARS) for _ in range(draw.randrange(4))}
    return [hostile_value(draw) for _ in range(draw.randrange(4))]


def slots_of(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Every (container, key) within a value."""
    found = [] if found is None else found
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            slots_of(value[key], found)
    return found


def mutate_value(draw: random.Random, value: Any, times: int | None = None) -> Any:
    """A copy of a JSON-like value with a few places changed, exchanged, doubled, renamed or taken away."""
    value = json.loads(json.dumps(value))
    for _ in range(times or draw.choice([1, 1, 1, 2, 4])):
        slots = slots_of(value)
        if not slots:
            return hostile_value(draw)
        (holder, key), (other, other_key) = draw.choice(slots), draw.choice(slots)
        kind = draw.randrange(6)
        if kind < 3:
            holder[key] = hostile_value(draw)
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            holder[key] = json.loads(json.dumps(other[other_key]))
        elif isinstance(holder, dict):
            holder[str(draw.choice(SCALARS))] = holder[key]
        else:
            holder += holder[: draw.choice([1, 50])]
    return value


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut, doubled, put in or taken out."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        at = draw.randrange(len(changed) + 1)
        size = draw.choice([1, 2, 4, 8, 64])
        kind = draw.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at : at + size] = draw.randbytes(size)
        elif kind == 2:
            changed[at : at + size] = b""
        elif kind == 3:
            changed[at:at] = changed[at // 2 :][:size]
        elif kind == 4:
            changed[at : at + size] = draw.choice([b"\x00", b"\xff"]) * size
        elif draw.randrange(4) == 0:
            del changed[at:]
    return bytes(changed)


def to_json(draw: random.Random, value: Any) -> bytes:
    """A value as JSON, now and then not quite."""
    data = json.dumps(value).encode()
    kind = draw.randrange(40)
    if kind == 0:
        opening = draw.choice([b"[", b'{"a":'])
        return data.replace(b": ", b": " + opening * 100_000, 1)
    return mutate_bytes(draw, data) if kind < 6 else data


def mutate_safetensors(draw: random.Random, data: bytes) -> bytes:
    """The header's values changed (dtypes, shapes, offsets, names), its length, or any bytes."""
    kind = draw.randrange(8)
    if kind == 0:
        return mutate_bytes(draw, data)
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if kind == 1:
        wrong = draw.choice([0, 1, size - 1, size + 1, size + 8, 1 << 20, 1 << 40, (1 << 64) - 1])
        return struct.pack("<Q", wrong) + data[8:]
    if kind == 2:
        name = draw.choice([name for name in header if name != "__metadata__"])
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
        return struct.pack("<Q", len(text)) + text.encode() + body
    if kind in (3, 4):
        entry = header[draw.choice([name for name in header if name != "__metadata__"])]
        draw.choice([_other_shape, _other_dtype, _other_offsets])(draw, entry)
    else:
        header = mutate_value(draw, header)
    text = to_json(draw, header).decode(errors="replace")
    encoded = text.encode(errors="replace")
    return struct.pack("<Q", len(encoded)) + encoded + body


def _other_shape(draw: random.Random, entry: dict[str, Any]) -> None:
    shape = entry["shape"]
    entry["shape"] = draw.choice([shape[::-1], [*shape, 1], [1, *shape], shape[1:], [], [0], [1 << 40, 1 << 40], [-1]])


def _other_dtype(draw: random.Random, entry: dict[str, Any]) -> None:
    entry["dtype"] = draw.choice(["F16", "BF16", "F32", "F64", "I8", "I32", "U8", "I64", "BOOL", "F8_E4M3", "X"])


def _other_offsets(draw: random.Random, entry: dict[str, Any]) -> None:
    start, end = entry["data_offsets"]
    entry["data_offsets"] = draw.choice(
        [[end, start], [start, end + 4], [0, 0], [0, end], [start + 1, end], [0, 1 << 62]]
    )
