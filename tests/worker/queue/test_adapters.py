"""Adapters by id and digest, and what becomes of a job before the engine sees it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lorayard.shared.errors import AdapterError, Refused
from lorayard.shared.job import Job, LoraSet
from lorayard.worker.queue.adapters import AdapterLibrary
from lorayard.worker.queue.prepare import Preparer


class Disk:
    """Adapter folders by id -> digest, and a count of the reads."""

    def __init__(self, **digests: str) -> None:
        self.digests = digests
        self.reads: list[str] = []

    def scan(self):
        return {name: SimpleNamespace(path=Path(name), digest=digest) for name, digest in self.digests.items()}

    def load(self, path):
        self.reads.append(path.name)
        if path.name == "broken":
            raise AdapterError("broken/adapter_model.safetensors is cut off")
        return SimpleNamespace(name=path.name, digest=self.digests[path.name])


def test_reads_an_adapter_once_and_keeps_replaced_bytes():
    disk = Disk(a="old")
    library = AdapterLibrary(disk.scan, disk.load, keep=2)
    first = library.get("a", "old")
    disk.digests["a"] = "new"
    assert library.get("a", "new").digest == "new"
    assert library.get("a", "old") is first
    assert disk.reads == ["a", "a"]


def test_forgets_the_longest_unused():
    disk = Disk(a="1", b="2", c="3")
    library = AdapterLibrary(disk.scan, disk.load, keep=2)
    for name in "abacab":
        library.get(name, disk.digests[name])
    assert disk.reads == ["a", "b", "c", "b"]


@pytest.mark.parametrize(
    "name, digest, said", [("gone", "1", "gone"), ("broken", "2", "cut off"), ("a", "older", "replaced")]
)
def test_what_cannot_be_had_is_no_adapter(name, digest, said):
    disk = Disk(a="1", broken="2")
    with pytest.raises(Refused, match=said) as refused:
        AdapterLibrary(disk.scan, disk.load, keep=2).get(name, digest)
    assert refused.value.code == "no_adapter"


class Words:
    """A tokenizer with one id a word."""

    def encode_batch(self, texts, add_bos=None, most=None):
        return [[0] * (add_bos is not False) + [len(word) for word in text.split()] for text in texts]

    def encode_chat(self, messages, most=None):
        return [len(messages)]


def prepare(job: Job):
    disk = Disk(a="1", b="2")
    return Preparer(Words(), AdapterLibrary(disk.scan, disk.load, 2), capacity=100)(job)  # type: ignore[arg-type]


def test_prompt_messages_and_tokens():
    assert prepare(Job("j", prompt="one three")).token_ids == [0, 3, 5]
    assert prepare(Job("j", prompt="one three", add_bos=False)).token_ids == [3, 5]
    assert prepare(Job("j", messages=({}, {}))).token_ids == [2]
    assert prepare(Job("j", tokens=(7, 8))).token_ids == [7, 8]


def test_only_the_default_length_is_clamped():
    assert prepare(Job("j", tokens=(1,) * 30)).max_tokens == 70
    assert prepare(Job("j", tokens=(1,), max_tokens=5)).max_tokens == 5


@pytest.mark.parametrize(("tokens", "max_tokens"), [(99, 2), (100, None), (300, None), (300, 1)])
def test_what_does_not_fit_never_reaches_the_engine(tokens, max_tokens):
    assert prepare(Job("j", tokens=(1,) * 99, max_tokens=1)).max_tokens == 1
    with pytest.raises(Refused, match=f"the prompt has {tokens} tokens.* at most 100") as refused:
        prepare(Job("j", tokens=(1,) * tokens, max_tokens=max_tokens))
    assert refused.value.code == "too_large"


def test_adapters_come_with_the_jobs_scales():
    loras = prepare(Job("j", tokens=(1,), lora=LoraSet.parse("b*0.5+a"), digests=("1", "2"))).loras
    assert [(lora.name, scale) for lora, scale in loras] == [("a", 1.0), ("b", 0.5)]
