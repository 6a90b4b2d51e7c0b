"""Weights of 8, 6, 5, 4, 3 and 2 bits, mixed in a matrix, in one layout for all kernels, made when a model is loaded.

Rows of Wᵀ (outputs) in tiles of 16, columns (inputs) in an order of their own: those of 8 bits, then of 6, 5, 4, 3, 2.
The columns of a width b are filled up to whole steps of 64. A tile and a step have 32 b words: for each power of two in
b, from the highest, a plane of so many bits of every number, [32 lanes, words], and with 8 bits [2, 32 lanes, 4].
Lane l holds rows l/4 and l/4 + 8 and columns 16 (l%4) to 16 (l%4) + 15. Of a plane of w bits, number i = 4 j + 2 p + h
(row l/4 + 8 h, column 4 j + 2 p + e) is in word i w / 16, from bit i w % 16 + 16 e on. The highest plane but 8 bits'
only one holds the lowest bits of the numbers.
words int32 [N/16, words of all steps]. scales fp16 [N/16, G, 8, 2]: of rows r and r + 8. zeros fp16, as the scales:
-z, or None where every zero point is 2^(b-1). N is filled up to a multiple of 64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from .bits import unpack, unpack_rows

WIDTHS = (8, 6, 5, 4, 3, 2)
BLOCK, TILE, STEP = 64, 16, 64
SLICE = 8192
"""Outputs that are laid out at a time, to spare memory."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """Weights [N, K] as the module tells. `widths`: of each width, the steps to its end, and log2 of a group's columns.

    order: int32, the input of each stored column, -1 for filling; None where they are the inputs.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    widths: tuple[tuple[int, int], ...]
    inputs: int
    outputs: int

    @property
    def columns(self) -> int:
        """Stored columns, filling included."""
        return self.widths[-1][0] * STEP

    def to(self, device: torch.device) -> Mixed:
        """The same on `device`."""
        zeros, order = (each if each is None else each.to(device) for each in (self.zeros, self.order))
        return replace(self, words=self.words.to(device), scales=self.scales.to(device), zeros=zeros, order=order)

    def position(self) -> Tensor | None:
        """int64 [K]: the stored column of each input; None where that is the input itself."""
        return None if self.order is None else self.order.argsort()[self.columns - self.inputs :]


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of a width as they are stored: numbers uint8 [R, N], scales fp16 [G, N], zeros [G, N] or None.

    sizes: rows of each group. inputs: int64 [R], the input of each row.
    """

    bits: int
    levels: Tensor
    scales: Tensor
    zeros: Tensor | None
    sizes: Sequence[int]
    inputs: Tensor


def join(parts: Sequence[Mixed]) -> Mixed | None:
    """One matrix with the outputs of all; None unless their columns are stored alike and their outputs in whole blocks.

    Parts of which only some have zero points do not go together either.
    """
    first = parts[0]
    alike = all(
        each.widths == first.widths and each.inputs == first.inputs and (each.zeros is None) == (first.zeros is None)
        and _same(each.order, first.order) for each in parts
    )  # fmt: skip
    if not alike or any(each.outputs % BLOCK for each in parts[:-1]):
        return None
    zeros = None if first.zeros is None else torch.cat([each.zeros for each in parts if each.zeros is not None])
    words, scales = (torch.cat([getattr(each, name) for each in parts]) for name in ("words", "scales"))
    return replace(first, words=words, scales=scales, zeros=zeros, outputs=sum(each.outputs for each in parts))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def pack_exl2(
    words: Tensor, codes: Tensor, scale_max: Tensor, groups: Sequence[tuple[int, int]], order: Tensor, outputs: int
) -> Mixed | None:
    """The tensors of linear_exl2.dequantise in the kernels' layout; None where groups are not in sixteens."""
    inputs, firsts = order.argsort(), list(accumulate((rows for _, rows in groups), initial=0))
    steps = unpack_rows(codes, 4).half() + 1
    scales, made = steps * steps * (scale_max / 256)[:, None], []
    word_at = list(accumulate((rows * bits // 32 for bits, rows in groups), initial=0))
    for begin in range(0, outputs, SLICE):
        end, parts = min(begin + SLICE, outputs), []
        for width in WIDTHS:
            chosen = [g for g, (bits, _) in enumerate(groups) if bits == width]
            if chosen:
                stream = torch.cat([words[word_at[g] : word_at[g + 1], begin:end] for g in chosen])
                rows = torch.cat([inputs[firsts[g] : firsts[g + 1]] for g in chosen])
                sizes = [groups[g][1] for g in chosen]
                parts.append(Part(width, unpack(stream, width), scales[chosen, begin:end], None, sizes, rows))
        made.append(_lay_out(parts, len(order)))
    return _whole(made)


def pack_gptq(qweight: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Mixed | None:
    """The tensors of linear_gptq.dequantise in the kernels' layout; None where they do not fit it.

    They fit with fp16 scales and groups in sixteens, in any order of the inputs.
    """
    bits, outputs = 32 * len(qweight) // len(group), qweight.shape[1]
    inputs = group.argsort(stable=True)
    sizes = group.bincount(minlength=len(scales)).tolist()
    if scales.dtype != torch.float16 or not all(sizes):
        return None
    symmetric, made = bool((zeros == 1 << bits - 1).all()), []
    for begin in range(0, outputs, SLICE):
        some = slice(begin, min(begin + SLICE, outputs))
        levels = unpack(qweight[:, some], bits)[inputs]
        part = Part(bits, levels, scales[:, some], None if symmetric else zeros[:, some], sizes, inputs)
        made.append(_lay_out([part], len(group)))
    return _whole(made)


def _whole(made: Sequence[Mixed | None]) -> Mixed | None:
    slices = [each for each in made if each is not None]
    return join(slices) if len(slices) == len(made) else None


def _lay_out(parts: Sequence[Part], inputs: int) -> Mixed | None:
    """Parts in the order of WIDTHS -> the layout."""
    words, scales, zeros, order, widths, end = [], [], [], [], [], 0
    for width in WIDTHS:
        part, shift = next((part for part in parts if part.bits == width), None), 0
        if part is not None:
            found = _granule(part.sizes)
            if found is None:
                return None
            shift, steps = found, -(-len(part.inputs) // STEP)
            end += steps
            fill, across = steps * STEP - len(part.inputs), -part.levels.shape[1] % BLOCK
            levels = torch.nn.functional.pad(part.levels, (0, across, 0, fill), value=1 << width - 1)
            words.append(_pack_levels(levels, width))
            scales.append(_per_group(part.scales, part.sizes, shift, steps))
            if part.zeros is not None:
                zeros.append(_per_group(-part.zeros.half(), part.sizes, shift, steps))
            order.append(torch.nn.functional.pad(part.inputs, (0, fill), value=-1))
        widths.append((end, shift))
    stored = torch.cat(order).int()
    own = torch.equal(stored, torch.arange(inputs, dtype=torch.int32, device=stored.device))
    every_zero = torch.cat(zeros, 1) if zeros else None
    outputs = parts[0].levels.shape[1]
    every_scale, none_if_own = torch.cat(scales, 1), None if own else stored
    return Mixed(torch.cat(words, 1), every_scale, every_zero, none_if_own, tuple(widths), inputs, outputs)


def _granule(sizes: Sequence[int]) -> int | None:
    """log2 of the columns of which every group but the last is a multiple; None below 16."""
    common = math.gcd(*accumulate(sizes[:-1]))
    shift = (common & -common).bit_length() - 1 if common else max(sizes[0] - 1, 15).bit_length()
    return shift if shift >= 4 else None


def _per_group(numbers: Tensor, sizes: Sequence[int], shift: int, steps: int) -> Tensor:
    """[G, N] of groups -> fp16 [N/16, groups of 2^shift columns, 8, 2], filled up with 0."""
    granules = torch.tensor([_ceil(size, shift) for size in sizes], device=numbers.device)
    repeated = numbers.repeat_interleave(granules, 0)
    rows = -(-repeated.shape[1] // BLOCK) * BLOCK
    filled = repeated.new_zeros(_ceil(steps * STEP, shift), rows, dtype=torch.float16)
    filled[: len(repeated), : repeated.shape[1]] = repeated
    return filled.T.reshape(-1, 2, 8, len(filled)).permute(0, 3, 2, 1).contiguous()


def _ceil(count: int, shift: int) -> int:
    return -(-count >> shift)


def _pack_levels(levels: Tensor, bits: int) -> Tensor:
    """uint8 [columns in whole steps, N in whole tiles] -> the words of one width, int32 [N/16, words]."""
    columns, rows = levels.shape
    # tile, h, l / 4, step, l % 4, j, p, e
    numbers = levels.T.reshape(rows // TILE, 2, 8, columns // STEP, 4, 4, 2, 2)
    numbers = numbers.permute(0, 3, 2, 4, 5, 6, 1, 7).reshape(rows // TILE, columns // STEP, 32, 16, 2)
    planes, low = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            planes.append(_pack_plane(numbers >> low & (1 << width) - 1, width))
            low += width
    return torch.cat(planes, 2).flatten(1)


def _pack_plane(numbers: Tensor, width: int) -> Tensor:
    """uint8 [tiles, steps, 32 lanes, 16, 2] below 2^width -> int32 [tiles, steps, 32 width]."""
    split = numbers.unflatten(3, (width, 16 // width))
    words = split.new_zeros(split.shape[:4], dtype=torch.int32)
    for at in range(16 // width):
        for e in range(2):
            words |= split[..., at, e].int() << at * width + 16 * e
    ordered: Tensor = words.unflatten(3, (2, 4)).transpose(2, 3) if width == 8 else words
    return ordered.flatten(2)
