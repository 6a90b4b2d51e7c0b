"""The low-rank deltas of several combinations of adapters (Hu 2021), each on its rows of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import TILE, fill


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
