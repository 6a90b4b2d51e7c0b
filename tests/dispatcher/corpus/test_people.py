"""What people meet around a run: to go on, a plan, a count of swaps, and where rows may come from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from lorayard.dispatcher.corpus.folder import Folder
from lorayard.dispatcher.corpus.progress import Swaps
from lorayard.dispatcher.corpus.source import count_rows, rows
from lorayard.dispatcher.corpus.spec import Input

from ..conftest import LiveYard, command
from ..fake import KEYS
from .test_corpus import many, pump, whole, write


def test_a_paused_corpus_is_resumed_from_anywhere(empty_yard: LiveYard, tmp_path: Path) -> None:
    yard, source = empty_yard, write(tmp_path / "in.jsonl", many(20))
    worker = yard.work()
    yard.halt(worker)
    yard.serve()
    first = pump(yard, tmp_path / "out", source)
    first.wish = lambda: "pause" if len(first.out) == 20 else ""
    assert not first.run()
    yard.work(gpu="gpu-h-1")
    done = command(yard, "corpus", "resume", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done
    whole(tmp_path / "out", 20)
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["done"], last["total"], last["eta_s"], last["swaps"], last["under_way"]) == (20, 20, 0, 0, 0)


def test_a_plan_says_what_a_run_would_do(yard: LiveYard, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    write(tmp_path / "job" / "in.jsonl", [*many(30), {"id": "x", "who": "b"}])
    (tmp_path / "job" / "job.yaml").write_text(
        "input: in.jsonl\nadapter: {column: who, missing: base}\nsample: {n: 2, max_tokens: 100}\n"
    )
    said = command(yard, "corpus", "plan", str(tmp_path / "job" / "job.yaml"), "--rate", "10").stdout
    assert "62 texts, 60 to be sent, " in said and "at most 6,000 new tokens, 10 min at 10 tokens/s" in said
    assert all(line in said for line in ("  a: 20", "  b: 20", "  base: 20", "  cannot be sent, 2: no prompt"))
    assert not yard.ran


class Yards:
    """What Redis answers about swaps, one after the other."""

    def __init__(self, *said: int | None) -> None:
        self.said = list(said)

    def smembers(self, key: str) -> set[bytes]:
        return {b"g"}

    def hget(self, key: str, field: str) -> int:
        if (swaps := self.said.pop(0)) is None:
            raise RedisConnectionError
        return swaps


def test_swaps_are_counted_over_a_new_worker_and_a_lost_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorayard.dispatcher.corpus.progress.SWAPS_S", 0)
    swaps = Swaps(Yards(5, 7, None, 8, 2, 2), KEYS)
    assert [swaps() for _ in range(6)] == [0, 2, 2, 3, 5, 5]


@pytest.mark.parametrize("where", ["memory://corpus", "{here}"])
def test_rows_come_from_wherever_fsspec_reaches(tmp_path: Path, where: str) -> None:
    folder = where.format(here=tmp_path)
    for name, mode in (("b.csv", "wt"), ("a.jsonl.gz", "wb"), ("c.parquet", "wb")):
        with fsspec.open(f"{folder}/{name}", mode) as file:
            if name == "b.csv":
                file.write('id,prompt\nr2,"p\n2"\nr3,p3\n')
            elif name == "c.parquet":
                pyarrow.parquet.write_table(pyarrow.table({"id": ["r4"], "prompt": ["p4"]}), file)
            else:
                file.write(gzip.compress(b'{"id": "r0", "prompt": "p0"}\n\n{"id": "r1", "prompt": "p1"}'))
    source = Input(f"{folder}/*.*")
    assert [row.columns["id"] for row in rows(source)] == [f"r{at}" for at in range(5)]
    assert count_rows(source) == (None if where.startswith("memory") else 5)


def test_half_a_surrogate_pair_fails_its_row_alone(yard: LiveYard, tmp_path: Path) -> None:
    bad = [{"id": "\ud83d", "prompt": "p", "who": ""}, {"id": "x", "prompt": "\ud83d", "who": ""}, {"id": "\ud83d"}]
    source = write(tmp_path / "in.jsonl", [*many(5), *bad])
    assert pump(yard, tmp_path / "out", source).run()
    whole(tmp_path / "out", 5)
    failed = [(one.name, one.code) for one in Folder.open(tmp_path / "out").ledger.failed()]
    assert failed == [("?", "bad_row"), ("x", "bad_row"), ("?", "bad_row")]
