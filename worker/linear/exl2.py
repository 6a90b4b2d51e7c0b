"""EXL2: `q_weight`, `q_scale`, `q_scale_max`, `q_groups` and `q_invperm`; columns padded to a multiple of 32."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorayard.kernels import mixed
from lorayard.kernels.launch import usable
from lorayard.kernels.linear_exl2 import dequantise, linear_exl2
from lorayard.shared.errors import NotSupported

from .linear import Packed, Shape
from .mixed import MixedTensors
from .quantisation import Quantisation
from .tensors import Tensors

PARTS = frozenset({"q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "q_perm"})
BITS = (2, 3, 4, 5, 6, 8)
INTEGERS = ("I32", "I16")


@dataclass(frozen=True, slots=True)
class Exl2Tensors:
    """The arguments of kernels.linear_exl2.dequantise, and how many columns are no padding."""

    words: Tensor
    codes: Tensor
    scale_max: Tensor
    groups: tuple[tuple[int, int], ...]
    order: Tensor
    outputs: int

    def to(self, device: torch.device) -> Packed:
        """The same on `device`, laid out for its kernels where they take it."""
        names = ("words", "codes", "scale_max", "order")
        moved = replace(self, **{name: getattr(self, name).to(device) for name in names})
        packed = moved.pack() if usable(moved.words) else None
        return moved if packed is None else MixedTensors(packed)

    def pack(self) -> mixed.Mixed | None:
        """The kernels' layout; None where the groups do not fit it."""
        return mixed.pack_exl2(self.words, self.codes, self.scale_max, self.groups, self.order, self.outputs)

    def dequantise(self) -> Tensor:
        """fp16 [K, N]."""
        return dequantise(self.words, self.codes, self.scale_max, self.groups, self.order)[:, : self.outputs]

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] -> [T, N]."""
        return linear_exl2(
            x, self.words, self.codes, self.scale_max, self.groups, self.order, self.outputs, bias
        )  # fmt: skip


def claims(tensors: Tensors, shape: Shape) -> bool:
    """Whether the linear is stored so."""
    return f"{shape.name}.q_weight" in tensors


def check(tensors: Tensors, shape: Shape, how: Quantisation) -> None:
    """By the headers alone."""
    name, inputs, padded = shape.name, shape.in_features, -(-shape.out_features // 32) * 32
    entry = tensors.entries[f"{name}.q_weight"]
    if inputs % 32 or inputs > 1 << 16:
        raise NotSupported(f"{entry.path}: {name}.q_weight packs {inputs} rows; EXL2 has a multiple of 32 up to 65536")
    rows = min(max(entry.shape[0] if entry.shape else 0, inputs * 2 // 32), inputs * 8 // 32)
    tensors.require(f"{name}.q_weight", (rows, padded), ("I32",))
    found = tensors.entries.get(f"{name}.q_scale_max")
    groups = min(max(found.shape[0] if found and found.shape else 0, 1), rows)
    tensors.require(f"{name}.q_scale_max", (groups,), ("F16",))
    tensors.require(f"{name}.q_scale", (groups, padded // 8), ("I32",))
    tensors.require(f"{name}.q_groups", (2 * groups,), ("I16",))
    for part in ("q_invperm", "q_perm"):
        if part == "q_invperm" or f"{name}.{part}" in tensors:
            tensors.require(f"{name}.{part}", (inputs,), INTEGERS)


def read(tensors: Tensors, shape: Shape, how: Quantisation) -> Exl2Tensors:
    """The tensors of a linear that passed `check`, on the CPU."""
    name = shape.name
    groups, order = _groups(tensors, shape), _permutation(tensors, f"{name}.q_invperm")
    if f"{name}.q_perm" in tensors and not torch.equal(_permutation(tensors, f"{name}.q_perm"), order.argsort()):
        raise tensors.fault(f"{name}.q_perm", f"is not the inverse of {name}.q_invperm")
    scale_max = tensors.read(f"{name}.q_scale_max")
    if not scale_max.isfinite().all():
        raise tensors.fault(f"{name}.q_scale_max", "holds numbers that are not finite")
    words, codes = tensors.read(f"{name}.q_weight"), tensors.read(f"{name}.q_scale")
    return Exl2Tensors(words, codes, scale_max, groups, order, shape.out_features)


def _groups(tensors: Tensors, shape: Shape) -> tuple[tuple[int, int], ...]:
    """(bits, rows) of each group, from the pairs (bits, first word) of q_groups."""
    name, words = f"{shape.name}.q_groups", tensors.entries[f"{shape.name}.q_weight"].shape[0]
    numbers = _unsigned(tensors.read(name)).tolist()
    pairs = list(zip(numbers[::2], zip(numbers[1::2], [*numbers[3::2], words], strict=True), strict=True))
    for bits, (start, end) in pairs:
        if bits not in BITS or start >= end or (end - start) * 32 % bits:
            raise tensors.fault(name, f"has a group of {bits} bits in words {start} to {end}, which cannot be")
    groups = tuple((bits, (end - start) * 32 // bits) for bits, (start, end) in pairs)
    if numbers[1] or sum(rows for _, rows in groups) != shape.in_features:
        raise tensors.fault(name, f"does not make {shape.in_features} rows from word 0 on")
    return groups


def _permutation(tensors: Tensors, name: str) -> Tensor:
    order = _unsigned(tensors.read(name))
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise tensors.fault(name, f"is no permutation of 0 to {len(order) - 1}")
    return order


def _unsigned(numbers: Tensor) -> Tensor:
    """int64; 16 bits hold numbers up to 65535."""
    return numbers.long() & 0xFFFF if numbers.dtype == torch.int16 else numbers.long()
