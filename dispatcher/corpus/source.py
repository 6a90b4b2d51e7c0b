"""The rows of an input: JSON lines, CSV, Parquet, OpenAI's batch files; local or wherever fsspec reaches."""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from lorayard.shared.errors import FileError, UsageError

from .spec import Input

ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}
MAX_LINE = 4 << 20
"""Characters; a job may have a MiB."""


class BadRow(Exception):
    """A row that cannot be used, and why."""


class Row(NamedTuple):
    """A row of the input; `position` counts from 0. fault: why it cannot be used, then the columns are empty."""

    position: int
    columns: dict[str, Any]
    fault: str = ""


def spool(source: Input, folder: Path) -> Input:
    """Standard input as a file in `folder`, so that a run can be resumed; any other input as it is."""
    if source.path != "-":
        return source
    kept = folder / "input"
    if not kept.exists():
        if sys.stdin.isatty():
            raise UsageError("the input is -, standard input, and that is a terminal; pipe rows into it")
        with (folder / "input.tmp").open("wb") as file:
            while block := sys.stdin.buffer.read(1 << 20):
                file.write(block)
        (folder / "input.tmp").rename(kept)
    return Input(str(kept.absolute()), "jsonl" if source.format == "auto" else source.format, source.id)


def rows(source: Input) -> Iterator[Row]:
    """All rows of all files in the order of their names. Raises FileError or UsageError before the first row."""
    files = _files(source)
    kinds = [kind_of(source, one.path) for one in files]
    read = {"jsonl": _json_lines, "openai": _json_lines, "csv": _csv, "parquet": _parquet}
    found = itertools.chain.from_iterable(
        _opened(read[kind], one) for kind, one in zip(kinds, files, strict=True)
    )  # fmt: skip
    return (
        Row(position, {}, one) if isinstance(one, str) else Row(position, one)
        for position, one in enumerate(found)
    )  # fmt: skip


def count_rows(source: Input) -> int | None:
    """How many rows there are, None where the files would have to be fetched twice. Raises as `rows` does."""
    files = _files(source)
    if any("file" not in _protocols(one) for one in files):
        return None
    found = {"jsonl": _count_lines, "openai": _count_lines, "csv": _count_csv, "parquet": _count_parquet}
    return sum(sum(_opened(found[kind_of(source, one.path)], one)) for one in files)


def _files(source: Input) -> list[Any]:
    import fsspec

    try:
        files = fsspec.open_files(source.path, "rb", compression="infer")
        files.sort(key=lambda one: str(one.path))
    except (OSError, ValueError, ImportError) as error:
        raise FileError(f"{source.path} cannot be opened: {error}") from None
    if not files:
        raise FileError(f"there is no file {source.path}")
    return list(files)


def _protocols(file: Any) -> tuple[str, ...]:
    named = file.fs.protocol
    return (named,) if isinstance(named, str) else tuple(named)


def kind_of(source: Input, path: str) -> str:
    """The format of a file, by the name if it is not said; an OpenAI batch file is told by its first line."""
    if source.format != "auto":
        return source.format
    names = Path(path).suffixes
    found = next((ENDINGS[name] for name in reversed(names) if name in ENDINGS), None)
    if found is None:
        raise UsageError(f"the format of {path} cannot be told by its name; say it with --format or input.format")
    return found


def _opened(read: Any, one: Any) -> Iterator[Any]:
    try:
        with one as file:
            yield from read(file)
    except OSError as error:
        raise FileError(f"{one.path} cannot be read: {error.strerror or error}") from None


def _json_lines(file: IO[bytes]) -> Iterator[dict[str, Any] | str]:
    while line := file.readline(MAX_LINE):
        if not line.strip():
            continue
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield f"the line is longer than {MAX_LINE >> 20} MiB"
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"the line is not JSON: {error}"
            continue
        yield found if isinstance(found, dict) else f"the line is JSON, but a {type(found).__name__} and no object"


def _count_lines(file: IO[bytes]) -> Iterator[int]:
    yield sum(1 for line in file if line.strip())


def _count_csv(file: IO[bytes]) -> Iterator[int]:
    yield sum(1 for _ in _csv(file))


def _count_parquet(file: IO[bytes]) -> Iterator[int]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield pyarrow.parquet.ParquetFile(file).metadata.num_rows
    except pyarrow.ArrowException as error:
        raise FileError(f"the Parquet file cannot be read: {error}") from None


def _csv(file: IO[bytes]) -> Iterator[dict[str, Any] | str]:
    reader = csv.DictReader(codecs.getreader("utf-8-sig")(file, "replace"), restkey="")
    try:
        for found in reader:
            if "" in found or None in found.values():
                yield f"the line has another number of fields than the header, which has {len(reader.fieldnames or ())}"
            else:
                yield found
    except csv.Error as error:
        yield f"the file is not CSV from here on: {error}"


def _parquet(file: IO[bytes]) -> Iterator[dict[str, Any] | str]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise FileError(f"the Parquet file cannot be read: {error}") from None
