"""Who runs, and which tokens the next step computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorayard.shared.errors import SlotBusy

from ..cache.page import PageTable, chain
from ..cache.storage import PAGE
from ..lora.bank import LoraBank
from .generation import Generation
from .request import SHORT

MAX_SKIPS = 4
"""How often later jobs may start before one that waits for pages or a slot."""


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens [start, end) of a job, computed in one step; with its last token, the next one can be drawn.

    complete: nothing is left to compute before the next token. unknown: only the device knows the last of these yet.
    """

    generation: Generation
    start: int
    end: int
    complete: bool
    unknown: bool

    @classmethod
    def of(cls, generation: Generation, size: int) -> Span:
        """The next `size` tokens."""
        start, end = generation.computed, generation.computed + size
        return cls(generation, start, end, end == generation.length, end > len(generation.token_ids))

    @property
    def wanted(self) -> range:
        """The positions whose logits are needed: the last one for the next token, all for logprobs of the prompt."""
        if self.generation.request.prompt_logprobs is not None:
            return range(self.start, self.end)
        return range(self.end - 1, self.end) if self.complete else range(0)


class Scheduler:
    """The queue and the batch. A job starts when it has a place in the batch, its slot, and all its pages."""

    def __init__(
        self, table: PageTable, bank: LoraBank, max_batch: int, chunk: int, copy: Callable[[int, int, int], None]
    ) -> None:
        self.table, self.bank, self.copy = table, bank, copy
        self.max_batch, self.chunk = max_batch, chunk
        self.waiting: list[Generation] = []
        self.running: list[Generation] = []
        self._seats = list(range(max_batch))
        self.failed: list[tuple[Generation, Exception]] = []
        """Jobs whose adapters could not be placed, for the generator to end."""

    def schedule(self) -> list[Span]:
        """The next step: a token of every job that is generating, then up to `chunk` of prompts, oldest first."""
        self._admit()
        missing = [(each, each.length - each.computed) for each in self.running if not each.sated]
        spans = [Span.of(each, 1) for each, count in missing if count == 1]
        budget = self.chunk
        for each, count in missing:
            size = min(count, budget)
            if count > 1 and size:
                spans.append(Span.of(each, size))
                budget -= size
        return spans

    def advance(self, span: Span) -> None:
        """The span's K/V is in the cache: publish the pages that it filled."""
        each = span.generation
        each.computed = span.end
        self._publish(each, min(span.end, each.settled) // PAGE)
        last = len(each.request.prompt) - 1
        if span.start < last <= span.end and last // PAGE >= each.published:
            parent, tail = each.request.tail
            if len(tail) >= SHORT:
                self.table.note(each.pages[last // PAGE], parent, tail)

    def _publish(self, each: Generation, full: int) -> None:
        """Make known the pages of a job before `full`."""
        if full > each.published:
            keys = chain(each.request.salt, each.token_ids[: full * PAGE])
            for index in range(each.published, full):
                self.table.publish(each.pages[index], keys[index])
                ids = each.token_ids[index * PAGE : (index + 1) * PAGE]
                self.table.note(each.pages[index], each.request.parent(keys, index), ids)
            each.published = full

    def _note_rest(self, each: Generation) -> None:
        """Note the tokens of a job that ends after its last full page, for one that goes on from its text."""
        end = min(each.computed, each.settled)
        index = end // PAGE
        if end - index * PAGE >= SHORT and index >= each.published:
            keys = chain(each.request.salt, each.token_ids[: index * PAGE])
            self.table.note(each.pages[index], each.request.parent(keys, index), each.token_ids[index * PAGE : end])

    def remove(self, each: Generation) -> None:
        """Forget a job and free its pages and slot."""
        (self.running if each in self.running else self.waiting).remove(each)
        if each.pages:
            self._note_rest(each)
        self.table.release(each.pages)
        if each.slot is not None:
            self.bank.unpin(each.slot)
        if each.seat >= 0:
            self._seats.append(each.seat)
        each.pages, each.slot, each.seat = (), None, -1

    def _admit(self) -> None:
        """Start what can start, first come first served, except that jobs may pass one that cannot start yet.

        A job that waits for what another is computing is passed without counting. A job passed MAX_SKIPS times is not
        passed any more: waiting for a slot, by none that needs a new slot; waiting for pages, by none at all.
        """
        passed: list[Generation] = []
        coming = self._coming()
        slot_waiter = page_waiter = None  # the first of each kind; none behind it was passed more often
        for each in tuple(self.waiting):
            if len(self.running) >= self.max_batch or (page_waiter and page_waiter.skips >= MAX_SKIPS):
                break
            if self._awaits(each, coming):
                continue
            seated = self._seat(each, new_slots=not (slot_waiter and slot_waiter.skips >= MAX_SKIPS))
            if seated and self._reserve(each):
                self.waiting.remove(each)
                self.running.append(each)
                each.seat = self._seats.pop()
                coming.update(self._makes(each))
                for earlier in passed:
                    earlier.skips += 1
                continue
            passed.append(each)
            if seated:
                page_waiter = page_waiter or each
            else:
                slot_waiter = slot_waiter or each

    def _coming(self) -> set[bytes]:
        """Keys of the prompts' pages, and digests of whole prompts, that are being computed."""
        return {key for each in self.running for key in self._makes(each)}

    def _makes(self, each: Generation) -> list[bytes]:
        """What of its prompt a job still computes, but the last token."""
        done = each.computed >= len(each.request.prompt) - 1
        return [] if done else [*each.request.prefix_keys[each.published :], each.request.digest]

    def _awaits(self, each: Generation, coming: set[bytes]) -> bool:
        """True if the next page that a job would compute is being computed for another: it will find it known.

        So samples of a prompt, and prompts that begin alike, are computed once. The other job is running, so it ends.
        """
        missing = (key for key in each.request.prefix_keys if not self.table.knows(key)) if coming else iter(())
        key = next(missing, each.request.digest)
        return bool(key) and key in coming

    def _seat(self, each: Generation, new_slots: bool) -> bool:
        """Pin the slot that holds the job's combination, filling one if need be and allowed."""
        adapters = each.request.adapters
        if not adapters or each.slot is not None:
            return True
        slot = self.bank.find(adapters)
        if slot is None and new_slots:
            try:
                slot = self.bank.place(adapters, each.request.slot)
            except SlotBusy:
                return False
            except Exception as error:  # whatever is wrong with these adapters concerns this job alone
                self.failed.append((each, error))
        if slot is None:
            return False
        self.bank.pin(slot)
        each.slot = slot
        return True

    def _reserve(self, each: Generation) -> bool:
        """Give the job its pages: with max_tokens more there is never too little memory later."""
        request = each.request
        known = next(
            (i for i, key in enumerate(request.prefix_keys) if not self.table.knows(key)), len(request.prefix_keys)
        )
        wanted = request.prompt[known * PAGE : -1][:PAGE] if request.prompt_logprobs is None else ()
        source, common = self.table.alike(request.parent(request.prefix_keys, known), wanted)
        count = -(-(request.prompt_tokens + request.max_tokens) // PAGE)
        reservation = self.table.reserve(count, request.prefix_keys)
        if reservation is None:
            return False
        each.pages, each.computed, each.published = reservation.pages, reservation.reused * PAGE, reservation.reused
        if common >= SHORT:  # at once, while the page is as it was, even if it has just been given to this job
            self.copy(source, each.pages[known], common)
            each.computed += common
        return True
