"""What kernels are given of the pools of K and V."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import require
from .pool import GROUP, FloatPool, Pool, QuantisedPool

FLOATS = (torch.float16, torch.bfloat16)


def forms_of(pools: tuple[Pool, Pool]) -> tuple[int, int, bool] | None:
    """Bits of a number of K and of V, and whether they are bf16; None if the kernel knows no such pools."""
    k, v = pools
    if isinstance(k, QuantisedPool) and isinstance(v, QuantisedPool):
        return k.bits, v.bits, False
    if isinstance(k, FloatPool) and isinstance(v, FloatPool) and k.values.dtype == v.values.dtype in FLOATS:
        return 16, 16, k.values.dtype == torch.bfloat16
    return None


def memory(pools: tuple[Pool, Pool], like: Tensor) -> tuple[Tensor | None, ...]:
    """Numbers of K and of V, and their scales if they are codes, as kernels are given them."""
    numbers: list[Tensor] = []
    scales: list[Tensor | None] = []
    for pool in pools:
        *places, dim = pool.shape
        if isinstance(pool, QuantisedPool):
            require("codes", pool.codes, torch.uint8, *places, dim * pool.bits // 8, like=like)
            require("scales", pool.scales, torch.float16, *places, dim // GROUP, like=like)
            numbers.append(pool.codes)
            scales.append(pool.scales)
        elif isinstance(pool, FloatPool):
            require("values", pool.values, pool.values.dtype, *places, dim, like=like)
            numbers.append(pool.values)
            scales.append(None)
    return *numbers, *scales
