"""y = x W + b with the weights of mixed.py: up to 128 tokens by mixed_decode, more by cuBLAS."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gather_columns import gather_columns
from .launch import Kernel, Launch, launch, require
from .mixed import BLOCK, STEP, TILE, Mixed

MANY = 128
"""Tokens of the largest batch for which the weights are read as they are stored."""


def linear_mixed(x: Tensor, mixed: Mixed, bias: Tensor | None) -> Tensor:
    """x [T, K], bias [N] -> [T, N], where kernels run. To 128 tokens of fp16 the weights are read as they are stored.

    A row's bits do not depend on the others within a family: to 128 tokens, more.
    """
    x = x.contiguous() if mixed.order is None else gather_columns(x, mixed.order)
    if len(x) > MANY or x.dtype != torch.float16:
        return torch.nn.functional.linear(x, _stored(mixed)[: mixed.outputs].to(x.dtype), bias)
    y = x.new_empty(len(x), mixed.outputs)
    if len(x):
        launch(decode(x, mixed, bias, y))
    return y


def dense(mixed: Mixed) -> Tensor:
    """The weights as ExLlamaV2 and GPTQ round them, fp16 [K, N], turned in memory, where kernels run."""
    weight, position = _stored(mixed)[: mixed.outputs], mixed.position()
    return (weight if position is None else weight[:, position]).T


def _stored(mixed: Mixed) -> Tensor:
    weight = mixed.scales.new_empty(len(mixed.words) * TILE, mixed.columns)
    launch(widen(mixed, weight))
    return weight


def widen(mixed: Mixed, out: Tensor) -> Launch:
    """The launch of mixed_dequantise: out fp16 [N to whole blocks, columns], columns as they are stored."""
    tiles, steps = len(mixed.words), mixed.columns // STEP
    require("out", out, torch.float16, tiles * TILE, mixed.columns, like=mixed.words)
    kernel = Kernel("mixed_dequantise", (("ZEROS", int(mixed.zeros is not None)),))
    return Launch(kernel, (-(-steps // 8), tiles, 1), 256, (*_weights(mixed), out, *_layout(mixed)))


class DecodeShape(NamedTuple):
    """Tiles of 16 rows and warps of a block, words of a tile that a lane waits for, blocks of a multiprocessor."""

    tiles: int
    warps: int
    flight: int
    blocks: int


def decode(x: Tensor, mixed: Mixed, bias: Tensor | None, y: Tensor, shape: DecodeShape | None = None) -> Launch:
    """The launch of mixed_decode for any number of tokens, in blocks of 8 or 16; x has its columns as they are stored.

    The bits of a row are the same for any number: the shape hangs on the weights alone.
    """
    require("x", x, torch.float16, len(x), mixed.columns, like=mixed.words)
    require("y", y, torch.float16, len(x), mixed.outputs, like=x)
    if bias is not None:
        require("bias", bias, torch.float16, mixed.outputs, like=x)
    tiles, warps, flight, blocks = shape or _decode_shape(mixed)
    columns = 1 if len(x) <= 8 else 2
    flight = min(flight, 20 if columns == 1 else 10)  # what the registers hold
    macros = {"TILES": tiles, "WARPS": warps, "FLIGHT": flight, "BLOCKS": blocks, "COLUMNS": columns}
    kernel = Kernel("mixed_decode", tuple((macros | {"ZEROS": int(mixed.zeros is not None)}).items()))
    grid = len(mixed.words) // tiles, -(-len(x) // (8 * columns)), 1
    arguments = *_weights(mixed), bias, x, y, len(x), mixed.outputs, *_layout(mixed)
    return Launch(kernel, grid, warps * 32, arguments, warps * columns * 8 * tiles * TILE * 4)


def _decode_shape(mixed: Mixed) -> DecodeShape:
    """As many blocks as fill an H200, and the rest of the work shared by warps."""
    blocks = len(mixed.words) * TILE // BLOCK
    if blocks > 256:
        return DecodeShape(2, 4, 10, 4)
    if blocks > 64:
        return DecodeShape(2, 8, 20, 2)
    return DecodeShape(2, 16, 10, 1) if blocks > 16 else DecodeShape(1, 16, 10, 1)


def _weights(mixed: Mixed) -> tuple[Tensor, Tensor, Tensor | None]:
    return mixed.words, mixed.scales, mixed.zeros


def _layout(mixed: Mixed) -> tuple[int, ...]:
    """Words of a lane and groups in a row of tiles, then the widths as mixed.cuh takes them."""
    stride, groups = mixed.words.shape[1] // 32, mixed.scales.shape[1]
    return stride, groups, *(end << 5 | shift for end, shift in mixed.widths)
