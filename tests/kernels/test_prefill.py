"""Attention of prompts by torch against the tiles of attention.py."""

from __future__ import annotations

import pytest
import torch

from lorayard.kernels import attention, prefill
from lorayard.kernels.pool import FloatPool, QuantisedPool

CONTEXTS, QUERIES = (77, 1, 530, 256, 257, 40), (77, 1, 10, 256, 1, 3)
PAGE, HEADS, KV_HEADS, DIM = 256, 6, 2, 64


def make(kind: str, device: str, dtype: torch.dtype):
    """A step over pages in random order: q, pools, and what `tile` is given."""
    torch.manual_seed(len(kind))
    count = len(CONTEXTS) * 3
    shape, place = (count, KV_HEADS, PAGE, DIM), torch.device(device)
    pools = [FloatPool(shape, dtype, place) if kind == "floats" else QuantisedPool(shape, 8, place) for _ in range(2)]
    for pool in pools:
        pages, offsets = (torch.arange(count * PAGE, device=device) // PAGE, torch.arange(PAGE, device=device))
        pool.write(torch.randn(count * PAGE, KV_HEADS, DIM, device=device), pages, offsets.repeat(count))
    sequence = torch.arange(len(CONTEXTS)).repeat_interleave(torch.tensor(QUERIES))
    positions = torch.cat([torch.arange(n - m, n) for n, m in zip(CONTEXTS, QUERIES, strict=True)])
    q = torch.randn(len(sequence), HEADS, DIM, device=device).to(dtype)
    return q, pools, (sequence, positions, torch.randperm(count).view(-1, 3), PAGE, 64, place)


@pytest.mark.parametrize("kind", ["floats", "codes"])
@pytest.mark.parametrize("window", [0, 100])
def test_spans_and_the_rest_are_the_tiles(kind, window):
    q, pools, step = make(kind, "cpu", torch.float32)
    split = attention.divide(*step, window)  # type: ignore[call-arg]
    assert len(split.spans) == (2 if window else 4)
    out = torch.full_like(q, torch.nan)
    prefill.attend_spans(q, pools, split.spans, 0.125, out)
    out[split.tokens] = attention.attend(q[split.tokens], *pools, split.tiles, 0.125)  # type: ignore[call-arg]
    torch.testing.assert_close(out, attention.attend(q, *pools, attention.tile(*step, window), 0.125))  # type: ignore[call-arg]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("kind", ["floats", "codes"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_attends_as_the_reference_does(kind, dtype, monkeypatch):
    q, pools, step = make(kind, "cuda", dtype)
    tiles = attention.tile(*step)
    out = attention.attend(q, *pools, tiles, 0.125)  # type: ignore[call-arg]
    monkeypatch.setenv("LORAYARD_KERNELS", "torch")
    value = attention.attend(q, *pools, tiles, 0.125).double()  # type: ignore[call-arg]
    assert (out.double() - value).norm() / value.norm() < (2e-3 if dtype == torch.float16 else 1e-2)
