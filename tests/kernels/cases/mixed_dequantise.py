"""Weights of mixed widths made fp16, for batches that cuBLAS multiplies."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorayard.kernels import linear_mixed, mixed

from ..case import Case, Real, poisoned
from .mixed_decode import LINEARS, exl2, packed


def odd(device: str) -> Iterator[Case]:
    for title, weights, value in packed(device):
        out = poisoned(len(weights.words) * 16, weights.columns, device=device)
        stored = torch.zeros(weights.columns, weights.outputs, dtype=torch.float64, device=device)
        position = weights.position()
        stored[slice(None) if position is None else position] = value.double()
        launches = [linear_mixed.widen(weights, out)]
        yield Case(title, launches, [(out[: weights.outputs], stored.T)], 1e-12)


def real(device: str) -> Iterator[Real]:
    for name in ("gate", "down"):
        inputs, outputs = LINEARS[name]
        yield name, lambda k=inputs, n=outputs: one(k, n, device)


def one(inputs: int, outputs: int, device: str) -> Case:
    """A linear of Llama's sizes."""
    weights = mixed.pack_exl2(*exl2(outputs, [(4, 128)] * (inputs // 128), device), outputs)
    out = poisoned(len(weights.words) * 16, weights.columns, device=device)
    read = weights.words.nbytes + weights.scales.nbytes + out.nbytes
    return Case(f"{inputs} x {outputs}", [linear_mixed.widen(weights, out)], [], bytes=read)
