"""The low-rank deltas of several combinations of adapters (Hu 2021), each on its rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import Kernel, Launch, launch, require
from .linear import TILE, fill

STEP = 16
"""Ranks are multiples of this."""
SLICE, WARPS = 1024, 4
"""Numbers of A's rows that a block of lora_shrink takes, and its warps."""
EXPAND_WARPS = 4
"""Warps of a block of lora_expand, each for 64 columns of y."""


def tile_rows(rows: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """rows int64 [n], scales float32 [n, R] -> [G, TILE] and [G, TILE, R]; the last row fills up, with scales of 0."""
    index = torch.arange(-(-len(rows) // TILE) * TILE)
    scales = scales[index.clamp(max=len(rows) - 1)]
    scales[len(rows) :] = 0
    return rows[index.clamp(max=len(rows) - 1)].view(-1, TILE), scales.view(-1, TILE, scales.shape[1])


def add_lora(x: Tensor, y: Tensor, rows: Tensor, scales: Tensor, a: Tensor, b: Tensor) -> None:
    """y[rows] += (x[rows] aᵀ * scales) bᵀ in place, for G tiles of rows with an a and a b each.

    x [T, K], y [T, N], rows and scales of `tile_rows`, a [G, R, K], b [G, N, R]. On the CPU a row's bits do not depend
    on the other rows; see kernels.linear.
    """
    chosen = x.index_select(0, rows.flatten()).view(*rows.shape, -1)
    shrunk = torch.bmm(fill(chosen), fill(a).transpose(1, 2)) * scales
    delta = torch.bmm(fill(shrunk.to(x.dtype)), fill(b).transpose(1, 2))
    y.index_add_(0, rows.flatten(), delta.flatten(0, 1))


@dataclass(frozen=True, slots=True)
class Tiles:
    """On one device: slots int32 [tiles], rows int32 [tiles, 8 or 32] of lora_tiles, scales float32 [S, W].

    Every row is less than S. W is a multiple of STEP, and no slot in use has a larger rank.
    """

    slots: Tensor
    rows: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class Joined:
    """Up to three linears of `inputs` numbers, side by side, and where the slots' adapters for them are.

    table: int64 [slots, modules], each slot's rank, then the address of its A [R, K] for each module, with B [N, R]
    right behind it, or 0. first: the first linear's column there. widths: N of each. All sizes are multiples of 8.
    """

    table: Tensor
    first: int
    inputs: int
    widths: tuple[int, ...]


def add_mixed(x: Tensor, y: Tensor, linears: Joined, tiles: Tiles) -> None:
    """y [T, N] += what the slots in use add to the linears' output for x [T, K], in place, by two kernels."""
    h = new_partial(x, linears, tiles)
    launch(shrink(x, linears, tiles, h))
    launch(expand(h, linears, tiles, y))


def new_partial(x: Tensor, linears: Joined, tiles: Tiles) -> Tensor:
    """Room for A x: float32 [slices of K, T, linears * W]."""
    slices = -(-linears.inputs // SLICE)
    return x.new_empty(slices, len(x), len(linears.widths) * tiles.scales.shape[1], dtype=torch.float32)


def shrink(x: Tensor, linears: Joined, tiles: Tiles, h: Tensor) -> Launch:
    """The launch of lora_shrink: h of `new_partial` = scales * (A x)."""
    width, parts = tiles.scales.shape[1], len(linears.widths)
    require("x", x, x.dtype, len(x), linears.inputs, like=linears.table)
    _require(tiles, x)
    grid = len(tiles.slots) * parts * len(h) * (width // STEP), 1, 1
    macros = {"WARPS": WARPS, "DEPTH": SLICE // (128 * WARPS)} | _format(x, tiles)
    arguments = linears.table, tiles.slots, tiles.rows, tiles.scales, x, h
    sizes = linears.table.shape[1], linears.first, parts, width, len(x), linears.inputs
    return Launch(Kernel("lora_shrink", tuple(macros.items())), grid, WARPS * 32, (*arguments, *sizes))


def expand(h: Tensor, linears: Joined, tiles: Tiles, y: Tensor) -> Launch:
    """The launch of lora_expand: y [T, N] += B h."""
    width, outputs = tiles.scales.shape[1], sum(linears.widths)
    require("y", y, y.dtype, h.shape[1], outputs, like=h)
    _require(tiles, y)
    ends = [sum(linears.widths[: i + 1]) for i in range(3)]
    span = EXPAND_WARPS * 64
    macros = {"WARPS": EXPAND_WARPS, "SLICES": len(h)} | _format(y, tiles)
    arguments = linears.table, tiles.slots, tiles.rows, h, y
    sizes = linears.table.shape[1], linears.first, len(linears.widths), width, len(y), linears.inputs
    grid = sum(-(-size // span) for size in linears.widths), len(tiles.slots), 1
    shared = tiles.rows.shape[1] * (width // 2 + 8) * 4
    kernel = Kernel("lora_expand", tuple(macros.items()))
    return Launch(kernel, grid, EXPAND_WARPS * 32, (*arguments, *sizes, outputs, ends[0], ends[1]), shared)


def _format(x: Tensor, tiles: Tiles) -> dict[str, int]:
    return {"COLUMNS": tiles.rows.shape[1] // 8, "BFLOAT": int(x.dtype == torch.bfloat16)}


def _require(tiles: Tiles, like: Tensor) -> None:
    if like.dtype not in (torch.float16, torch.bfloat16) or tiles.scales.shape[1] % STEP:
        raise ValueError(f"numbers must be of 16 bits, scales of a multiple of {STEP} ranks")
    require("slots", tiles.slots, torch.int32, len(tiles.slots), like=like)
    require("rows", tiles.rows, torch.int32, len(tiles.slots), tiles.rows.shape[1], like=like)
    require("scales", tiles.scales, torch.float32, *tiles.scales.shape, like=like)
