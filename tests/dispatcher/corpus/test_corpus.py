"""A corpus from a file of rows to its shards, with real Redis and dispatcher and a worker that echoes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow
import pyarrow.parquet
import pytest

from lorayard.dispatcher.corpus import books
from lorayard.dispatcher.corpus.folder import Folder
from lorayard.dispatcher.corpus.ledger import Ledger
from lorayard.dispatcher.corpus.pump import Pump
from lorayard.dispatcher.corpus.request import Maker
from lorayard.dispatcher.corpus.shards import Shards
from lorayard.dispatcher.corpus.source import rows
from lorayard.dispatcher.corpus.spec import Accept, Adapter, Corpus, Input, Output, Run, Sample

from ..conftest import LiveYard, command
from ..fake import DIGESTS, KEYS


def write(path: Path, found: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def many(count: int) -> list[dict[str, Any]]:
    return [{"id": f"r{at}", "prompt": f"p{at}", "who": ("a", "b", "")[at % 3]} for at in range(count)]


def said(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pump(yard: LiveYard, folder: Path, source: Path, **parts: Any) -> Pump:
    corpus = Corpus(Input(str(source), id="id"), **{"output": Output("jsonl", 7, 0.2)} | parts)
    opened = Folder.make(folder, corpus, "0" * 64, {"id": "string", "prompt": "string", "who": "string"})
    return Pump(yard.server.client(), KEYS, opened, Maker(corpus, DIGESTS, "base"), rows(corpus.input))


def whole(folder: Path, count: int) -> None:
    """Every row is there, once."""
    opened = Folder.open(folder)
    assert books.verify(opened) == []
    assert Counter(row["id"] for row in books.texts(opened)) == Counter(f"r{at}" for at in range(count))
    assert all(row["text"] == f"echo p{row['id'][1:]}" for row in books.texts(opened))


def test_from_rows_to_shards_and_out_again(yard: LiveYard, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", many(30))
    with source.open("a") as file:
        file.write('no json\n{"id": "x", "prompt": "p", "who": "nobody"}\n')
    words = ["corpus", "run", str(source), "-o", str(tmp_path / "out"), "--id-column", "id", "--adapter-column", "who",
             "--missing-adapter", "base", "--temperature", "0", "--n", "2"]  # fmt: skip
    first = command(yard, *words)
    assert first.returncode == 5 and "60 texts in" in first.stderr and "4 texts failed" in first.stderr, first
    again = command(yard, *words)
    assert again.returncode == 5 and len(yard.ran) == 60
    table = pyarrow.parquet.read_table(tmp_path / "out" / "data")
    assert table.num_rows == 60 and len(set(table["row_key"].to_pylist())) == 60
    for row in table.to_pylist():
        assert row["text"] == f"echo {row['prompt']}" and row["adapter"] == row["who"]
        assert row["adapter_digest"] == DIGESTS.get(row["who"], "")
    seeds = {(row["id"], row["sample"]): row["seed"] for row in table.to_pylist()}
    assert len(set(seeds.values())) == 60
    status = command(yard, "corpus", "status", str(tmp_path / "out")).stdout
    assert all(word in status for word in ("60 texts", "no_adapter", "bad_row", "nobody", "not JSON"))
    assert command(yard, "corpus", "verify", str(tmp_path / "out")).returncode == 0
    for kind in ("jsonl", "csv", "parquet"):
        assert (
            command(
                yard, "corpus", "export", str(tmp_path / "out"), "--to", kind, "-o", str(tmp_path / kind)
            ).returncode
            == 0
        )
    assert [(row["id"], row["sample"]) for row in said(tmp_path / "jsonl")] == sorted(
        seeds, key=lambda one: (int(one[0][1:]), one[1])
    )
    assert len((tmp_path / "csv").read_text().splitlines()) == 61
    assert pyarrow.parquet.read_table(tmp_path / "parquet").num_rows == 60
    shown = command(yard, "corpus", "sample", str(tmp_path / "out"), "-n", "1", "--by-adapter").stdout
    assert shown.count("echo p") == 3


class Died(BaseException):
    """What a SIGKILL leaves: nothing is put in order."""


DEATHS = [
    (Shards, "_fill", "before"), (Shards, "_fill", "after"), (Shards, "write", "after"), (Ledger, "commit", "before"),
    (Ledger, "commit", "after"), (Pump, "_clear", "after"), (Pump, "_send", "before"), (Pump, "_send", "after"),
    (Pump, "_settle", "after"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name", "when"), DEATHS)
@pytest.mark.parametrize("turn", [2, 3])
def test_wherever_it_dies_each_text_is_there_once(
    yard: LiveYard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: str, turn: int
) -> None:
    source = write(tmp_path / "in.jsonl", many(40))
    real, calls = getattr(owner, name), []

    def deadly(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == turn and when == "before":
            raise Died
        answer = real(*args, **more)
        if len(calls) == turn:
            raise Died
        return answer

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(owner, name, deadly)
        pump(yard, tmp_path / "out", source, run=Run(window=16)).run()
    assert pump(yard, tmp_path / "out", source, run=Run(window=16)).run()
    whole(tmp_path / "out", 40)
    assert sorted(Counter(yard.ran).values()) == [1] * 40, "the work of the first run was done again"
    assert yard.redis.xlen(KEYS.results(Folder.open(tmp_path / "out").batch)) == 0


def test_a_killed_client_goes_on(yard: LiveYard, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", many(400))
    words = [sys.executable, "-m", "lorayard.shared.cli", "corpus", "run", str(source), "-o", str(tmp_path / "out"),
             "--id-column", "id", "--shard-rows", "20", "--window", "50", "--json"]  # fmt: skip
    env = os.environ | {"LORAYARD_REDIS_URL": yard.server.url}
    for kill in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        child = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout and child.stdout.readline(), "it says how it goes"
        before = len(yard.ran)
        yard.until(lambda before=before, child=child: len(yard.ran) > before + 40 or child.poll() is not None)  # type: ignore[misc]
        child.send_signal(kill)
        status = child.wait()
        assert status == (-9 if kill == signal.SIGKILL else 6) or status == 0
        child.stdout.close()
    assert subprocess.run(words, env=env, capture_output=True).returncode == 0
    whole(tmp_path / "out", 400)


def test_another_corpus_another_input_other_bytes_are_refused(yard: LiveYard, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", many(6))
    words = ["corpus", "run", str(source), "-o", str(tmp_path / "out"), "--id-column", "id", "--adapter", "a"]
    assert command(yard, *words).returncode == 0
    other = command(yard, *words, "--temperature", "0.5")
    assert other.returncode == 7 and "sample differs" in other.stderr
    write(source, [{**row, "prompt": "changed"} for row in many(6)])
    changed = command(yard, *words)
    assert changed.returncode == 7 and "text 0 of the input is another" in changed.stderr
    write(source, many(7))
    yard.redis.hset(KEYS.adapters, "a", json.dumps({"rank": 8, "digest": "9" * 32, "bytes": 1000}))
    bytes_changed = command(yard, *words)
    assert bytes_changed.returncode == 7 and "adapter a has other bytes" in bytes_changed.stderr


def test_gates_keep_texts_apart(yard: LiveYard, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", many(12))
    accept = Accept(min_chars=8, regex="p1[01]")
    assert pump(yard, tmp_path / "out", source, accept=accept).run()
    opened = Folder.open(tmp_path / "out")
    assert sorted(row["id"] for row in books.texts(opened)) == ["r10", "r11"]
    assert opened.ledger.reasons() == [("rejected", "min_chars", 10)]
    turned_down = [row for name in opened.ledger.shards() if (tmp_path / "out/rejected" / name).exists()
                   for row in opened.rejected.read(name)]  # fmt: skip
    assert {row["reason"] for row in turned_down} == {"min_chars"} and books.verify(opened) == []


def test_a_full_disk_stops_with_a_sentence_and_goes_on(
    yard: LiveYard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", many(30))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(Exception, match=r"part-00000.jsonl cannot be written: No space"),
    ):
        patch.setattr(Shards, "_fill", full)
        pump(yard, tmp_path / "out", source).run()
    assert pump(yard, tmp_path / "out", source).run()
    whole(tmp_path / "out", 30)


def test_failed_texts_are_retried_on_request(yard: LiveYard, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", many(5))
    words = ["corpus", "run", str(source), "-o", str(tmp_path / "out"), "--max-tokens", "100000"]
    assert command(yard, *words).returncode == 5
    opened = Folder.open(tmp_path / "out")
    assert opened.ledger.reasons() == [("failed", "too_large", 5)]
    yard.redis.hset(KEYS.info, "cache_tokens", 200_000)
    time.sleep(1.1)  # until the dispatcher looks again
    assert command(yard, "corpus", "retry", str(tmp_path / "out")).stdout == "5 texts will run again\n"
    assert command(yard, *words).returncode == 0


def test_a_cancelled_corpus_goes_on(empty_yard: LiveYard, tmp_path: Path) -> None:
    yard, source = empty_yard, write(tmp_path / "in.jsonl", many(20))
    worker = yard.work()
    yard.halt(worker)
    yard.serve()
    first = pump(yard, tmp_path / "out", source)
    first.wish = lambda: "cancel" if len(first.out) == 20 else ""
    assert not first.run()
    yard.until(lambda: not any(map(int, yard.redis.hvals(KEYS.depth))))
    yard.work(gpu="gpu-h-1")
    assert pump(yard, tmp_path / "out", source).run()
    whole(tmp_path / "out", 20)


def closed(**properties: Any) -> dict[str, Any]:
    """Schema of an object that has these properties and no others."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


WORD, COUNT, NULL = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "null"}
ENDS: dict[str, Any] = {"index": COUNT, "finish_reason": {"enum": ["stop", "length"]}, "logprobs": NULL}
MESSAGE = closed(role={"const": "assistant"}, content=WORD, refusal=NULL)


def completion(kind: str, **text: Any) -> dict[str, Any]:
    return closed(
        id=WORD, object={"const": kind}, created=COUNT, model=WORD,
        choices={"type": "array", "minItems": 1, "items": closed(**ENDS, **text)},
        usage=closed(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT),
    )  # fmt: skip


BODY = {"oneOf": [completion("chat.completion", message=MESSAGE), completion("text_completion", text=WORD)]}
RESPONSE = closed(status_code={"const": 200}, request_id=WORD, body=BODY)
OPENAI_LINE = {
    "oneOf": [
        closed(id=WORD, custom_id=WORD, response=RESPONSE, error=NULL),
        closed(id=WORD, custom_id=WORD, response=NULL, error=closed(code=WORD, message=WORD)),
    ]
}
"""BatchRequestOutput of OpenAI's OpenAPI description, its nullable fields spelled out."""


def test_openai_batch_files_as_they_are(yard: LiveYard, tmp_path: Path) -> None:
    chat = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}
    bodies = [
        chat,
        {**chat, "model": "fake"},
        {**chat, "tools": [{}]},
        {**chat, "adapters": [{"name": "b", "scale": 0.5}]},
    ]
    source = write(tmp_path / "in.jsonl", [
        {"custom_id": f"c{at}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for at, body in enumerate(bodies)
    ])  # fmt: skip
    ran = command(yard, "corpus", "run", str(source), "-o", str(tmp_path / "out"))
    assert ran.returncode == 5, ran
    assert (
        command(
            yard, "corpus", "export", str(tmp_path / "out"), "--to", "openai", "-o", str(tmp_path / "o.jsonl")
        ).returncode
        == 0
    )
    answers = {line["custom_id"]: line for line in said(tmp_path / "o.jsonl")}
    assert answers.keys() == {"c0", "c1", "c2", "c3"}
    for line in answers.values():
        jsonschema.validate(line, OPENAI_LINE)
    assert answers["c0"]["response"]["body"]["choices"][0]["message"]["content"].startswith("echo")
    assert [answers[f"c{at}"]["response"]["body"]["model"] for at in (0, 1, 3)] == ["a", "base", "b*0.5"]
    assert answers["c2"]["response"] is None and "body.tools" in answers["c2"]["error"]["message"]


def test_adapters_by_map_and_samples(yard: LiveYard, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", many(9))
    adapter = Adapter(column="who", map={"a": "a*0.5+b", "b": [{"name": "b", "scale": 2}]}, missing="base")
    assert pump(yard, tmp_path / "out", source, adapter=adapter, sample=Sample(n=2, seed=3)).run()
    found = Counter(row["adapter"] for row in books.texts(Folder.open(tmp_path / "out")))
    assert found == {"a*0.5+b": 6, "b*2": 6, "": 6}
