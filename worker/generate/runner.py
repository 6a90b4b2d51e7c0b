"""Runs the spans of a step on the model and draws the next tokens, on the host or where the logits are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lorayard.kernels import lora_tiles, sample
from lorayard.kernels.launch import usable
from lorayard.shared.job import MAX_RANK_SUM

from ..cache.storage import PAGE, Cache
from ..lora.bank import LoraBank
from ..models.batch import Batch
from ..models.model import Model
from .generation import Generation
from .graphs import ROWS, Fields, Graph, Size
from .sampler import Choice, Draw, draw_on_device, fill_rows, on_device
from .scheduler import Span
from .step import Outcome, build_batch, outcomes

NOTHING = Outcome(None, None, [])


@dataclass(frozen=True, slots=True)
class Flight:
    """A step on its way. ahead: whether the next one may begin before its outcomes are known."""

    spans: Sequence[Span]
    ahead: bool
    outcomes: Callable[[], list[Outcome]]


class Seats:
    """What graphs are told of each sample that runs, by its seat: pages, slot and scales, written when it sits down."""

    def __init__(self, count: int, pages: int) -> None:
        self._whose: list[Generation | None] = [None] * count
        self.pages = np.zeros((count, pages), np.int32)
        self.slots = np.full(count, -1, np.int32)
        self.scales = np.zeros((count, MAX_RANK_SUM), np.float32)
        self.widths = np.zeros(count, np.int32)

    def take(self, each: Generation, bank: LoraBank) -> None:
        """Note a sample, if it is new in its seat."""
        seat = each.seat
        if self._whose[seat] is each:
            return
        self._whose[seat] = each
        self.pages[seat, : len(each.pages)] = each.pages
        self.slots[seat], self.widths[seat] = -1, 0
        if each.slot is not None:
            scales = bank.rank_scales(each.slot, tuple(scale for _, scale in each.request.loras)).numpy()
            self.slots[seat], self.widths[seat] = each.slot, len(scales)
            self.scales[seat] = 0
            self.scales[seat, : len(scales)] = scales


class Runner:
    """Holds what lasts from step to step: the tokens drawn last, by seat, and the graphs."""

    def __init__(self, model: Model, cache: Cache, bank: LoraBank, vocab_size: int, seats: int) -> None:
        self.model, self.cache, self.bank = model, cache, bank
        self.vocab_size = min(vocab_size, model.config.vocab_size)
        self._gpu = bool(model.layer_devices) and all(device.type == "cuda" for device in model.layer_devices)
        self._seats = Seats(seats, cache.pages)
        self._drawn = torch.zeros(seats, dtype=torch.int64, device=model.norm.device if self._gpu else "cpu")
        self._graphs: dict[Size, Graph] | None = {} if self._gpu else None
        self._pools = {device: torch.cuda.graph_pool_handle() for device in set(model.layer_devices) if self._gpu}

    def run(self, spans: Sequence[Span]) -> Flight:
        """Begin a step."""
        draws = self._draws(spans)
        if draws is None:
            batch = self._batch(spans)
            logits = self.model.forward(batch, self.cache, self.bank)
            told = outcomes(logits, spans, self.vocab_size)
            return Flight(spans, False, lambda: told)
        tokens = self._replay(spans, draws) if len(draws) == len(spans) else None
        return self._flight(spans, draws, tokens or self._eager(spans, draws))

    def _draws(self, spans: Sequence[Span]) -> list[Draw] | None:
        """What the complete spans draw by, if the kernel can do it for all and nobody needs to see the logits."""
        ready = self._gpu and usable(self._drawn) and sample.takes(self.vocab_size)
        if not ready or not all(span.generation.plain for span in spans):
            return None
        draws = [span.generation.draw for span in spans if span.complete]
        return draws if all(map(on_device, draws)) else None

    def _flight(self, spans: Sequence[Span], draws: Sequence[Draw], tokens: Callable[[], list[int]]) -> Flight:
        def read() -> list[Outcome]:
            ids = iter(zip(tokens(), draws, strict=False))
            return [_outcome(*next(ids)) if span.complete else NOTHING for span in spans]

        return Flight(spans, True, read)

    def _batch(self, spans: Sequence[Span]) -> Batch:
        """The batch, with tokens that only the device knows yet."""
        batch = build_batch(spans, self.bank)
        ends = np.cumsum([span.end - span.start for span in spans]) - 1
        late = [(int(end), span.generation.seat) for end, span in zip(ends, spans, strict=True) if span.unknown]
        if not late:
            return batch
        ids = batch.token_ids.to(self.model.embedding.device)
        rows, seats = torch.tensor(late, device=self._drawn.device).unbind(1)
        ids[rows.to(ids.device)] = self._drawn[seats].clamp(min=0).to(ids.device)  # -1 where none could be drawn
        return replace(batch, token_ids=ids)

    def _eager(self, spans: Sequence[Span], draws: Sequence[Draw]) -> Callable[[], list[int]]:
        """Any spans, operation by operation."""
        logits = self.model.forward(self._batch(spans), self.cache, self.bank)
        if not draws:
            return list
        seats = [span.generation.seat for span in spans if span.complete]
        tokens, _ = draw_on_device(logits, draws, self.vocab_size, seats, self._drawn)
        return tokens.tolist

    def _replay(self, spans: Sequence[Span], draws: Sequence[Draw]) -> Callable[[], list[int]] | None:
        """One token of each by a graph; None if there can be none."""
        fits = len(spans) <= ROWS[-1] and all(span.end - span.start == 1 for span in spans)
        if self._graphs is None or not fits:
            return None
        for span in spans:
            self._seats.take(span.generation, self.bank)
        seats = np.array([span.generation.seat for span in spans])
        used = {int(slot) for slot in self._seats.slots[seats] if slot >= 0}
        if not self.bank.graphable(used):
            return None
        self.bank.receive(used)
        deepest = max(span.end for span in spans)
        size = Size.of(len(spans), -(-deepest // PAGE), int(self._seats.widths[seats].max()))
        graph = self._graphs.get(size)
        if graph is None:
            graph = Graph(self.model, self.cache, self.bank, self._drawn, size, self.vocab_size, self._pools)
        try:
            tokens = graph.launch(lambda fields: self._write(fields, spans, draws, seats))
        except RuntimeError as error:
            warnings.warn(f"decode steps are run without CUDA graphs, which is slower: {error}", stacklevel=2)
            self._graphs = None
            return None
        self._graphs[size] = graph
        return tokens

    def _write(self, fields: Fields, spans: Sequence[Span], draws: Sequence[Draw], seats: Any) -> None:
        """Tell a graph what its step is; rows beyond the spans' work on a page of nobody."""
        count, pages, width = len(spans), fields.table.shape[1], fields.scales.shape[1]
        rows = np.ascontiguousarray(fields.draws).view(sample.ROW).reshape(-1)
        rows[count:] = np.zeros((), sample.ROW)
        rows[count:]["seat"] = -1
        fill_rows(rows[:count], draws, seats)
        fields.ids[:count] = [-1 if span.unknown else span.generation.token_ids[span.start] for span in spans]
        fields.positions[:count] = [span.start for span in spans]
        fields.seats[:count] = seats
        fields.table[:count, : self._seats.pages.shape[1]] = self._seats.pages[seats, :pages]
        fields.ids[count:], fields.positions[count:], fields.seats[count:] = 0, 0, -1
        fields.table[count:] = self.cache.scratch
        if width:
            slots = self._seats.slots[seats]
            lora_tiles.fill_tables(slots, lora_tiles.Tables(fields.tile_slots, fields.tile_rows))
            fields.scales.view(np.float32)[:count] = self._seats.scales[seats, :width]


def _outcome(token: int, draw: Draw) -> Outcome:
    return Outcome(Choice(token, mu=draw.mu) if token >= 0 else None, None, [])
