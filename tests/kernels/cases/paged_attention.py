"""Decoding and prefilling over pages in random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lorayard.kernels import attention, paged_attention

from ..case import Case, Real, poisoned

PAGE = 256


def make(
    contexts: Sequence[int],
    queries: Sequence[int],
    heads: tuple[int, int],
    dim: int,
    device: str,
    page: int = PAGE,
    window: int = 0,
    cap: float = 0.0,
) -> Case:
    """Sequences of `contexts` tokens, of which the last `queries` attend; heads of queries and of the cache."""
    widest = -(-max(contexts) // page)
    count = len(contexts) * widest
    table = torch.randperm(count).view(len(contexts), widest)
    pools = [torch.randn(count, heads[1], page, dim, device=device).half() for _ in range(2)]
    sequence = torch.arange(len(contexts)).repeat_interleave(torch.tensor(queries))
    positions = torch.cat([torch.arange(n - m, n) for n, m in zip(contexts, queries, strict=True)])
    if set(queries) == {1}:
        tiles = attention.decode_tiles(positions.to(device), table.to(device), page, window)
    else:
        tiles = attention.tile(sequence, positions, table, page, page, torch.device(device), window)
    q = torch.randn(len(sequence), heads[0], dim, device=device).half()
    out = poisoned(*q.shape, device=device)
    arrays = tiles.rows, tiles.positions, tiles.pages.contiguous()
    launches = [paged_attention.attend_pages(q, (pools[0], pools[1]), *arrays, out, dim**-0.5, cap, window)]
    read = sum(contexts) * heads[1] * dim * 4
    value = attend(q, pools, table.to(device), sequence, positions, window, cap) if count < 64 else out.new_zeros(0)
    return Case(f"{list(contexts)}, {heads}, {dim}", launches, [(out, value)] if len(value) else [], 1e-3, bytes=read)


def attend(
    q: torch.Tensor,
    pools: Sequence[torch.Tensor],
    table: torch.Tensor,
    sequence: torch.Tensor,
    positions: torch.Tensor,
    window: int,
    cap: float,
):
    """Attention in float64, a token at a time."""
    group = q.shape[1] // pools[0].shape[1]
    out = torch.empty_like(q, dtype=torch.float64)
    for i, (row, at) in enumerate(zip(sequence.tolist(), positions.tolist(), strict=True)):
        k, v = (pool[table[row]].transpose(0, 1).flatten(1, 2)[:, : at + 1].double() for pool in pools)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = (k @ q[i].double()[:, :, None])[:, :, 0] * q.shape[2] ** -0.5
        scores = cap * (scores / cap).tanh() if cap else scores
        if window:
            scores[:, : max(0, at - window + 1)] = -torch.inf
        out[i] = (scores.softmax(-1)[:, None] @ v)[:, 0]
    return out


def odd(device: str) -> Iterator[Case]:
    yield make((77, 1, 530), (1, 1, 1), (8, 2), 128, device)
    yield make((77, 1, 530), (1, 1, 1), (3, 1), 64, device, window=50)
    yield make((21, 515), (7, 6), (8, 2), 64, device, 16)
    yield make((40,), (3,), (3, 3), 64, device, 48)
    yield make((5, 700), (3, 1), (10, 1), 64, device, window=100, cap=2.0)


def real(device: str) -> Iterator[Real]:
    for batch, context in ((1, 1024), (8, 1024), (64, 640), (64, 1024), (256, 1024)):
        yield f"{batch} x {context}", lambda b=batch, c=context: make((c,) * b, (1,) * b, (32, 8), 128, device)
