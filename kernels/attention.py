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
    place int64 [T]: a token's index in the flat tiles. Keys are read in blocks of `block` tokens, a part of a page;
    active: for each block of the past, how many tiles see it.
    """

    rows: Tensor
    positions: Tensor
    pages: Tensor
    place: Tensor
    block: int
    active: tuple[int, ...]

    def hidden(self, i: int) -> Tensor:
        """float32 [n, TILE, block] of the tiles that see block i: 0 for keys that a query sees, -inf for later ones."""
        keys = torch.arange(i * self.block, (i + 1) * self.block, device=self.positions.device)
        return torch.where(keys > self.positions[: self.active[i], :, None], -torch.inf, 0.0)

    def read(self, pool: Tensor, i: int) -> Tensor:
        """float32 [n * kv_heads, block, D]: block i of the tiles that see it, from [pages, kv_heads, page, D]."""
        _, heads, page, dim = pool.shape
        n, parts = self.active[i], page // self.block
        heads_of_page = self.pages[:n, i // parts, None] * heads + torch.arange(heads, device=pool.device)
        return pool.view(-1, self.block, dim).index_select(0, (heads_of_page * parts + i % parts).flatten()).float()


def tile(sequence: Tensor, positions: Tensor, page_table: Tensor, page: int, block: int, device: torch.device) -> Tiles:
    """Cut the tokens of a step into tiles on `device`, with keys in blocks of `block` tokens.

    On the CPU: sequence, positions int64 [T], a sequence's tokens contiguous; page_table int64 [S, P], pages of `page`
    tokens.
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
    depth = positions[rows].amax(1) // block + 1
    active = torch.bincount(depth).flip(0).cumsum(0).flip(0)[1:].tolist()
    place = order.argsort()[of_token] * TILE + within % TILE
    pages = page_table[sequence[rows[:, 0]]].to(device)
    return Tiles(rows.to(device), positions[rows].to(device), pages, place.to(device), block, tuple(active))


def write(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, pages: Tensor, offsets: Tensor) -> None:
    """Put k, v [T, kv_heads, D] at (page, offset) int64 [T] of the pools [pages, kv_heads, page, D].

    Values are made finite and kept in fp16's range: a masked key has weight 0, and 0 * inf would leak out of a page
    into the job that uses it next.
    """
    for new, pool in ((k, k_pool), (v, v_pool)):
        pool[pages, :, offsets] = new.to(pool.dtype).nan_to_num(0.0).clamp_(-LIMIT, LIMIT)


def attend(q: Tensor, k_pool: Tensor, v_pool: Tensor, tiles: Tiles) -> Tensor:
    """q [T, heads, D] and the pools of `write` -> softmax(q kᵀ / sqrt(D)) v, [T, heads, D] in q's dtype.

    A query sees the keys at its position and before. Computed in float32, block by block in order with a running
    maximum (Milakov and Gimelshein 2018); products have one shape whatever the batch, so a row's bits do not depend on
    it.
    """
    heads, dim = q.shape[1:]
    kv_heads = k_pool.shape[1]
    queries = (q.float() * dim**-0.5).index_select(0, tiles.rows.flatten())
    queries = queries.view(-1, TILE, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    queries = queries.reshape(-1, TILE * heads // kv_heads, dim)
    top = queries.new_full((*queries.shape[:2], 1), -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(queries)
    for i, active in enumerate(tiles.active):
        n = active * kv_heads
        scores = torch.bmm(queries[:n], tiles.read(k_pool, i).transpose(1, 2))
        scores.view(active, heads, TILE, tiles.block).add_(tiles.hidden(i)[:, None])
        peak = torch.maximum(top[:n], scores.amax(-1, keepdim=True))
        weights, kept = scores.sub_(peak).exp_(), (top[:n] - peak).exp_()
        total[:n] = total[:n] * kept + weights.sum(-1, keepdim=True)
        out[:n] = out[:n] * kept + torch.bmm(weights, tiles.read(v_pool, i))
        top[:n] = peak
    out = (out / total).view(-1, heads, TILE, dim).transpose(1, 2)
    return out.reshape(-1, heads, dim).index_select(0, tiles.place).to(q.dtype)
