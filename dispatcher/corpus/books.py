"""What can be read off a folder: verification, export, samples, the report. Nothing here needs Redis."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lorayard.shared.errors import UsageError

from . import openai
from .folder import Folder
from .ledger import DONE, FAILED
from .shards import VARYING, Shards

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


def export(folder: Folder, kind: str, path: Path, order: str) -> int:
    """Write all texts into one file that appears whole; -> rows. order: `input`, or `canonical`: by row key, without
    the columns that another run may fill otherwise."""
    if kind not in KINDS:
        raise UsageError(f"--to must be one of {', '.join(KINDS)}, not {kind!r}")
    rows = _canonical(folder) if order == "canonical" else _by_position(folder)
    temporary = path.with_name(f".{path.name}.tmp")
    if kind == "parquet":
        place = Shards(path.parent, "parquet", folder.types)
        place.columns = {name: form for name, form in place.columns.items() if order == "input" or name not in VARYING}
        held = list(rows)
        place._fill(temporary, held)
        count = len(held)
    else:
        with temporary.open("w", newline="") as file:
            count = _write(kind, folder, rows, file)
    temporary.rename(path)
    return count


def _write(kind: str, folder: Folder, rows: Iterable[Mapping[str, Any]], file: IO[str]) -> int:
    count = 0
    if kind == "csv":
        import csv

        writer: csv.DictWriter[str] | None = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)
            count += 1
        return count
    for row in rows:
        if kind == "openai":
            if "custom_id" not in row or "url" not in row:
                raise UsageError("--to openai is for a corpus whose input is an OpenAI batch file")
            row = openai.answer(row, row["url"])
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        count += 1
    if kind == "openai":
        for text in folder.ledger.failed():
            file.write(json.dumps(openai.failure(text.key, text.name, text.code, text.reason)) + "\n")
            count += 1
    return count


def _by_position(folder: Folder) -> Iterator[dict[str, Any]]:
    """Rows in the order of the input."""
    where = {text.key: text.position for text in folder.ledger.all() if text.state == DONE}
    yield from sorted(texts(folder), key=lambda row: where[row["row_key"]])


def _canonical(folder: Folder) -> Iterator[dict[str, Any]]:
    for row in sorted(texts(folder), key=lambda row: str(row["row_key"])):
        yield {name: value for name, value in row.items() if name not in VARYING}


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
