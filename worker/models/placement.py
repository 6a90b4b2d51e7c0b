"""Which device holds which part of a model, planned before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from lorayard.shared.errors import ModelError, UsageError

from .devices import Devices, named

USABLE = 0.9
"""Share of a GPU's free memory that is planned with when no limit is given."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A device and the bytes that a model, its cache and its slots may take there; None is no limit.

    stated: by a person. Otherwise the step's workspace must fit in, too.
    """

    device: torch.device
    limit: int | None
    stated: bool = True

    def room(self, workspace: int) -> int | None:
        """What parts may take beside a workspace of so many bytes."""
        return self.limit if self.stated or self.limit is None else max(0, self.limit - workspace)


@dataclass(frozen=True, slots=True)
class Part:
    """What stays together on one device, in bytes. cache: its layer's pages. slots: what all LoRA slots hold of it."""

    name: str
    weights: int
    cache: int = 0
    slots: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.slots


@dataclass(frozen=True, slots=True)
class Plan:
    """places: for each part, in order, the index of its budget; shorter than parts if they do not fit."""

    parts: tuple[Part, ...]
    budgets: tuple[Budget, ...]
    workspace: int
    places: tuple[int, ...]

    @property
    def fits(self) -> bool:
        """Whether every part has a place."""
        return len(self.places) == len(self.parts)

    def on(self, index: int) -> Part:
        """The sum of what is on a device."""
        found = [part for part, place in zip(self.parts, self.places, strict=False) if place == index]
        sums = (sum(getattr(part, field) for part in found) for field in ("weights", "cache", "slots"))
        return Part(str(self.budgets[index].device), *sums)

    def devices(self) -> list[torch.device]:
        """The device of each part. Raises ModelError, with what is needed and what there is."""
        if not self.fits:
            have = ", ".join(f"{each.device} {gib(each.room(self.workspace) or 0)}" for each in self.budgets)
            raise ModelError(
                f"model, cache and slots need {gib(sum(part.total for part in self.parts))}, the devices give {have}; "
                "make the cache smaller or name more devices (`lorayard info MODEL` says what would fit)"
            )
        return [self.budgets[place].device for place in self.places]


def plan(parts: Sequence[Part], budgets: Sequence[Budget], workspace: int = 0) -> Plan:
    """Parts in order onto devices in order: a device is filled before the next one is begun."""
    places: list[int] = []
    for index, budget in enumerate(budgets):
        room = budget.room(workspace)
        sums = accumulate(part.total for part in parts[len(places) :])
        places += [index for total in sums if room is None or total <= room]
    return Plan(tuple(parts), tuple(budgets), workspace, tuple(places))


def find_budgets(devices: Devices, absent: bool = False) -> list[Budget]:
    """What devices there are and may give: stated limits, else a GPU's free memory. `auto` is every GPU, or the CPU.

    absent: a GPU with a limit need not be there, as nothing will be loaded. Raises UsageError.
    """
    if devices == "auto":
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or "cpu"
    found = []
    for name, limit in named(devices):
        device = torch.device(name)
        if device.type == "cuda" and not (absent and limit is not None) and device.index >= torch.cuda.device_count():
            raise UsageError(f"there is no device {name}: torch sees {torch.cuda.device_count()} GPUs")
        stated = limit is not None
        if not stated and device.type == "cuda":
            limit = int(torch.cuda.mem_get_info(device)[0] * USABLE)
        found.append(Budget(device, limit, stated))
    return found


def gib(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"
