"""Pages of every kind of cache in order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from lorayard.kernels.gather_pages import gather_pages

from ..case import Case, Real, poisoned
from .paged_attention import PAGE, pool_of

Kinds = tuple[int | torch.dtype, int | torch.dtype]


def make(pages: int, heads: int, dim: int, kinds: Kinds, dtype: torch.dtype, device: str, page: int = PAGE) -> Case:
    """So many of twice as many pages, of K and V of these bits or dtypes."""
    shape = 2 * pages, heads, page, dim
    k, v = (pool_of(shape, kind, torch.device(device)) for kind in kinds)
    which = torch.randperm(2 * pages, device=device)[:pages].clone()
    out = poisoned(2, heads, pages * page, dim, dtype=dtype, device=device)
    launches = [gather_pages((k, v), which, (out[0], out[1]))]
    same = [(each, pool.gather(which).to(dtype)) for each, pool in zip(out, (k, v), strict=True)]
    read = (k.nbytes + v.nbytes) // 2 + out.nbytes
    return Case(f"{pages} x {heads} x {page} x {dim}, {kinds}, {dtype}", launches, [], same=same, bytes=read)


def odd(device: str) -> Iterator[Case]:
    yield make(3, 2, 64, (torch.float16, torch.float16), torch.float16, device, 20)
    yield make(2, 1, 128, (torch.bfloat16, torch.bfloat16), torch.float16, device, 12)
    yield make(2, 3, 128, (8, 4), torch.float16, device, 12)
    yield make(1, 2, 64, (4, 8), torch.bfloat16, device, 16)


def real(device: str) -> Iterator[Real]:
    for title, kind in (("fp16", torch.float16), ("codes of 8", 8), ("codes of 4", 4)):
        yield f"2048 tokens, {title}", partial(make, 8, 8, 128, (kind, kind), torch.float16, device)
