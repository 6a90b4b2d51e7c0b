"""Attention of many queries of one sequence on a GPU, by torch: causal, over all keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from .gather_pages import gather
from .pool import Pool

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
"""Those of torch that take heads of K for several of q, the fastest first."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start to start + count of a step, all of one sequence, after `before` tokens that the cache holds.

    pages int64 [P], on the device of the cache: just those of the before + count tokens.
    """

    start: int
    count: int
    before: int
    pages: Tensor


def spans_of(
    positions: Tensor, counts: Tensor, page_table: Tensor, page: int, device: torch.device, window: int
) -> Iterable[Span | None]:
    """A Span, or None where the window hides a key or there is one query, of each sequence of a step.

    On the CPU: positions int64 [T] of `counts` int64 [n] tokens of each sequence in turn; page_table int64 [n, P].
    """
    aligned = pad(page_table, (0, page_table.shape[1] % 2))  # kernels want tables that begin at 16 bytes
    tables, starts = aligned.to(device), counts.cumsum(0) - counts
    for i, (start, count, before) in enumerate(
        zip(starts.tolist(), counts.tolist(), positions[starts].tolist(), strict=True)
    ):
        keys = before + count
        fits = count > 1 and not 0 < window < keys
        yield Span(start, count, before, tables[i, : -(-keys // page)]) if fits else None


def attend_spans(q: Tensor, pools: tuple[Pool, Pool], spans: Iterable[Span], scale: float, out: Tensor) -> None:
    """Rows of the spans of `out` as attention.attend has them; a call for each, so that no row's bits hang on others.

    q [T, heads, D], and `out` like it.
    """
    with sdpa_kernel(BACKENDS, set_priority=True):
        for span in spans:
            rows = slice(span.start, span.start + span.count)
            k, v = gather(pools, span.pages, q.dtype)
            out[rows] = (_after if span.before else _whole)(q[rows], k, v, span.before, scale)


def _whole(q: Tensor, k: Tensor, v: Tensor, before: int, scale: float) -> Tensor:
    """A sequence from its begin, made up to whole pages: for cuDNN builds a plan for each new shape."""
    count = len(q)
    if count < k.shape[1]:
        q = pad(q, (0, 0, 0, 0, 0, k.shape[1] - count))
    queries = q.transpose(0, 1)[None]
    out = scaled_dot_product_attention(queries, k[None], v[None], is_causal=True, scale=scale, enable_gqa=True)
    return out[0, :, :count].transpose(0, 1)


def _after(q: Tensor, k: Tensor, v: Tensor, before: int, scale: float) -> Tensor:
    """A part of a sequence: the last query sees all keys, each before it one less."""
    from torch.nn.attention.bias import causal_lower_right  # brings torch's compiler along: half of a worker's start

    keys = before + len(q)
    queries, mask = q.transpose(0, 1)[None], causal_lower_right(len(q), keys)
    k, v = k[None, :, :keys], v[None, :, :keys]
    out: Tensor = scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)
