"""y += B h of many adapters."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorayard.kernels import lora

from ..case import Case, Real, poisoned
from .lora_shrink import BATCHES, LINEARS, Problem, problems


def odd(device: str) -> Iterator[Case]:
    for problem in problems(device):
        outputs, launches = [], []
        for columns, rows in ((8, slice(None)), (32, slice(None)), (8, slice(3, 5))):
            tiles, x, y = problem.tiles(columns, rows), problem.x[rows].contiguous(), problem.y[rows].clone()
            h = poisoned(*lora.new_partial(x, problem.linears, tiles).shape, dtype=torch.float32, device=device)
            launches += [lora.shrink(x, problem.linears, tiles, h), lora.expand(h, problem.linears, tiles, y)]
            outputs.append(y)
        half = problem.x.dtype == torch.float16
        expected = [(y, problem.added()) for y in outputs[:2]]
        same = [(outputs[0], outputs[1]), (outputs[2], outputs[0][3:5])]
        same += [(outputs[0][i], problem.y[i]) for i, slot in enumerate(problem.slots) if slot < 0]
        yield Case(f"{problem.linears.widths}", launches, expected, 4e-4 if half else 4e-3, same, kept=problem)


def real(device: str) -> Iterator[Real]:
    for batch, slots in BATCHES.items():
        for name, sizes in LINEARS.items():
            yield f"{name}, {batch}", lambda s=slots, k=sizes: one(s, *k, device)  # type: ignore[call-arg]


def one(slots: list[int], inputs: int, widths: tuple[int, ...], device: str) -> Case:
    """A batch of Llama's sizes and ranks of 16."""
    problem = Problem.random(slots, inputs, widths, [16] * (max(slots) + 1), torch.float16, device)
    tiles = problem.tiles(8 if len(slots) <= 256 else 32)
    h = lora.new_partial(problem.x, problem.linears, tiles).normal_()
    launches = [lora.expand(h, problem.linears, tiles, problem.y)]
    return Case("", launches, [], bytes=problem.used(1) + 2 * problem.y.nbytes + h.nbytes, kept=problem)
