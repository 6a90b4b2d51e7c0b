"""Small batches times weights of 4 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorayard.kernels import linear_gptq, linear_q4, q4

from ..case import Case, Real, poisoned

LINEARS = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}


def gptq(inputs: int, outputs: int, group: int, ordered: bool, symmetric: bool, device: str) -> list[torch.Tensor]:
    """Random tensors of linear_gptq.dequantise."""
    groups = inputs // group
    words = torch.randint(-(2**31), 2**31 - 1, (inputs // 8, outputs), dtype=torch.int64, device=device).int()
    zeros = torch.randint(1, 17, (groups, outputs), device=device)
    scales = (torch.rand(groups, outputs, device=device) * 0.02 + 0.002) * 2.0 ** torch.randint(
        -3, 4, (outputs,), device=device
    )
    index = torch.arange(inputs, device=device) // group
    index = index if ordered else index[torch.randperm(inputs, device=device)]
    return [words, (zeros.fill_(8) if symmetric else zeros).to(torch.int8), scales.half(), index]


def odd(device: str) -> Iterator[Case]:
    for inputs, outputs, group, ordered, symmetric in (
        (384, 96, 128, True, True),
        (512, 80, 32, False, False),
        (1280, 208, 1280, False, True),
    ):
        tensors = gptq(inputs, outputs, group, ordered, symmetric, device)
        weights, packed = linear_gptq.dequantise(*tensors).double(), q4.pack(*tensors)
        x, bias = (torch.randn(n, k, device=device).half() for n, k in ((37, inputs), (1, outputs)))
        sizes = (1, 7, 12, 37)
        outputs_of = [poisoned(n, outputs, device=device) for n in sizes]
        launches = [
            linear_q4.decode(x[:n].contiguous(), packed, bias[0], y) for n, y in zip(sizes, outputs_of, strict=True)
        ]
        value = x.double() @ weights + bias.double()
        title = f"{inputs} x {outputs}, groups of {group}, {'ordered' if ordered else 'by activation'}"
        expected = [(y, value[: len(y)]) for y in outputs_of]
        yield Case(title, launches, expected, same=[(y, outputs_of[-1][: len(y)]) for y in outputs_of[:-1]])


def real(device: str) -> Iterator[Real]:
    for tokens in (1, 8, 16):
        for name, (inputs, outputs) in LINEARS.items():
            yield f"{name}, {tokens} tokens", lambda k=inputs, n=outputs, m=tokens: one(k, n, m, device)


def one(inputs: int, outputs: int, tokens: int, device: str, shape: linear_q4.DecodeShape | None = None) -> Case:
    """A linear of Llama's sizes."""
    tensors = gptq(inputs, outputs, 128, True, True, device)
    packed = q4.pack(*tensors)
    x, y = torch.randn(tokens, inputs, device=device).half(), poisoned(tokens, outputs, device=device)
    value = x.double() @ linear_gptq.dequantise(*tensors).double()
    read = packed.weights.numel() * 4 + packed.scales.numel() * 2 + 2 * tokens * (inputs + outputs)
    launches = [linear_q4.decode(x, packed, None, y, shape)]
    return Case(f"{inputs} x {outputs}", launches, [(y, value)], bytes=read, operations=2 * tokens * inputs * outputs)
