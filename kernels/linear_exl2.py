"""y = x W + b with EXL2 weights: rows in an order of their own, in groups of 2, 3, 4, 5, 6 or 8 bits.

Row r of the stored order, in group g of b bits: (q[r, n] - 2^(b-1)) * scale[g, n], where
scale[g, n] = (code[g, n] + 1)^2 * fp16(scale_max[g] / 256). Every product is rounded to fp16, as ExLlamaV2 does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from .bits import unpack, unpack_rows


def dequantise(
    words: Tensor, codes: Tensor, scale_max: Tensor, groups: Sequence[tuple[int, int]], order: Tensor
) -> Tensor:
    """words int32 [R, N], codes int32 [G, N/8] of 4 bits, scale_max fp16 [G], groups (bits, rows) -> fp16 [K, N].

    order: int64 [K], the stored row of each input.
    """
    steps = unpack_rows(codes, 4).half() + 1
    scales = steps * steps * (scale_max / 256)[:, None]
    rows = torch.tensor([rows for _, rows in groups], device=words.device)
    stored, word, group = [], 0, 0
    for bits, run in groupby(groups, key=lambda each: each[0]):
        sizes = [rows for _, rows in run]
        end, last = word + sum(sizes) * bits // 32, group + len(sizes)
        levels = unpack(words[word:end], bits).half() - (1 << bits - 1)
        stored.append(levels * scales[group:last].repeat_interleave(rows[group:last], 0))
        word, group = end, last
    return torch.cat(stored)[order]


def linear_exl2(
    x: Tensor,
    words: Tensor,
    codes: Tensor,
    scale_max: Tensor,
    groups: Sequence[tuple[int, int]],
    order: Tensor,
    outputs: int,
    bias: Tensor | None,
) -> Tensor:
    """x [T, K] fp16 or bf16 and the tensors of `dequantise` -> [T, outputs]; columns beyond are padding."""
    y = x @ dequantise(words, codes, scale_max, groups, order)[:, :outputs].to(x.dtype)
    return y if bias is None else y + bias
