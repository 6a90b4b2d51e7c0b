"""GPTQ: `qweight`, `qzeros`, `scales` and maybe `g_idx`, of 2, 3, 4 or 8 bits."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lorayard.kernels import mixed, q4
from lorayard.kernels.bits import unpack_rows
from lorayard.kernels.launch import usable
from lorayard.kernels.linear_gptq import dequantise, linear_gptq
from lorayard.kernels.linear_q4 import dense, linear_q4
from lorayard.shared.errors import NotSupported

from .linear import Packed, Shape
from .mixed import MixedTensors
from .quantisation import Quantisation
from .tensors import FLOATS, Tensors

PARTS = frozenset({"qweight", "qzeros", "scales", "g_idx"})
BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class GptqTensors:
    """The arguments of kernels.linear_gptq.dequantise, zero points unpacked and true."""

    words: Tensor
    zeros: Tensor
    scales: Tensor
    group: Tensor

    def to(self, device: torch.device) -> Packed:
        """The same on `device`, laid out for its kernels where they take it."""
        moved = GptqTensors(*(getattr(self, field.name).to(device) for field in fields(self)))
        if not usable(moved.words):
            return moved
        arguments = moved.words, moved.zeros, moved.scales, moved.group
        if four := q4.pack(*arguments):
            return Q4Tensors(four)
        packed = mixed.pack_gptq(*arguments)
        return moved if packed is None else MixedTensors(packed)

    def dequantise(self) -> Tensor:
        """[K, N], fp16, or fp32 where the scales are."""
        return dequantise(self.words, self.zeros, self.scales, self.group)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] -> [T, N]."""
        return linear_gptq(x, self.words, self.zeros, self.scales, self.group, bias)


@dataclass(frozen=True, slots=True)
class Q4Tensors:
    """The same numbers of 4 bits, laid out for kernels.linear_q4."""

    packed: q4.Q4

    @property
    def words(self) -> Tensor:
        """The packed numbers."""
        return self.packed.weights

    def to(self, device: torch.device) -> Packed:
        """The same on `device`."""
        return Q4Tensors(self.packed.to(device))

    def dequantise(self) -> Tensor:
        """[K, N] in fp16."""
        return dense(self.packed) if usable(self.words) else q4.dequantise(self.packed)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] -> [T, N]."""
        return linear_q4(x, self.packed, bias)


def claims(tensors: Tensors, shape: Shape) -> bool:
    """Whether the linear is stored so."""
    return f"{shape.name}.qweight" in tensors


def check(tensors: Tensors, shape: Shape, how: Quantisation) -> None:
    """By the headers alone."""
    name, inputs, outputs = shape.name, shape.in_features, shape.out_features
    bits = _bits(tensors, shape, how)
    if inputs * bits % 32 or outputs * bits % 32:
        raise NotSupported(
            f"{tensors.entries[f'{name}.qweight'].path}: {name}.qweight packs {inputs} by {outputs} numbers of {bits} "
            "bits, which fill no whole words; this version needs whole ones"
        )
    tensors.require(f"{name}.qweight", (inputs * bits // 32, outputs), ("I32",))
    require_groups(tensors, shape, how.group_size, outputs * bits // 32)
    if how.act_order or f"{name}.g_idx" in tensors:
        tensors.require(f"{name}.g_idx", (inputs,), ("I32",))


def read(tensors: Tensors, shape: Shape, how: Quantisation) -> GptqTensors:
    """The tensors of a linear that passed `check`, on the CPU."""
    name, inputs = shape.name, shape.in_features
    bits = _bits(tensors, shape, how)
    scales = read_scales(tensors, f"{name}.scales")
    zeros = unpack_rows(tensors.read(f"{name}.qzeros"), bits).to(torch.int16) + how.zero_offset
    group = torch.arange(inputs) // group_rows(shape, how.group_size, len(scales))
    if f"{name}.g_idx" in tensors:
        stored = tensors.read(f"{name}.g_idx").long()
        if int(stored.min()) < 0 or int(stored.max()) >= len(scales):
            raise tensors.fault(f"{name}.g_idx", f"names groups outside 0 to {len(scales) - 1}")
        if how.act_order or stored.any():  # else nobody filled it in
            group = stored
    words = tensors.read(f"{name}.qweight")
    return GptqTensors(words, zeros if bits == 8 else zeros.to(torch.int8), scales, group)


def require_groups(tensors: Tensors, shape: Shape, group_size: int | None, zero_words: int) -> None:
    """Check `scales` [G, N] and `qzeros` [G, zero_words]. Where no size is given, groups must be equal."""
    name, inputs = shape.name, shape.in_features
    groups = 1 if group_size in (None, -1) else -(-inputs // group_size)
    scales = tensors.entries.get(f"{name}.scales")
    if group_size is None and scales and scales.shape and scales.shape[0] and inputs % scales.shape[0] == 0:
        groups = scales.shape[0]
    tensors.require(f"{name}.scales", (groups, shape.out_features), FLOATS)
    tensors.require(f"{name}.qzeros", (groups, zero_words), ("I32",))


def group_rows(shape: Shape, group_size: int | None, groups: int) -> int:
    """Neighbouring inputs of one group."""
    return shape.in_features // groups if group_size in (None, -1) else group_size


def read_scales(tensors: Tensors, name: str) -> Tensor:
    """fp16, or fp32 where they are stored so, all finite."""
    scales = tensors.read(name)
    scales = scales if scales.dtype == torch.float32 else scales.half()
    if not scales.isfinite().all():
        raise tensors.fault(name, "holds numbers that are not finite in fp16")
    return scales


def _bits(tensors: Tensors, shape: Shape, how: Quantisation) -> int:
    """From the rows of qweight; the config must agree."""
    name = f"{shape.name}.qweight"
    rows = tensors.entries[name].shape[:1]
    found = next((bits for bits in BITS if rows == (shape.in_features * bits // 32,)), how.bits or 4)
    if how.bits not in (None, found):
        raise tensors.fault(name, f"has numbers of {found} bits, where {how.path.name} says {how.bits}")
    return found
