"""Queries and keys turned, keys and values written into their pages."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Kernel, Launch, launch, require, usable
from .pool import FloatPool, Pool
from .rope import rope


def turn_and_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turn: tuple[Tensor, Tensor],
    pools: tuple[Pool, Pool],
    place: tuple[Tensor, Tensor],
) -> Tensor:
    """rope(q); rope(k) and v go into the pools.

    q [T, heads, D], k and v [T, kv_heads, D]; turn: cos and sin float32 [T, D/2]; place: (pages, offsets) int64 [T].
    """
    keys, values = pools
    if usable(q) and isinstance(keys, FloatPool) and isinstance(values, FloatPool) and fits(q, k, v, keys.values):
        out = q.new_empty(q.shape)
        launch(append(q, k, v, turn, (keys.values, values.values), place, out))
        return out
    keys.write(rope(k, *turn), *place)
    values.write(v, *place)
    return rope(q, *turn)


def fits(q: Tensor, k: Tensor, v: Tensor, pool: Tensor) -> bool:
    """Whether the kernel takes heads [T, heads, D] like these, which may be columns of a wider tensor, and the pool."""
    inner = all(x.stride()[1:] == (x.shape[2], 1) and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0 for x in (q, k, v))
    known = q.dtype == k.dtype == v.dtype in (torch.float16, torch.bfloat16) and pool.dtype == torch.float16
    return inner and known and q.shape[2] % 4 == 0 and len(q) > 0


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turn: tuple[Tensor, Tensor],
    pools: tuple[Tensor, Tensor],
    place: tuple[Tensor, Tensor],
    out: Tensor,
) -> Launch:
    """The launch of rope_append.cu for the values of two FloatPools of fp16, queries to `out`; else as above."""
    if not fits(q, k, v, pools[0]):
        raise ValueError("q, k and v must be of one dtype, with whole heads one after the other; pass copies")
    tokens, heads, dim = q.shape
    turned = turn[0].shape[1]
    kv_heads, page = pools[0].shape[1:3]
    require("out", out, q.dtype, tokens, heads, dim, like=q)
    for name, each, dtype in (("cos", turn[0], torch.float32), ("sin", turn[1], torch.float32)):
        require(name, each, dtype, tokens, turned, like=q)
    for name, each in (("pages", place[0]), ("offsets", place[1])):
        require(name, each, torch.int64, tokens, like=q)
    for name, each in (("k_pool", pools[0]), ("v_pool", pools[1])):
        require(name, each, torch.float16, len(pools[0]), kv_heads, page, dim, like=q)
    macros = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "TURNED": turned,
        "BFLOAT": int(q.dtype == torch.bfloat16),
    }
    arguments = (q, k, v, *turn, *place, out, *pools, page, q.stride(0), k.stride(0), v.stride(0))
    return Launch(Kernel("rope_append", tuple(macros.items())), (tokens, heads + 2 * kv_heads, 1), 32, arguments)
