"""Activations between the kernels around q4_mid: as it reads them, and what it leaves to the next kernel to add."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import Kernel, Launch

TILE = 128
"""Tokens of q4_mid's largest block."""


@dataclass(frozen=True, slots=True)
class Arranged:
    """rows fp16 [T, K], and the same in the order of image.cuh: fp16 [K/64, padded T, 64]."""

    rows: Tensor
    image: Tensor

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Partial:
    """y [T, N] = the sum over P, in their order, of parts float32 [P, T, W], and bias [N]; W >= N."""

    parts: Tensor
    bias: Tensor | None

    def __len__(self) -> int:
        return self.parts.shape[1]


def new_image(x: Tensor) -> Tensor:
    """Room for the image of x [T, K], K a multiple of 64; T is filled up to whole blocks of q4_mid."""
    tokens, width = x.shape
    padded = next((n for n in (16, 32, 64) if n >= tokens), -(-tokens // TILE) * TILE)
    return x.new_empty(width // 64, padded, 64, dtype=torch.float16)


def arrange(x: Tensor, order: Tensor | None, image: Tensor) -> Launch:
    """The launch of q4_arrange: image of x, whose columns are taken in `order`."""
    steps, padded, _ = image.shape
    grid = steps, -(-len(x) // 16), 1
    return Launch(Kernel("q4_arrange", ()), grid, 128, (x, order, image, len(x), padded, x.shape[1]))
