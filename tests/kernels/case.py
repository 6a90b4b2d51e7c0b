"""What the tests and the benchmark of kernels know of each: tests/kernels/cases/NAME.py tells it for NAME.cu.

A module of cases has `odd(device)`, which yields cases at odd sizes with fresh random input, and `real(device)`, which
yields (title, maker) for the sizes of an 8B Llama; a maker gives a case on memory of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorayard.kernels.launch import FOLDER, Launch

NAMES = sorted(path.stem for path in FOLDER.glob("*.cu"))
Real = tuple[str, Callable[[], "Case"]]


@dataclass
class Case:
    """Launches in order, what they must write, and what they must read and compute at least.

    expected: an output and its float64 value. same: rows that must have the same bits.
    tolerance: of the norm of the difference over the norm of the value. kept: what must live as long as the case.
    """

    title: str
    launches: list[Launch]
    expected: list[tuple[Tensor, Tensor]]
    tolerance: float = 4e-4
    same: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    bytes: int = 0
    operations: int = 0
    kept: object = None


def cases_of(name: str):
    """The module that describes a kernel."""
    return importlib.import_module(f".cases.{name}", __package__)


def poisoned(*shape: int, dtype: torch.dtype = torch.float16, device: str = "cpu") -> Tensor:
    """NaN everywhere, so that what nobody writes is seen."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def check(case: Case) -> None:
    """Assert that the outputs, already written, are right."""
    for out, value in case.expected:
        error = ((out.double() - value).norm() / value.norm()).item()
        assert error < case.tolerance, f"{case.title}: the error is {error:.1e}"
    for one, other in case.same:
        assert torch.equal(one, other), f"{case.title}: the bits of a row depend on the batch"
