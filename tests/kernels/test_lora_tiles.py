"""Rows by slot: every row in one tile of its slot, and never more tiles than there is room for."""

from __future__ import annotations

import numpy as np
import pytest

from lorayard.kernels.lora_tiles import Tables, count_tiles, fill_tables, tables


@pytest.mark.parametrize("columns", [8, 32])
def test_every_row_is_in_a_tile_of_its_slot(columns: int) -> None:
    rng = np.random.default_rng(columns)
    for _ in range(200):
        rows, used = int(rng.integers(1, 300)), int(rng.integers(1, 70))
        slots = rng.integers(-1, used, rows).astype(np.int32)
        made = tables(slots, columns)
        room = count_tiles(rows, used, columns)
        assert len(made.slots) <= room
        into = Tables(np.empty(room, np.int32), np.empty((room, columns), np.int32))
        fill_tables(slots, into)
        assert np.array_equal(into.rows[: len(made.slots)], made.rows)
        assert (into.slots[len(made.slots) :] == -1).all() and (into.rows[len(made.slots) :] == -1).all()
        places = made.rows >= 0
        assert sorted(made.rows[places]) == np.flatnonzero(slots >= 0).tolist()
        assert (slots[made.rows] == made.slots[:, None])[places].all()


def test_the_room_for_tiles_can_be_needed_whole() -> None:
    slots = np.array([0] * 17 + [1] * 9 + [2], np.int32)
    assert len(tables(slots).slots) == 6 == count_tiles(27, 3)
    assert len(tables(np.full(5, -1, np.int32)).slots) == 0
