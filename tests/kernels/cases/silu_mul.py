"""The gate, on tensors of their own and on the columns of one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorayard.kernels.arranged import new_image
from lorayard.kernels.silu_mul import gated

from ..case import Case, Real, poisoned
from .q4_arrange import image_of


def make(rows: int, width: int, dtype: torch.dtype, device: str, alone: bool = True) -> Case:
    """A case with gate and up side by side."""
    gate, up = torch.randn(rows, 2 * width, device=device).mul_(3).to(dtype).chunk(2, -1)
    out, last = (poisoned(n, width, dtype=dtype, device=device) for n in (rows, 1))
    launches = [gated(gate, up, out), gated(gate[-1:], up[-1:], last)][: 1 + alone]
    value = torch.nn.functional.silu(gate.double()) * up.double()
    tolerance = 4e-4 if dtype == torch.float16 else 3e-3
    return Case(
        f"{rows} x {width}, {dtype}", launches, [(out, value)], tolerance, [(out[-1:], last)] * alone, 3 * out.nbytes
    )


def arranged(rows: int, width: int, device: str) -> Case:
    """A case of an image."""
    gate, up = torch.randn(rows, 2 * width, device=device).half().chunk(2, -1)
    out = poisoned(rows, width, device=device)
    image = new_image(out).fill_(torch.nan)
    value = torch.nn.functional.silu(gate.double()) * up.double()
    expected = [(out, value), (image[:, :rows], image_of(value))]
    return Case(f"{rows} x {width}, arranged", [gated(gate, up, out, image)], expected, bytes=4 * out.nbytes)


def odd(device: str) -> Iterator[Case]:
    yield make(3, 136, torch.float16, device)
    yield make(2, 2056, torch.bfloat16, device)
    yield arranged(17, 192, device)


def real(device: str) -> Iterator[Real]:
    for tokens in (1, 64, 256):
        yield f"{tokens} tokens", lambda n=tokens: make(n, 14336, torch.float16, device, False)
        yield f"arranged, {tokens} tokens", lambda n=tokens: arranged(n, 14336, device)
