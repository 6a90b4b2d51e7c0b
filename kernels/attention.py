"""Causal attention over a paged cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .launch import launch, usable
from .paged_attention import attend_pages, fits
from .pool import Pool
from .prefill import Span, attend_spans, spans_of

TILE = 4
"""Queries of one sequence that attend together."""
LOWEST = -1e38
"""Below every score, and finite: a query may see nothing of its tile's first block."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """A step's queries in tiles of up to TILE tokens of one sequence, those with the most blocks of keys first.

    rows int64 [n, width]: tokens; a short tile repeats its first. positions int64 [n, width]. pages int64 [n, P].
    place int64 [T]: a token's index in the flat tiles. Keys are read in blocks of `block` tokens, a part of a page;
    first int64 [n]: the first block that a tile sees. active: how many tiles see an i-th block from there on.
    window: keys that a query sees, itself included; 0 for all. split: on a GPU, the same queries in another way.
    """

    rows: Tensor
    positions: Tensor
    pages: Tensor
    place: Tensor
    first: Tensor
    window: int
    block: int
    active: tuple[int, ...]
    split: Split | None = None

    def hidden(self, i: int) -> Tensor:
        """bool [n, width, block] of the tiles that see an i-th block: the keys that a query does not see."""
        n = self.active[i]
        within = torch.arange(self.block, device=self.positions.device)
        keys = ((self.first[:n, None] + i) * self.block + within)[:, None]
        positions = self.positions[:n, :, None]
        later = keys > positions
        return later | (keys <= positions - self.window) if self.window else later

    def read(self, pool: Pool, i: int) -> Tensor:
        """float32 [n * kv_heads, block, D]: i-th blocks of the tiles that have one."""
        _, heads, page, _ = pool.shape
        n, parts = self.active[i], page // self.block
        block = self.first[:n, None] + i
        pages = self.pages[:n].gather(1, block // parts)
        heads_of_page = pages * heads + torch.arange(heads, device=pages.device)
        return pool.read((heads_of_page * parts + block % parts).flatten(), self.block)


@dataclass(frozen=True, slots=True)
class Split:
    """A step's queries: spans that see all keys before them, and the other tokens int64 [t] in tiles of their own."""

    spans: tuple[Span, ...]
    tokens: Tensor
    tiles: Tiles | None


def tile(
    sequence: Tensor,
    positions: Tensor,
    page_table: Tensor,
    page: int,
    block: int,
    device: torch.device,
    window: int = 0,
) -> Tiles:
    """Cut the tokens of a step into tiles on `device`, with keys in blocks of `block` tokens; see Tiles.

    On the CPU: sequence, positions int64 [T], a sequence's tokens contiguous; page_table int64 [S, P], pages of `page`
    tokens.
    """
    tiles = _tile(sequence, positions, page_table, block, device, window)
    if device.type == "cpu":
        return tiles
    return replace(tiles, split=divide(sequence, positions, page_table, page, block, device, window))


def divide(
    sequence: Tensor,
    positions: Tensor,
    page_table: Tensor,
    page: int,
    block: int,
    device: torch.device,
    window: int = 0,
) -> Split | None:
    """The Split of a step, given as for `tile`; None if it has no span."""
    which, counts = sequence.unique_consecutive(return_counts=True)
    found = list(spans_of(positions, counts, page_table[which], page, device, window))
    spans = tuple(span for span in found if span)
    if not spans:
        return None
    tokens = torch.tensor([span is None for span in found]).repeat_interleave(counts).nonzero().flatten()
    rest = [_tile(sequence[tokens], positions[tokens], page_table, block, device, window)] if len(tokens) else [None]
    return Split(spans, tokens.to(device), rest[0])


def _tile(
    sequence: Tensor, positions: Tensor, page_table: Tensor, block: int, device: torch.device, window: int
) -> Tiles:
    index = torch.arange(len(sequence))
    starts = torch.cat([sequence.new_ones(1, dtype=torch.bool), sequence[1:] != sequence[:-1]])
    within = index - index[starts][starts.cumsum(0) - 1]
    leads = within % TILE == 0
    of_token = leads.cumsum(0) - 1
    rows = index[leads].repeat_interleave(TILE)
    rows[of_token * TILE + within % TILE] = index
    rows = rows.view(-1, TILE)
    first = (positions[rows].amin(1) - window + 1).clamp(min=0) // block if window else torch.zeros(len(rows)).long()
    blocks = positions[rows].amax(1) // block + 1 - first
    order = blocks.argsort(descending=True, stable=True)
    active = torch.bincount(blocks).flip(0).cumsum(0).flip(0)[1:].tolist()
    rows, first = rows[order], first[order].to(device)
    place = order.argsort()[of_token] * TILE + within % TILE
    pages = page_table[sequence[rows[:, 0]]].to(device)
    return Tiles(
        rows.to(device), positions[rows].to(device), pages, place.to(device), first, window, block, tuple(active)
    )


def decode_tiles(positions: Tensor, page_table: Tensor, page: int, window: int = 0) -> Tiles:
    """One query a sequence, by operations of the device alone, so that a graph can hold them.

    positions int64 [B]; page_table int64 [B, P], both on the device, pages of `page` tokens. A row that pads a batch
    has position 0 and a page that no sequence owns.
    """
    count, pages = page_table.shape
    rows, page_table = torch.arange(count, device=positions.device), page_table.contiguous()
    first = torch.zeros_like(rows)
    return Tiles(rows[:, None], positions[:, None], page_table, rows, first, window, page, (count,) * pages)


def attend(q: Tensor, k_pool: Pool, v_pool: Pool, tiles: Tiles, scale: float, cap: float = 0.0) -> Tensor:
    """q [T, heads, D], pools of the keys k and values v -> softmax(f(q kᵀ * scale)) v, [T, heads, D] in q's dtype.

    A query sees the keys at its position and before, within the tiles' window. f(x) is cap * tanh(x / cap) (Gemma 2,
    Rivière 2024), or x for a cap of 0. Computed in float32, block by block in order with a running maximum (Milakov
    and Gimelshein 2018); products have one shape whatever the batch, so a row's bits do not depend on it, nor do they
    on a block that it does not see.
    """
    if not usable(q):
        return _attend(q, k_pool, v_pool, tiles, scale, cap)
    if tiles.split and not cap:
        out = torch.empty_like(q)
        attend_spans(q, (k_pool, v_pool), tiles.split.spans, scale, out)
        if tiles.split.tiles:
            tokens = tiles.split.tokens
            out[tokens] = attend(q[tokens], k_pool, v_pool, tiles.split.tiles, scale)
        return out
    count, width = tiles.rows.shape
    if fits(q, (k_pool, v_pool), count, width, tiles.pages.shape[1] * k_pool.shape[2]):
        out, tables = torch.empty_like(q), (tiles.rows, tiles.positions, tiles.pages)
        launch(attend_pages(q, (k_pool, v_pool), *tables, out, scale, cap, tiles.window))
        return out
    return _attend(q, k_pool, v_pool, tiles, scale, cap)


def _attend(q: Tensor, k_pool: Pool, v_pool: Pool, tiles: Tiles, scale: float, cap: float) -> Tensor:
    """`attend` by torch."""
    heads, dim = q.shape[1:]
    kv_heads, width = k_pool.shape[1], tiles.rows.shape[1]
    queries = (q.float() * scale).index_select(0, tiles.rows.flatten())
    queries = queries.view(-1, width, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    queries = queries.reshape(-1, width * heads // kv_heads, dim)
    top = queries.new_full((*queries.shape[:2], 1), LOWEST)
    total, out = torch.zeros_like(top), torch.zeros_like(queries)
    for i, active in enumerate(tiles.active):
        n = active * kv_heads
        scores = torch.bmm(queries[:n], tiles.read(k_pool, i).transpose(1, 2))
        if cap:
            scores = scores.div_(cap).tanh_().mul_(cap)
        scores.view(active, heads, width, tiles.block).masked_fill_(tiles.hidden(i)[:, None], -torch.inf)
        peak = torch.maximum(top[:n], scores.amax(-1, keepdim=True))
        weights, kept = scores.sub_(peak).exp_(), (top[:n] - peak).exp_()
        total[:n] = total[:n] * kept + weights.sum(-1, keepdim=True)
        out[:n] = out[:n] * kept + torch.bmm(weights, tiles.read(v_pool, i))
        top[:n] = peak
    out = (out / total).view(-1, heads, width, dim).transpose(1, 2)
    return out.reshape(-1, heads, dim).index_select(0, tiles.place).to(q.dtype)
