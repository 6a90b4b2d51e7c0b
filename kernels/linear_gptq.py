"""y = x W + b with GPTQ weights of 2, 3, 4 or 8 bits, W[k, n] = (q[k, n] - zero[g, n]) * scale[g, n], g = group[k]."""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import unpack


def dequantise(qweight: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """qweight int32 [K bits / 32, N] packed down K, zeros int8 or int16 [G, N], scales [G, N], group int64 [K].

    -> [K, N].     The difference is exact and the product is rounded once to the dtype of the scales, fp16 or fp32.
    """
    levels = unpack(qweight, 32 * len(qweight) // len(group)).to(torch.int16)
    return (levels - zeros[group]).to(scales.dtype) * scales[group]


def linear_gptq(
    x: Tensor, qweight: Tensor, zeros: Tensor, scales: Tensor, group: Tensor, bias: Tensor | None
) -> Tensor:
    """x [T, K] fp16 or bf16 and the tensors of `dequantise` -> [T, N]."""
    y = x @ dequantise(qweight, zeros, scales, group).to(x.dtype)
    return y if bias is None else y + bias
