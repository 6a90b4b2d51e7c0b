"""The low-rank delta of one combination of adapters (Hu 2021) on its rows of a batch."""

from __future__ import annotations

from torch import Tensor

from .linear import TILE, fill, multiply_tiles


def add_lora(x: Tensor, y: Tensor, rows: Tensor, scales: Tensor, a: Tensor, b: Tensor) -> None:
    """y[rows] += (x[rows] aᵀ * scales) bᵀ in place.

    x [T, K], y [T, N], rows int64 [n], scales float32 [n, R], a [R, K], b [N, R]. On the CPU a row's bits do not
    depend on the other rows; see kernels.linear.
    """
    chosen = x.index_select(0, rows)
    if x.is_cuda:
        y.index_add_(0, rows, (chosen @ a.T * scales).to(x.dtype) @ b.T)
        return
    shrunk = multiply_tiles(fill(chosen, TILE), fill(a).T)
    shrunk[: len(rows)] *= scales
    y.index_add_(0, rows, multiply_tiles(fill(shrunk), fill(b).T)[: len(rows)])
