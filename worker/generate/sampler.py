"""From logits to the next token, each row by itself: what a row draws does not depend on the rows beside it.

The order: penalties, blocked ids, temperature, top-k, top-p, min-p, draw. Each of top-k, top-p and min-p looks at the
probabilities that the one before it left, in the order of larger logits and, among equals, lower ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorayard.shared.job import SamplingParams

MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What the next token of one sequence depends on, besides its logits.

    token_ids: prompt and generated tokens, the first `prompt_tokens` being the prompt. seed, sample: 64 bits each;
    with the position (the number of tokens before) they fix the random number. blocked: ids that may not come now.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    prompt_tokens: int
    seed: int
    sample: int = 0
    blocked: Sequence[int] = ()


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: the SplitMix64 mix (Steele 2014) of seed, sample and position in turn."""
    state = 0
    for word in (seed, sample, position):
        state = _mix((state ^ word) + 0x9E3779B97F4A7C15 & MASK)
    return (state >> 11) / (1 << 53)


def _mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def sample(logits: Tensor, draws: Sequence[Draw], vocab_size: int) -> list[int | None]:
    """The next token of each row of float32 logits [L, V]; None where a row holds NaN or allows nothing.

    Ids from `vocab_size` on have no token and are never chosen. The logits are altered.
    """
    logits[:, vocab_size:] = -torch.inf
    for row, draw in zip(logits, draws, strict=True):
        _penalise(row, draw)
        if draw.blocked:
            row[list(draw.blocked)] = -torch.inf
    best = zip(logits.argmax(-1).tolist(), logits.amax(-1).tolist(), strict=True)
    chosen: list[int | None] = [id if abs(top) < torch.inf else None for id, top in best]
    for index, draw in enumerate(draws):
        if draw.params.temperature > 0 and chosen[index] is not None:
            chosen[index] = _draw(logits[index], draw)
    return chosen


def _penalise(row: Tensor, draw: Draw) -> None:
    params = draw.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(draw.token_ids)), device=row.device)
        old = row[seen]
        row[seen] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        new = torch.tensor(draw.token_ids[draw.prompt_tokens :], dtype=torch.int64, device=row.device)
        counts = new.bincount(minlength=len(row))
        row -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _draw(row: Tensor, draw: Draw) -> int:
    """A token of one row [V], at a temperature above 0."""
    params = draw.params
    scaled = (row.double() - row.max()) / params.temperature
    plain = not params.top_k and params.top_p == 1 and params.min_p == 0
    ids = None if plain else scaled.argsort(descending=True, stable=True)
    weights = torch.exp(scaled if ids is None else scaled[ids])
    if params.top_k:
        weights = weights[: params.top_k]
    sums = weights.cumsum(0)
    if params.top_p < 1:
        before = sums - weights
        weights = weights[: int((before < params.top_p * sums[-1]).sum())]
    if params.min_p > 0:
        weights = weights[: int((weights >= params.min_p * weights[0]).sum())]
    sums = sums[: len(weights)]
    point = uniform(draw.seed, draw.sample, len(draw.token_ids)) * float(sums[-1])
    place = min(int((sums <= point).sum()), int((weights > 0).nonzero()[-1]))
    return place if ids is None else int(ids[place])
