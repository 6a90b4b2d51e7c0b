"""A x of many adapters, and what both kernels of LoRA need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorayard.kernels import lora
from lorayard.kernels.lora_tiles import tables

from ..case import Case, Real

LINEARS = {
    "qkv": (4096, (4096, 1024, 1024)), "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)), "down": (14336, (4096,)),
}  # fmt: skip
BATCHES = {
    "1 token": [0], "64 tokens, one": [0] * 64, "64 tokens, 64": list(range(64)),
    "256 tokens, 64": [i % 64 for i in range(256)], "8192 tokens, 16": [i // 512 for i in range(8192)],
}  # fmt: skip
"""The slot of each row, by what the batch is."""


@dataclass
class Problem:
    """Random adapters of `ranks` at each of the linears but those of `without`, on `x` and `y`."""

    linears: lora.Joined
    buffers: list[Tensor]
    halves: dict[tuple[int, int], tuple[Tensor, Tensor]]
    slots: list[int]
    x: Tensor
    y: Tensor
    scales: Tensor

    @classmethod
    def random(
        cls, slots: list[int], inputs: int, widths: tuple[int, ...], ranks: list[int], dtype: torch.dtype, device: str,
        without: tuple[tuple[int, int], ...] = (),
    ) -> Problem:  # fmt: skip
        """Slot s of rank ranks[s], touching each part p but where (s, p) is in `without`."""
        table, buffers, halves = torch.zeros(len(ranks), 2 + len(widths), dtype=torch.int64), [], {}
        for slot, rank in enumerate(ranks):
            table[slot, 0] = rank
            for part, outputs in enumerate(widths):
                if (slot, part) in without:
                    continue
                buffer = torch.randn(rank * (inputs + outputs), device=device).to(dtype)
                buffer[rank * inputs :] *= rank**-0.5
                table[slot, 2 + part] = buffer.data_ptr()
                halves[slot, part] = buffer[: rank * inputs].view(rank, -1), buffer[rank * inputs :].view(-1, rank)
                buffers.append(buffer)
        x = (torch.randn(len(slots), inputs, device=device) * inputs**-0.5).to(dtype)
        y = torch.randn(len(slots), sum(widths), device=device).to(dtype)
        scales = torch.randn(len(slots), max(ranks), device=device)
        return cls(lora.Joined(table.to(device), 2, inputs, widths), buffers, halves, slots, x, y, scales)

    def tiles(self, columns: int, rows: slice = slice(None)) -> lora.Tiles:
        """Of some rows, with two tiles that nobody uses."""
        made = tables(np.array(self.slots[rows], np.int32), columns)
        place = [torch.from_numpy(each).to(self.x.device) for each in made]
        unused = [torch.full_like(each[:1], -1).expand(2, *each.shape[1:]) for each in place]
        return lora.Tiles(  # type: ignore[call-arg]
            *(torch.cat(pair) for pair in zip(place, unused, strict=True)), self.scales[rows].contiguous()
        )

    def shrunk(self) -> Tensor:
        """float64 [slices, T, parts * W], zeros where there is nothing."""
        starts, parts = range(0, self.linears.inputs, lora.SLICE), len(self.linears.widths)
        h = torch.zeros(len(starts), len(self.slots), parts, self.scales.shape[1], device=self.x.device).double()
        for (slot, part), (a, _) in self.halves.items():
            rows = [i for i, each in enumerate(self.slots) if each == slot]
            for slice, start in zip(h, starts, strict=True):
                columns = range(start, min(start + lora.SLICE, self.linears.inputs))
                product = self.x[rows][:, columns].double() @ a[:, columns].double().T
                slice[rows, part, : len(a)] = product * self.scales[rows, : len(a)]
        return h.flatten(2)

    def added(self) -> Tensor:
        """float64 [T, N], y and what the adapters add."""
        y, h = self.y.double(), self.shrunk().sum(0).view(len(self.slots), len(self.linears.widths), -1)
        for (slot, part), (a, b) in self.halves.items():
            rows, start = [i for i, each in enumerate(self.slots) if each == slot], sum(self.linears.widths[:part])
            y[rows, start : start + len(b)] += h[rows, part, : len(a)] @ b.double().T
        return y

    def used(self, half: int) -> int:
        """Bytes of A or B that the rows use."""
        return sum(pair[half].nbytes for (slot, _), pair in self.halves.items() if slot in self.slots)


def problems(device: str) -> Iterator[Problem]:
    """Odd sizes, mixed ranks, rows without adapters, slots without some of the linears."""
    slots = [1, -1, 0, 2, 1, 3, -1, *[1] * 11, 2, 0]
    yield Problem.random(slots, 2120, (200, 72), [16, 64, 32, 16], torch.float16, device, ((0, 1), (2, 0)))
    yield Problem.random(slots, 136, (64, 8, 24), [16, 16, 32, 16], torch.bfloat16, device, ((1, 1),))
    yield Problem.random(slots, 4096, (1048,), [128, 16, 64, 16], torch.float16, device)


def odd(device: str) -> Iterator[Case]:
    for problem in problems(device):
        outputs, launches = [], []
        for columns, rows in ((8, slice(None)), (32, slice(None)), (8, slice(3, 5))):
            tiles, x = problem.tiles(columns, rows), problem.x[rows].contiguous()
            h = lora.new_partial(x, problem.linears, tiles).fill_(0)
            launches.append(lora.shrink(x, problem.linears, tiles, h))
            outputs.append(h)
        expected, tolerance = [(h, problem.shrunk()) for h in outputs[:2]], 1e-5
        same = [(outputs[0], outputs[1]), (outputs[2], outputs[0][:, 3:5])]
        yield Case(f"{problem.linears.inputs} inputs", launches, expected, tolerance, same, kept=problem)


def real(device: str) -> Iterator[Real]:
    for batch, slots in BATCHES.items():
        for name, sizes in LINEARS.items():
            yield f"{name}, {batch}", lambda s=slots, k=sizes: one(s, *k, device)  # type: ignore[call-arg]


def one(slots: list[int], inputs: int, widths: tuple[int, ...], device: str) -> Case:
    """A batch of Llama's sizes and ranks of 16."""
    problem = Problem.random(slots, inputs, widths, [16] * (max(slots) + 1), torch.float16, device)
    tiles = problem.tiles(8 if len(slots) <= 256 else 32)
    h = lora.new_partial(problem.x, problem.linears, tiles)
    launches = [lora.shrink(problem.x, problem.linears, tiles, h)]
    return Case("", launches, [], bytes=problem.used(0) + problem.x.nbytes + h.nbytes, kept=problem)
