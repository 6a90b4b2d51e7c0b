"""A combination of adapters in one buffer of the host, as a slot holds it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lorayard.kernels.linear import STEP

from .config import INPUT, OUTPUT

if TYPE_CHECKING:
    from ..models.model import Model

Halves = Mapping[str, tuple[Tensor, Tensor]]
"""A [r, K] and B [N, r] by module."""


class Ranked(Protocol):
    """An adapter's halves, and the largest rank among them."""

    @property
    def tensors(self) -> Halves: ...
    @property
    def max_rank(self) -> int: ...


def rank_class(rank: int) -> int:
    """What a slot makes of a combination whose adapters' largest ranks sum to `rank`: STEP, or the next power of 2."""
    return max(STEP, 1 << (rank - 1).bit_length())


@dataclass(frozen=True, slots=True, eq=False)
class Packed(Mapping[str, tuple[Tensor, Tensor]]):
    """A [R, K] and then B [N, R] of each module in one tensor. places: start, K and N by module."""

    rank: int
    numbers: Tensor
    places: Mapping[str, tuple[int, int, int]]

    @classmethod
    def of(cls, loras: Sequence[Ranked], modules: Sequence[str], pinned: bool) -> Packed:
        """The adapters' ranks one after another; zeros where one has a smaller rank at a module, or none."""
        ranks = [lora.max_rank for lora in loras]
        rank, places, end = rank_class(sum(ranks)), dict[str, tuple[int, int, int]](), 0
        first = {module: next(each.tensors[module] for each in loras if module in each.tensors) for module in modules}
        for module, (a, b) in first.items():
            places[module] = end, a.shape[1], len(b)
            end += rank * (a.shape[1] + len(b))
        dtype = next(iter(first.values()))[0].dtype
        packed = cls(rank, torch.empty(end, dtype=dtype, pin_memory=pinned), places)
        for module, (a, b) in packed.items():
            if len(loras) > 1 or len(first[module][0]) < rank:
                a.zero_(), b.zero_()
            for lora, start in zip(loras, accumulate(ranks, initial=0), strict=False):
                if module in lora.tensors:
                    half_a, half_b = lora.tensors[module]
                    a[start : start + len(half_a)] = half_a
                    b[:, start : start + len(half_a)] = half_b
        return packed

    def __getitem__(self, module: str) -> tuple[Tensor, Tensor]:
        start, inputs, outputs = self.places[module]
        middle = start + self.rank * inputs
        a, b = self.numbers[start:middle], self.numbers[middle : middle + self.rank * outputs]
        return a.view(self.rank, inputs), b.view(outputs, self.rank)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def by_device(model: Model, modules: Iterable[str]) -> dict[torch.device, list[str]]:
    """The modules by where the model has them."""
    found: dict[torch.device, list[str]] = {}
    for module in modules:
        found.setdefault(device_of(model, module), []).append(module)
    return found


def device_of(model: Model, module: str) -> torch.device:
    """Where the model has a linear, or the embedding. Raises KeyError for anything else."""
    if module == INPUT:
        return model.embedding.device
    head = model.head if module == OUTPUT else None
    return (head or model.linears[module]).device
