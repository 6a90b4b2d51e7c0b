"""y = x Wᵀ + b with float weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

TILE = 8
"""Rows of one product on the CPU."""
STEP = 16
"""Columns on the CPU are a multiple of this, 64 bytes, so that every row begins alike."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] of one dtype -> [T, N].

    On the CPU a row's bits do not depend on T or on its place in x: BLAS picks its summation order by the shape and by
    the alignment of rows, so every product has TILE rows, and rows are whole steps; zeros fill up both.
    """
    if x.is_cuda:
        return functional.linear(x, weight, bias)
    y = multiply_tiles(fill(x, TILE), fill(weight).T)[: len(x)]
    return y if bias is None else y.add_(bias)


def fill(x: Tensor, rows: int = 1) -> Tensor:
    """x [..., T, K] with zeros up to a multiple of `rows` rows and of STEP columns."""
    below, right = -x.shape[-2] % rows, -x.shape[-1] % STEP
    return torch.constant_pad_nd(x, (0, right, 0, below)) if below or right else x


def multiply_tiles(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], T a multiple of TILE, weight [K, N] -> [T, N], one product for each TILE rows."""
    if len(x) == TILE:
        return x @ weight
    y = x.new_empty(len(x), weight.shape[1])
    for start in range(0, len(x), TILE):
        torch.mm(x[start : start + TILE], weight, out=y[start : start + TILE])
    return y
