"""A generator over a model that says what it is told: its next token is a table look-up."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch

from lorayard.demo import BASE
from lorayard.worker import Cache, Event, Generator, Handle, Lora, Model, SamplingParams, Tokenizer
from lorayard.worker.models.batch import Batch

TOKENIZER = Tokenizer.from_directory(BASE)
VOCAB = 1408
GREEDY = SamplingParams(temperature=0)
STARTS = range(1300, 1400)
"""First tokens of prompts: each has a text of its own."""


Step = int | tuple[int, ...]
"""A token, or several, likeliest first."""


class Scripted:
    """After a prompt that begins with token k, the tokens of scripts[k], then the end token for ever."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=VOCAB, max_seq_len=4096)
        self.layer_devices = ()
        self.linears = {"linear": SimpleNamespace(device=torch.device("cpu"))}
        self.scripts: dict[int, tuple[int, list[Step]]] = {}
        self.first_of_page: dict[int, int] = {}
        self.batches: list[Batch] = []

    def copy(self, source: int, target: int, tokens: int) -> None:
        if source in self.first_of_page:
            self.first_of_page[target] = self.first_of_page[source]

    def forward(self, batch: Batch, cache: object, bank: object) -> torch.Tensor:
        self.batches.append(batch)
        logits = torch.zeros(len(batch.logit_rows), VOCAB)
        firsts = batch.positions == 0
        for token, row in zip(batch.token_ids[firsts].tolist(), batch.sequence[firsts].tolist(), strict=True):
            self.first_of_page[int(batch.page_table[row, 0])] = token
        for index, row in enumerate(batch.logit_rows.tolist()):
            page = int(batch.page_table[batch.sequence[row], 0])
            length, script = self.scripts[self.first_of_page[page]]
            place = int(batch.positions[row]) + 1 - length
            step = script[place] if 0 <= place < len(script) else 1
            for rank, token in enumerate(reversed(step if isinstance(step, tuple) else (step,))):
                logits[index, token] = rank + 1
        return logits


class Yard:
    """A generator over the scripted model."""

    def __init__(self, pages: int = 16, **options: int) -> None:
        self.model = Scripted()
        cache = cast(Cache, SimpleNamespace(pages=pages, max_tokens=pages * 256, copy_prefix=self.model.copy))
        self.generator = Generator(cast(Model, self.model), cache, TOKENIZER, **options)
        self.events: dict[Handle, list[Event]] = {}

    def submit(self, script: Sequence[Step], length: int = 1, **options: Any) -> Handle:
        start = STARTS[len(self.events)]
        tail = options.pop("tail", [9] * (length - 1))
        self.model.scripts[start] = (length, list(script))
        options = {"max_tokens": 40, "sampling": GREEDY} | options
        handle = self.generator.enqueue([start, *tail], **options)
        self.events[handle] = []
        return handle

    def step(self) -> None:
        for event in self.generator.iterate():
            self.events[event.handle].append(event)

    def finish(self) -> None:
        while self.generator.busy:
            self.step()

    def last(self, handle: Handle) -> Event:
        """The job's last event; the pieces before it must make up the whole."""
        events = self.events[handle]
        assert [event.finished for event in events] == [False] * (len(events) - 1) + [True]
        assert "".join(event.text for event in events) == events[-1].full_text
        assert sum(len(event.token_ids) for event in events) == events[-1].new_tokens
        return events[-1]

    def check_empty(self) -> None:
        """Nothing is held any more."""
        self.generator.table.check_integrity()
        assert self.generator.table.free == self.generator.cache.pages
        assert self.generator.queued == self.generator.running == 0
        assert not any(slot.pins for slot in self.generator.bank._slots)


def lora(name: str) -> Lora:
    return Lora(name, f"digest of {name}", {"linear": (torch.zeros(1, 1), torch.zeros(1, 1))})


def words(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_bos=False)


def said(script: Sequence[Step], **options: Any) -> Event:
    """The last event of a job on its own."""
    yard = Yard()
    handle = yard.submit(script, **options)
    yard.finish()
    yard.check_empty()
    return yard.last(handle)
