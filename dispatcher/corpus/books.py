"""What can be read off a folder: verification, export, samples, the report. Nothing here needs Redis."""

from __future__ import annotations

import csv
import itertools
import json
import random
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from lorayard.shared.errors import FileError, UsageError

from . import openai
from .dedupe import distinct
from .folder import Folder
from .ledger import DONE, FAILED
from .shards import VARYING, write_parquet

KINDS = ("jsonl", "csv", "parquet", "openai")


def texts(folder: Folder) -> Iterator[dict[str, Any]]:
    """All rows of all shards, in the order in which they were written."""
    for name in folder.ledger.shards():
        if (folder.path / "data" / name).exists():
            yield from folder.accepted.read(name)


def verify(folder: Folder) -> list[str]:
    """Faults, one sentence each: a text missing or twice, a shard the ledger does not know or that holds other rows."""
    faults: list[str] = []
    known = folder.ledger.shards()
    for place in ("data", "rejected"):
        found = {path.name for path in (folder.path / place).glob("part-*")}
        faults += [f"{place}/{name} is not in the ledger" for name in sorted(found - known.keys())]
    places = {
        name: shards
        for shards in (folder.accepted, folder.rejected)
        for name in known
        if (shards.folder / name).exists()
    }
    faults += [f"shard {name} is missing" for name in known.keys() - places.keys()]
    listed: dict[str, set[str]] = {}
    keys: Counter[str] = Counter()
    for text in folder.ledger.all():
        keys[text.key] += 1
        if text.state != FAILED:
            listed.setdefault(text.shard, set()).add(text.key)
    faults += [f"the row key {key} is there {count} times" for key, count in keys.items() if count > 1]
    for name, shards in places.items():
        faults += _compare(name, known[name], [row["row_key"] for row in shards.read(name)], listed.get(name, set()))
    return faults


def _compare(name: str, rows: int, found: list[str], listed: set[str]) -> Iterator[str]:
    if len(found) != rows:
        yield f"shard {name} has {len(found)} rows, the ledger says {rows}"
    if len(set(found)) != len(found):
        yield f"shard {name} holds a row key twice"
    if set(found) != listed:
        yield f"shard {name} holds {len(set(found) ^ listed)} row keys that are not those of the ledger"


def export(folder: Folder, kind: str, path: Path, canonical: bool = False, dedupe: str = "") -> tuple[int, int]:
    """Write all texts into one file that appears whole; -> (its rows, duplicates left out).

    In the order of the input, or canonical: by row key, without the columns that another run may fill otherwise.
    dedupe: as `distinct` takes it; of duplicates the first in that order stays. Raises FileError, UsageError.
    """
    if kind == "openai" and dedupe:
        raise UsageError("--to openai answers every request, so --dedupe cannot leave one out")
    if kind == "openai" and not {"custom_id", "url"} <= folder.types.keys():
        raise UsageError("--to openai is for a corpus whose input is an OpenAI batch file")
    temporary = path.with_name(f".{path.name}.tmp")
    varying, removed = VARYING if canonical else (), list[str]()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            rows: Iterable[Mapping[str, Any]] = _sorted(folder, Path(scratch) / "rows", canonical)
            if dedupe:
                rows = distinct(rows, dedupe, removed)
            kept = ({name: value for name, value in row.items() if name not in varying} for row in rows)
            if kind == "parquet":
                columns = {name: form for name, form in folder.accepted.columns.items() if name not in varying}
                count = write_parquet(temporary, columns, kept)
            else:
                with temporary.open("w", newline="") as file:
                    count = (_csv if kind == "csv" else _lines)(folder, kind, kept, file)
        temporary.rename(path)
    except (OSError, sqlite3.Error) as error:
        temporary.unlink(missing_ok=True)
        raise FileError(f"{path} cannot be written: {error}") from None
    return count, len(removed)


def _sorted(folder: Folder, scratch: Path, canonical: bool) -> Iterator[dict[str, Any]]:
    """All rows in order, sorted by SQLite in a scratch file: a corpus may be larger than memory."""
    with closing(sqlite3.connect(scratch, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=OFF")
        db.execute("CREATE TABLE place (key TEXT PRIMARY KEY, position INTEGER) WITHOUT ROWID")
        db.execute("CREATE TABLE text (place PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID")
        db.execute("BEGIN")
        if not canonical:
            found = ((text.key, text.position) for text in folder.ledger.all() if text.state == DONE)
            db.executemany("INSERT INTO place VALUES (?, ?)", found)
        where = "?1" if canonical else "(SELECT position FROM place WHERE key = ?1)"
        rows = ((row["row_key"], json.dumps(row)) for row in texts(folder))
        db.executemany(f"INSERT INTO text VALUES ({where}, ?2)", rows)
        for (body,) in db.execute("SELECT body FROM text ORDER BY place"):
            yield json.loads(body)


def _csv(folder: Folder, kind: str, rows: Iterable[Mapping[str, Any]], file: IO[str]) -> int:
    writer: csv.DictWriter[str] | None = None
    count = 0
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
        writer.writerow(row)
        count += 1
    return count


def _lines(folder: Folder, kind: str, rows: Iterable[Mapping[str, Any]], file: IO[str]) -> int:
    """JSON lines; OpenAI's have the failed texts, too."""
    is_openai = kind == "openai"
    made: Iterable[Mapping[str, Any]] = (openai.answer(row, row["url"]) for row in rows) if is_openai else rows
    failed = folder.ledger.failed() if is_openai else ()
    count = 0
    for row in itertools.chain(made, (openai.failure(one.key, one.name, one.code, one.reason) for one in failed)):
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        count += 1
    return count


def sample(folder: Folder, count: int, by_adapter: bool, seed: int) -> list[dict[str, Any]]:
    """Some texts drawn evenly (reservoir sampling, Vitter 1985), `count` in all or of each LoRA set."""
    drawn: dict[str, list[dict[str, Any]]] = {}
    seen: Counter[str] = Counter()
    source = random.Random(seed)
    for row in texts(folder):
        group = row["adapter"] if by_adapter else ""
        chosen = drawn.setdefault(group, [])
        seen[group] += 1
        if len(chosen) < count:
            chosen.append(row)
        elif (place := source.randrange(seen[group])) < count:
            chosen[place] = row
    return [row for group in sorted(drawn) for row in drawn[group]]


def report(folder: Folder) -> str:
    """What became of the corpus, as Markdown."""
    ledger = folder.ledger
    counts = ledger.counts()
    lines = [
        f"# {folder.path.name}", "",
        f"{counts['done']:,} texts, {counts['rejected']:,} rejected, {counts['failed']:,} failed. "
        f"Fingerprint `{ledger.get('fingerprint')}`, base `{ledger.get('base_digest')[:16]}`.", "",
        "| LoRA set | texts | tokens |", "|---|---|---|",
        *(f"| {name or 'base'} | {count:,} | {tokens:,} |" for name, count, tokens in ledger.by_adapter()), "",
    ]  # fmt: skip
    if adapters := ledger.adapters():
        lines += [
            "| adapter | digest |",
            "|---|---|",
            *(f"| {name} | `{digest}` |" for name, digest in adapters.items()),
            "",
        ]
    if reasons := ledger.reasons():
        lines += [
            "| what | why | texts |",
            "|---|---|---|",
            *(f"| {state} | {code} | {count:,} |" for state, code, count in reasons),
        ]
    return "\n".join(lines).rstrip() + "\n"
