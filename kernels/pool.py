"""Pools of the paged cache: K or V of one layer, as floats or quantised. Attention knows only `write` and `read`.

The quantised form is ExLlamaV2's, byte for byte: a Hadamard rotation spreads outliers, 32 neighbours share a scale.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

RUN, GROUP = 64, 32
"""Values that are rotated together, and that share a scale."""
LIMIT = 65504.0
"""The largest number of fp16."""


class Pool(Protocol):
    """[pages, heads, page, D] values, in whatever form."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(pages, heads, page, D)."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""

    def write(self, new: Tensor, pages: Tensor, offsets: Tensor) -> None:
        """Put new [T, heads, D] at (page, offset) int64 [T].

        Values are made finite and kept in fp16's range: a masked key has weight 0, and 0 * inf would leak out of a page
        into the job that uses it next.
        """

    def read(self, blocks: Tensor, size: int) -> Tensor:
        """float32 [n, size, D] for int64 [n]: page (p * heads + head) has page / size blocks in order."""

    def gather(self, pages: Tensor) -> Tensor:
        """[heads, n * page, D] of pages int64 [n]; fp16 of a quantised pool."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of a page to another."""


class FloatPool:
    """fp16, bf16 or fp32, zeros at first."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.values = shape, torch.zeros(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.values.nbytes

    def write(self, new: Tensor, pages: Tensor, offsets: Tensor) -> None:
        """See Pool."""
        self.values[pages, :, offsets] = new.to(self.values.dtype).nan_to_num(0.0).clamp_(-LIMIT, LIMIT)

    def read(self, blocks: Tensor, size: int) -> Tensor:
        """See Pool."""
        return self.values.view(-1, size, self.shape[-1]).index_select(0, blocks).float()

    def gather(self, pages: Tensor) -> Tensor:
        """See Pool."""
        return self.values.transpose(0, 1).index_select(1, pages).flatten(1, 2)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """See Pool."""
        self.values[target, :, :tokens] = self.values[source, :, :tokens]


class QuantisedPool:
    """codes uint8 [pages, heads, page, D bits / 8] and scales fp16 [pages, heads, page, D / 32]; bits 4 or 8."""

    def __init__(self, shape: tuple[int, int, int, int], bits: int, device: torch.device) -> None:
        *places, dim = shape
        self.shape, self.bits = shape, bits
        self.codes = torch.zeros(*places, dim * bits // 8, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(*places, dim // GROUP, dtype=torch.float16, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.codes.nbytes + self.scales.nbytes

    def write(self, new: Tensor, pages: Tensor, offsets: Tensor) -> None:
        """See Pool."""
        self.codes[pages, :, offsets], self.scales[pages, :, offsets] = quantise(new, self.bits)

    def read(self, blocks: Tensor, size: int) -> Tensor:
        """See Pool."""
        codes, scales = (
            tensor.view(-1, size, tensor.shape[-1]).index_select(0, blocks) for tensor in (self.codes, self.scales)
        )
        return dequantise(codes, scales, self.bits).float()

    def gather(self, pages: Tensor) -> Tensor:
        """See Pool."""
        codes, scales = (
            tensor.transpose(0, 1).index_select(1, pages).flatten(1, 2) for tensor in (self.codes, self.scales)
        )
        return dequantise(codes, scales, self.bits)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """See Pool."""
        for tensor in (self.codes, self.scales):
            tensor[target, :, :tokens] = tensor[source, :, :tokens]


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x [..., D], D a multiple of 64 -> codes uint8 [..., D bits / 8], scales fp16 [..., D / 32].

    code = round(w / a * half) + half for w = rotate(x) and a the largest |w| of its group, half = 2^(bits - 1), in
    fp16; scale = a / half. Two codes of 4 bits fill a byte, the first below. Values are kept within 2047, so that sums
    of 32 stay in fp16's range.
    """
    half = 1 << (bits - 1)
    bound = LIMIT // GROUP
    x = x.float().nan_to_num(0.0).clamp(-bound, bound).half()
    groups = rotate(x).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    shares = torch.where(largest > 0, groups / largest, -1.0).float()
    codes = (shares * half + half).half().round().clamp_(0, 2 * half - 1).to(torch.uint8).flatten(-2)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes, (largest / half).squeeze(-1)


def dequantise(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The inverse, fp16 [..., D]: rotate((code - half) scale) / 32."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    values = (codes.half() - (1 << (bits - 1))).unflatten(-1, (-1, GROUP)) * scales[..., None]
    return (rotate(values.flatten(-2)) / GROUP).nan_to_num_(0.0)


def rotate(x: Tensor) -> Tensor:
    """fp16 [..., D] -> [..., D]: of each run of 64, Sylvester's Hadamard matrix of 32 times even and times odd places.

    Not normalised, in fp16, by butterflies of strides 1, 2, 4, 8, 16.
    """
    runs = x.unflatten(-1, (-1, GROUP, RUN // GROUP)).transpose(-1, -2)
    for stride in (1, 2, 4, 8, 16):
        a, b = runs.unflatten(-1, (-1, 2, stride)).unbind(-2)
        runs = torch.stack([a + b, a - b], -2).flatten(-3)
    rotated: Tensor = runs.transpose(-1, -2).flatten(-3)
    return rotated
