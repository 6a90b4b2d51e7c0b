"""The linears of a model: called by what their weights are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorayard.kernels.linear import linear


@dataclass(frozen=True, slots=True)
class Shape:
    """A linear's name in the checkpoint and its sizes."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False


class Linear:
    """y [T, N] = x [T, K] Wᵀ + b, the weights float. Subclasses hold them otherwise."""

    def __init__(self, shape: Shape, weight: Tensor, bias: Tensor | None) -> None:
        self.shape, self.weight, self.bias = shape, weight, bias

    @property
    def name(self) -> str:
        """Module name in the checkpoint."""
        return self.shape.name

    @property
    def in_features(self) -> int:
        """K."""
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.shape.out_features

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weight.device

    def dense(self) -> Tensor:
        """W [N, K] in the dtype that the model computes in."""
        return self.weight

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Packed(Protocol):
    """Quantised weights of a linear on one device, `words` the numbers themselves."""

    @property
    def words(self) -> Tensor: ...

    def to(self, device: torch.device) -> Packed:
        """The same on `device`."""

    def dequantise(self) -> Tensor:
        """[K, N], as the format's makers round it."""

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] -> [T, N]."""


class PackedLinear(Linear):
    """The weights stay packed and are dequantised at every call."""

    def __init__(self, shape: Shape, packed: Packed, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(shape, packed.words, bias)
        self.packed, self.dtype = packed, dtype

    def dense(self) -> Tensor:
        """W [N, K] in the dtype that the model computes in, dequantised here."""
        return self.packed.dequantise().to(self.dtype).T

    def __call__(self, x: Tensor) -> Tensor:
        return self.packed.multiply(x, self.bias)
