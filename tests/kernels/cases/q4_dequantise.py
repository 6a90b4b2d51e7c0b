"""Weights of 4 bits made fp16, for batches that cuBLAS multiplies."""

from __future__ import annotations

from collections.abc import Iterator

from lorayard.kernels import linear_gptq, linear_q4, q4

from ..case import Case, Real, poisoned
from .q4_decode import LINEARS, gptq


def make(inputs: int, outputs: int, group: int, symmetric: bool, device: str) -> Case:
    """A case whose weights must be exact."""
    tensors = gptq(inputs, outputs, group, True, symmetric, device)
    packed = q4.pack(*tensors)
    out = poisoned(len(packed.factors), inputs, device=device)
    value = linear_gptq.dequantise(*tensors).T.double()
    launches = [linear_q4.widen(packed, out)]
    read = packed.weights.nbytes + packed.scales.nbytes + out.nbytes
    return Case(f"{inputs} x {outputs}", launches, [(out[:outputs], value)], 1e-12, bytes=read)


def odd(device: str) -> Iterator[Case]:
    yield make(384, 80, 32, False, device)
    yield make(256, 64, 256, True, device)


def real(device: str) -> Iterator[Real]:
    for name, (inputs, outputs) in LINEARS.items():
        yield name, lambda k=inputs, n=outputs: make(k, n, 128, True, device)
