"""The folder of a corpus: its ledger, its shards, what it is of, and who works on it."""

from __future__ import annotations

import fcntl
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lorayard.shared.errors import FileError, LorayardError

from .ledger import Ledger
from .shards import Shards
from .spec import Corpus, build

CARD = """---
configs:
- config_name: default
  data_files: data/part-*
---
Texts made by `lorayard corpus`; report.md says how many, and by which adapters.
"""
"""Tells Hugging Face datasets to leave the rejected texts alone."""


class ForeignFolder(LorayardError):
    """The folder belongs to another corpus, or its adapters have changed since."""

    exit_status = 7


class Folder:
    """An opened folder. `corpus` is as it was when the folder was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger = Ledger(path / "ledger.sqlite")
        self.corpus: Corpus = build(Corpus, json.loads(self.ledger.get("corpus", "{}")), str(path))
        self.types: Mapping[str, str] = json.loads(self.ledger.get("columns", "{}"))
        self.batch = self.ledger.get("batch")
        self._bound = self.ledger.adapters()

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Raises FileError if there is no corpus."""
        if not (path / "ledger.sqlite").is_file():
            raise FileError(f"{path} is no folder of a corpus; `lorayard corpus run` makes one")
        return cls(path)

    @classmethod
    def make(cls, path: Path, corpus: Corpus, base_digest: str, types: Mapping[str, str]) -> Folder:
        """A new one, or the one that is there if it is of the same corpus. Raises ForeignFolder, FileError."""
        fingerprint = corpus.fingerprint(base_digest)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not (path / "README.md").exists():
                (path / "README.md").write_text(CARD)
        except OSError as error:
            raise FileError(f"{path} cannot be made: {error.strerror}") from None
        ledger = Ledger(path / "ledger.sqlite")
        if not ledger.get("fingerprint"):
            ledger.set(
                corpus=json.dumps(asdict(corpus)), fingerprint=fingerprint, base_digest=base_digest,
                columns=json.dumps(types), batch=f"corpus-{secrets.token_hex(6)}",
            )  # fmt: skip
        elif ledger.get("fingerprint") != fingerprint:
            old = json.loads(ledger.get("corpus"))
            changed = [name for name, value in asdict(corpus).items() if old.get(name) != value]
            raise ForeignFolder(
                f"{path} belongs to another corpus: {', '.join(changed) or 'the base model'} differs; "
                "name another folder with -o"
            )
        ledger.close()
        return cls(path)

    @property
    def accepted(self) -> Shards:
        """The shards of texts that count."""
        return Shards(self.path / "data", self.corpus.output.format, self.types)

    @property
    def rejected(self) -> Shards:
        """The shards of texts that a gate turned down."""
        return Shards(self.path / "rejected", "jsonl", self.types)

    def lock(self) -> object:
        """Held by the one process that fills the folder, until the answer is forgotten. Raises FileError."""
        file = (self.path / "lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise FileError(f"another process fills {self.path}: see lorayard corpus status {self.path}") from None
        return file

    def bind(self, adapter: str, digest: str) -> None:
        """Only bytes that wrote the first text of an adapter may write more. Raises ForeignFolder."""
        if adapter not in self._bound:
            self.ledger.use(adapter, digest)
            self._bound[adapter] = digest
        elif self._bound[adapter] != digest:
            raise ForeignFolder(
                f"adapter {adapter} has other bytes ({digest[:12]}) than those that wrote texts of {self.path} "
                f"({self._bound[adapter][:12]}); bring them back, or name another folder with -o"
            )
