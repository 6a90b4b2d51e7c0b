"""The generator: jobs with different LoRA sets, one batch, one step at a time."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lorayard.shared.errors import GeneratorBusy, Refused, UsageError
from lorayard.shared.job import SamplingParams

from ..cache.page import PageTable
from ..cache.storage import Cache
from ..lora.bank import LoraBank
from ..lora.peft import Lora
from ..models.model import Model
from ..text.tokenizer import Tokenizer
from .event import Event, Handle
from .generation import Generation
from .request import Limits, LoraUse, LoraUses, Request, texts
from .runner import Flight, Runner
from .scheduler import Scheduler, Span
from .step import Outcome
from .words import Words

__all__ = ["Event", "Generator", "Handle"]

GREEDY = SamplingParams(temperature=0)


class Generator:
    """Runs jobs on a loaded model. Not for several threads at once.

    max_batch: jobs in a step. slots: combinations of adapters resident at a time. chunk: prompt tokens in a step,
    beside one token of every job that is generating. seed: where the seeds of jobs that bring none come from.
    """

    def __init__(
        self, model: Model, cache: Cache, tokenizer: Tokenizer, max_batch: int = 64, slots: int = 8, chunk: int = 512,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        if max_batch < 1 or chunk < 1:
            raise UsageError(f"max_batch and chunk must be at least 1, not {max_batch} and {chunk}")
        self.model, self.cache, self.tokenizer = model, cache, tokenizer
        self.bank = LoraBank(model, slots)
        self.table = PageTable(cache.pages)
        self._scheduler = Scheduler(self.table, self.bank, max_batch, chunk, cache.copy_prefix)
        self.limits = Limits(model.config.vocab_size, self.capacity, self.bank.max_rank, slots)
        self._runner = Runner(model, cache, self.bank, tokenizer.vocab_size, max_batch)
        self._flight: Flight | None = None
        self._words = Words(tokenizer)
        self._jobs: dict[Handle, list[Generation]] = {}
        self._events: list[Event] = []
        self._default: LoraUses = ()
        self._serial = 0
        self._seeds = random.Random(seed)

    @property
    def queued(self) -> int:
        """Jobs that have not started."""
        return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """Jobs in the batch."""
        return len(self._scheduler.running)

    @property
    def busy(self) -> bool:
        """True if `iterate` has something to do or to say."""
        return bool(self._jobs or self._events)

    @property
    def capacity(self) -> int:
        """The most tokens, prompt and new ones together, that one job may have."""
        return min(self.cache.max_tokens, self.model.config.max_seq_len)

    def warmup(self) -> None:
        """Run a tiny job, so that what is set up on first use is there. Raises GeneratorBusy."""
        self._need_idle("the generator can only warm up")
        self.generate([[self.tokenizer.bos_id or 0] * 2], max_tokens=2, sampling=GREEDY, loras=())

    def set_loras(self, loras: Sequence[LoraUse] | None) -> None:
        """Choose the LoRA set of jobs that name none; None or [] is the base. Raises GeneratorBusy, AdapterError."""
        self._need_idle("the default LoRA set can only change")
        self._default = self.limits.lora_set(loras or ())

    def enqueue(
        self, prompt: str | Sequence[int], *, max_tokens: int = 256, min_tokens: int = 0,
        sampling: SamplingParams | None = None, loras: Sequence[LoraUse] | None = None, stop: Sequence[str | int] = (),
        add_bos: bool | None = None, slot: int | None = None, n: int = 1, logprobs: int | None = None,
        prompt_logprobs: int | None = None, token_healing: bool = False, banned_strings: Sequence[str] = (),
        deadline: float | None = None,
    ) -> Handle:  # fmt: skip
        """Queue a job: text or token ids to go on from.

        loras: one set, None for the default one. stop: strings and ids that end the text without being part of it,
        besides the model's own end ids. min_tokens: no such id is drawn before. add_bos: as `Tokenizer.encode`.
        slot: which slot of the bank to use if the combination is in none. n: samples of the prompt, which share its
        pages. logprobs, prompt_logprobs: how many of the likeliest tokens are told with each new token, and with
        each of the prompt, which is then computed whole; None tells nothing. token_healing: the prompt's last token may
        become a longer one. banned_strings: never come, in whatever case; text that becomes one is taken back before it
        is told. deadline: by time.monotonic(); past it the job ends with Refused("expired").
        Raises Refused or AdapterError; nothing is queued then.
        """
        sampling = sampling or SamplingParams()
        ids = tuple(self.tokenizer.encode(prompt, add_bos) if isinstance(prompt, str) else prompt)
        stop_strings = texts("stop", stop)
        stop_ids = frozenset(item for item in stop if not isinstance(item, str))
        self.limits.check_ids("stop", stop_ids)
        self.limits.check_ids("prompt", ids)
        healing = self._words.healing(ids) if token_healing else frozenset()
        request = Request(
            ids[:-1] if healing else ids, max_tokens, min_tokens, sampling,
            self._seeds.getrandbits(64) if sampling.seed is None else sampling.seed, 0,
            self._default if loras is None else self.limits.lora_set(loras), stop_strings,
            stop_ids | {id for id in self.tokenizer.eos_ids if id < self.limits.vocab_size}, slot, logprobs,
            prompt_logprobs, texts("banned_strings", banned_strings), healing,
            self._words.texts[ids[-1]] if healing else "", self._breakers(sampling), self._ignored(sampling), deadline,
        )  # fmt: skip
        self.limits.check(request, n)
        handle = Handle(self._serial)
        self._serial += 1
        self._jobs[handle] = [
            Generation(handle, replace(request, sample=sample, prompt_logprobs=None if sample else prompt_logprobs),
                       self.tokenizer.stream)
            for sample in range(n)
        ]  # fmt: skip
        self._scheduler.waiting += self._jobs[handle]
        return handle

    def cancel(self, handle: Handle) -> bool:
        """End a job now, all its samples; `iterate` tells their last events. False if it has ended already."""
        samples = tuple(self._jobs.get(handle, ()))
        for sample in samples:
            self._end(sample, sample.cancel())
        return bool(samples)

    def iterate(self) -> list[Event]:
        """One step, and what came of it: schedule, run, apply. A job that fails ends alone.

        On a GPU a step is begun before the outcomes of the one before it are read, if nothing in it hangs on them; so
        events come a step later. Events of a sample come in order; see `Event` for what they tell and when.
        """
        self._expire()
        spans = self._scheduler.schedule()
        for job, error in self._scheduler.failed:
            self._end(job, job.end("error", error=error))
        self._scheduler.failed.clear()
        before, self._flight = self._flight, None
        flights = self._launch(spans) if spans else []
        if flights and flights[-1].ahead:
            self._flight = flights.pop()
        for flight in [before, *flights]:
            if flight:
                self._land(flight)
        events, self._events = self._events, []
        return events

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        loras: Sequence[Any] | None = None,
        n: int = 1,
        **options: Any,
    ) -> list[str]:
        """The texts of several prompts, the `n` of each one after another, run together. Takes what `enqueue` takes.

        loras: one set for all prompts, or a list of sets, one for each prompt. The first job that fails ends all:
        its error is raised. Events of other jobs are kept for the next `iterate`.
        """
        if isinstance(prompts, str):
            raise UsageError("prompts must be a list; for one prompt give [prompt]")
        sets = _sets(loras, len(prompts))
        handles: list[Handle] = []
        told: dict[tuple[Handle, int], str] = {}
        others: list[Event] = []
        try:
            for prompt, lora_set in zip(prompts, sets, strict=True):
                handles.append(self.enqueue(prompt, loras=lora_set, n=n, **options))
            ours = set(handles)
            while len(told) < n * len(ours):
                for event in self.iterate():
                    if event.handle not in ours:
                        others.append(event)
                    elif event.error is not None:
                        raise event.error
                    elif event.full_text is not None:
                        told[event.handle, event.sample] = event.full_text
        finally:
            for handle in handles:
                self.cancel(handle)
            self._events = others + [event for event in self._events if event.handle not in set(handles)]
        return [told[handle, sample] for handle in handles for sample in range(n)]

    @torch.inference_mode()
    def _launch(self, spans: Sequence[Span]) -> list[Flight]:
        """Run; if the batch fails, each job by itself, so that only the one at fault does."""
        try:
            flight = self._runner.run(spans)
        except Exception as error:
            if len(spans) > 1:
                return [flight for span in spans for flight in self._launch([span])]
            self._end(spans[0].generation, spans[0].generation.end("error", error=error))
            return []
        for span in spans:
            self._scheduler.advance(span)
            span.generation.pending = int(span.complete)
        return [flight]

    def _land(self, flight: Flight) -> None:
        """Apply the outcomes to the samples that have not ended meanwhile."""
        for span, outcome in zip(flight.spans, flight.outcomes(), strict=True):
            sample = span.generation
            if sample not in self._jobs.get(sample.handle, ()):
                continue
            sample.prompt_logprobs += outcome.prompt
            if span.complete:
                self._apply(sample, outcome)

    def _apply(self, sample: Generation, outcome: Outcome) -> None:
        if outcome.choice is None:
            error = Refused("internal", "the model's logits are not numbers, or leave no token to choose")
            self._end(sample, sample.end("error", error=error))
            return
        event = sample.accept(outcome.choice, outcome.logprobs)
        if event is not None and event.finished:
            self._end(sample, event)
        elif event is not None:
            self._events.append(event)

    def _end(self, sample: Generation, event: Event) -> None:
        samples = self._jobs[sample.handle]
        samples.remove(sample)
        if not samples:
            del self._jobs[sample.handle]
        self._scheduler.remove(sample)
        self._events.append(event)

    def _need_idle(self, what: str) -> None:
        if self._jobs:
            raise GeneratorBusy(f"{what} when no job is queued or running; there are {len(self._jobs)}")

    def _expire(self) -> None:
        now = time.monotonic()
        for sample in [sample for samples in self._jobs.values() for sample in samples]:
            if sample.request.deadline is not None and now > sample.request.deadline:
                self._end(sample, sample.end("error", error=Refused("expired", "the deadline passed")))

    def _breakers(self, sampling: SamplingParams) -> frozenset[int]:
        if not sampling.dry_multiplier:
            return frozenset()
        return self._words.breakers if sampling.dry_breakers is None else frozenset(sampling.dry_breakers)

    def _ignored(self, sampling: SamplingParams) -> frozenset[int]:
        if not sampling.xtc_probability:
            return frozenset()
        return self._words.line_ends if sampling.xtc_ignore is None else frozenset(sampling.xtc_ignore)


def _sets(loras: Sequence[Any] | None, count: int) -> Sequence[Any]:
    """A set for each of `count` prompts, from one set or from a list of sets."""
    if loras is None or not any(isinstance(each, list) or _is_set(each) for each in loras):
        return [loras] * count
    if len(loras) != count:
        raise UsageError(f"loras has {len(loras)} sets for {count} prompts")
    return loras


def _is_set(each: Any) -> bool:
    """True for a tuple that is a set of its own, not one (adapter, scale)."""
    return isinstance(each, tuple) and (len(each) != 2 or isinstance(each[1], Lora | tuple))
