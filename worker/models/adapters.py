"""What a model needs to know of LoRA: that there may be something to add to a linear's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import LoraRows


class Bank(Protocol):
    """Resident adapters; `lora.bank.LoraBank` is the one there is."""

    def prepare(self, loras: tuple[LoraRows, ...], device: torch.device) -> Any:
        """What `apply` needs of a step, on `device`."""

    def apply(self, name: str, x: Tensor, y: Tensor, prepared: Any) -> Tensor:
        """y [T, N] of the linear `name` for its input x [T, K], with the delta of every slot in use added."""


class Adapter(Protocol):
    """An adapter in host memory; `lora.peft.Lora` is the one there is, and says what these are."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def tensors(self) -> dict[str, tuple[Tensor, Tensor]]: ...
    @property
    def max_rank(self) -> int: ...

    def resident(self, model: Any, pairs: Sequence[tuple[Any, float]], rows: Tensor) -> tuple[Bank, LoraRows]:
        """A bank for the model that holds just the set `pairs`, this adapter among them, and its use by `rows`."""
