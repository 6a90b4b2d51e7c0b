"""The launch of paged_attention.cu, which does what attention.attend does."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from .launch import Kernel, Launch, require
from .pool import Pool
from .pool_memory import FLOATS, forms_of, memory

SPLIT, WARPS = 256, 4
"""Keys that a block of threads reads, and its warps; always the same, for the bits of a row hang on them."""
DIMS = (64, 128)
LOG2_E = math.log2(math.e)
MOST = 1 << 30
"""Bytes of partial results that a launch may take."""
COUNTERS = 1 << 16
"""Counters that a launch has at least: enough for any step that only decodes."""


@cache
def counters(device: torch.device, size: int) -> Tensor:
    """int32 [size], zeros: each launch leaves them so. Not first called while a graph is captured."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def fits(q: Tensor, pools: tuple[Pool, Pool], tiles: int, width: int, span: int) -> bool:
    """Whether it takes q [T, heads, D] in `tiles` of `width`, pools [pages, kv_heads, page, D] and `span` keys."""
    heads, dim = q.shape[1:]
    kv_heads, page = pools[0].shape[1:3]
    partial = width * tiles * heads * -(-span // SPLIT) * (dim + 2) * 4
    known = q.dtype in FLOATS and q.is_contiguous() and forms_of(pools) is not None
    return known and dim in DIMS and heads // kv_heads <= 16 and page % 16 == 0 and 0 < partial <= MOST


def attend_pages(
    q: Tensor,
    pools: tuple[Pool, Pool],
    rows: Tensor,
    positions: Tensor,
    pages: Tensor,
    out: Tensor,
    scale: float,
    cap: float = 0.0,
    window: int = 0,
) -> Launch:
    """out = attention.attend(q, ...), with rows, positions, pages and window of its Tiles.

    Positions, pages and the keys before a sequence's newest are read before the kernel in front has ended. So those
    must come from kernels further back, when each tile is one token.
    """
    tokens, heads, dim = q.shape
    _, kv_heads, page, _ = pools[0].shape
    tiles, tile = rows.shape
    forms = forms_of(pools)
    if forms is None:
        raise ValueError("pools must be of fp16, of bf16 or of codes, both alike")
    for name, each in (("q", q), ("out", out)):
        require(name, each, q.dtype, tokens, heads, dim, like=q)
    for name, each in (("rows", rows), ("positions", positions)):
        require(name, each, torch.int64, tiles, tile, like=q)
    require("pages", pages, torch.int64, tiles, pages.shape[1], like=q)
    group, decoding = heads // kv_heads, tiles == tokens
    queries = 1 if decoding else next(n for n in (4, 2, 1) if n * group <= 16 and tile % n == 0)
    parts = 1 if decoding else tile // queries
    splits = -(-pages.shape[1] * page // SPLIT)
    count = tiles * parts * kv_heads
    partial = q.new_empty(count * splits * queries * group * (dim + 2), dtype=torch.float32)
    arrived = counters(q.device, max(COUNTERS, 1 << (count - 1).bit_length()))
    macros = {"QUERIES": queries, "GROUP": group, "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "SPLIT": SPLIT}
    macros |= {"STRIDE": tile, "BLOCKS": parts, "WARPS": WARPS, "DECODING": int(decoding)}
    macros |= {"K_BITS": forms[0], "V_BITS": forms[1], "POOL_BFLOAT": int(forms[2])}
    macros |= {"BFLOAT": int(q.dtype == torch.bfloat16)}
    inner, outer = (scale / cap, cap * LOG2_E) if cap else (scale * LOG2_E, 0.0)
    tables = rows, positions, pages, out, partial, arrived, pages.shape[1], page, window or 1 << 30
    shared = queries * group * (WARPS * (dim + 2) * 4 + dim * 2)
    kernel, grid = Kernel("paged_attention", tuple(macros.items())), (splits, kv_heads, tiles * parts)
    return Launch(kernel, grid, 32 * WARPS, (q, *memory(pools, q), *tables, inner, outer), shared)
