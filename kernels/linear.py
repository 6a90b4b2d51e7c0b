"""y = x Wᵀ + b with float weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

TILE = 8
"""Rows of one product on the CPU."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] of one dtype -> [T, N].

    On the CPU a row's bits do not depend on T or on its place in x: BLAS picks its summation order by the shape, so
    every product has the same shape, TILE rows, the last of them padded with zeros.
    """
    if x.is_cuda:
        return functional.linear(x, weight, bias)
    y = multiply_tiles(pad_tile(x), weight.T)[: len(x)]
    return y if bias is None else y.add_(bias)


def pad_tile(x: Tensor) -> Tensor:
    """x [T, K] with rows of zeros up to a multiple of TILE."""
    short = -len(x) % TILE
    return torch.constant_pad_nd(x, (0, 0, 0, short)) if short else x


def multiply_tiles(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], T a multiple of TILE, weight [K, N] -> [T, N], one product for each TILE rows."""
    if len(x) == TILE:
        return x @ weight
    y = x.new_empty(len(x), weight.shape[1])
    for start in range(0, len(x), TILE):
        torch.mm(x[start : start + TILE], weight, out=y[start : start + TILE])
    return y
