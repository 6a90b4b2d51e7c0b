"""The rows of a batch by the slot of adapters that each uses, as the kernels of lora.cuh read them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

COLUMNS = 8
"""Rows that the tensor cores take at once."""
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


class Tables(NamedTuple):
    """slots int32 [tiles], rows int32 [tiles, n COLUMNS]: each tile has rows of one slot; -1 is none."""

    slots: Ints
    rows: Ints


def count_tiles(rows: int, slots: int, columns: int = COLUMNS) -> int:
    """The tiles of `columns` rows that any use of so many slots by so many rows can need."""
    used = min(rows, slots)
    return used + (rows - used) // columns


def tables(slots: Ints, columns: int = COLUMNS) -> Tables:
    """From the slot of each row [T], or -1, as few tiles as there may be."""
    counts = np.bincount(slots[slots >= 0])
    tiles = int((-(-counts // columns)).sum())
    made = Tables(np.empty(tiles, np.int32), np.empty((tiles, columns), np.int32))
    fill_tables(slots, made)
    return made


def fill_tables(slots: Ints, into: Tables) -> None:
    """Write the tiles of tables() into arrays that have room for them and perhaps more."""
    into.slots.fill(-1)
    into.rows.fill(-1)
    order = np.argsort(slots, kind="stable")
    order = order[slots[order] >= 0]
    of_row = slots[order]
    begins = np.flatnonzero(np.diff(of_row, prepend=-1))
    sizes = np.diff(begins, append=len(order))
    columns = into.rows.shape[1]
    tiles = -(-sizes // columns)
    place = np.arange(len(order)) - np.repeat(begins, sizes)
    tile = np.repeat(np.cumsum(tiles) - tiles, sizes) + place // columns
    into.rows[tile, place % columns] = order
    into.slots[tile] = of_row
