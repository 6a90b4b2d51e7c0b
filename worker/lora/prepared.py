"""What a step tells the bank of its rows, on one device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorayard.kernels.lora import Tiles, tile_rows
from lorayard.kernels.lora_tiles import COLUMNS, tables

from ..models.batch import LoraRows

MANY = 16
"""Rows of a slot, on average, from which tiles are four times as large."""


@dataclass(frozen=True, slots=True)
class Group:
    """The tiles of rows whose slots have one rank class R.

    slots: one for each tile. rows int64 [G, TILE], scales float32 [G, TILE, R].
    """

    slots: tuple[int, ...]
    rows: Tensor
    scales: Tensor

    @classmethod
    def of(cls, uses: list[LoraRows], device: torch.device) -> Group:
        """From the rows of each slot, on `device`."""
        tiles = [tile_rows(use.rows, use.scales) for use in uses]
        slots = tuple(use.slot for use, (rows, _) in zip(uses, tiles, strict=True) for _ in rows)
        rows, scales = (torch.cat(parts).to(device) for parts in zip(*tiles, strict=True))
        return cls(slots, rows, scales)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a step needs on one device: groups for torch, or tiles for the kernels of LoRA.

    changing: the rows of slots that change more than LoRA does.
    """

    groups: tuple[Group, ...]
    changing: tuple[LoraRows, ...]
    tiles: Tiles | None = None


def group_rows(loras: tuple[LoraRows, ...], device: torch.device) -> tuple[Group, ...]:
    """By rank class."""
    classes: dict[int, list[LoraRows]] = {}
    for use in loras:
        classes.setdefault(use.scales.shape[1], []).append(use)
    return tuple(Group.of(uses, device) for uses in classes.values())


def mixed_tiles(loras: tuple[LoraRows, ...], device: torch.device) -> Tiles:
    """As few as there may be, in one copy to the device."""
    count = max(int(use.rows[-1]) for use in loras) + 1
    slots = np.full(count, -1, np.int32)
    scales = np.zeros((count, max(use.scales.shape[1] for use in loras)), np.float32)
    for use in loras:
        rows = use.rows.numpy()
        slots[rows] = use.slot
        scales[rows, : use.scales.shape[1]] = use.scales.numpy()
    columns = COLUMNS if count < MANY * len(loras) else 4 * COLUMNS
    made = tables(slots, columns)
    parts = [np.resize(each.view(np.int32), -(-each.size // 4) * 4) for each in (made.slots, made.rows, scales)]
    host = torch.empty(sum(part.size for part in parts), dtype=torch.int32, pin_memory=True)
    np.concatenate(parts, out=host.numpy())
    sent = host.to(device, non_blocking=True).split([part.size for part in parts])
    rows_sent = sent[1].view(-1, columns)
    return Tiles(sent[0][: len(made.slots)], rows_sent, sent[2].view(torch.float32).view(scales.shape))


def on_device(use: LoraRows, device: torch.device) -> LoraRows:
    """The same there."""
    return LoraRows(use.slot, use.rows.to(device), use.scales.to(device))
