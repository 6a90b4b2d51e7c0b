"""Float weights: `weight` [N, K] in fp16, bf16 or fp32. Their values are not looked at: a NaN stays a NaN."""

from __future__ import annotations

from torch import Tensor

from .linear import Shape
from .quantisation import Quantisation
from .tensors import Tensors

PARTS = frozenset({"weight"})


def claims(tensors: Tensors, shape: Shape) -> bool:
    """Always: a linear that is stored in no way at all lacks its `weight`."""
    return True


def check(tensors: Tensors, shape: Shape, how: Quantisation) -> None:
    """By the headers alone."""
    tensors.require(f"{shape.name}.weight", (shape.out_features, shape.in_features))


def read(tensors: Tensors, shape: Shape, how: Quantisation) -> Tensor:
    """W [N, K]."""
    return tensors.read(f"{shape.name}.weight")
