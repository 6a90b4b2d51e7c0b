"""The adapters that this worker has read, each bound to its bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lorayard.shared.errors import FileError, NotSupported, Refused

if TYPE_CHECKING:
    from ..lora.peft import Lora


class Folder(Protocol):
    """Where an adapter is, and the digest of what is there."""

    @property
    def path(self) -> Path: ...
    @property
    def digest(self) -> str: ...


class AdapterLibrary:
    """Gives the adapter of an id and a digest, read when first asked for. For one thread.

    `scan()` lists the folders by id, `load(path)` reads one. The `keep` adapters used last stay in host memory, so that
    a job bound to bytes that have been replaced since may still run.
    """

    def __init__(self, scan: Callable[[], Mapping[str, Folder]], load: Callable[[Path], Lora], keep: int) -> None:
        self._scan, self._load, self._keep = scan, load, keep
        self._read: OrderedDict[tuple[str, str], Lora] = OrderedDict()

    def get(self, name: str, digest: str) -> Lora:
        """Raises Refused("no_adapter") if these bytes are nowhere any more, or cannot be used."""
        lora = self._read.get((name, digest)) or self._find(name, digest)
        self._read[name, digest] = lora
        self._read.move_to_end((name, digest))
        while len(self._read) > self._keep:
            self._read.popitem(last=False)
        return lora

    def _find(self, name: str, digest: str) -> Lora:
        folder = self._scan().get(name)
        if folder is None:
            raise Refused("no_adapter", f"the folder of adapter {name} is gone, or is malformed now")
        try:
            lora = self._load(folder.path)
        except (FileError, NotSupported) as error:
            raise Refused("no_adapter", f"adapter {name} cannot be used: {error}") from None
        if lora.digest != digest:
            raise Refused(
                "no_adapter",
                f"the bytes of adapter {name} were replaced after the job was accepted: it is bound to {digest[:8]}, "
                f"the folder now holds {lora.digest[:8]}; submit it again",
            )
        return lora
