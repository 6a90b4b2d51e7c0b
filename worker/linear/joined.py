"""Linears of one input, computed as one where their weights allow it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorayard.kernels import q4

from .gptq import Q4Tensors
from .linear import Linear, PackedLinear, Shape


class Joined:
    """The outputs of several linears side by side. On a GPU their weights become parts of one tensor, if they can."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = tuple(parts)
        self.names = tuple(part.name for part in parts)
        self._whole = self.parts[0] if len(parts) == 1 else _join(self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, sum of N]."""
        return self._whole(x) if self._whole else torch.cat([part(x) for part in self.parts], -1)


def _join(parts: tuple[Linear, ...]) -> Linear | None:
    """One linear in the place of all, whose weights the parts then share; None if they are of different kinds."""
    biases = [part.bias for part in parts if part.bias is not None]
    if parts[0].device.type == "cpu" or len(biases) not in (0, len(parts)):
        return None
    shape = Shape("", parts[0].in_features, sum(part.out_features for part in parts), bool(biases))
    bias = torch.cat(biases) if biases else None
    packed = [part for part in parts if isinstance(part, PackedLinear)]
    if packed:
        return _join_packed(shape, packed, bias) if len(packed) == len(parts) else None
    whole = torch.cat([part.weight for part in parts])
    for part, weight in zip(parts, whole.split([part.out_features for part in parts]), strict=True):
        part.weight = weight
    return Linear(shape, whole, bias)


def _join_packed(shape: Shape, parts: Sequence[PackedLinear], bias: Tensor | None) -> Linear | None:
    laid = [part.packed.packed for part in parts if isinstance(part.packed, Q4Tensors)]
    whole = q4.join(laid) if len(laid) == len(parts) else None
    if whole is None:
        return None
    for part, each in zip(parts, q4.split(whole, [each.outputs for each in laid]), strict=True):
        part.packed, part.weight = Q4Tensors(each), each.weights
    return PackedLinear(shape, Q4Tensors(whole), bias, parts[0].dtype)
