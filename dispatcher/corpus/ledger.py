"""The book of a corpus: which texts are done, in SQLite beside the shards. Only what has ended is in it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lorayard.shared.errors import FileError

DONE, REJECTED, FAILED = 1, 2, 3
STATES = {DONE: "done", REJECTED: "rejected", FAILED: "failed"}
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (name TEXT PRIMARY KEY, rows INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS adapters (id TEXT PRIMARY KEY, digest TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS texts (
  position INTEGER PRIMARY KEY, name TEXT NOT NULL, key TEXT NOT NULL,
  state INTEGER NOT NULL, shard TEXT NOT NULL, adapter TEXT NOT NULL,
  tokens INTEGER NOT NULL, code TEXT NOT NULL, reason TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS unfinished ON texts (state) WHERE state > 1;
CREATE TABLE IF NOT EXISTS retries (position INTEGER PRIMARY KEY, generation INTEGER NOT NULL);
"""


class Ended(NamedTuple):
    """A text that has ended. name: its row's. tokens: new ones. code, reason: why it failed or was rejected."""

    position: int
    name: str
    key: str
    state: int
    shard: str
    adapter: str
    tokens: int
    code: str = ""
    reason: str = ""


class Ledger:
    """One connection. Every write is one transaction, on the disk when the call returns."""

    def __init__(self, path: Path) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(SCHEMA)
            self._load()
        except sqlite3.Error as error:
            raise FileError(f"the ledger {path} cannot be used: {error}") from None

    def _load(self) -> None:
        self.ended = bytearray()
        for (position,) in self._db.execute("SELECT position FROM texts"):
            self._mark(position)
        self.generations = dict(self._db.execute("SELECT position, generation FROM retries"))

    def close(self) -> None:
        """Give the file back."""
        self._db.close()

    def get(self, name: str, default: str = "") -> str:
        """A word about the corpus."""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return default if row is None else str(row[0])

    def set(self, **words: str) -> None:
        """Keep words about the corpus."""
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", words.items())

    def has(self, position: int) -> bool:
        """Whether the text has ended."""
        byte = position >> 3
        return byte < len(self.ended) and bool(self.ended[byte] >> (position & 7) & 1)

    def key(self, position: int) -> str:
        """The row key of a text that has ended."""
        return str(self._db.execute("SELECT key FROM texts WHERE position = ?", (position,)).fetchone()[0])

    def commit(self, texts: Iterable[Ended], shards: Iterable[tuple[str, int]] = ()) -> None:
        """What has ended, and the (name, rows) of the shards that hold it."""
        texts = list(texts)
        with self._transaction():
            self._db.executemany("INSERT INTO shards VALUES (?, ?)", shards)
            self._db.executemany("INSERT INTO texts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", texts)
        for text in texts:
            self._mark(text.position)

    def shards(self) -> dict[str, int]:
        """Name -> rows of every shard that counts."""
        return dict(self._db.execute("SELECT name, rows FROM shards ORDER BY name"))

    def adapters(self) -> dict[str, str]:
        """Id -> digest of the adapters that this corpus has used."""
        return dict(self._db.execute("SELECT id, digest FROM adapters ORDER BY id"))

    def use(self, adapter: str, digest: str) -> None:
        """Bind the corpus to an adapter's bytes."""
        with self._transaction():
            self._db.execute("INSERT INTO adapters VALUES (?, ?)", (adapter, digest))

    def counts(self) -> dict[str, int]:
        """State -> texts."""
        found = dict(self._db.execute("SELECT state, COUNT(*) FROM texts GROUP BY state"))
        return {name: found.get(state, 0) for state, name in STATES.items()}

    def by_adapter(self) -> list[tuple[str, int, int]]:
        """(LoRA set, texts done, their new tokens)."""
        question = "SELECT adapter, COUNT(*), SUM(tokens) FROM texts WHERE state = 1 GROUP BY adapter ORDER BY adapter"
        return self._db.execute(question).fetchall()

    def reasons(self) -> list[tuple[str, str, int]]:
        """(state, code, texts) of what was rejected or failed, most first."""
        found = self._db.execute(
            "SELECT state, code, COUNT(*) FROM texts WHERE state > 1 GROUP BY state, code ORDER BY COUNT(*) DESC, code"
        )
        return [(STATES[state], code, count) for state, code, count in found]

    def failed(self) -> Iterator[Ended]:
        """The failed texts, in the order of positions."""
        yield from map(Ended._make, self._db.execute("SELECT * FROM texts WHERE state = 3 ORDER BY position"))

    def retry(self, code: str | None = None) -> int:
        """Forget failed texts, so that they run again under new job ids; -> how many."""
        with self._transaction():
            wanted = "state = 3 AND (?1 IS NULL OR code = ?1)"
            self._db.execute(
                f"INSERT INTO retries SELECT position, 1 FROM texts WHERE {wanted} "
                "ON CONFLICT (position) DO UPDATE SET generation = generation + 1",
                (code,),
            )
            count = self._db.execute(f"DELETE FROM texts WHERE {wanted}", (code,)).rowcount
        self._load()
        return count

    def again(self, position: int) -> None:
        """Let a text that has not ended run under a new job id."""
        generation = self.generations.get(position, 0) + 1
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO retries VALUES (?, ?)", (position, generation))
        self.generations[position] = generation

    def all(self) -> Iterator[Ended]:
        """Every text that has ended, in the order of positions."""
        yield from map(Ended._make, self._db.execute("SELECT * FROM texts ORDER BY position"))

    def _mark(self, position: int) -> None:
        byte = position >> 3
        if byte >= len(self.ended):
            self.ended.extend(bytes(byte + 1 - len(self.ended) + len(self.ended) // 2))
        self.ended[byte] |= 1 << (position & 7)

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    """BEGIN IMMEDIATE to COMMIT, or ROLLBACK and a FileError that says what is wrong."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def __enter__(self) -> None:
        self._run("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if kind is None:
            self._run("COMMIT")
            return
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error):
            raise FileError(f"the ledger cannot be written: {error}; what was written before is safe") from None

    def _run(self, command: str) -> None:
        try:
            self.db.execute(command)
        except sqlite3.Error as error:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise FileError(f"the ledger cannot be written: {error}; what was written before is safe") from None
