"""The tensors of a folder's safetensors files, checked by their headers before anything is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorayard.shared.errors import FileError, NotSupported

FLOATS = ("F16", "BF16", "F32")
BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor is and what it is; dtype as safetensors writes it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


class Tensors:
    """All tensors of some safetensors files by name. Errors are `error`s that name the file and the tensor."""

    def __init__(self, paths: Sequence[Path], error: type[FileError]) -> None:
        self.error, self.folder = error, paths[0].parent
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
        return sum(
            math.prod(entry.shape) * BYTES.get(entry.dtype, 8)
            for name, entry in self.entries.items()
            if name.startswith(prefix)
        )

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
        """The tensor, in the CPU's memory."""
        path = self.entries[name].path
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as reason:
            raise self.error(f"{path}: {name} cannot be read: {reason}") from None


def _header(path: Path, error: type[FileError]) -> dict[str, Entry]:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: Entry(path, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError) as reason:
        raise error(f"{path} is not a whole safetensors file: {str(reason)[:200]}") from None
