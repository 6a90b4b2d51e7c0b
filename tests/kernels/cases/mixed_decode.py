"""Small batches times weights of mixed widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorayard.kernels import linear_exl2, linear_gptq, linear_mixed, mixed
from lorayard.kernels.gather_columns import gather

from ..case import Case, Real, poisoned

LINEARS = {"q": (4096, 4096), "k": (4096, 1024), "gate": (4096, 14336), "down": (14336, 4096), "qkv": (4096, 6144),
           "gate_up": (4096, 28672)}  # fmt: skip
Groups = Sequence[tuple[int, int]]
ODD: tuple[tuple[int, Groups], ...] = (
    (96, ((8, 32), (6, 64), (5, 32), (4, 64), (3, 32), (2, 64), (2, 32))),
    (64, ((5, 32), (5, 32), (4, 128), (4, 128), (3, 64), (3, 64), (3, 32))),
    (160, ((4, 128), (2, 64), (4, 128), (2, 32), (8, 128))),
)


def exl2(outputs: int, groups: Groups, device: str) -> tuple[Tensor, Tensor, Tensor, Groups, Tensor]:
    """Random tensors of linear_exl2.dequantise."""
    inputs = sum(rows for _, rows in groups)
    order = torch.randperm(inputs, device=device)
    maxima = torch.rand(len(groups), device=device).half() * 0.1 + 0.01
    return _words(sum(r * b // 32 for b, r in groups), outputs, device), _words(len(groups), outputs // 8, device), \
        maxima, groups, order  # fmt: skip


def _words(rows: int, columns: int, device: str) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int64, device=device).int()


def gptq(bits: int, inputs: int, outputs: int, group: int, ordered: bool, symmetric: bool, device: str) -> list[Tensor]:
    """Random tensors of linear_gptq.dequantise."""
    groups = -(-inputs // group)
    zeros = torch.randint(1, (1 << bits) + 1, (groups, outputs), device=device).to(torch.int16)
    zeros = zeros.fill_(1 << bits - 1) if symmetric else zeros
    scales = (torch.rand(groups, outputs, device=device) * 0.02 + 0.002).half()
    index = torch.arange(inputs, device=device) // group
    index = index if ordered else index[torch.randperm(inputs, device=device)]
    return [_words(inputs * bits // 32, outputs, device), zeros, scales, index]


def packed(device: str) -> Iterator[tuple[str, mixed.Mixed, Tensor]]:
    """Matrices of both formats in the kernels' layout, and what torch makes of them, [K, N]."""
    for outputs, groups in ODD:
        tensors = exl2(outputs, groups, device)
        yield f"EXL2 of {groups}", mixed.pack_exl2(*tensors, outputs), linear_exl2.dequantise(*tensors)
    for bits, inputs, group, ordered, symmetric in ((8, 192, 64, True, True), (2, 384, 128, False, False),
                                                   (3, 256, 256, False, True), (8, 224, 32, True, False)):  # fmt: skip
        tensors = gptq(bits, inputs, 96, group, ordered, symmetric, device)  # type: ignore[assignment]
        yield f"GPTQ of {bits} bits", mixed.pack_gptq(*tensors), linear_gptq.dequantise(*tensors)  # type: ignore[call-arg]


def odd(device: str) -> Iterator[Case]:
    shapes = (None, linear_mixed.DecodeShape(1, 4, 4, 2))
    for i, (title, weights, value) in enumerate(packed(device)):
        x, bias = (torch.randn(n, k, device=device).half() for n, k in ((19, weights.inputs), (1, weights.outputs)))
        y, sizes, launches = [], (1, 11, 19), []
        for n in sizes:
            stored = poisoned(n, weights.columns, device=device)
            order = torch.arange(weights.inputs, device=device).int() if weights.order is None else weights.order
            y.append(poisoned(n, weights.outputs, device=device))
            launches += [gather(x[:n], order, stored)]
            launches += [linear_mixed.decode(stored, weights, bias[0], y[-1], shapes[i % 2])]
        result = x.double() @ value.double() + bias.double()
        yield Case(title, launches, [(each, result[: len(each)]) for each in y],
                   same=[(each, y[-1][: len(each)]) for each in y[:-1]])  # fmt: skip


def real(device: str) -> Iterator[Real]:
    for tokens in (1, 8, 16):
        for name, (inputs, outputs) in LINEARS.items():
            yield f"{name} of 4.0 bits, {tokens} tokens", lambda k=inputs, n=outputs, m=tokens: one(k, n, m, device)
    for bits in (2, 3, 5, 6, 8):
        yield f"gate of {bits} bits, 1 token", lambda b=bits: one(4096, 14336, 1, device, bits=b)


def one(
    inputs: int, outputs: int, tokens: int, device: str, shape: linear_mixed.DecodeShape | None = None, bits: int = 4
) -> Case:
    """A linear of Llama's sizes as EXL2: of 4 bits with a part of 5 and another of 3."""
    some = 2 if bits == 4 else 0
    groups = [(5, 128)] * some + [(bits, 128)] * (inputs // 128 - 2 * some) + [(3, 128)] * some
    tensors = exl2(outputs, groups, device)
    weights, value = mixed.pack_exl2(*tensors, outputs), linear_exl2.dequantise(*tensors)
    x, y = torch.randn(tokens, inputs, device=device).half(), poisoned(tokens, outputs, device=device)
    stored = x[:, weights.order.long()].contiguous()
    launches = [gather(x, weights.order, stored), linear_mixed.decode(stored, weights, None, y, shape)]
    read = weights.words.nbytes + weights.scales.nbytes + x.nbytes + y.nbytes
    expected = [(y, x.double() @ value.double())]
    return Case(f"{inputs} x {outputs}", launches, expected, bytes=read, operations=2 * tokens * inputs * outputs)
