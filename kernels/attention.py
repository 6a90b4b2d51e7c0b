"""Causal attention over a paged cache, and the writing of its pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 4
"""Queries of one sequence that attend together."""
LIMIT = 65504.0
"""The largest number of fp16."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """A step's queries in tiles of TILE tokens of one sequence, those with the longest past first.

    rows int64 [n, TILE]: tokens; a short tile repeats its first. positions int64 [n, TILE]. pages int64 [n, P].
    active: for each page index p, how many tiles see that page. place int64 [T]: a token's index in the flat tiles.
    """

    rows: Tensor
    positions: Tensor
    pages: Tensor
    active: tuple[int, ...]
    place: Tensor

    def hide(self, p: int, n: int, page: int) -> Tensor:
        """float32 [n, TILE, page] of the first n tiles: 0 for keys of page p that a query sees, -inf for later ones."""
        keys = torch.arange(p * page, (p + 1) * page, device=self.positions.device)
        return torch.where(keys > self.positions[:n, :, None], -torch.inf, 0.0)

    def to(self, device: torch.device) -> Tiles:
        """The same on `device`."""
        moved = (part.to(device) for part in (self.rows, self.positions, self.pages, self.place))
        rows, positions, pages, place = moved
        return Tiles(rows, positions, pages, self.active, place)


def tile(sequence: Tensor, positions: Tensor, page_table: Tensor, page: int) -> Tiles:
    """Cut the tokens of a step into tiles.

    sequence, positions int64 [T], a sequence's tokens contiguous; page_table int64 [S, P], pages of `page` tokens.
    """
    index = torch.arange(len(sequence))
    starts = torch.cat([sequence.new_ones(1, dtype=torch.bool), sequence[1:] != sequence[:-1]])
    within = index - index[starts][starts.cumsum(0) - 1]
    leads = within % TILE == 0
    of_token = leads.cumsum(0) - 1
    rows = index[leads].repeat_interleave(TILE)
    rows[of_token * TILE + within % TILE] = index
    rows = rows.view(-1, TILE)
    order = positions[rows].amax(1).argsort(descending=True, stable=True)
    rows = rows[order]
    depth = positions[rows].amax(1) // page + 1
    active = tuple(int((depth > p).sum()) for p in range(int(depth.max())))
    place = order.argsort()[of_token] * TILE + within % TILE
    return Tiles(rows, positions[rows], page_table[sequence[rows[:, 0]]], active, place)


def write(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, pages: Tensor, offsets: Tensor) -> None:
    """Put k, v [T, kv_heads, D] at (page, offset) int64 [T] of the pools [pages, kv_heads, page, D].

    Values are made finite and kept in fp16's range: a masked key has weight 0, and 0 * inf would leak out of a page
    into the job that uses it next.
    """
    for new, pool in ((k, k_pool), (v, v_pool)):
        pool[pages, :, offsets] = new.to(pool.dtype).nan_to_num(0.0).clamp_(-LIMIT, LIMIT)


def attend(q: Tensor, k_pool: Tensor, v_pool: Tensor, tiles: Tiles) -> Tensor:
    """q [T, heads, D] and the pools of `write` -> softmax(q kᵀ / sqrt(D)) v, [T, heads, D] in q's dtype.

    A query sees the keys at its position and before. Computed in float32, page by page in order with a running maximum
    (Milakov and Gimelshein 2018); products have one shape whatever the batch, so a row's bits do not depend on it.
    """
    heads, dim = q.shape[1:]
    kv_heads, page = k_pool.shape[1:3]
    shared = heads // kv_heads
    queries = (q.float() * dim**-0.5).index_select(0, tiles.rows.flatten())
    queries = queries.view(-1, TILE, kv_heads, shared, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    top = queries.new_full((*queries.shape[:3], 1), -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(queries)
    for p, n in enumerate(tiles.active):
        k, v = (pool.index_select(0, tiles.pages[:n, p]).float() for pool in (k_pool, v_pool))
        scores = queries[:n] @ k.transpose(-1, -2)
        scores.view(n, kv_heads * shared, TILE, page).add_(tiles.hide(p, n, page)[:, None])
        peak = torch.maximum(top[:n], scores.amax(-1, keepdim=True))
        weights, kept = scores.sub_(peak).exp_(), (top[:n] - peak).exp_()
        total[:n] = total[:n] * kept + weights.sum(-1, keepdim=True)
        out[:n] = out[:n] * kept + weights @ v
        top[:n] = peak
    out = (out / total).view(-1, heads, TILE, dim).transpose(1, 2)
    return out.reshape(-1, heads, dim).index_select(0, tiles.place).to(q.dtype)
