"""The linears of a model: read by what the tensors are, called by what the device does best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorayard.kernels.linear import linear
from lorayard.kernels.linear_gptq import dequantise, linear_gptq, nibbles
from lorayard.shared.errors import NotSupported

from .tensors import FLOATS, Tensors


class GptqFormat(Protocol):
    """What config.json says about GPTQ tensors; see models.config.Gptq."""

    @property
    def group_size(self) -> int: ...
    @property
    def act_order(self) -> bool: ...
    @property
    def zero_offset(self) -> int: ...


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

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class GptqLinear(Linear):
    """The weights stay packed in 4 bits, `weight` being GPTQ's qweight, and are dequantised at every call."""

    def __init__(self, shape: Shape, packed: GptqTensors, bias: Tensor | None) -> None:
        super().__init__(shape, packed.qweight, bias)
        self.packed = packed

    def __call__(self, x: Tensor) -> Tensor:
        packed = self.packed
        return linear_gptq(x, packed.qweight, packed.zeros, packed.scales, packed.group, self.bias)


@dataclass(frozen=True, slots=True)
class GptqTensors:
    """The arguments of kernels.linear_gptq.dequantise, zero points unpacked and true."""

    qweight: Tensor
    zeros: Tensor
    scales: Tensor
    group: Tensor

    def to(self, device: torch.device) -> GptqTensors:
        """The same on `device`."""
        return GptqTensors(*(t.to(device) for t in (self.qweight, self.zeros, self.scales, self.group)))

    def dequantise(self) -> Tensor:
        """fp16 [K, N]."""
        return dequantise(self.qweight, self.zeros, self.scales, self.group)


def check(tensors: Tensors, shape: Shape, form: GptqFormat) -> None:
    """Check by the headers alone that the linear can be read. Raises the tensors' error, or NotSupported."""
    name, inputs, outputs = shape.name, shape.in_features, shape.out_features
    if shape.bias:
        tensors.require(f"{name}.bias", (outputs,))
    if f"{name}.q_weight" in tensors:
        raise _unknown(tensors, f"{name}.q_weight", "is in the EXL2 format")
    if f"{name}.qweight" not in tensors:
        tensors.require(f"{name}.weight", (outputs, inputs))
        return
    _refuse_other_packing(tensors, shape)
    tensors.require(f"{name}.qweight", (inputs // 8, outputs), ("I32",))
    groups = 1 if form.group_size == -1 else -(-inputs // form.group_size)
    tensors.require(f"{name}.scales", (groups, outputs), FLOATS)
    tensors.require(f"{name}.qzeros", (groups, outputs // 8), ("I32",))
    if form.act_order or f"{name}.g_idx" in tensors:
        tensors.require(f"{name}.g_idx", (inputs,), ("I32",))


def parts(tensors: Tensors, shape: Shape) -> set[str]:
    """The tensors that belong to the linear, by their last name."""
    weights = {"qweight", "qzeros", "scales", "g_idx"} if f"{shape.name}.qweight" in tensors else {"weight"}
    return weights | ({"bias"} if shape.bias else set())


def _refuse_other_packing(tensors: Tensors, shape: Shape) -> None:
    name, inputs, outputs = f"{shape.name}.qweight", shape.in_features, shape.out_features
    if inputs % 8 or outputs % 8:
        raise _unknown(tensors, name, f"packs {inputs} by {outputs}, not multiples of 8")
    got = tensors.entries[name].shape
    if got == (inputs, outputs // 8):
        raise _unknown(tensors, name, "is in the AWQ format")
    for bits in (2, 3, 8):
        if got == (inputs * bits // 32, outputs):
            raise _unknown(tensors, name, f"is GPTQ with {bits} bits")


def _unknown(tensors: Tensors, name: str, what: str) -> NotSupported:
    path = tensors.entries[name].path
    return NotSupported(f"{path}: {name} {what}; this version reads GPTQ with 4 bits and float weights")


def read_gptq(tensors: Tensors, shape: Shape, form: GptqFormat) -> GptqTensors:
    """The GPTQ tensors of a linear that passed `check`, on the CPU."""
    name, inputs = shape.name, shape.in_features
    scales = tensors.read(f"{name}.scales").half()
    zeros = nibbles(tensors.read(f"{name}.qzeros")).flatten(1) + form.zero_offset
    group = tensors.read(f"{name}.g_idx").long() if f"{name}.g_idx" in tensors else torch.zeros(inputs).long()
    if int(group.min()) < 0 or int(group.max()) >= len(scales):
        raise tensors.error(f"{name}.g_idx names groups outside 0 to {len(scales) - 1}")
    if not form.act_order and not group.any() and len(scales) > 1:
        group = torch.arange(inputs) // form.group_size
    return GptqTensors(tensors.read(f"{name}.qweight"), zeros.to(torch.int8), scales, group)


def read(tensors: Tensors, shape: Shape, form: GptqFormat, device: torch.device, dtype: torch.dtype) -> Linear:
    """The linear on `device`. The CPU dequantises here, once, and keeps W [N, K] turned in memory, which is faster."""
    bias = tensors.read(f"{shape.name}.bias").to(device, dtype) if shape.bias else None
    if f"{shape.name}.qweight" not in tensors:
        weight = tensors.read(f"{shape.name}.weight").to(device, dtype)
        return Linear(shape, weight if weight.is_cuda else weight.T.contiguous().T, bias)
    packed = read_gptq(tensors, shape, form)
    if device.type != "cpu":
        return GptqLinear(shape, packed.to(device), bias)
    return Linear(shape, packed.dequantise().to(dtype).T, bias)
