"""Pages of K and V in order, as activations."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Kernel, Launch, launch, require, usable
from .pool import Pool
from .pool_memory import forms_of, memory

WARPS, SHARES = 8, 4
"""Warps of a block, and blocks that share a page."""


def gather(pools: tuple[Pool, Pool], pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V of pages int64 [n] as dtype [heads, n * page, D]."""
    k, v = pools
    _, heads, page, dim = k.shape
    if usable(pages) and forms_of(pools) is not None and dim % 64 == 0 and page % SHARES == 0:
        dense = pages.new_empty(2, heads, len(pages) * page, dim, dtype=dtype)
        launch(gather_pages(pools, pages, (dense[0], dense[1])))
        return dense[0], dense[1]
    return k.gather(pages).to(dtype), v.gather(pages).to(dtype)


def gather_pages(pools: tuple[Pool, Pool], pages: Tensor, out: tuple[Tensor, Tensor]) -> Launch:
    """The launch of gather_pages.cu into `out`; else as above."""
    _, heads, page, dim = pools[0].shape
    forms = forms_of(pools)
    if forms is None or dim % 64 or page % SHARES:
        raise ValueError("pools must be of fp16, of bf16 or of codes, both alike, with rows of 64 numbers")
    require("pages", pages, torch.int64, len(pages), like=out[0])
    for name, each in (("k", out[0]), ("v", out[1])):
        require(name, each, out[0].dtype, heads, len(pages) * page, dim, like=pages)
    macros = {"HEADS": heads, "DIM": dim, "WARPS": WARPS, "SHARES": SHARES, "K_BITS": forms[0], "V_BITS": forms[1]}
    macros |= {"POOL_BFLOAT": int(forms[2]), "BFLOAT": int(out[0].dtype == torch.bfloat16)}
    arguments = (*memory(pools, pages), pages, *out, page)
    kernel = Kernel("gather_pages", tuple(macros.items()))
    return Launch(kernel, (len(pages) * SHARES, heads, 2), 32 * WARPS, arguments)
