"""From logits to the next token, each row by itself: what a row draws does not depend on the rows beside it.

The order is ExLlamaV2's: LOGIT_STEPS (penalties, DRY, mask), softmax with temperature and smoothing, then the steps of
FILTERS, each on the probabilities that the one before it left, then the draw: the first id, in order of ids, up to
which the probabilities exceed the random number. A setting that is neutral leaves its step out, so logits that nobody
asked to change keep their bits. On a GPU rows that ask for no more than `on_device` says are drawn by a kernel, in
float32: another token comes there only if the random number lies within rounding of the end of a token's share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorayard.kernels import sample as kernel
from lorayard.shared.job import SamplingParams

from . import filters, penalties
from .mask import Mask

BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What the next token of one sequence depends on, besides its logits.

    token_ids: prompt and generated tokens, the first `prompt_tokens` being the prompt. seed, sample, attempt: with the
    position (the number of tokens before) they fix the random number; attempt counts how often text was taken back.
    mu: mirostat's. breakers, ignored: ids that DRY and XTC leave alone.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    prompt_tokens: int
    seed: int
    sample: int = 0
    attempt: int = 0
    mask: Mask = Mask()
    mu: float = 0.0
    breakers: frozenset[int] = frozenset()
    ignored: frozenset[int] = frozenset()
    pending: int = 0
    """Tokens after token_ids that only the device knows yet."""

    @property
    def position(self) -> int:
        """The number of tokens before the next one."""
        return len(self.token_ids) + self.pending


class Choice(NamedTuple):
    """The next token; its probability in the draw that chose it; mirostat's mu after it."""

    token: int
    probability: float = 1.0
    mu: float = 0.0


def uniform(seed: int, sample: int, position: int, attempt: int = 0) -> float:
    """A number in [0, 1) with 53 random bits: the SplitMix64 mix (Steele 2014) of the words in turn."""
    state = 0
    for word in (seed, sample, position, attempt) if attempt else (seed, sample, position):
        state = _mix((state ^ word) + 0x9E3779B97F4A7C15 & BITS)
    return (state >> 11) / (1 << 53)


def uniforms(draws: Sequence[Draw]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`uniform` of each, at once."""
    state = np.zeros(len(draws), np.uint64)
    for words in zip(*[(each.seed, each.sample, each.position) for each in draws], strict=True):
        state = _mix((state ^ np.array(words, np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    attempts = np.array([each.attempt for each in draws], np.uint64)
    if attempts.any():
        state = np.where(attempts > 0, _mix((state ^ attempts) + np.uint64(0x9E3779B97F4A7C15)), state)
    numbers: np.ndarray[Any, np.dtype[np.float64]] = (state >> np.uint64(11)) / (1 << 53)
    return numbers


def _mix(z: Any) -> Any:
    """Of a word, int, or of many, uint64 [n]."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & BITS
    z = (z ^ z >> 27) * 0x94D049BB133111EB & BITS
    return z ^ z >> 31


def _penalise(row: Tensor, draw: Draw) -> Tensor:
    p = draw.params
    return penalties.penalise(
        row, draw.token_ids, draw.prompt_tokens, p.repetition_penalty, p.frequency_penalty, p.presence_penalty,
        p.repetition_range, p.repetition_decay,
    )  # fmt: skip


def _dry(row: Tensor, draw: Draw) -> Tensor:
    p = draw.params
    return penalties.dry(
        row, draw.token_ids, p.dry_multiplier, p.dry_base, p.dry_allowed_length, p.dry_range, p.dry_max_ngram,
        draw.breakers,
    )  # fmt: skip


def _xtc(p: Tensor, ids: Tensor, draw: Draw) -> Tensor:
    ignored = torch.isin(ids, torch.tensor(sorted(draw.ignored), dtype=torch.int64, device=ids.device))
    return filters.xtc(p, draw.params.xtc_probability, draw.params.xtc_threshold, ignored)


LOGIT_STEPS: tuple[tuple[Callable[[Draw], bool], Callable[[Tensor, Draw], Tensor]], ...] = (
    (
        lambda d: d.params.repetition_penalty != 1 or bool(d.params.frequency_penalty or d.params.presence_penalty),
        _penalise,
    ),
    (lambda d: d.params.dry_multiplier > 0, _dry),
    (lambda d: d.mask != Mask(), lambda row, d: d.mask.apply(row)),
)
"""(whether a row asks for it, logits [V] -> logits [V]) in order."""

FILTERS: tuple[tuple[Callable[[SamplingParams], bool], Callable[[Tensor, Tensor, Draw], Tensor]], ...] = (
    (lambda s: s.top_k > 0, lambda p, _, d: filters.top_k(p, d.params.top_k)),
    (lambda s: s.top_p < 1, lambda p, _, d: filters.top_p(p, d.params.top_p)),
    (lambda s: s.top_a > 0, lambda p, _, d: filters.top_a(p, d.params.top_a)),
    (lambda s: s.min_p > 0, lambda p, _, d: filters.min_p(p, d.params.min_p)),
    (lambda s: s.tfs < 1, lambda p, _, d: filters.tail_free(p, d.params.tfs)),
    (lambda s: s.typical < 1, lambda p, _, d: filters.typical(p, d.params.typical)),
    (lambda s: s.mirostat, lambda p, _, d: filters.mirostat_cut(p, d.mu)),
    (
        lambda s: s.max_temp > s.min_temp,
        lambda p, _, d: filters.dynamic_temperature(p, d.params.min_temp, d.params.max_temp, d.params.temp_exponent),
    ),
    (
        lambda s: s.temperature_last and s.max_temp <= s.min_temp,
        lambda p, _, d: filters.sharpen(p, d.params.temperature),
    ),
    (lambda s: s.xtc_probability > 0, _xtc),
)
"""(whether a row asks for it, probabilities [n] of the ids [n] -> probabilities [n]) in order."""


_RARE: Callable[[SamplingParams], Any] = attrgetter(
    "repetition_penalty", "frequency_penalty", "presence_penalty", "dry_multiplier", "temperature_last", "max_temp",
    "smoothing_factor", "top_a", "tfs", "typical", "mirostat", "xtc_probability", "skew",
)  # fmt: skip
_NEUTRAL = _RARE(SamplingParams())


def on_device(draw: Draw) -> bool:
    """Whether the kernel draws such a row: temperature, top_k, top_p, min_p and some blocked ids, nothing else."""
    mask = draw.mask
    plain = mask.allowed is None and not mask.bias and len(mask.blocked) <= kernel.MAX_BANNED
    return plain and bool(_RARE(draw.params) == _NEUTRAL)


def fill_rows(rows: np.ndarray[Any, Any], draws: Sequence[Draw], seats: Sequence[int] | None = None) -> None:
    """What the kernel reads of each row, into rows of dtype `kernel.ROW` [L]; without seats its token goes to none."""
    params = [draw.params for draw in draws]
    rows["number"] = uniforms(draws)
    rows["temperature"] = [each.temperature and max(each.temperature, 1e-30) for each in params]
    rows["top_p"] = [each.top_p for each in params]
    rows["min_p"] = [each.min_p for each in params]
    rows["top_k"] = [min(each.top_k, (1 << 31) - 1) for each in params]
    rows["seat"] = -1 if seats is None else seats
    rows["banned"] = -1
    for row, draw in zip(rows, draws, strict=True):
        if draw.mask.blocked:
            row["banned"][: len(draw.mask.blocked)] = sorted(draw.mask.blocked)


def sample(logits: Tensor, draws: Sequence[Draw], vocab_size: int) -> list[Choice | None]:
    """The next token of each row of logits [L, V]; None where a row holds NaN or allows nothing.

    Ids from `vocab_size` on have no token and are never chosen. The logits are altered.
    """
    if not kernel.fits(logits, vocab_size):
        return sample_on_host(logits, draws, vocab_size)
    ours = [on_device(draw) for draw in draws]
    chosen: list[Choice | None] = [None] * len(draws)
    if any(ours):
        chosen = _sample_on_device(logits, draws, ours, vocab_size)
    rare = [index for index, each in enumerate(ours) if not each]
    if rare:
        rows = logits[torch.tensor(rare, device=logits.device)].float()
        for index, choice in zip(rare, sample_on_host(rows, [draws[i] for i in rare], vocab_size), strict=True):
            chosen[index] = choice
    return chosen


def _sample_on_device(
    logits: Tensor, draws: Sequence[Draw], ours: Sequence[bool], vocab_size: int
) -> list[Choice | None]:
    """The choices of `ours`; what stands for the others is of no use."""
    asked = [draw if each else UNASKED for draw, each in zip(draws, ours, strict=True)]
    tokens, probabilities = draw_on_device(logits, asked, vocab_size)
    told = zip(tokens.tolist(), probabilities.tolist(), draws, strict=True)
    return [
        Choice(token, p, 0.0 if draw.params.temperature else draw.mu) if token >= 0 else None
        for token, p, draw in told
    ]  # fmt: skip


def draw_on_device(
    logits: Tensor, draws: Sequence[Draw], vocab_size: int, seats: Sequence[int] | None = None,
    drawn: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens int64 [L] and their probabilities float32 [L], left on the device; see kernels.sample.draw."""
    rows = np.zeros(len(draws), kernel.ROW)
    fill_rows(rows, draws, seats)
    words = torch.from_numpy(rows.view(np.int32).reshape(len(draws), -1)).to(logits.device)
    tokens = torch.empty(len(draws), dtype=torch.int64, device=logits.device)
    probabilities = torch.empty(len(draws), dtype=torch.float32, device=logits.device)
    kernel.draw(logits, words, vocab_size, tokens, probabilities, drawn)
    return tokens, probabilities


UNASKED = Draw(SamplingParams(temperature=0.0), (), 0, 0)


def sample_on_host(logits: Tensor, draws: Sequence[Draw], vocab_size: int) -> list[Choice | None]:
    """As `sample`, of float32 logits, row by row in torch, whatever a row asks for."""
    logits[:, vocab_size:] = -torch.inf
    for index, draw in enumerate(draws):
        for wanted, step in LOGIT_STEPS:
            if wanted(draw):
                logits[index] = step(logits[index], draw)
    best = zip(logits.argmax(-1).tolist(), logits.amax(-1).tolist(), draws, strict=True)
    chosen = [Choice(id, mu=draw.mu) if abs(top) < torch.inf else None for id, top, draw in best]
    for index, draw in enumerate(draws):
        if draw.params.temperature > 0 and chosen[index] is not None:
            chosen[index] = _draw(logits[index], draw)
    return chosen


def distribution(row: Tensor, draw: Draw) -> tuple[Tensor | None, Tensor]:
    """(ids [n] in descending order, None for 0..V-1; their probabilities [n], float64) that a token is drawn from."""
    params = draw.params
    p = filters.soften(
        row, 1.0 if params.temperature_last else params.temperature, params.smoothing_factor, params.smoothing_curve
    )
    steps = [step for wanted, step in FILTERS if wanted(params)]
    if not steps and not params.skew:
        return None, p
    ids = row.argsort(descending=True, stable=True)
    p = p[ids]
    for step in steps:
        ids, p = ids[p > 0], p[p > 0]
        p = step(p, ids, draw)
    if params.skew:
        order = p.argsort(descending=True, stable=True)
        ids, p = ids[order], p[order]
    return ids, p


def _draw(row: Tensor, draw: Draw) -> Choice:
    """A token of one row [V], at a temperature above 0."""
    params = draw.params
    ids, p = distribution(row, draw)
    if ids is not None and not params.skew:
        order = ids.argsort()
        ids, p = ids[order], p[order]
    number = filters.skewed(uniform(draw.seed, draw.sample, draw.position, draw.attempt), params.skew)
    sums = p.cumsum(0)
    place = min(int((sums <= number * float(sums[-1])).sum()), int((p > 0).nonzero()[-1]))
    probability = float(p[place] / sums[-1])
    mu = filters.next_mu(draw.mu, probability, params.mirostat_tau, params.mirostat_eta) if params.mirostat else 0.0
    return Choice(place if ids is None else int(ids[place]), probability, mu)
