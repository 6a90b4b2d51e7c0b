"""Adapter folders on disk: what there is, without reading a tensor. Needs no torch."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorayard.shared.errors import AdapterError, LorayardError
from lorayard.shared.job import ADAPTER_ID

from .config import AdapterConfig

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The first that is there is read."""


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """One adapter. digest: see `adapter_digest`. bytes: size of the weights file."""

    id: str
    path: Path
    rank: int
    digest: str
    bytes: int


class AdapterFolders(dict[str, AdapterFolder]):
    """Adapters by id. problems: one sentence for each folder that was passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []


def scan(roots: Sequence[Path]) -> AdapterFolders:
    """Find every folder below the roots that holds an adapter_config.json; its name is the adapter's id.

    Of two folders with one id the first, in the order of the roots, counts. Unchanged files are not read again.
    """
    found = AdapterFolders()
    for root in roots:
        for path in sorted(config.parent for config in Path(root).rglob(CONFIG)):
            try:
                folder = _folder(path, stamp(path))
                if folder.id in found:
                    raise AdapterError(f"adapter {folder.id} is in both {found[folder.id].path} and {path}")
                found[folder.id] = folder
            except LorayardError as reason:
                found.problems.append(str(reason))
    return found


def weights_file(path: Path) -> Path:
    """The file with the adapter's tensors. Raises AdapterError when there is none."""
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise AdapterError(f"{path} holds neither {' nor '.join(WEIGHTS)}")


def stamp(path: Path) -> tuple[int, ...]:
    """Changes when the folder's files do: (mtime_ns, size) of each."""
    try:
        stats = [(path / CONFIG).stat(), weights_file(path).stat()]
    except OSError as reason:
        raise AdapterError(f"{path / CONFIG} cannot be read: {reason.strerror}") from None
    return tuple(number for stat in stats for number in (stat.st_mtime_ns, stat.st_size))


def adapter_digest(path: Path) -> str:
    """blake2b of 16 bytes, in hex, over the bytes of adapter_config.json and then of the weights file."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (path / CONFIG, weights_file(path)):
        try:
            with name.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as reason:
            raise AdapterError(f"{name} cannot be read: {reason.strerror}") from None
    return digest.hexdigest()


@functools.lru_cache(maxsize=1 << 16)
def known_digest(path: Path, stamp: tuple[int, ...]) -> str:
    """`adapter_digest` of a folder with this stamp, read once."""
    return adapter_digest(path)


@functools.lru_cache(maxsize=1 << 16)
def _folder(path: Path, stamp: tuple[int, ...]) -> AdapterFolder:
    if not ADAPTER_ID.fullmatch(path.name):
        raise AdapterError(f"{path}: the folder's name must match {ADAPTER_ID.pattern} to be an adapter id")
    rank = AdapterConfig.from_directory(path).max_rank
    return AdapterFolder(path.name, path, rank, known_digest(path, stamp), stamp[3])
