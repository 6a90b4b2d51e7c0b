"""Generators over the demo model, and what their jobs say."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lorayard.demo import BASE
from lorayard.worker import Cache, Event, Generator, Model, ModelConfig

from .scripted import TOKENIZER

TEXT = "What does len do?\nlen(x) gives the number of items of x.\nWhat does zip do?\nzip(a, b) "
Options = dict[str, Any]


@functools.cache
def demo_model() -> Model:
    model = Model(ModelConfig.from_directory(BASE))
    model.load(devices="cpu")
    return model


def make(pages: int = 48, **options: int) -> Generator:
    """A generator with a cache of its own."""
    model = demo_model()
    return Generator(model, Cache(model, pages * 256, "fp32"), TOKENIZER, **options)


def run(generator: Generator, jobs: Sequence[tuple[Any, Options]]) -> list[list[Event]]:
    """The events of every sample, in order of jobs and samples, checked to make up the whole and leave nothing."""
    handles = [generator.enqueue(prompt, **options) for prompt, options in jobs]
    told: dict[tuple[int, int], list[Event]] = defaultdict(list)
    while generator.busy:
        for event in generator.iterate():
            assert event.error is None
            told[handles.index(event.handle), event.sample].append(event)
    for events in told.values():
        assert [event.finished for event in events] == [False] * (len(events) - 1) + [True]
        assert "".join(event.text for event in events) == events[-1].full_text
        assert len(ids_of(events)) == events[-1].new_tokens
    generator.table.check_integrity()
    assert generator.table.free == generator.cache.pages
    return [told[key] for key in sorted(told)]


def ids_of(events: Sequence[Event]) -> list[int]:
    return [id for event in events for id in event.token_ids]
