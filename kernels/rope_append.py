"""Queries and keys turned, keys and values written into their pages."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Kernel, Launch, launch, require, usable
from .pool import Pool
from .pool_memory import FLOATS, forms_of, memory
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
    if usable(q) and fits(q, k, v, pools):
        out = q.new_empty(q.shape)
        launch(append(q, k, v, turn, pools, place, out))
        return out
    keys.write(rope(k, *turn), *place)
    values.write(v, *place)
    return rope(q, *turn)


def fits(q: Tensor, k: Tensor, v: Tensor, pools: tuple[Pool, Pool]) -> bool:
    """Whether the kernel takes the pools and heads [T, heads, D] like these, be they columns of a wider tensor."""
    inner = all(x.stride()[1:] == (x.shape[2], 1) and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0 for x in (q, k, v))
    known = q.dtype == k.dtype == v.dtype in FLOATS and forms_of(pools) is not None
    return inner and known and q.shape[2] % 4 == 0 and len(q) > 0


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turn: tuple[Tensor, Tensor],
    pools: tuple[Pool, Pool],
    place: tuple[Tensor, Tensor],
    out: Tensor,
) -> Launch:
    """The launch of rope_append.cu, queries to `out`; else as above."""
    forms = forms_of(pools)
    if forms is None or not fits(q, k, v, pools):
        raise ValueError("q, k and v must be of one dtype, with whole heads one after the other; pass copies")
    tokens, heads, dim = q.shape
    turned = turn[0].shape[1]
    kv_heads, page = pools[0].shape[1:3]
    require("out", out, q.dtype, tokens, heads, dim, like=q)
    for name, each, dtype in (("cos", turn[0], torch.float32), ("sin", turn[1], torch.float32)):
        require(name, each, dtype, tokens, turned, like=q)
    for name, each in (("pages", place[0]), ("offsets", place[1])):
        require(name, each, torch.int64, tokens, like=q)
    macros = {"HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "TURNED": turned}
    macros |= {"K_BITS": forms[0], "V_BITS": forms[1], "POOL_BFLOAT": int(forms[2])}
    macros |= {"BFLOAT": int(q.dtype == torch.bfloat16)}
    arguments = (q, k, v, *turn, *place, out, *memory(pools, q), page, q.stride(0), k.stride(0), v.stride(0))
    return Launch(Kernel("rope_append", tuple(macros.items())), (tokens, heads + 2 * kv_heads, 1), 32, arguments)
