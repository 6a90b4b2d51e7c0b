"""Shards: files of texts that appear whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorayard.shared.errors import FileError

TEXT_COLUMNS = {
    "row_key": "string", "sample": "int64", "text": "string", "finish_reason": "string", "prompt_tokens": "int64",
    "new_tokens": "int64", "adapter": "string", "adapter_digest": "string", "base_digest": "string", "seed": "uint64",
    "attempts": "int64", "gpu": "string", "t_queue_ms": "int64", "t_first_ms": "int64", "t_total_ms": "int64",
}  # fmt: skip
"""What the yard adds to the input's columns; a column of the input with such a name becomes input_NAME."""

SURROGATE = re.compile("[\ud800-\udfff]")
GROUP = 10_000
"""Rows of a row group."""

VARYING = ("attempts", "gpu", "t_queue_ms", "t_first_ms", "t_total_ms")
"""Columns that another run of the same corpus may fill otherwise."""


def column_types(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Type of each column of the input, from its first rows: bool, int64, double, string, or json for all else."""
    seen: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            seen.setdefault(name, set()).add(type(value))
    return {name: _type(kinds - {type(None)}) for name, kinds in seen.items()}


def _type(kinds: set[type]) -> str:
    for allowed, name in (({bool}, "bool"), ({int}, "int64"), ({int, float}, "double"), ({str}, "string")):
        if kinds and kinds <= allowed:
            return name
    return "json"


def fitted(columns: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """A row's own columns as they go into a shard. Raises ValueError naming the column that does not fit."""
    fit: dict[str, Any] = {}
    for name, kind in types.items():
        value = columns.get(name)
        if kind == "json":
            value = None if value is None else json.dumps(value, default=str, ensure_ascii=False)
        elif value is not None and _type({type(value)}) != kind:
            if kind != "double" or type(value) is not int:
                raise ValueError(f"column {name} holds {kind} in the first rows, and {str(value)[:60]!r} here")
        if isinstance(value, str) and not value.isascii() and SURROGATE.search(value):
            raise ValueError(f"column {name} holds half of a surrogate pair, which is no character")
        fit[f"input_{name}" if name in TEXT_COLUMNS else name] = value
    if extra := columns.keys() - types.keys():
        raise ValueError(f"column {sorted(extra)[0]} is not in the first rows")
    return fit


class Shards:
    """Writes and reads the shards of one folder. types: as `column_types` gives them."""

    def __init__(self, folder: Path, form: str, types: Mapping[str, str]) -> None:
        self.folder, self.form = folder, form
        names = {f"input_{name}" if name in TEXT_COLUMNS else name: kind for name, kind in types.items()}
        self.columns = {**{name: "string" if kind == "json" else kind for name, kind in names.items()}, **TEXT_COLUMNS}
        folder.mkdir(exist_ok=True)

    def write(self, number: int, rows: Sequence[Mapping[str, Any]]) -> str:
        """Write a shard, on the disk with its name when this returns; -> the name. Raises FileError."""
        name = f"part-{number:05d}.{self.form}"
        temporary = self.folder / f".{name}.tmp"
        try:
            self._fill(temporary, rows)
            _sync(temporary)
            temporary.rename(self.folder / name)
            _sync(self.folder)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise FileError(
                f"{self.folder / name} cannot be written: {error.strerror or error}; make room and run the same "
                "command again, nothing that was written before is lost"
            ) from None
        return name

    def _fill(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.form == "jsonl":
            with path.open("w") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        write_parquet(path, self.columns, rows)

    def read(self, name: str) -> Iterator[dict[str, Any]]:
        """The rows of a shard. Raises FileError."""
        path = self.folder / name
        try:
            if self.form == "jsonl":
                with path.open() as file:
                    yield from map(json.loads, file)
                return
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
                yield from batch.to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are among these
            raise FileError(f"{path} cannot be read: {error}") from None

    def sweep(self, known: Iterable[str]) -> list[str]:
        """Remove what a death left behind: files that the ledger does not know; -> their names."""
        known = set(known)
        stray = [
            path for path in self.folder.iterdir()
            if path.name not in known and path.name.lstrip(".").startswith("part-")
        ]  # fmt: skip
        for path in stray:
            path.unlink()
        return sorted(path.name for path in stray)


def write_parquet(path: Path, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows whose columns have types as `Shards.columns` gives them; -> how many."""
    import pyarrow
    import pyarrow.parquet

    kinds: dict[str, Callable[[], Any]] = {
        "bool": pyarrow.bool_, "int64": pyarrow.int64, "uint64": pyarrow.uint64, "double": pyarrow.float64,
        "string": pyarrow.string,
    }  # fmt: skip
    schema = pyarrow.schema([(name, kinds[kind]()) for name, kind in columns.items()])
    rows, count = iter(rows), 0
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while some := list(itertools.islice(rows, GROUP)):
            arrays = [pyarrow.array([row.get(name) for row in some], schema.field(name).type) for name in columns]
            writer.write_table(pyarrow.table(arrays, schema=schema))
            count += len(some)
    return count


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
