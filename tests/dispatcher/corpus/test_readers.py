"""The folder of a corpus opens in what people read data with; each test is skipped where its reader is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorayard.dispatcher.corpus.folder import Folder
from lorayard.dispatcher.corpus.ledger import DONE, Ended
from lorayard.dispatcher.corpus.spec import Corpus, Input, Output

TEXT = 'caf\u00e9, "two"\nlines'


def row(at: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"r{at}", "tags": '["x"]', "score": None if at % 2 else 0.5, "row_key": f"{at:032x}", "sample": 0,
        "text": TEXT, "finish_reason": "stop", "prompt_tokens": 3, "new_tokens": 2, "adapter": "", "adapter_digest": "",
        "base_digest": "0" * 64, "seed": (1 << 63) - 1 - at, "attempts": 1, "gpu": "gpu-h-0", "t_queue_ms": 1,
        "t_first_ms": 2, "t_total_ms": 3, **more,
    }  # fmt: skip


@pytest.fixture(params=["parquet", "jsonl"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of two shards, with a rejected text beside them."""
    corpus = Corpus(Input("in.jsonl"), output=Output(request.param))
    folder = Folder.make(tmp_path / "out", corpus, "0" * 64, {"id": "string", "tags": "json", "score": "double"})
    for number in range(2):
        rows = [row(2 * number + at) for at in range(2)]
        name = folder.accepted.write(number, rows)
        ended = [Ended(2 * number + at, f"r{at}", one["row_key"], DONE, name, "", 2) for at, one in enumerate(rows)]
        folder.ledger.commit(ended, [(name, 2)])
    folder.ledger.commit([], [(folder.rejected.write(2, [row(4, reason="min_chars")]), 1)])
    (folder.path / "report.md").write_text("# out\n")
    return folder.path


def same(rows: list[dict[str, Any]]) -> bool:
    """Whether these are the four texts, bit by bit where it matters."""
    return [(one["id"], one["text"], int(one["seed"])) for one in sorted(rows, key=lambda one: one["id"])] == [
        (f"r{at}", TEXT, (1 << 63) - 1 - at) for at in range(4)
    ]


def test_pandas(out: Path) -> None:
    pandas = pytest.importorskip("pandas")
    shards = sorted((out / "data").iterdir())
    if shards[0].suffix == ".parquet":
        frame = pandas.read_parquet(out / "data")
    else:
        frame = pandas.concat(pandas.read_json(shard, lines=True) for shard in shards)
    assert same(frame.to_dict("records"))


def test_pyarrow(out: Path) -> None:
    dataset = pytest.importorskip("pyarrow.dataset")
    form = "parquet" if next((out / "data").iterdir()).suffix == ".parquet" else "json"
    assert same(dataset.dataset(out / "data", format=form).to_table().to_pylist())


def test_duckdb(out: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    form = next((out / "data").iterdir()).suffix
    found = duckdb.sql(f"SELECT id, text, seed FROM '{out}/data/*{form}'").fetchall()
    assert same([dict(zip(("id", "text", "seed"), one, strict=True)) for one in found])


def test_datasets(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(str(out), split="train", cache_dir=str(out.parent / "cache"))
    assert same(found.to_list())
