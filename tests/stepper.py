"""Sequences fed by hand through Model.forward, as a generator would feed them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lorayard.worker import Cache, Lora, Model
from lorayard.worker.cache.storage import PAGE
from lorayard.worker.lora.bank import LoraBank
from lorayard.worker.models.batch import Batch, LoraRows

torch.set_num_threads(1)


@dataclass(eq=False)
class Sequence:
    """A text in the cache under one LoRA set."""

    loras: list[tuple[Lora, float]] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    length: int = 0


class Stepper:
    """A model with a cache and a bank of its own; pages are handed out in the order of `pages`."""

    def __init__(self, model: Model, tokens: int = 4096, slots: int = 8, dtype: str = "fp32", shuffle: int = 0) -> None:
        self.model, self.cache, self.bank = model, Cache(model, tokens, dtype), LoraBank(model, slots)
        self.free = torch.randperm(self.cache.pages, generator=torch.Generator().manual_seed(shuffle)).tolist()

    def step(self, feeds: list[tuple[Sequence, list[int]]]) -> list[torch.Tensor]:
        """Run the next tokens of some sequences in one batch -> the logits of each, [tokens, vocab]."""
        positions, rows = [], torch.arange(sum(len(tokens) for _, tokens in feeds))
        for sequence, tokens in feeds:
            positions.append(torch.arange(sequence.length, sequence.length + len(tokens)))
            sequence.length += len(tokens)
            while len(sequence.pages) * PAGE < sequence.length:
                sequence.pages.append(self.free.pop())
        owner = torch.tensor([i for i, (_, tokens) in enumerate(feeds) for _ in tokens])
        table = torch.zeros(len(feeds), max(len(sequence.pages) for sequence, _ in feeds), dtype=torch.int64)
        for i, (sequence, _) in enumerate(feeds):
            table[i, : len(sequence.pages)] = torch.tensor(sequence.pages)
        token_ids = torch.tensor([token for _, tokens in feeds for token in tokens])
        batch = Batch(token_ids, torch.cat(positions), owner, table, rows, self._lora_rows(feeds))
        logits = self.model.forward(batch, self.cache, self.bank).cpu()
        return list(logits.split([len(tokens) for _, tokens in feeds]))

    def _lora_rows(self, feeds: list[tuple[Sequence, list[int]]]) -> tuple[LoraRows, ...]:
        """One entry for each slot, whatever the order and the number of the sequences that use it."""
        used: dict[int, list[tuple[int, torch.Tensor]]] = {}
        row = 0
        for sequence, tokens in feeds:
            if sequence.loras:
                pairs = sorted(sequence.loras, key=lambda pair: pair[0].name)
                slot = self.bank.place(tuple(lora for lora, _ in pairs))
                scales = self.bank.rank_scales(slot, tuple(scale for _, scale in pairs))
                used.setdefault(slot, []).extend((row + i, scales) for i in range(len(tokens)))
            row += len(tokens)
        return tuple(
            LoraRows(slot, torch.tensor([r for r, _ in rows]), torch.stack([scales for _, scales in rows]))
            for slot, rows in used.items()
        )
