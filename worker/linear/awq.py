"""AWQ in the layout `gemm`: 4 bits, packed along the outputs in an order of their own.

It has the mathematics of GPTQ, with rows in their order and true zero points, so its numbers are packed anew as GPTQ's
are and the same kernel multiplies them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorayard.kernels.bits import unpack_rows
from lorayard.shared.errors import NotSupported

from .gptq import GptqTensors, group_rows, read_scales, require_groups
from .linear import Shape
from .quantisation import Quantisation
from .tensors import Tensors

PARTS = frozenset({"qweight", "qzeros", "scales"})
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of eight numbers each of eight neighbouring outputs is."""


def claims(tensors: Tensors, shape: Shape) -> bool:
    """Whether the linear is stored so: GPTQ's qweight has the same name and another shape."""
    entry = tensors.entries.get(f"{shape.name}.qweight")
    return entry is not None and entry.shape == (shape.in_features, shape.out_features // 8)


def check(tensors: Tensors, shape: Shape, how: Quantisation) -> None:
    """By the headers alone."""
    name, inputs, outputs = shape.name, shape.in_features, shape.out_features
    if inputs % 8 or outputs % 8 or how.bits not in (None, 4):
        raise NotSupported(
            f"{tensors.entries[f'{name}.qweight'].path}: {name}.qweight packs {inputs} by {outputs} numbers of "
            f"{how.bits or 4} bits; this version reads AWQ with 4 bits and multiples of 8"
        )
    tensors.require(f"{name}.qweight", (inputs, outputs // 8), ("I32",))
    require_groups(tensors, shape, how.group_size, outputs // 8)


def read(tensors: Tensors, shape: Shape, how: Quantisation) -> GptqTensors:
    """The tensors of a linear that passed `check`, on the CPU, as GPTQ has them."""
    levels, zeros = (_unpack(tensors.read(f"{shape.name}.{part}")) for part in ("qweight", "qzeros"))
    scales = read_scales(tensors, f"{shape.name}.scales")
    group = torch.arange(shape.in_features) // group_rows(shape, how.group_size, len(scales))
    return GptqTensors(_pack(levels), zeros.to(torch.int8), scales, group)


def _unpack(words: Tensor) -> Tensor:
    """int32 [R, N/8] -> uint8 [R, N]."""
    eights: Tensor = unpack_rows(words, 4).unflatten(1, (-1, 8))
    return eights[:, :, list(ORDER)].flatten(1)


def _pack(levels: Tensor) -> Tensor:
    """uint8 [K, N] -> int32 [K/8, N], down the columns."""
    words = torch.zeros(len(levels) // 8, levels.shape[1], dtype=torch.int32)
    for i in range(8):
        words |= levels[i::8].int() << 4 * i
    return words
