"""y = x W + b with the weights of q4.py: up to 16 tokens by q4_decode, more by q4_mid, many by cuBLAS."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Kernel, Launch, launch, require, usable
from .q4 import BLOCK, Q4, STEP, dequantise

FEW, MANY = 16, 128
"""Tokens of the largest batch of q4_decode, where q4_mid can run, and of both."""
SHARED = {1: 231936, 2: 115200, 3: 76288}
"""Bytes of shared memory that each of so many blocks of a multiprocessor can have."""


def linear_q4(x: Tensor, q4: Q4, bias: Tensor | None) -> Tensor:
    """x [T, K], bias [N] -> [T, N]. To 128 tokens of fp16 the weights are read as they are stored.

    A row's bits do not depend on the others within a family: to 16 tokens, to 128, more.
    """
    if usable(x) and (len(x) > MANY or x.dtype != torch.float16):
        weight = torch.empty(len(q4.factors), q4.inputs, dtype=torch.float16, device=x.device)
        launch(widen(q4, weight))
        ordered = x if q4.order is None else x[:, q4.order]
        return torch.nn.functional.linear(ordered, weight[: q4.outputs].to(x.dtype), bias)
    if not usable(x):
        y = x @ dequantise(q4).to(x.dtype)
        return y if bias is None else y + bias
    y = x.new_empty(len(x), q4.outputs)
    if len(x) > FEW and usable(x, hopper=True) and q4.outputs % 4 == 0:
        for each in mid(x.contiguous(), q4, bias, y):
            launch(each)
    elif len(x):
        launch(decode(x, q4, bias, y))
    return y


def widen(q4: Q4, out: Tensor) -> Launch:
    """The launch of q4_dequantise: out fp16 [N to whole blocks, K], columns as they are stored."""
    rows, steps = len(q4.factors), q4.weights.shape[1]
    require("out", out, torch.float16, rows, q4.inputs, like=q4.weights)
    kernel = Kernel("q4_dequantise", tuple(_format(q4).items()))
    return Launch(kernel, (steps, rows // BLOCK, 1), 256, (*_weights(q4), out, q4.inputs))


class DecodeShape(NamedTuple):
    """Tiles of 16 rows and warps of a block, steps that a warp has in flight, blocks of a multiprocessor."""

    tiles: int
    warps: int
    depth: int
    blocks: int


def decode(x: Tensor, q4: Q4, bias: Tensor | None, y: Tensor, shape: DecodeShape | None = None) -> Launch:
    """The launch of q4_decode for any number of tokens, in blocks of 8 or 16.

    The bits of a row are the same for any number: the shape hangs on the weights alone.
    """
    x = x.contiguous() if q4.order is None else x[:, q4.order]
    _require(x, q4, bias, y)
    tiles, warps, depth, blocks = shape or _decode_shape(q4)
    columns = 1 if len(x) <= 8 else 2
    macros = {"TILES": tiles, "WARPS": warps, "DEPTH": depth, "BLOCKS": blocks, "COLUMNS": columns} | _format(q4)
    grid = len(q4.factors) // (16 * tiles), -(-len(x) // (8 * columns)), 1
    arguments = *_weights(q4), bias, x, y, len(x), q4.outputs, q4.inputs
    shared = warps * columns * 8 * tiles * 16 * 4
    return Launch(Kernel("q4_decode", tuple(macros.items())), grid, warps * 32, arguments, shared)


def _decode_shape(q4: Q4) -> DecodeShape:
    """As measured on an H200: as many blocks as fill it, and the rest of the work shared by warps."""
    rows = len(q4.factors)
    if rows > 8192:
        return DecodeShape(2, 4, 2, 4)
    return DecodeShape(2, 8, 2, 2) if rows > 4096 else DecodeShape(2, 16, 1, 1)


class MidShape(NamedTuple):
    """Warpgroups and tokens of a block, parts of K, blocks of a multiprocessor."""

    warpgroups: int
    tokens: int
    splits: int
    blocks: int


def mid(x: Tensor, q4: Q4, bias: Tensor | None, y: Tensor, shape: MidShape | None = None) -> list[Launch]:
    """The launches of q4_arrange, q4_mid and, where K is in parts, sum_partials.

    The bits of a row are the same for any number of tokens: the parts of K hang on the weights alone.
    """
    _require(x, q4, bias, y)
    shape = shape or _mid_shape(q4, len(x))
    if q4.weights.shape[0] % shape.warpgroups or q4.outputs % 4:
        raise ValueError(f"{q4.outputs} outputs are not for blocks of {shape.warpgroups} warpgroups; choose a divisor")
    rows, tiles, sums = len(q4.factors), -(-len(x) // shape.tokens), []
    image = x.new_empty(tiles * shape.tokens * q4.inputs)
    partial = x.new_empty(shape.splits * len(x) * rows if shape.splits > 1 else 0, dtype=torch.float32)
    if shape.splits > 1:
        sums = [add_parts(partial.view(shape.splits, len(x), rows), bias, y)]
    stage, levels = shape.tokens * 256 + shape.warpgroups * 4096, _level_bytes(q4, shape)
    blocks, stages = _stages(shape.blocks, stage, 256 + levels)
    macros = {"WARPGROUPS": shape.warpgroups, "TOKENS": shape.tokens, "SPLITS": shape.splits, "BLOCKS": blocks}
    kernel = Kernel("q4_mid", tuple((macros | {"STAGES": stages} | _format(q4)).items()), hopper=True)
    arguments = *_weights(q4), bias, image, y, partial, len(x), q4.outputs, rows, q4.inputs
    grid = tiles, rows // (BLOCK * shape.warpgroups) * shape.splits, 1
    main = Launch(kernel, grid, shape.warpgroups * 128 + 32, arguments, stages * stage + 256 + levels)
    return [arrange(x, q4.order, shape.tokens, image), main, *sums]


def _mid_shape(q4: Q4, tokens: int) -> MidShape:
    """As measured on an H200; `splits` must not hang on the tokens."""
    blocks, steps = q4.weights.shape[:2]
    few = next(n for n in (16, 32, 64) if n >= min(tokens, 64))
    pairs = 2 - blocks % 2
    if blocks >= 256 or steps < 8:
        return MidShape(pairs, few, 1, 2)
    if steps >= 64:
        return MidShape(pairs, few, 8, 2)
    if tokens > 64 and blocks <= 64:
        return MidShape(pairs, 128, 4, 1)
    return MidShape(1, 128 if tokens > 64 else few, 4, 3)


def _stages(blocks: int, stage: int, rest: int) -> tuple[int, int]:
    """Blocks of a multiprocessor, at most so many, that have room for two stages or more, and the stages."""
    for fewer in range(blocks, 0, -1):
        stages = min(8, (SHARED[fewer] - rest) // stage)
        if stages >= 2:
            return fewer, stages
    raise ValueError(f"two stages of {stage} bytes beside {rest} do not fit into shared memory; choose fewer tokens")


def _level_bytes(q4: Q4, shape: MidShape) -> int:
    """Scales and zeros of a block."""
    groups = -(-q4.weights.shape[1] // shape.splits) * STEP // q4.group + 1
    return shape.warpgroups * 4 * groups * 32 * (1 if q4.zeros is None else 2)


def arrange(x: Tensor, order: Tensor | None, tokens: int, image: Tensor) -> Launch:
    """The launch of q4_arrange."""
    grid = x.shape[1] // 64, -(-tokens // 16), -(-len(x) // tokens)
    kernel = Kernel("q4_arrange", (("TOKENS", tokens),))
    return Launch(kernel, grid, 128, (x, order, image, len(x), x.shape[1]))


def add_parts(partial: Tensor, bias: Tensor | None, y: Tensor) -> Launch:
    """The launch of sum_partials: partial float32 [P, T, W] -> y fp16 [T, N], N a multiple of 4 and not above W."""
    parts, tokens, width = partial.shape
    kernel = Kernel("sum_partials", (("PARTS", parts), ("WIDTH", width)))
    return Launch(kernel, (tokens, -(-y.shape[1] // 1024), 1), 256, (partial, bias, y, tokens, y.shape[1]))


def _require(x: Tensor, q4: Q4, bias: Tensor | None, y: Tensor) -> None:
    require("x", x, torch.float16, len(x), q4.inputs, like=q4.weights)
    require("y", y, torch.float16, len(x), q4.outputs, like=x)
    if bias is not None:
        require("bias", bias, torch.float16, q4.outputs, like=x)


def _weights(q4: Q4) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    return q4.weights, q4.scales, q4.zeros, q4.factors


def _format(q4: Q4) -> dict[str, int]:
    return {"GROUP": q4.group, "ZEROS": int(q4.zeros is not None)}
