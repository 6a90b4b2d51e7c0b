"""Steps that make tokens less likely for having been said. Each maps logits [V] to new ones, or returns what it got."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def penalise(
    row: Tensor, token_ids: Sequence[int], prompt_tokens: int, repetition: float = 1.0, frequency: float = 0.0,
    presence: float = 0.0, reach: int = -1, decay: int = 0,
) -> Tensor:  # fmt: skip
    """Logits of tokens that were said, lowered.

    A token at distance d from the end (the last one: 0) counts with weight w = 1 up to `reach` (-1: always), then
    1 - (d - reach) / decay down to 0 (ExLlamaV2's range and decay; with decay 0 the distances below reach count).
    repetition: l / r if l > 0, else l * r, with r = 1 + (repetition - 1) w of its nearest occurrence (CTRL, Keskar
    2019; ExLlamaV2). Of tokens of the text alone: l - frequency * sum of w - presence * greatest w (OpenAI's
    definition, there with w = 1).
    """
    weights = _weights(len(token_ids), reach, decay)
    if repetition != 1 and len(weights):
        ids, _, nearest = _said(token_ids, weights, row)
        old, factor = row[ids], (1 + (repetition - 1) * nearest).to(row)
        row = row.scatter(0, ids, torch.where(old > 0, old / factor, old * factor))
    text = token_ids[prompt_tokens:]
    weights = weights[max(0, len(weights) - len(text)) :]
    if (frequency or presence) and len(weights):
        ids, total, nearest = _said(text, weights, row)
        row = row.scatter_add(0, ids, -(frequency * total + presence * nearest).to(row))
    return row


def _weights(count: int, reach: int, decay: int) -> Tensor:
    """float64 [n], oldest first, of the last n tokens, those whose weight is above 0."""
    if reach < 0 or reach >= count:
        return torch.ones(count, dtype=torch.float64)
    distance = torch.arange(min(count, reach + decay) - 1, -1, -1, dtype=torch.float64)
    return (1 - (distance - reach) / max(decay, 1)).clamp(max=1)


def _said(token_ids: Sequence[int], weights: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(each id among the last tokens, the sum of its weights, the greatest), on the row's device."""
    last = torch.tensor(token_ids[len(token_ids) - len(weights) :])
    ids, place = last.unique(return_inverse=True)
    total = torch.zeros(len(ids), dtype=torch.float64).index_add(0, place, weights)
    nearest = torch.zeros(len(ids), dtype=torch.float64).scatter_reduce(0, place, weights, "amax")
    return ids.to(row.device), total.to(row.device), nearest.to(row.device)


def dry(
    row: Tensor, token_ids: Sequence[int], multiplier: float, base: float, allowed_length: int, reach: int = 0,
    max_ngram: int = 20, breakers: frozenset[int] = frozenset(),
) -> Tensor:  # fmt: skip
    """Do not repeat yourself: l - multiplier * base^(n - allowed_length) for a token that would repeat n + 1 tokens.

    n is the length of the longest run of tokens before an earlier occurrence of the token that the sequence ends with,
    at most max_ngram; below allowed_length nothing is done. No run goes over a breaker, and breakers are never lowered.
    reach: how many of the last tokens are looked at, 0 for all. Source: "DRY", p-e-w 2024, text-generation-webui 5677.
    """
    ids = torch.tensor(token_ids[-reach:] if reach else token_ids, dtype=torch.int64)
    broken = torch.isin(ids, torch.tensor(sorted(breakers.intersection(token_ids)), dtype=torch.int64))
    if multiplier == 0 or len(ids) < 2 or broken[-1]:
        return row
    ends = ((ids[:-1] == ids[-1]) & ~broken[1:]).nonzero().flatten()
    lengths, alive = torch.ones_like(ends), torch.ones_like(ends, dtype=torch.bool)
    for back in range(1, min(max_ngram, len(ids) - 1)):
        if broken[-1 - back] or not alive.any():
            break
        alive &= (ends >= back) & (ids[(ends - back).clamp(min=0)] == ids[-1 - back])
        lengths += alive
    long = lengths >= allowed_length
    if not long.any():
        return row
    lowered = torch.zeros(len(row), dtype=torch.float64)
    penalty = multiplier * base ** (lengths[long] - allowed_length).double()
    lowered.scatter_reduce_(0, ids[ends[long] + 1], penalty, "amax")
    return row - lowered.to(row)
