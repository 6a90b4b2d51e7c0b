"""The launch of paged_attention.cu, which does what attention.attend does."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from .launch import Kernel, Launch, require

SPLIT = 512
"""Keys that a block of threads reads; always the same, for the bits of a row hang on it."""
DIMS = (64, 128)
LOG2_E = math.log2(math.e)
MOST = 256 << 20
"""Bytes of partial results that a launch may take."""
COUNTERS = 1 << 16
"""Counters that a launch has at least: enough for any step that only decodes."""


@cache
def counters(device: torch.device, size: int) -> Tensor:
    """int32 [size], zeros: each launch leaves them so. Not first called while a graph is captured."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def fits(q: Tensor, pool: Tensor, tiles: int, width: int, span: int) -> bool:
    """Whether it takes q [T, heads, D] in `tiles` of `width`, a pool [pages, kv_heads, page, D] and `span` keys."""
    heads, dim = q.shape[1:]
    halves = q.dtype == pool.dtype == torch.float16 and q.is_contiguous()
    partial = width * tiles * heads * -(-span // SPLIT) * (dim + 2) * 4
    return halves and dim in DIMS and heads // pool.shape[1] <= 16 and pool.shape[2] % 16 == 0 and 0 < partial <= MOST


def attend_pages(
    q: Tensor,
    pools: tuple[Tensor, Tensor],
    rows: Tensor,
    positions: Tensor,
    pages: Tensor,
    out: Tensor,
    scale: float,
    cap: float = 0.0,
    window: int = 0,
) -> Launch:
    """out = attention.attend(q, ...), with rows, positions, pages and window of its Tiles, and the pools' values."""
    tokens, heads, dim = q.shape
    count, kv_heads, page, _ = pools[0].shape
    tiles, tile = rows.shape
    for name, each in (("q", q), ("out", out)):
        require(name, each, torch.float16, tokens, heads, dim, like=q)
    for name, each in (("k_pool", pools[0]), ("v_pool", pools[1])):
        require(name, each, torch.float16, count, kv_heads, page, dim, like=q)
    for name, each in (("rows", rows), ("positions", positions)):
        require(name, each, torch.int64, tiles, tile, like=q)
    require("pages", pages, torch.int64, tiles, pages.shape[1], like=q)
    group, decoding = heads // kv_heads, tiles == tokens
    queries = 1 if decoding else next(n for n in (4, 2, 1) if n * group <= 16 and tile % n == 0)
    parts = 1 if decoding else tile // queries
    splits = -(-pages.shape[1] * page // SPLIT)
    partial = q.new_empty(tiles * parts * kv_heads * splits * queries * group * (dim + 2), dtype=torch.float32)
    arrived = counters(q.device, max(COUNTERS, 1 << (tiles * parts * kv_heads - 1).bit_length()))
    macros = {"QUERIES": queries, "GROUP": group, "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "SPLIT": SPLIT}
    macros |= {"STRIDE": tile, "BLOCKS": parts}
    inner, outer = (scale / cap, cap * LOG2_E) if cap else (scale * LOG2_E, 0.0)
    arguments = q, *pools, rows, positions, pages, out, partial, arrived, pages.shape[1], page, window or 1 << 30
    shared = 4 * (8 if queries * group <= 8 else 16) * (dim + 2) * 4
    kernel = Kernel("paged_attention", tuple(macros.items()))
    return Launch(kernel, (splits, kv_heads, tiles * parts), 128, (*arguments, inner, outer), shared)
