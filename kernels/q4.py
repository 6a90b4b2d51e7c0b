"""y = x W + b with weights of 4 bits in one layout for all kernels, made from GPTQ's numbers when a model is loaded.

Rows of Wᵀ (outputs) in blocks of 64, columns (inputs) in steps of 128:
weights int32 [N/64, K/128, 4 tiles of 16 rows, 2 halves of 64 columns, 32 lanes, 4 words]. Lane l, word j holds rows
l/4 and l/4 + 8 of a tile and columns 16 (l%4) + 4 j + {0, 1, 2, 3} of a half: the operand A of a product of 16 by 8 by
16, whose columns are in an order of their own. Bits 4 (2 p + h + 4 e) are row l/4 + 8 h, column 2 p + e.
scales fp16 [N/16, G, 8, 2]: of rows r and r + 8, times 2^24 and 2^20, divided by a power of two of the row.
zeros int16 [N/16, G, 8, 2] (z and 16 z) or None where every zero point is 8. factors float32 [N]: those powers.
N is filled up to whole blocks with scales of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bits import unpack

BLOCK, STEP = 64, 128
GROUPS = (16, 32, 64)
"""Sizes of groups below a step; larger ones are whole steps."""


@dataclass(frozen=True, slots=True)
class Q4:
    """Weights [N, K], K stored in `order` where it is not its own. The module tells the shapes."""

    weights: Tensor
    scales: Tensor
    zeros: Tensor | None
    factors: Tensor
    outputs: int
    group: int
    order: Tensor | None

    @property
    def inputs(self) -> int:
        """K."""
        return self.weights.shape[1] * STEP

    def to(self, device: torch.device) -> Q4:
        """The same on `device`."""
        zeros, order = (each if each is None else each.to(device) for each in (self.zeros, self.order))
        weights, scales, factors = (each.to(device) for each in (self.weights, self.scales, self.factors))
        return replace(self, weights=weights, scales=scales, zeros=zeros, factors=factors, order=order)


def pack(qweight: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Q4 | None:
    """The tensors of linear_gptq.dequantise in the kernels' layout; None where they do not fit it.

    They fit with 4 bits, fp16 scales, K in whole steps and groups of equal size, in any order of the inputs.
    """
    inputs, outputs = len(group), qweight.shape[1]
    size = inputs // len(scales)
    if len(qweight) * 8 != inputs or scales.dtype != torch.float16 or inputs % STEP:
        return None
    if size not in GROUPS and size % STEP:
        return None
    order = group.argsort(stable=True)
    regular = torch.arange(inputs, device=group.device) // size
    if not torch.equal(group[order], regular):
        return None
    own = torch.equal(group, regular)
    levels = unpack(qweight, 4) if own else unpack(qweight, 4)[order]
    whole = -outputs % BLOCK
    levels, scales, zeros = (torch.nn.functional.pad(each, (0, whole)) for each in (levels, scales, zeros))
    packed_scales, factors = _pack_scales(scales)
    symmetric = bool((zeros[:, :outputs] == 8).all())
    packed_zeros = (
        None if symmetric else _pair_rows(zeros.to(torch.int16)) * zeros.new_tensor([1, 16], dtype=torch.int16)
    )
    return Q4(_pack_levels(levels.T), packed_scales, packed_zeros, factors, outputs, size, None if own else order)


def join(parts: Sequence[Q4]) -> Q4 | None:
    """The outputs of all, one after another; None where they differ in more than their numbers, or fill no blocks."""
    first = parts[0]
    for each in parts:
        same = (each.group, each.inputs, each.zeros is None) == (first.group, first.inputs, first.zeros is None)
        if not same or each.outputs % BLOCK or (each.order is None) != (first.order is None):
            return None
        if each.order is not None and first.order is not None and not torch.equal(each.order, first.order):
            return None
    zeros = [each.zeros for each in parts if each.zeros is not None]
    weights, scales, factors = (torch.cat([getattr(each, name) for each in parts]) for name in _PARTS)
    outputs = sum(each.outputs for each in parts)
    return Q4(weights, scales, torch.cat(zeros) if zeros else None, factors, outputs, first.group, first.order)


_PARTS = ("weights", "scales", "factors")


def split(whole: Q4, outputs: Sequence[int]) -> list[Q4]:
    """The parts of `join`, views into it."""
    weights = whole.weights.split([size // BLOCK for size in outputs])
    scales = whole.scales.split([size // 16 for size in outputs])
    zeros = [None] * len(outputs) if whole.zeros is None else whole.zeros.split([size // 16 for size in outputs])
    parts = zip(weights, scales, zeros, whole.factors.split(list(outputs)), outputs, strict=True)
    return [Q4(w, s, z, f, size, whole.group, whole.order) for w, s, z, f, size in parts]


def _pack_levels(levels: Tensor) -> Tensor:
    """uint8 [N, K] -> `weights`."""
    rows, columns = levels.shape
    # block, tile, h, l / 4, step, half, l % 4, j, p, e
    parts = levels.reshape(rows // BLOCK, 4, 2, 8, columns // STEP, 2, 4, 4, 2, 2)
    words = parts.new_zeros(parts.shape[:2] + parts.shape[3:8], dtype=torch.int32)
    for h in range(2):
        for p in range(2):
            for e in range(2):
                words |= parts[:, :, h, ..., p, e].int() << 4 * (2 * p + h + 4 * e)
    return words.permute(0, 3, 1, 4, 2, 5, 6).reshape(rows // BLOCK, columns // STEP, 4, 2, 32, 4).contiguous()


def _pair_rows(per_group: Tensor) -> Tensor:
    """[G, N] -> [N/16, G, 8, 2], rows r and r + 8 side by side."""
    return per_group.T.reshape(-1, 2, 8, len(per_group)).permute(0, 3, 2, 1).contiguous()


def _pack_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """[G, N] -> `scales` and `factors`; the largest scale of a row comes to 2^15 or more, below fp16's limit."""
    exponent = torch.frexp(scales.float().abs().amax(0)).exponent
    largest = torch.ldexp(scales.float(), 16 - exponent)
    pairs = _pair_rows(largest) * largest.new_tensor([1, 1 / 16])
    return pairs.half(), torch.ldexp(torch.ones_like(largest[0]), exponent + 8)


def dequantise(q4: Q4) -> Tensor:
    """The weights as linear_gptq.dequantise gives them, fp16 [K, N]."""
    blocks, steps = q4.weights.shape[:2]
    words = q4.weights.view(blocks, steps, 4, 2, 8, 4, 4).permute(0, 2, 4, 1, 3, 5, 6)
    levels = torch.stack([words >> 4 * i & 15 for i in range(8)], -1)  # block, tile, l / 4, step, half, l % 4, j, bits
    levels = levels.unflatten(-1, (2, 2, 2))  # e, p, h
    levels = levels.permute(0, 1, 9, 2, 3, 4, 5, 6, 8, 7).reshape(blocks * BLOCK, steps * STEP)
    scales = _split_rows(q4.scales.float() * q4.scales.new_tensor([2.0**-24, 2.0**-20], dtype=torch.float32))
    scales = (scales * q4.factors[:, None]).half().repeat_interleave(q4.group, 1)
    if q4.zeros is None:
        differences = levels - 8
    else:
        zeros = _split_rows(q4.zeros // q4.zeros.new_tensor([1, 16]))
        differences = levels - zeros.repeat_interleave(q4.group, 1)
    stored: Tensor = (differences.half() * scales).T[:, : q4.outputs]
    return stored if q4.order is None else stored[q4.order.argsort()]


def _split_rows(pairs: Tensor) -> Tensor:
    """[N/16, G, 8, 2] -> [N, G]."""
    return pairs.permute(0, 3, 2, 1).reshape(-1, pairs.shape[1])
