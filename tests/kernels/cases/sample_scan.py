"""The highest logit of each chunk, and the sum of its masses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from lorayard.kernels import sample

from ..case import Case, Real


def make(rows: int, width: int, vocab_size: int, dtype: torch.dtype, device: str) -> Case:
    """A case with logits that have equals."""
    logits = (torch.randn(rows, width, device=device).double() * 8).round().div(4).to(dtype)
    settings = np.zeros(rows, sample.ROW)
    settings["temperature"], settings["banned"] = 0.8, -1
    words = torch.from_numpy(settings.view(np.int32).reshape(rows, -1)).to(device)
    chunks = -(-vocab_size // sample.CHUNK)
    highest, sums = (torch.full((rows, chunks), -7, dtype=torch.int64, device=device) for _ in range(2))
    values = torch.full((rows, chunks * sample.CHUNK), -torch.inf, dtype=torch.float64, device=device)
    values[:, :vocab_size] = logits[:, :vocab_size]
    values = values.view(rows, chunks, -1)
    places = ~(values.argmax(-1) + torch.arange(chunks, device=device) * sample.CHUNK).int()
    total = ((values - values.amax(-1, keepdim=True)) / np.float32(0.8)).exp().sum(-1)
    launches = [sample.scan(logits, words, highest, sums, vocab_size)]
    same = [(highest.view(torch.int32)[:, ::2], places)]
    return Case(f"{rows} x {width}, {dtype}", launches, [(sums, total * 2.0**40)], 1e-5, same, logits.nbytes)


def odd(device: str) -> Iterator[Case]:
    yield make(3, 8195, 8193, torch.float32, device)
    yield make(2, 16400, 9000, torch.float16, device)
    yield make(2, 1001, 1001, torch.bfloat16, device)


def real(device: str) -> Iterator[Real]:
    for rows in (1, 64, 256):
        yield f"{rows} rows", lambda n=rows: make(n, 128256, 128256, torch.float16, device)
