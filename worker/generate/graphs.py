"""Decode steps as CUDA graphs: one token of each of some sequences, captured once and replayed with new data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorayard.kernels import sample
from lorayard.kernels.lora import Tiles
from lorayard.kernels.lora_tiles import COLUMNS, count_tiles

from ..cache.storage import Cache
from ..lora.bank import LoraBank
from ..lora.prepared import Prepared
from ..models.layer import Step
from ..models.model import Model

ROWS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Sizes of batches that have a graph; smaller batches are filled up."""
FEWEST_PAGES = 4
Words = TypeVar("Words", Tensor, NDArray[np.int32])


class Size(NamedTuple):
    """Sequences, pages of each, and the widest rank class of their adapters; 0 without any."""

    rows: int
    pages: int
    width: int

    @classmethod
    def of(cls, rows: int, pages: int, width: int) -> Size:
        """The smallest that has room."""
        whole = max(FEWEST_PAGES, 1 << (pages - 1).bit_length())
        return cls(next(size for size in ROWS if size >= rows), whole, width)


class Fields(NamedTuple):
    """What a step is told, as views into one array of int32 words, on the host or on a device.

    draws [B, WORDS] are rows of kernels.sample.ROW; seats and ids [B]: an id of -1 is the token drawn last in the seat;
    positions [B]; table [B, P]; tile_slots, tile_rows and scales (float32 bits) are those of kernels.lora.Tiles.
    """

    draws: Any
    ids: Any
    seats: Any
    positions: Any
    table: Any
    tile_slots: Any
    tile_rows: Any
    scales: Any


def shapes_of(size: Size, slots: int) -> Fields:
    """The fields' shapes, for a bank of so many slots."""
    rows, pages, width = size
    tiles = count_tiles(rows, slots) if width else 0
    one = (rows,)
    return Fields((rows, sample.WORDS), one, one, one, (rows, pages), (tiles,), (tiles, COLUMNS), (rows, width))


def count_words(shapes: Fields) -> int:
    """Words of all fields, each of which begins at a multiple of 16 bytes."""
    return sum(-(-int(np.prod(shape)) // 4) * 4 for shape in shapes)


def views(words: Words, shapes: Fields) -> Fields:
    """The fields in an array."""
    found, start = [], 0
    for shape in shapes:
        count = int(np.prod(shape))
        found.append(words[start : start + count].reshape(shape))
        start += -(-count // 4) * 4
    return Fields(*found)


class Graph:
    """A step of one size. What it is told is written on the host in turns, as the step before may still be read."""

    def __init__(
        self, model: Model, cache: Cache, bank: LoraBank, drawn: Tensor, size: Size,
        vocab_size: int, pools: dict[torch.device, Any],
    ) -> None:  # fmt: skip
        self.model, self.cache, self.bank, self.drawn, self.size = model, cache, bank, drawn, size
        self._vocab_size = vocab_size
        self._stages, self._pools = model.stages, pools
        shapes = shapes_of(size, bank.slots)
        count = count_words(shapes)
        self._hosts = [torch.zeros(count, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self._fields = [views(host.numpy(), shapes) for host in self._hosts]
        self._words = {stage.device: torch.zeros(count, dtype=torch.int32, device=stage.device)
                       for stage in self._stages}  # fmt: skip
        self._views = {device: views(words, shapes) for device, words in self._words.items()}
        self.tokens = torch.zeros(size.rows, dtype=torch.int64, device=drawn.device)
        self._told = [torch.zeros(size.rows, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._entries: list[tuple[Tensor, Tensor | None]] = []
        self._exits: list[tuple[Tensor, Tensor | None]] = []
        self._turn = 0

    def launch(self, write: Callable[[Fields], None]) -> Callable[[], list[int]]:
        """Begin a step that `write` describes; what is returned waits for it and tells the tokens, -1 for none."""
        self._turn ^= 1
        write(self._fields[self._turn])
        for words in self._words.values():
            words.copy_(self._hosts[self._turn], non_blocking=True)
        if not self._graphs:
            self._capture()
        for index, (stage, graph) in enumerate(zip(self._stages, self._graphs, strict=True)):
            with torch.cuda.device(stage.device):
                self._enter(index)
                graph.replay()
        told = self._told[self._turn]
        with torch.cuda.device(self.drawn.device):
            told.copy_(self.tokens, non_blocking=True)
            event = torch.cuda.Event()
            event.record()

        def tokens() -> list[int]:
            event.synchronize()
            return told.tolist()

        return tokens

    def _capture(self) -> None:
        """Run the step once, so that all is compiled and allocated, then capture it.

        Whatever comes of it, the tokens drawn last stay as they were: the step itself is still to run.
        """
        drawn = self.drawn.clone()
        try:
            self._graphs = [self._capture_stage(index) for index in range(len(self._stages))]
        finally:
            self.drawn.copy_(drawn)

    def _capture_stage(self, index: int) -> torch.cuda.CUDAGraph:
        stage = self._stages[index]
        with torch.cuda.device(stage.device), _side_stream():
            if index:
                h, delta = self._exits[-1]
                self._entries.append((h.to(stage.device), None if delta is None else delta.to(stage.device)))
            else:
                self._entries.append((self.tokens, None))
            self._compute(index)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(self._pools[stage.device], capture_error_mode="thread_local")
            try:
                left = self._compute(index)
            finally:
                graph.capture_end()
            graph.replay()
            self._exits.append(left)
        return graph

    def _enter(self, index: int) -> None:
        if index:
            for to, source in zip(self._entries[index], self._exits[index - 1], strict=True):
                if to is not None and source is not None:
                    to.copy_(source, non_blocking=True)

    def _compute(self, index: int) -> tuple[Tensor, Tensor | None]:
        """One stage, by operations of its device alone: h and delta after it."""
        stage, model = self._stages[index], self.model
        told = self._views[stage.device]
        loras, bank = None, None
        if self.size.width:
            bank, scales = self.bank, told.scales.view(torch.float32)
            loras = Prepared((), (), Tiles(told.tile_slots, told.tile_rows, scales))
        rope = model.rope[stage.device]
        step = Step.decoding(told.positions.long(), told.table.long(), model.config.windows, rope, bank, loras)
        h, delta = self._entries[index]
        if index == 0:
            last = self.drawn.to(stage.device)[told.seats.clamp(min=0)].clamp(min=0)  # -1 where none could be drawn
            h = model.embed(torch.where(told.ids < 0, last, told.ids))
        for layer in stage.layers:
            h, delta = model.layers[layer].forward(h, delta, step, *self.cache[layer])
        if index == len(self._stages) - 1:
            logits = model.project(h, delta)
            probabilities = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
            sample.draw(logits, told.draws, self._vocab_size, self.tokens, probabilities, self.drawn)
        return h, delta


@contextmanager
def _side_stream() -> Iterator[None]:
    """A stream of its own for the current device, before and after which the current one waits."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)
