"""The tensors of a folder's safetensors files, checked by their headers before anything is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorayard.shared.errors import FileError, NotSupported

FLOATS = ("F16", "BF16", "F32")
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I16": torch.int16, "I32": torch.int32}
"""What is read, as safetensors writes it. Other dtypes may be in a file, but have no place in a model."""
PIECE, THREADS = 64 << 20, 4
"""Bytes of a tensor up to which one thread reads it, and threads that read a larger one."""
MAX_PINNED = 128 << 20
"""Bytes of a tensor that pinned memory is taken for; that memory is kept for the next tensors, and then for good."""
MAX_HEADER = 4 << 20
"""Bytes of a header: a file of twenty thousand tensors has less."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor is and what it is; dtype as safetensors writes it, start and size in bytes of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    size: int = 0


class Tensors:
    """All tensors of some safetensors files by name. Errors are `error`s that name the file and the tensor.

    pinned: whether tensors are read into memory that a GPU copies from at full speed, for those that are to go there.
    """

    def __init__(self, paths: Sequence[Path], error: type[FileError]) -> None:
        self.error, self.folder = error, paths[0].parent
        self.pinned = False
        self.entries: dict[str, Entry] = {}
        for path in paths:
            for name, entry in _header(path, error).items():
                if name in self.entries:
                    raise error(f"{name} is in both {self.entries[name].path} and {path}")
                self.entries[name] = entry

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def stored_bytes(self, prefix: str) -> int:
        """Bytes of all tensors whose names begin so."""
        return sum(entry.size for name, entry in self.entries.items() if name.startswith(prefix))

    def require(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> None:
        """Check that the tensor is there with this shape and one of these dtypes."""
        entry = self.entries.get(name)
        if entry is None:
            raise self.error(f"{self.folder}: tensor {name} is missing from the safetensors files")
        if entry.dtype not in dtypes:
            raise NotSupported(f"{entry.path}: {name} is {entry.dtype}; this version reads {', '.join(dtypes)} there")
        if entry.shape != shape:
            raise self.error(f"{entry.path}: {name} has shape {list(entry.shape)}, expected {list(shape)}")

    def fault(self, name: str, what: str) -> FileError:
        """The error to raise for what a tensor holds."""
        return self.error(f"{self.entries[name].path}: {name} {what}")

    def read(self, name: str) -> Tensor:
        """The tensor, copied into the CPU's memory, if large by several threads. Several threads may read at once."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise NotSupported(f"{entry.path}: {name} is {entry.dtype}; this version reads {', '.join(DTYPES)}")
        data = torch.empty(entry.size, dtype=torch.uint8, pin_memory=self.pinned and 0 < entry.size <= MAX_PINNED)
        view: Any = data.numpy()
        try:
            if entry.size <= PIECE:
                got = _fill(entry.path, entry.start, view)
            else:
                starts = range(0, entry.size, PIECE)
                with ThreadPoolExecutor(THREADS) as pool:
                    got = sum(pool.map(lambda at: _fill(entry.path, entry.start + at, view[at : at + PIECE]), starts))
        except OSError as reason:
            raise self.fault(name, f"cannot be read: {reason.strerror}") from None
        if got < entry.size:
            raise self.fault(name, "cannot be read: the file has become shorter")
        return data.view(DTYPES[entry.dtype]).view(entry.shape)


def _fill(path: Path, start: int, view: Any) -> int:
    """Read a file from `start` on into `view` -> the bytes that there were."""
    got = 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while got < len(view) and (count := file.readinto(view[got:])):
            got += count
    return got


def _header(path: Path, error: type[FileError]) -> dict[str, Entry]:
    """Entries of a file that safetensors itself takes for whole: offsets fit the shapes and fill the file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise error(f"{path} is not a whole safetensors file: a header of {length} bytes is too long")
            with safe_open(path, "pt"):
                header = json.loads(file.read(length), object_pairs_hook=_once)
    except (OSError, SafetensorError, ValueError, RecursionError) as reason:
        raise error(f"{path} is not a whole safetensors file: {str(reason)[:200]}") from None
    header.pop("__metadata__", None)
    return {name: _entry(path, 8 + length, fields) for name, fields in header.items()}


def _entry(path: Path, data: int, fields: dict[str, Any]) -> Entry:
    start, end = fields["data_offsets"]
    return Entry(path, fields["dtype"], tuple(fields["shape"]), data + start, end - start)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{twice[:100]} is there twice")
    return found
