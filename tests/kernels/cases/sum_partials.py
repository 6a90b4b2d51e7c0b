"""Parts of K added in their order."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorayard.kernels import linear_q4
from lorayard.kernels.arranged import Partial

from ..case import Case, Real, poisoned


def make(parts: int, tokens: int, outputs: int, width: int, device: str) -> Case:
    """A case with bias."""
    partial, bias = torch.randn(parts, tokens, width, device=device), torch.randn(outputs, device=device).half()
    y = poisoned(tokens, outputs, device=device)
    value = partial.double().sum(0)[:, :outputs] + bias.double()
    launches = [linear_q4.add_parts(Partial(partial, bias), y)]
    return Case(f"{parts} parts", launches, [(y, value)], bytes=partial.nbytes + y.nbytes)


def odd(device: str) -> Iterator[Case]:
    yield make(3, 5, 1100, 1152, device)


def real(device: str) -> Iterator[Real]:
    for tokens in (16, 64):
        yield f"4 parts, {tokens} tokens", lambda n=tokens: make(4, n, 4096, 4096, device)
