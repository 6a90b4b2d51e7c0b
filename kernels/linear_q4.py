"""y = x W + b with the weights of q4.py: up to 8 tokens by q4_decode, to 256 by q4_mid, more by cuBLAS."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arranged import Arranged, Partial, arrange, new_image
from .launch import Kernel, Launch, launch, require, usable
from .q4 import BLOCK, Q4, STEP, dequantise

FEW, MANY, BLOCKWISE = 8, 256, 128
"""Tokens of the largest batch of q4_decode, of q4_mid, and of q4_decode where q4_mid cannot run."""
SHARED = {1: 231936, 2: 115200, 3: 76288}
"""Bytes of shared memory that each of so many blocks of a multiprocessor can have."""


def linear_q4(x: Tensor | Arranged, q4: Q4, bias: Tensor | None) -> Tensor:
    """x [T, K], bias [N] -> [T, N]. To 256 tokens of fp16 the weights are read as they are stored.

    A row's bits do not depend on the others within a family: to 8 tokens, to 128, to 256, more.
    """
    if takes_arranged(x, q4):
        y = linear_q4_parts(x, q4, bias)
        return y if isinstance(y, Tensor) else add_up(y, q4.outputs)
    x = x if isinstance(x, Tensor) else x.rows
    if usable(x) and (len(x) > BLOCKWISE or x.dtype != torch.float16):
        weight = torch.empty(len(q4.factors), q4.inputs, dtype=torch.float16, device=x.device)
        launch(widen(q4, weight))
        ordered = x if q4.order is None else x[:, q4.order]
        return torch.nn.functional.linear(ordered, weight[: q4.outputs].to(x.dtype), bias)
    if not usable(x):
        y = x @ dequantise(q4).to(x.dtype)
        return y if bias is None else y + bias
    y = x.new_empty(len(x), q4.outputs)
    if len(x):
        launch(decode(x, q4, bias, y))
    return y


def takes_arranged(x: Tensor | Arranged, q4: Q4) -> bool:
    """Whether q4_mid does this product: it reads an image where x has one."""
    rows = x if isinstance(x, Tensor) else x.rows
    fits = FEW < len(rows) <= MANY and rows.dtype == torch.float16 and q4.outputs % 4 == 0
    return fits and usable(rows, hopper=True)


def linear_q4_parts(x: Tensor | Arranged, q4: Q4, bias: Tensor | None) -> Tensor | Partial:
    """linear_q4 where `takes_arranged`; where q4_mid divides K, what it leaves to the next kernel to add."""
    launches, y = mid(x, q4, bias)
    for each in launches:
        launch(each)
    return y


def add_up(partial: Partial, outputs: int) -> Tensor:
    """[T, N] of a partial result, by sum_partials."""
    y = partial.parts.new_empty(len(partial), outputs, dtype=torch.float16)
    launch(add_parts(partial, y))
    return y


def dense(q4: Q4) -> Tensor:
    """The weights as q4.dequantise gives them, fp16 [K, N], turned in memory, where kernels run."""
    weight = torch.empty(len(q4.factors), q4.inputs, dtype=torch.float16, device=q4.weights.device)
    launch(widen(q4, weight))
    stored = weight[: q4.outputs]
    return (stored if q4.order is None else stored[:, q4.order.argsort()]).T


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

    The bits of a row are the same for any number: what divides K hangs on the weights alone.
    """
    x = x.contiguous() if q4.order is None else x[:, q4.order]
    _require(x, q4, bias, y)
    columns = 1 if len(x) <= 8 else 2
    tiles, warps, depth, blocks = shape or _decode_shape(q4, columns)
    macros = {"TILES": tiles, "WARPS": warps, "DEPTH": depth, "BLOCKS": blocks, "COLUMNS": columns} | _format(q4)
    grid = len(q4.factors) // (16 * tiles), -(-len(x) // (8 * columns)), 1
    arguments = *_weights(q4), bias, x, y, len(x), q4.outputs, q4.inputs
    shared = warps * columns * 8 * tiles * 16 * 4
    return Launch(Kernel("q4_decode", tuple(macros.items())), grid, warps * 32, arguments, shared)


def _decode_shape(q4: Q4, columns: int) -> DecodeShape:
    """As measured on an H200: as many blocks as fill it, and the rest of the work shared by warps.

    The warps, which divide K, hang on the weights alone; the registers of two columns leave less in flight.
    """
    rows = len(q4.factors)
    if rows > 8192:
        return DecodeShape(4 // columns, 4, 1, 4)
    depth = 2 // columns
    return DecodeShape(2, 8, depth, 2) if rows > 4096 else DecodeShape(2, 16, depth, 1)


class MidShape(NamedTuple):
    """Warpgroups and tokens of a block, parts of K, blocks of a multiprocessor."""

    warpgroups: int
    tokens: int
    splits: int
    blocks: int


def mid(
    x: Tensor | Arranged, q4: Q4, bias: Tensor | None, shape: MidShape | None = None
) -> tuple[list[Launch], Tensor | Partial]:
    """The launches of q4_mid, before it q4_arrange where x is not arranged as q4 wants it, and what they write.

    The bits of a row are the same for any number of tokens of a family: the parts of K hang on the weights alone.
    """
    rows, image = (x, None) if isinstance(x, Tensor) else (x.rows, x.image)
    y = rows.new_empty(len(rows), q4.outputs)
    _require(rows, q4, bias, y)
    shape = shape or _mid_shape(q4, len(rows))
    if q4.weights.shape[0] % shape.warpgroups or q4.outputs % 4:
        raise ValueError(f"{q4.outputs} outputs are not for blocks of {shape.warpgroups} warpgroups; choose a divisor")
    launches = []
    if image is None or q4.order is not None:
        image = new_image(rows)
        launches.append(arrange(rows.contiguous(), q4.order, image))
    width, divided = len(q4.factors), shape.splits > 1
    parts = rows.new_empty(shape.splits * divided, len(rows), width, dtype=torch.float32)
    stage, levels = shape.tokens * 256 + shape.warpgroups * 4096, _level_bytes(q4, shape)
    blocks, stages = _stages(shape.blocks, stage, 256 + levels)
    macros = {"WARPGROUPS": shape.warpgroups, "TOKENS": shape.tokens, "SPLITS": shape.splits, "BLOCKS": blocks}
    kernel = Kernel("q4_mid", tuple((macros | {"STAGES": stages} | _format(q4)).items()), hopper=True)
    sizes = len(rows), image.shape[1], q4.outputs, width, q4.inputs
    grid = -(-len(rows) // shape.tokens), width // (BLOCK * shape.warpgroups) * shape.splits, 1
    arguments = *_weights(q4), bias, image, y, parts, *sizes
    launches.append(Launch(kernel, grid, shape.warpgroups * 128 + 32, arguments, stages * stage + 256 + levels))
    return launches, Partial(parts, bias) if divided else y


def _mid_shape(q4: Q4, tokens: int) -> MidShape:
    """As measured on an H200; to 128 tokens, and above, `splits` must not hang on the tokens."""
    blocks, steps = q4.weights.shape[:2]
    tile = next(n for n in (16, 32, 64, 128) if n >= min(tokens, 128))
    pairs = 2 - blocks % 2
    if blocks >= 256 or steps < 8:
        return MidShape(pairs, tile, 1, 1 if tile == 128 else 2)
    if tokens > 128:
        return MidShape(pairs, tile, 1 if blocks > 64 else 2, 1)
    if blocks > 64:
        return MidShape(1, tile, 4, 3)
    return MidShape(1, tile, 4, 3) if tile == 16 else MidShape(pairs, tile, 4, 1)


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


def add_parts(partial: Partial, y: Tensor) -> Launch:
    """The launch of sum_partials: y fp16 [T, N], N a multiple of 4."""
    parts, tokens, width = partial.parts.shape
    kernel = Kernel("sum_partials", (("PARTS", parts), ("WIDTH", width)))
    grid = tokens, -(-y.shape[1] // 1024), 1
    return Launch(kernel, grid, 256, (partial.parts, partial.bias, y, tokens, y.shape[1]))


def _require(x: Tensor, q4: Q4, bias: Tensor | None, y: Tensor) -> None:
    require("x", x, torch.float16, len(x), q4.inputs, like=q4.weights)
    require("y", y, torch.float16, len(x), q4.outputs, like=x)
    if bias is not None:
        require("bias", bias, torch.float16, q4.outputs, like=x)


def _weights(q4: Q4) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    return q4.weights, q4.scales, q4.zeros, q4.factors


def _format(q4: Q4) -> dict[str, int]:
    return {"GROUP": q4.group, "ZEROS": int(q4.zeros is not None)}
