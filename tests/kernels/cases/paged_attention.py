"""Decoding and prefilling over pages in random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from lorayard.kernels import attention, paged_attention
from lorayard.kernels.pool import FloatPool, Pool, QuantisedPool, quantise

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
    bits: tuple[int, int] | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float16, torch.float16),
) -> Case:
    """Sequences of `contexts` tokens, of which the last `queries` attend; heads of queries and of the cache.

    A cache of codes has so many `bits` for K and V, another the second of `dtypes`; the first is of the queries.
    """
    widest = -(-max(contexts) // page)
    count = len(contexts) * widest
    table = torch.randperm(count).view(len(contexts), widest)
    shape = count, heads[1], page, dim
    pools = [pool_of(shape, each or dtypes[1], torch.device(device)) for each in bits or (0, 0)]
    sequence = torch.arange(len(contexts)).repeat_interleave(torch.tensor(queries))
    positions = torch.cat([torch.arange(n - m, n) for n, m in zip(contexts, queries, strict=True)])
    if set(queries) == {1}:
        tiles = attention.decode_tiles(positions.to(device), table.to(device), page, window)
    else:
        tiles = attention.tile(sequence, positions, table, page, page, torch.device(device), window)
    q = torch.randn(len(sequence), heads[0], dim, device=device).to(dtypes[0])
    out = poisoned(*q.shape, dtype=dtypes[0], device=device)
    arrays = tiles.rows, tiles.positions, tiles.pages.contiguous()
    launches = [paged_attention.attend_pages(q, (pools[0], pools[1]), *arrays, out, dim**-0.5, cap, window)]
    read = sum(contexts) * sum(pool.nbytes for pool in pools) // (count * page)
    title = f"{list(contexts)}, {heads}, {dim}, {bits or dtypes}"
    if count >= 64:
        return Case(title, launches, [], bytes=read)
    every = torch.arange(count, device=device)
    values = [pool.gather(every).unflatten(1, (count, page)).transpose(0, 1) for pool in pools]
    value = attend(q, values, table.to(device), sequence, positions, window, cap)
    alone, last = poisoned(1, *q.shape[1:], dtype=dtypes[0], device=device), slice(len(q) - 1, None)
    tiles = attention.decode_tiles(positions[last].clone().to(device), table[-1:].clone().to(device), page, window)
    arrays = tiles.rows, tiles.positions, tiles.pages
    launches.append(
        paged_attention.attend_pages(q[last].clone(), (pools[0], pools[1]), *arrays, alone, dim**-0.5, cap, window)
    )
    same = [(out[last], alone)] if set(queries) == {1} else []
    return Case(title, launches, [(out, value)], 8e-3 if torch.bfloat16 in dtypes else 1e-3, same, read)


def pool_of(shape: tuple[int, int, int, int], form: int | torch.dtype, device: torch.device) -> Pool:
    """A pool of codes of so many bits or of a dtype, full of random numbers."""
    if isinstance(form, torch.dtype):
        pool = FloatPool(shape, form, device)
        pool.values.normal_()
        return pool
    codes = QuantisedPool(shape, form, device)
    codes.codes, codes.scales = quantise(torch.randn(shape, device=device), form)
    return codes


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
    yield make((77, 530), (1, 1), (4, 1), 128, device, bits=(8, 8))
    yield make((20, 600), (1, 1), (8, 2), 128, device, bits=(8, 4))
    yield make((300,), (1,), (8, 1), 64, device, bits=(4, 4), dtypes=(torch.bfloat16, torch.float16))
    yield make((300,), (3,), (4, 1), 128, device, bits=(4, 4))
    yield make((300, 40), (1, 1), (8, 1), 64, device, dtypes=(torch.bfloat16, torch.bfloat16))
    yield make((40, 30), (1, 1), (2, 1), 128, device, dtypes=(torch.bfloat16, torch.float16))


def real(device: str) -> Iterator[Real]:
    for batch, context in ((1, 640), (8, 1024), (64, 640), (256, 640), (256, 1024)):
        for bits in (None, (8, 8), (8, 4), (4, 4)) if context == 640 else (None,):
            title = f"{batch} x {context}{', codes of ' + ' and '.join(map(str, bits)) if bits else ''}"
            yield title, partial(make, (context,) * batch, (1,) * batch, (32, 8), 128, device, bits=bits)
