"""Columns in another order, some of them none."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorayard.kernels.gather_columns import gather

from ..case import Case, Real, poisoned


def make(tokens: int, inputs: int, columns: int, device: str) -> Case:
    """A case with random columns, which must be exact."""
    x = torch.randn(tokens, inputs, device=device).half()
    order = torch.randint(-1, inputs, (columns,), dtype=torch.int32, device=device)
    out = poisoned(tokens, columns, device=device)
    value = x.double()[:, order.long()] * (order >= 0)
    return Case(f"{tokens} x {inputs}", [gather(x, order, out)], [(out, value)], 1e-12, bytes=x.nbytes + out.nbytes)


def odd(device: str) -> Iterator[Case]:
    yield make(3, 96, 128, device)
    yield make(2, 72, 1096, device)


def real(device: str) -> Iterator[Real]:
    for tokens in (1, 16):
        yield f"{tokens} tokens", lambda n=tokens: make(n, 4096, 4160, device)
