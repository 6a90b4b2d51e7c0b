"""The generator: jobs with different LoRA sets, one batch, one step at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch

from lorayard.shared.errors import AdapterError, GeneratorBusy, Refused, UsageError
from lorayard.shared.job import SamplingParams

from ..cache.page import PageTable
from ..cache.storage import Cache
from ..lora.bank import LoraBank
from ..lora.peft import Lora
from ..models.model import Model
from ..text.tokenizer import Tokenizer
from .event import Event, Handle
from .generation import Generation, Request
from .sampler import Choice, sample
from .scheduler import Scheduler, Span
from .step import build_batch
from .stop import StopScanner

__all__ = ["Event", "Generator", "Handle"]

LoraUse = Lora | tuple[Lora, float]
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
        self._scheduler = Scheduler(self.table, self.bank, max_batch, chunk)
        self._jobs: dict[Handle, Generation] = {}
        self._events: list[Event] = []
        self._default: tuple[tuple[Lora, float], ...] = ()
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
        self._default = self._lora_set(loras or ())

    def enqueue(
        self, prompt: str | Sequence[int], *, max_tokens: int = 256, min_tokens: int = 0,
        sampling: SamplingParams | None = None, loras: Sequence[LoraUse] | None = None, stop: Sequence[str | int] = (),
        add_bos: bool | None = None, slot: int | None = None, sample: int = 0,
    ) -> Handle:  # fmt: skip
        """Queue a job: text or token ids to go on from.

        loras: one set, None for the default one. stop: strings and ids that end the text without being part of it,
        besides the model's own end ids. min_tokens: no such id is drawn before. add_bos: as `Tokenizer.encode`.
        slot: which slot of the bank to use if the combination is in none. sample: tells apart several answers to one
        prompt with one seed. Raises Refused or AdapterError; nothing is queued then.
        """
        sampling = sampling or SamplingParams()
        request = Request(
            self._prompt(prompt, add_bos), max_tokens, min_tokens, sampling,
            self._seeds.getrandbits(64) if sampling.seed is None else sampling.seed, sample,
            self._default if loras is None else self._lora_set(loras),
            tuple(item for item in stop if isinstance(item, str)), self._stop_ids(stop), slot,
        )  # fmt: skip
        self._check_lengths(request)
        handle = Handle(self._serial)
        self._serial += 1
        scanner = StopScanner(request.stop_strings)
        job = Generation(handle, request, self.tokenizer.stream(), list(request.prompt), scanner)
        self._jobs[handle] = job
        self._scheduler.waiting.append(job)
        return handle

    def cancel(self, handle: Handle) -> bool:
        """End a job now; `iterate` tells its last event. False if it has ended already."""
        job = self._jobs.get(handle)
        if job is not None:
            self._end(job, job.cancel())
        return job is not None

    def iterate(self) -> list[Event]:
        """One step, and what came of it: schedule, run, apply. A job that fails ends alone."""
        spans = self._scheduler.schedule()
        for job, error in self._scheduler.failed:
            self._end(job, job.end("error", error=error))
        self._scheduler.failed.clear()
        if spans:
            self._step(spans)
        events, self._events = self._events, []
        return events

    def generate(
        self, prompts: Sequence[str | Sequence[int]], *, loras: Sequence[Any] | None = None, **options: Any
    ) -> list[str]:
        """The texts of several prompts, run together. Takes what `enqueue` takes.

        loras: one set for all prompts, or a list of sets, one for each prompt. The first job that fails ends all:
        its error is raised. Events of other jobs are kept for the next `iterate`.
        """
        if isinstance(prompts, str):
            raise UsageError("prompts must be a list; for one prompt give [prompt]")
        sets = _sets(loras, len(prompts))
        handles: list[Handle] = []
        texts: dict[Handle, str] = {}
        others: list[Event] = []
        try:
            for prompt, lora_set in zip(prompts, sets, strict=True):
                handles.append(self.enqueue(prompt, loras=lora_set, **options))
            ours = set(handles)
            while len(texts) < len(ours):
                for event in self.iterate():
                    if event.handle not in ours:
                        others.append(event)
                    elif event.error is not None:
                        raise event.error
                    elif event.full_text is not None:
                        texts[event.handle] = event.full_text
        finally:
            for handle in handles:
                self.cancel(handle)
            self._events = others + [event for event in self._events if event.handle not in set(handles)]
        return [texts[handle] for handle in handles]

    @torch.inference_mode()
    def _step(self, spans: Sequence[Span]) -> None:
        """Run and apply; if the batch fails, each job by itself, so that only the one at fault does."""
        try:
            logits = self.model.forward(build_batch(spans, self.bank), self.cache, self.bank)
            draws = [span.generation.draw for span in spans if span.complete]
            tokens = iter(sample(logits, draws, self.tokenizer.vocab_size))
        except Exception as error:
            if len(spans) == 1:
                self._end(spans[0].generation, spans[0].generation.end("error", error=error))
            else:
                for span in spans:
                    self._step([span])
            return
        for span in spans:
            complete = span.complete
            self._scheduler.advance(span)
            if complete:
                self._apply(span.generation, next(tokens))

    def _apply(self, job: Generation, choice: Choice | None) -> None:
        if choice is None:
            error = Refused("internal", "the model's logits are not numbers, or leave no token to choose")
            self._end(job, job.end("error", error=error))
            return
        event = job.accept(choice.token)
        if event.finished:
            self._end(job, event)
        else:
            self._events.append(event)

    def _end(self, job: Generation, event: Event) -> None:
        del self._jobs[job.handle]
        self._scheduler.remove(job)
        self._events.append(event)

    def _need_idle(self, what: str) -> None:
        if self._jobs:
            raise GeneratorBusy(f"{what} when no job is queued or running; there are {len(self._jobs)}")

    def _prompt(self, prompt: str | Sequence[int], add_bos: bool | None) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(prompt, add_bos) if isinstance(prompt, str) else prompt)
        if not ids:
            raise Refused("no_prompt", "the prompt has no tokens")
        self._check_ids("prompt", ids)
        return ids

    def _stop_ids(self, stop: Sequence[str | int]) -> frozenset[int]:
        if isinstance(stop, str) or "" in stop:
            raise Refused("bad_field", "stop must be a list of token ids and of strings that are not empty")
        ids = frozenset(item for item in stop if not isinstance(item, str))
        self._check_ids("stop", ids)
        return ids | {id for id in self.tokenizer.eos_ids if id < self.model.config.vocab_size}

    def _check_ids(self, field: str, ids: Sequence[int] | frozenset[int]) -> None:
        limit = self.model.config.vocab_size
        wrong = next((id for id in ids if type(id) is not int or not 0 <= id < limit), None)
        if wrong is not None:
            raise Refused("bad_field", f"{field}: {wrong!r} is not a token id from 0 to {limit - 1}")

    def _check_lengths(self, request: Request) -> None:
        if request.max_tokens < 1 or not 0 <= request.min_tokens <= request.max_tokens:
            raise Refused("bad_field", "max_tokens must be at least 1 and min_tokens between 0 and max_tokens")
        total = len(request.prompt) + request.max_tokens
        if total > self.capacity:
            raise Refused(
                "too_large",
                f"the prompt has {len(request.prompt)} tokens and max_tokens is {request.max_tokens}; together they "
                f"may be at most {self.capacity}",
            )
        if request.slot is not None and not 0 <= request.slot < self.bank.slots:
            raise UsageError(f"there is no slot {request.slot}; the bank has {self.bank.slots}")

    def _lora_set(self, loras: Sequence[LoraUse]) -> tuple[tuple[Lora, float], ...]:
        """(adapter, scale) sorted by name, all that can be known to be wrong refused."""
        uses = [use if isinstance(use, tuple) else (use, 1.0) for use in loras]
        uses.sort(key=lambda use: use[0].name)
        names = [lora.name for lora, _ in uses]
        if len(set(names)) < len(names):
            raise AdapterError(f"a LoRA set names an adapter twice: {', '.join(names)}")
        if not all(math.isfinite(scale) for _, scale in uses):
            raise Refused("bad_adapter", f"the scales of {', '.join(names)} must be finite numbers")
        rank = sum(lora.max_rank for lora, _ in uses)
        if rank > self.bank.max_rank:
            raise AdapterError(f"the ranks of {', '.join(names)} sum to {rank}; a slot holds {self.bank.max_rank}")
        return tuple((lora, float(scale)) for lora, scale in uses)


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
