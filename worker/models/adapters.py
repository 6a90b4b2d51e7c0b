"""What a model needs to know of LoRA: that there may be something to add to the output of a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import LoraRows


class Bank(Protocol):
    """Resident adapters; `lora.bank.LoraBank` is the one there is."""

    def touches(self, name: str, loras: tuple[LoraRows, ...]) -> bool:
        """Whether any slot in use does anything to the output of the module `name`."""

    def prepare(self, loras: tuple[LoraRows, ...], device: torch.device) -> Any:
        """What `apply` needs of a step, on `device`."""

    def apply(self, names: str | tuple[str, ...], x: Tensor, y: Tensor, prepared: Any) -> Tensor:
        """y [T, N] of the linears `names`, side by side, for x [T, K], with what every slot in use does to its rows."""

    def embed(self, name: str, token_ids: Tensor, h: Tensor, loras: tuple[LoraRows, ...]) -> Tensor:
        """h [T, N] of the embedding `name` for token_ids [T], likewise; before any scale that the model puts on h."""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What an adapter does to a module besides adding B A x: y becomes gain * y + offset.

    weight: in the place of the module's own, of the same shape. tokens: ids int64 [n] and their rows [n, K] of that
    weight (embedding and head). gain [N]: DoRA's. offset [N]: of biases. Each may be absent.
    """

    weight: Tensor | None = None
    tokens: tuple[Tensor, Tensor] | None = None
    gain: Tensor | None = None
    offset: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All that are there."""
        return [each for each in (self.weight, *(self.tokens or ()), self.gain, self.offset) if each is not None]

    def to(self, device: torch.device) -> Change:
        """The same on `device`."""
        weight, gain, offset = (None if t is None else t.to(device) for t in (self.weight, self.gain, self.offset))
        tokens = None if self.tokens is None else (self.tokens[0].to(device), self.tokens[1].to(device))
        return Change(weight, tokens, gain, offset)


class Adapter(Protocol):
    """An adapter in host memory; `lora.peft.Lora` is the one there is, and says what these are."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def tensors(self) -> Mapping[str, tuple[Tensor, Tensor]]: ...
    @property
    def changes(self) -> Mapping[str, Change]: ...
    @property
    def alone(self) -> str: ...
    @property
    def packed(self) -> Mapping[torch.device, Any]: ...
    @property
    def max_rank(self) -> int: ...

    def resident(self, model: Any, pairs: Sequence[tuple[Any, float]], rows: Tensor) -> tuple[Bank, LoraRows]:
        """A bank for the model that holds just the set `pairs`, this adapter among them, and its use by `rows`."""
