"""What a model needs to know of LoRA: that there may be something to add to a linear's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .batch import LoraRows

if TYPE_CHECKING:
    from .model import Model


class Bank(Protocol):
    """Resident adapters; `lora.bank.LoraBank` is the one there is."""

    def prepare(self, loras: tuple[LoraRows, ...], device: torch.device) -> Any:
        """What `apply` needs of a step, on `device`."""

    def apply(self, name: str, x: Tensor, y: Tensor, prepared: Any) -> Tensor:
        """y [T, N] of the linear `name` for its input x [T, K], with the delta of every slot in use added."""


class Adapter(Protocol):
    """An adapter that is not resident; `lora.peft.Lora` is the one there is."""

    def resident(self, model: Model, pairs: Sequence[tuple[Any, float]], rows: Tensor) -> tuple[Bank, LoraRows]:
        """A bank that holds just the set `pairs` (this adapter among them), and its use by the tokens `rows`."""
