"""The columns of x in another order."""

from __future__ import annotations

from torch import Tensor

from .launch import Kernel, Launch, launch, require


def gather_columns(x: Tensor, order: Tensor) -> Tensor:
    """x [T, K] fp16 or bf16, order int32 [C] -> [T, C], 0 where the order is negative; where kernels run."""
    out = x.new_empty(len(x), len(order))
    if len(x):
        launch(gather(x.contiguous(), order, out))
    return out


def gather(x: Tensor, order: Tensor, out: Tensor) -> Launch:
    """The launch of gather_columns; C is a multiple of 8."""
    require("x", x, x.dtype, *x.shape, like=order)
    require("out", out, x.dtype, len(x), len(order), like=order)
    if x.element_size() != 2 or len(order) % 8:
        raise ValueError(f"{len(order)} columns of {x.dtype}: they must be of 16 bits and a multiple of 8")
    grid = -(-len(order) // 1024), len(x), 1
    return Launch(Kernel("gather_columns", ()), grid, 128, (x, order, out, x.shape[1], len(order)))
