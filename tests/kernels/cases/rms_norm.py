"""Normalisation, with and without a residual."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorayard.kernels.arranged import Partial, new_image
from lorayard.kernels.rms_norm import norm

from ..case import Case, Real, poisoned
from .q4_arrange import image_of

EPS = 1e-5


def make(rows: int, width: int, dtype: torch.dtype, residual: bool, device: str, alone: bool = True) -> Case:
    """A case with random rows."""
    x, r = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(width, device=device).to(dtype)
    total, y, first = (poisoned(n, width, dtype=dtype, device=device) for n in (rows, rows, 1))
    value = (x + r if residual else x).double()
    launches = [norm(x, r if residual else None, weight, total if residual else None, y, EPS)]
    if alone:
        launches.append(norm(x[:1], r[:1] if residual else None, weight, total[:1] if residual else None, first, EPS))
    expected = [(y, value * (value.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double())]
    if residual:
        expected.append((total, value))
    tolerance = 5e-4 if dtype == torch.float16 else 4e-3
    read = x.nbytes * (4 if residual else 2)
    return Case(f"{rows} x {width}, {dtype}", launches, expected, tolerance, [(y[:1], first)] * alone, read)


def between(rows: int, width: int, parts: int, device: str) -> Case:
    """A case of parts to add, and of an image to write."""
    residual, weight, bias = (torch.randn(n, width, device=device).half() for n in (rows, 1, 1))
    x = Partial(torch.randn(parts, rows, width + 64, device=device), bias[0])
    total, y = (poisoned(rows, width, device=device) for _ in range(2))
    image = new_image(y).fill_(torch.nan)
    value = (x.parts.double().sum(0)[:, :width] + bias.double()).half().double() + residual.double()
    normal = value * (value.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    expected = [(total, value), (y, normal), (image[:, :rows], image_of(normal))]
    launches = [norm(x, residual, weight[0], total, y, EPS, image)]
    return Case(f"{rows} x {width}, {parts} parts", launches, expected, 5e-4, bytes=x.parts.nbytes + 5 * y.nbytes)


def odd(device: str) -> Iterator[Case]:
    yield make(5, 72, torch.float16, False, device)
    yield make(3, 4104, torch.float16, True, device)
    yield make(2, 2056, torch.bfloat16, True, device)
    yield between(19, 128, 3, device)


def real(device: str) -> Iterator[Real]:
    for tokens in (1, 64, 256):
        yield f"with residual, {tokens} tokens", lambda n=tokens: make(n, 4096, torch.float16, True, device, False)
        yield f"4 parts, {tokens} tokens", lambda n=tokens: between(n, 4096, 4, device)
