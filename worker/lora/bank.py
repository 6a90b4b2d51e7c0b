"""Slots: the combinations of adapters that are resident beside a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorayard.kernels.launch import usable
from lorayard.kernels.linear import STEP, linear
from lorayard.kernels.lora import add_lora, add_mixed
from lorayard.shared.errors import AdapterError, Refused, SlotBusy, UsageError
from lorayard.shared.job import MAX_RANK_SUM

from ..linear.linear import Shape
from ..models.adapters import Adapter, Change
from ..models.batch import LoraRows
from ..models.model import linear_shapes
from .change import change_embedded, change_output
from .config import INPUT, OUTPUT
from .packed import Packed, by_device, device_of, rank_class
from .prepared import Prepared, group_rows, mixed_tiles, on_device
from .resident import Arrival, Resident

if TYPE_CHECKING:
    from ..models.model import Model


@dataclass(slots=True)
class _Slot:
    """One combination: A [R, K] and B [N, R] for each module that it touches, R its rank class.

    changes: of each module, with the column of a row's scales that holds the changing adapter's. arrivals: what has
    been sent to devices and not been received there yet.
    """

    loras: tuple[Adapter, ...] = ()
    stacked: dict[str, Packed] = field(default_factory=dict)
    changes: dict[str, list[tuple[int, Change]]] = field(default_factory=dict)
    arrivals: dict[torch.device, Arrival] = field(default_factory=dict)
    pins: int = 0
    used: int = 0

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(lora.digest for lora in self.loras)

    def halves(self, name: str) -> tuple[Tensor, Tensor] | None:
        return self.stacked[name][name] if name in self.stacked else None


class LoraBank:
    """`slots` places for combinations of adapters, each of a rank sum up to `max_rank`.

    A combination is one or more adapters of different names, in the order of their names, without scales. A slot in
    use (pinned) never changes. On CUDA `place` returns while the adapters are still on their way: steps do not wait for
    them until one uses them. width: the largest rank class that has been in any slot.
    """

    def __init__(self, model: Model, slots: int = 8, max_rank: int | None = None) -> None:
        if slots < 1:
            raise UsageError(f"a LoRA bank needs at least one slot, not {slots}")
        self.model, self.slots = model, slots
        self.max_rank = MAX_RANK_SUM if max_rank is None else max_rank
        self.swaps, self.width = 0, STEP
        self._slots = [_Slot() for _ in range(slots)]
        self._residents: dict[torch.device, Resident] = {}
        self._clock = 0

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        """The model's linears by name."""
        return {shape.name: shape for shape in linear_shapes(self.model.config)}

    @property
    def _mixes(self) -> bool:
        """Whether the kernels of LoRA do the work."""
        sizes = (size for shape in self._shapes.values() for size in (shape.in_features, shape.out_features))
        return usable(self.model.norm) and not any(size % 8 for size in sizes)

    @property
    def combinations(self) -> list[tuple[str, ...] | None]:
        """What each slot holds, as ID@DIGEST8 (see shared.job.combination); None for an empty slot."""
        return [tuple(f"{lora.name}@{lora.digest[:8]}" for lora in slot.loras) or None for slot in self._slots]

    def find(self, loras: tuple[Adapter, ...]) -> int | None:
        """The slot that holds exactly this combination."""
        digests = tuple(lora.digest for lora in _ordered(loras))
        return next((i for i, slot in enumerate(self._slots) if slot.digests == digests), None)

    def place(self, loras: tuple[Adapter, ...], slot: int | None = None) -> int:
        """Make the combination resident and return its slot.

        That is the slot that holds it already, else the given one, else an empty or the longest unused drained one.
        Raises SlotBusy when that is pinned or there is none, AdapterError when the ranks are too large.
        """
        present = self.find(loras)
        if present is None:
            rank = sum(lora.max_rank for lora in loras)
            if rank > self.max_rank:
                names = ", ".join(lora.name for lora in loras)
                raise AdapterError(f"the ranks of {names} sum to {rank}; a slot holds {self.max_rank}")
            present = self._drained() if slot is None else slot
            self._fill(present, _ordered(loras))
        self._touch(present)
        return present

    def pin(self, slot: int) -> None:
        """A job that uses the slot was queued."""
        self._slots[slot].pins += 1
        self._touch(slot)

    def unpin(self, slot: int) -> None:
        """That job is done."""
        assert self._slots[slot].pins > 0, slot
        self._slots[slot].pins -= 1

    def rank_scales(self, slot: int, scales: tuple[float, ...]) -> Tensor:
        """float32 [R], R the slot's rank class: each adapter's scale by order of name, once a rank, then zeros.

        Tensors are shared: nobody writes into them.
        """
        loras = self._slots[slot].loras
        return _spread(tuple(lora.max_rank for lora in loras), scales, _rank_class(loras))

    def touches(self, name: str, loras: tuple[LoraRows, ...]) -> bool:
        """Whether any slot in use does anything to the output of the module `name`."""
        slots = [self._slots[use.slot] for use in loras]
        return any(name in slot.stacked or name in slot.changes for slot in slots)

    def graphable(self, slots: Collection[int]) -> bool:
        """Whether a captured graph can do all that these slots do: A and B at the layers' linears."""
        used = [self._slots[index] for index in slots]
        return not used or (
            self._mixes and not any(slot.changes or slot.stacked.keys() & {INPUT, OUTPUT} for slot in used)
        )

    def receive(self, slots: Iterable[int]) -> None:
        """Let the current streams wait for what is on its way to these slots. `prepare` does it for eager steps."""
        for index in slots:
            arrivals = self._slots[index].arrivals
            while arrivals:
                device, arrival = arrivals.popitem()
                self._resident(device).receive(index, arrival)

    def prepare(self, loras: tuple[LoraRows, ...], device: torch.device) -> Prepared:
        """What `apply` needs of a step, on `device`."""
        self.receive(use.slot for use in loras)
        changing = tuple(on_device(use, device) for use in loras if self._slots[use.slot].changes)
        if self._mixes:
            return Prepared((), changing, mixed_tiles(loras, device))
        return Prepared(group_rows(loras, device), changing)

    def apply(self, names: str | tuple[str, ...], x: Tensor, y: Tensor, prepared: Prepared) -> Tensor:
        """y [T, N] of the linears `names`, side by side, for x [T, K], with each slot's work on its rows, in place."""
        names, start = (names,) if isinstance(names, str) else names, 0
        for name in names if prepared.groups or prepared.changing else ():
            end = start + self._shapes[name].out_features
            self._apply(name, x, y[:, start:end], prepared)
            start = end
        if prepared.tiles is not None:
            add_mixed(x, y, self._resident(y.device).joined(names), prepared.tiles)
        return y

    def _apply(self, name: str, x: Tensor, y: Tensor, prepared: Prepared) -> None:
        for use in prepared.changing:
            for column, change in self._slots[use.slot].changes.get(name, ()):
                scale = use.scales[:, column : column + 1]
                y[use.rows] = change_output(change, x[use.rows], y[use.rows], scale)
        for group in prepared.groups:
            pairs = [self._slots[slot].halves(name) for slot in group.slots]
            touched = [pair for pair in pairs if pair]
            if not touched:
                continue
            if len(touched) < len(pairs):
                blank = (torch.zeros_like(touched[0][0]), torch.zeros_like(touched[0][1]))
                touched = [pair or blank for pair in pairs]
            a, b = (torch.stack(halves) for halves in zip(*touched, strict=True))
            add_lora(x, y, group.rows, group.scales, a, b)

    def embed(self, name: str, token_ids: Tensor, h: Tensor, loras: tuple[LoraRows, ...]) -> Tensor:
        """h [T, N] of the embedding `name` for token_ids [T], likewise."""
        for use in loras:
            slot = self._slots[use.slot]
            if name not in slot.changes and name not in slot.stacked:
                continue
            use = on_device(use, h.device)
            ids, rows = token_ids[use.rows], h[use.rows]
            for column, change in slot.changes.get(name, ()):
                rows = change_embedded(change, ids, rows, use.scales[:, column : column + 1])
            if name in slot.stacked:
                a, b = slot.stacked[name][name]
                rows = rows + linear((a[:, ids].T * use.scales).to(h.dtype), b)
            h[use.rows] = rows
        return h

    def _resident(self, device: torch.device) -> Resident:
        if device not in self._residents:
            self._residents[device] = Resident(device, self._shapes, self.slots)
        return self._residents[device]

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._slots[slot].used = self._clock

    def _drained(self) -> int:
        free = [i for i, slot in enumerate(self._slots) if not slot.pins]
        if not free:
            raise SlotBusy(f"all {self.slots} slots are in use")
        return min(free, key=lambda i: (bool(self._slots[i].loras), self._slots[i].used))

    def _fill(self, index: int, loras: tuple[Adapter, ...]) -> None:
        old = self._slots[index]
        if old.pins:
            raise SlotBusy(f"slot {index} is in use by {old.pins} jobs")
        self.swaps += bool(old.loras)
        self._slots[index] = _Slot()
        filled = _Slot(loras, changes=self._changes(loras))
        for device, modules in by_device(self.model, _modules(loras)).items():
            packed = _packed(loras, device, modules)
            if device.type == "cuda":
                packed, filled.arrivals[device] = self._resident(device).send(packed)
            filled.stacked |= dict.fromkeys(packed, packed)
        self.width = max(self.width, _rank_class(loras))
        self._slots[index] = filled

    def _changes(self, loras: tuple[Adapter, ...]) -> dict[str, list[tuple[int, Change]]]:
        changes: dict[str, list[tuple[int, Change]]] = {}
        column = 0
        for lora in loras:
            for module, change in lora.changes.items():
                changes.setdefault(module, []).append((column, change.to(device_of(self.model, module))))
            column += lora.max_rank
        return changes


def check_set(pairs: Sequence[tuple[Adapter, float]]) -> None:
    """Refuse a set with an adapter whose effect is no sum, unless it is alone and at scale 1."""
    for lora, scale in pairs:
        if lora.alone and (len(pairs) > 1 or scale != 1):
            raise Refused(
                "bad_adapter", f"adapter {lora.name} uses {lora.alone}: it runs alone and at scale 1, not in a sum"
            )


def _ordered(loras: tuple[Adapter, ...]) -> tuple[Adapter, ...]:
    names = {lora.name for lora in loras}
    if not loras or len(names) < len(loras):
        raise AdapterError("a combination is one or more adapters of different names")
    if len(loras) > 1:
        check_set([(lora, 1.0) for lora in loras])
    return tuple(sorted(loras, key=lambda lora: lora.name))


@lru_cache(maxsize=1024)
def _spread(ranks: tuple[int, ...], scales: tuple[float, ...], width: int) -> Tensor:
    spread = torch.zeros(width)
    spread[: sum(ranks)] = torch.tensor(scales, dtype=torch.float32).repeat_interleave(torch.tensor(ranks))
    return spread


def _rank_class(loras: tuple[Adapter, ...]) -> int:
    return rank_class(sum(lora.max_rank for lora in loras))


def _modules(loras: tuple[Adapter, ...]) -> list[str]:
    """All that the adapters add to, each once."""
    return list(dict.fromkeys(module for lora in loras for module in lora.tensors))


def _packed(loras: tuple[Adapter, ...], device: torch.device, modules: list[str]) -> Packed:
    """The combination's part on a device; an adapter that is alone may have been packed when it was read."""
    alone = loras[0].packed.get(device) if len(loras) == 1 else None
    return alone if alone and list(alone) == modules else Packed.of(loras, modules, device.type == "cuda")
