"""Batches to 256 tokens times weights of 4 bits, with what arranges the tokens and adds the parts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorayard.kernels import linear_gptq, linear_q4, q4

from ..case import Case, Real, poisoned
from .q4_decode import LINEARS, gptq


def product(x, packed, bias, shape=None):
    """The launches of q4_mid and, where K is divided, sum_partials, and the tensor that they write."""
    launches, y = linear_q4.mid(x, packed, bias, shape)
    if isinstance(y, torch.Tensor):
        return launches, y.fill_(torch.nan)
    y.parts.fill_(torch.nan)
    out = poisoned(len(x), packed.outputs, device=x.device)
    return [*launches, linear_q4.add_parts(y, out)], out


def odd(device: str) -> Iterator[Case]:
    shape = linear_q4.MidShape
    for inputs, outputs, group, ordered, symmetric, shapes in (
        (512, 240, 64, True, True, (shape(2, 16, 1, 2), shape(1, 32, 1, 2))),
        (896, 64, 32, False, False, (shape(1, 16, 2, 2), shape(1, 64, 2, 1))),
        (1280, 128, 1280, True, False, (shape(2, 32, 3, 1), shape(1, 16, 3, 3))),
    ):
        tensors = gptq(inputs, outputs, group, ordered, symmetric, device)
        weights, packed = linear_gptq.dequantise(*tensors).double(), q4.pack(*tensors)
        x, bias = torch.randn(37, inputs, device=device).half(), torch.randn(outputs, device=device).half()
        launches, expected, same = [], [], []
        for shape_of, tokens in zip(shapes, (11, 37), strict=True):
            more, y = product(x[:tokens], packed, bias, shape_of)
            launches += more
            expected.append((y, x[:tokens].double() @ weights + bias.double()))
            same.append((y[:11], expected[0][0]))
        yield Case(f"{inputs} x {outputs}, groups of {group}", launches, expected, same=same)


def real(device: str) -> Iterator[Real]:
    for tokens in (16, 32, 64, 128, 256):
        for name, (inputs, outputs) in LINEARS.items():
            yield f"{name}, {tokens} tokens", lambda k=inputs, n=outputs, m=tokens: one(k, n, m, device)


def one(inputs: int, outputs: int, tokens: int, device: str, shape: linear_q4.MidShape | None = None) -> Case:
    """A linear of Llama's sizes."""
    tensors = gptq(inputs, outputs, 128, True, True, device)
    packed = q4.pack(*tensors)
    x = torch.randn(tokens, inputs, device=device).half()
    value = x.double() @ linear_gptq.dequantise(*tensors).double()
    read = packed.weights.numel() * 4 + packed.scales.numel() * 2 + 2 * tokens * (inputs + outputs)
    launches, y = product(x, packed, None, shape)
    return Case(f"{inputs} x {outputs}", launches, [(y, value)], bytes=read, operations=2 * tokens * inputs * outputs)
