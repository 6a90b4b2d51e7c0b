"""The weight formats, told by the tensors that a linear has, so they mix freely in a model."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import awq, dense, exl2, gptq
from .linear import Linear, Packed, PackedLinear, Shape
from .quantisation import Quantisation
from .tensors import Tensors


class Format(Protocol):
    """A module of this folder. `check` and `read` are the functions below for one format, the bias left out."""

    @property
    def PARTS(self) -> frozenset[str]:
        """Last names of the tensors that it may have."""

    def claims(self, tensors: Tensors, shape: Shape) -> bool:
        """Whether the linear is stored so."""

    def check(self, tensors: Tensors, shape: Shape, how: Quantisation) -> None: ...
    def read(self, tensors: Tensors, shape: Shape, how: Quantisation) -> Tensor | Packed: ...


FORMATS: tuple[Format, ...] = (exl2, awq, gptq, dense)
"""The first that claims a linear has it."""


def format_of(tensors: Tensors, shape: Shape) -> Format:
    """The format that the linear is stored in."""
    return next(each for each in FORMATS if each.claims(tensors, shape))


def check(tensors: Tensors, shape: Shape, how: Quantisation) -> None:
    """Check by the headers alone that the linear can be read. Raises the tensors' error, or NotSupported."""
    name = shape.name
    if shape.bias:
        tensors.require(f"{name}.bias", (shape.out_features,))
    here = how.at(name)
    if here is None and is_packed(tensors, shape):
        raise tensors.error(f"{tensors.folder}: {name} is packed, where {how.path.name} says that it is not")
    format_of(tensors, shape).check(tensors, shape, here or how)


def parts(tensors: Tensors, shape: Shape) -> set[str]:
    """The tensors that belong to the linear, by their last name."""
    return {*format_of(tensors, shape).PARTS, *(["bias"] if shape.bias else ())}


def name_of(tensors: Tensors, shape: Shape) -> str:
    """The format's name: that of its module here."""
    return str(getattr(format_of(tensors, shape), "__name__", "")).rpartition(".")[2]


def is_packed(tensors: Tensors, shape: Shape) -> bool:
    """Whether the weights are quantised."""
    return format_of(tensors, shape) is not dense


def read(tensors: Tensors, shape: Shape, how: Quantisation, device: torch.device, dtype: torch.dtype) -> Linear:
    """A linear that passed `check`, on `device`. The CPU dequantises here, once, and keeps W [N, K] turned in memory,
    which is faster."""
    bias = tensors.read(f"{shape.name}.bias").to(device, dtype) if shape.bias else None
    weight = format_of(tensors, shape).read(tensors, shape, how.at(shape.name) or how)
    if not isinstance(weight, Tensor):
        if device.type != "cpu":
            return PackedLinear(shape, weight.to(device), bias, dtype)
        weight = weight.dequantise().T
    weight = weight.to(device, dtype)
    return Linear(shape, weight if weight.is_cuda else weight.T.contiguous().T, bias)
