"""What is computed once: prompts that begin alike, samples of a prompt, and answers that someone goes on from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorayard.worker import Generator, SamplingParams
from lorayard.worker.models.batch import Batch

from .demo_generator import TEXT, Options, ids_of, make, run
from .scripted import GREEDY, STARTS, TOKENIZER, Yard, words


def test_samples_share_the_prompts_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make(pages=3 + 4 + 2)
    prompt = (TOKENIZER.encode(TEXT) * 30)[:600]
    computed: list[int] = []
    forward = generator.model.forward

    def watched(batch: Batch, *rest: Any) -> torch.Tensor:
        computed.append(len(batch.token_ids))
        return forward(batch, *rest)

    monkeypatch.setattr(generator.model, "forward", watched)
    handle = generator.enqueue(prompt, max_tokens=4, min_tokens=4, n=5, sampling=SamplingParams(temperature=3, seed=1))
    while not any(event.handle == handle for event in generator.iterate()):
        assert generator.running <= 1, "the others wait for the pages"
    generator.iterate()
    assert generator.running == 5 and generator.cache.pages - generator.table.free == 2 + 5
    while generator.busy:
        generator.iterate()
    assert sum(computed) == 600 + 4 + 5 * 3, "the part of a page is copied"
    generator.table.check_integrity()


def test_prompts_that_begin_alike_are_computed_once() -> None:
    """While one computes a page, others that need it wait; those that need something else do not."""
    yard = Yard(pages=30, chunk=100)
    shared = [9] * 600
    first = yard.submit(words("x"), 601, tail=shared)
    start = STARTS[0]
    yard.model.scripts[start] = (601, list(words("x")))
    twin = yard.generator.enqueue([start, *shared], max_tokens=9, sampling=GREEDY)
    yard.events[twin] = []
    alien = yard.submit(words("y"), 30)
    yard.step()
    assert (yard.generator.running, yard.generator.queued) == (2, 1)
    yard.finish()
    assert [yard.last(handle).full_text for handle in (first, twin, alien)] == ["x", "x", "y"]
    tokens = sum(len(batch.token_ids) for batch in yard.model.batches)
    assert tokens == 601 + 1 + 30 + 3, "and one more of each for the end"
    yard.check_empty()


def test_the_common_part_of_a_page_is_copied_and_changes_no_bit() -> None:
    """Prompts that part within a page, in the first or a later one, after a job has ended or while it runs."""
    text = (TOKENIZER.encode(TEXT) * 12)[:330]
    options: Options = {"max_tokens": 4, "sampling": SamplingParams(temperature=3, seed=2), "logprobs": 4}
    prompts = [text, [*text[:300], 9, 9, 9], text[:200], [*text[:100], *text[:20]], [*text[:257], 8]]
    generator = make(chunk=100)
    copied = watch_copies(generator)
    for jobs in ([0], [1, 2], [3, 4, 0, 2], [0, 1]):
        together = run(generator, [(prompts[at], options) for at in jobs])
        for at, events in zip(jobs, together, strict=True):
            (alone,) = run(make(), [(prompts[at], options)])
            assert [event.logprobs for event in events] == [event.logprobs for event in alone]
    assert {300 - 256, 199, 100} <= set(copied) and min(copied) >= 16


def watch_copies(generator: Generator) -> list[int]:
    """A list that gets the number of tokens of each copy."""
    copied: list[int] = []
    copy = generator._scheduler.copy

    def watched(source: int, target: int, tokens: int) -> None:
        copied.append(tokens)
        copy(source, target, tokens)

    generator._scheduler.copy = watched
    return copied


def test_who_goes_on_from_an_answer_computes_what_is_new() -> None:
    generator = make()
    prompt = TOKENIZER.encode(TEXT)[:50]
    options: Options = {"max_tokens": 12, "min_tokens": 12, "sampling": SamplingParams(temperature=3, seed=2)}
    (events,) = run(generator, [(prompt, options)])
    copied = watch_copies(generator)
    follow_up = [*prompt, *ids_of(events), 9, 8, 7]
    (again,) = run(generator, [(follow_up, options)])
    assert copied == [len(prompt) + 11], "the last token was drawn, not computed"
    assert [ids_of(again)] == [ids_of(events) for events in run(make(), [(follow_up, options)])]


def test_who_waits_for_a_job_that_ends_goes_on_without_it() -> None:
    yard = Yard(pages=30, chunk=100)
    first = yard.submit(words("x"), 601)
    twin = yard.generator.enqueue([STARTS[0], *[9] * 600], max_tokens=9, sampling=GREEDY)
    yard.events[twin] = []
    yard.step()
    assert yard.generator.running == 1
    yard.generator.cancel(first)
    yard.finish()
    assert yard.last(twin).full_text == "x"
    yard.check_empty()
