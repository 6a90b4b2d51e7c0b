"""What the slots of a bank hold on one CUDA device, where the kernels of LoRA find it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorayard.kernels.lora import Joined

from ..linear.linear import Shape
from .packed import Packed


@dataclass(frozen=True, slots=True)
class Arrival:
    """A slot's adapters on their way. row: what the table will hold, on the host; ready: when they are there."""

    row: Tensor
    ready: torch.cuda.Event


class Resident:
    """The table of kernels.lora.Joined for all linears of a model, and the stream that fills slots."""

    def __init__(self, device: torch.device, shapes: Mapping[str, Shape], slots: int) -> None:
        self.device, self._shapes = device, shapes
        self._columns = {name: i + 1 for i, name in enumerate(shapes)}
        self._table = torch.zeros(slots, len(shapes) + 1, dtype=torch.int64, device=device)
        self._stream = torch.cuda.Stream(device)
        self._joined: dict[tuple[str, ...], Joined] = {}

    def send(self, packed: Packed) -> tuple[Packed, Arrival]:
        """Begin to copy a combination into a new buffer: the same there, usable once it has arrived.

        The copy waits for what is queued on the current stream, and for nothing that comes after.
        """
        numbers = torch.empty_like(packed.numbers, device=self.device)
        numbers.record_stream(self._stream)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            numbers.copy_(packed.numbers, non_blocking=True)
            ready = self._stream.record_event()
        row = torch.zeros(self._table.shape[1], dtype=torch.int64, pin_memory=True)
        base, cells = numbers.data_ptr(), row.numpy()
        cells[0] = packed.rank
        for module, (start, _, _) in packed.places.items():
            if module in self._columns:
                cells[self._columns[module]] = base + start * numbers.itemsize
        return replace(packed, numbers=numbers), Arrival(row, ready)

    def receive(self, slot: int, arrival: Arrival) -> None:
        """Let the current stream wait for the copy, and see it from then on."""
        torch.cuda.current_stream(self.device).wait_event(arrival.ready)
        self._table[slot].copy_(arrival.row, non_blocking=True)

    def joined(self, names: tuple[str, ...]) -> Joined:
        """The linears `names` of one input side by side; they must follow each other in the model, too."""
        if names not in self._joined:
            columns, shapes = [self._columns[name] for name in names], [self._shapes[name] for name in names]
            if columns != list(range(columns[0], columns[0] + len(names))):
                raise ValueError(f"{', '.join(names)} do not follow each other in the model")
            widths = tuple(shape.out_features for shape in shapes)
            self._joined[names] = Joined(self._table, columns[0], shapes[0].in_features, widths)
        return self._joined[names]
