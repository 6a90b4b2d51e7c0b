"""y = x W + b with 4-bit GPTQ weights, W[k, n] = (q[k, n] - zero[g, n]) * scale[g, n], g = group[k]."""

from __future__ import annotations

import torch
from torch import Tensor


def nibbles(words: Tensor) -> Tensor:
    """The eight 4-bit numbers of each int32, lowest bits first, in a new last dimension."""
    return words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32, device=words.device) & 15


def dequantise(qweight: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """qweight int32 [K/8, N] packed down K, zeros int8 [G, N], scales fp16 [G, N], group int64 [K] -> fp16 [K, N].

    The difference is exact and the product is rounded once to fp16.
    """
    levels = nibbles(qweight).transpose(1, 2).flatten(0, 1)
    return (levels - zeros[group]).half() * scales[group]


def linear_gptq(
    x: Tensor, qweight: Tensor, zeros: Tensor, scales: Tensor, group: Tensor, bias: Tensor | None
) -> Tensor:
    """x [T, K] fp16 or bf16 and the tensors of `dequantise` -> [T, N]."""
    y = x @ dequantise(qweight, zeros, scales, group).to(x.dtype)
    return y if bias is None else y + bias
