"""Every step of the sampler against a plain statement of its formula in NumPy and float64, on random logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lorayard.shared.errors import Refused, UsageError
from lorayard.shared.job import SamplingParams
from lorayard.worker.generate import filters, penalties
from lorayard.worker.generate.mask import Mask
from lorayard.worker.generate.sampler import FILTERS, LOGIT_STEPS, Draw, distribution, sample

VOCAB = 40
Array = np.ndarray[Any, np.dtype[np.float64]]
CASES = range(60)


def random_logits(seed: int) -> Array:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32).astype(np.float64)


def random_tokens(seed: int, count: int = 30) -> list[int]:
    """Of few kinds, so that they repeat."""
    return np.random.default_rng(seed).integers(0, 4, count).tolist()


def descending(seed: int, count: int = VOCAB) -> Array:
    p = np.exp(random_logits(seed))[:count]
    return np.sort(p / p.sum())[::-1].copy()


def kept(p: Array, which: Sequence[int]) -> Array:
    chosen = np.zeros_like(p)
    chosen[list(which)] = p[list(which)]
    return chosen / chosen.sum()


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def same(got: torch.Tensor, expected: Array, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=rtol, atol=1e-300 if rtol < 1e-6 else 1e-5)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("reach, decay", [(-1, 0), (0, 0), (5, 0), (5, 8), (0, 8), (29, 3), (99, 9)])
def test_penalties(seed: int, reach: int, decay: int) -> None:
    logits, tokens, prompt = random_logits(seed), random_tokens(seed), seed % 31
    repetition, frequency, presence = 1.3, 0.25, 0.5
    expected = logits.copy()
    met, met_in_text = set(), set()
    full = len(tokens) if reach < 0 else reach
    for distance in range(min(full + decay, len(tokens))):
        token = tokens[len(tokens) - 1 - distance]
        weight = 1.0 if distance <= full else 1 - (distance - full) / decay
        if token not in met:
            met.add(token)
            factor = 1 + (repetition - 1) * weight
            expected[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for distance in range(min(full + decay, len(tokens) - prompt)):
        token = tokens[len(tokens) - 1 - distance]
        weight = 1.0 if distance <= full else 1 - (distance - full) / decay
        expected[token] -= frequency * weight + (presence * weight if token not in met_in_text else 0)
        met_in_text.add(token)
    row = torch.tensor(logits, dtype=torch.float32)
    same(penalties.penalise(row, tokens, prompt, repetition, frequency, presence, reach, decay), expected, 1e-5)
    assert torch.equal(row, torch.tensor(logits, dtype=torch.float32)), "a step alters nothing that it is given"


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "reach, max_ngram, breakers", [(0, 20, []), (0, 3, []), (12, 20, []), (0, 20, [2]), (0, 20, [0, 1])]
)
def test_dry(seed: int, reach: int, max_ngram: int, breakers: list[int]) -> None:
    logits, tokens = random_logits(seed), random_tokens(seed, 60)
    multiplier, base, allowed = 0.8, 1.75, 2
    seen = tokens[-reach:] if reach else tokens
    longest: dict[int, int] = {}
    for end in range(len(seen) - 1):
        length = 0
        while length < min(max_ngram, end + 1) and seen[end - length] == seen[-1 - length] not in breakers:
            length += 1
        follower = seen[end + 1]
        if length and follower not in breakers:
            longest[follower] = max(longest.get(follower, 0), length)
    expected = logits.copy()
    for token, length in longest.items():
        if length >= allowed:
            expected[token] -= multiplier * base ** (length - allowed)
    row = torch.tensor(logits, dtype=torch.float32)
    same(penalties.dry(row, tokens, multiplier, base, allowed, reach, max_ngram, frozenset(breakers)), expected, 1e-4)


def test_dry_lowers_what_would_repeat_and_grows_with_the_run() -> None:
    row = torch.zeros(10)
    assert penalties.dry(row, [1, 2, 3, 9, 1, 2], 1.0, 2.0, 2).tolist() == [0, 0, 0, -1] + [0] * 6
    assert penalties.dry(row, [5, 1, 2, 3, 9, 5, 1, 2], 1.0, 2.0, 2).tolist() == [0, 0, 0, -2] + [0] * 6
    assert penalties.dry(row, [1, 2, 3, 9, 1, 2], 1.0, 2.0, 2, breakers=frozenset([2])) is row


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("smoothing, curve", [(0.0, 1.0), (0.3, 1.0), (0.3, 2.0), (2.0, 3.0)])
def test_temperature_and_smoothing(seed: int, temperature: float, smoothing: float, curve: float) -> None:
    logits = random_logits(seed)
    logits[seed % VOCAB] = -np.inf
    d = logits - logits.max()
    if smoothing:
        with np.errstate(invalid="ignore"):
            d = -smoothing * ((3 - curve) / 2 * d**2 - (curve - 1) / 2 * d**3)
        d[seed % VOCAB] = -np.inf
    same(filters.soften(torch.tensor(logits).float(), temperature, smoothing, curve), softmax(d / temperature))


def numpy_top_p(p: Array, share: float) -> Array:
    count = next((at + 1 for at in range(len(p)) if p[: at + 1].sum() >= share), len(p))
    return kept(p, range(count))


def numpy_tfs(p: Array, z: float) -> Array:
    curvature = [abs(p[i] - 2 * p[i + 1] + p[i + 2]) for i in range(len(p) - 2)]
    total, so_far = sum(curvature), 0.0
    for at, each in enumerate(curvature):
        so_far += each / total
        if so_far > z:
            return kept(p, range(at + 1))
    return p


def numpy_typical(p: Array, share: float) -> Array:
    entropy = -sum(x * math.log(x) for x in p)
    order = sorted(range(len(p)), key=lambda at: abs(-math.log(p[at]) - entropy))
    count = next(at + 1 for at in range(len(p)) if sum(p[i] for i in order[: at + 1]) >= share)
    return kept(p, order[:count])


def numpy_dynamic(p: Array, low: float, high: float, exponent: float) -> Array:
    entropy = -sum(x * math.log(x) for x in p)
    temperature = low + (high - low) * (entropy / math.log(len(p))) ** exponent
    return softmax(np.log(p) / temperature)


def numpy_xtc(p: Array, q: float, threshold: float, ignored: Array) -> Array:
    """As its author has it: with probability q, all choices above the threshold but the least likely are excluded."""
    members = [at for at in range(len(p)) if p[at] >= threshold and not ignored[at]]
    excluded = p.copy()
    excluded[members[:-1]] = 0
    return (1 - q) * p + q * excluded / excluded.sum()


STEPS: list[tuple[str, Callable[..., torch.Tensor], Callable[..., Array], list[tuple[float, ...]]]] = [
    ("top_k", filters.top_k, lambda p, k: kept(p, range(min(k, len(p)))), [(1,), (7,), (99,)]),
    ("top_p", filters.top_p, numpy_top_p, [(1e-6,), (0.5,), (0.93,)]),
    ("top_a", filters.top_a, lambda p, a: kept(p, np.flatnonzero(p >= a * p.max() ** 2)), [(0.1,), (0.9,), (1.0,)]),
    ("min_p", filters.min_p, lambda p, m: kept(p, np.flatnonzero(p >= m * p.max())), [(0.02,), (0.3,), (1.0,)]),
    ("tfs", filters.tail_free, numpy_tfs, [(0.2,), (0.9,), (0.99,)]),
    ("typical", filters.typical, numpy_typical, [(0.1,), (0.5,), (0.95,)]),
    ("mirostat", filters.mirostat_cut,
     lambda p, mu: kept(p, sorted({0, *np.flatnonzero(-np.log2(p) <= mu)})), [(0.1,), (2.0,), (5.0,)]),
    ("sharpen", filters.sharpen, lambda p, t: softmax(np.log(p) / t), [(0.4,), (3.0,)]),
    ("dynamic", filters.dynamic_temperature, numpy_dynamic, [(0.0, 2.0, 1.0), (0.5, 3.0, 0.4)]),
]  # fmt: skip


@pytest.mark.parametrize("name, step, formula, settings", STEPS, ids=[step[0] for step in STEPS])
@pytest.mark.parametrize("count", [3, VOCAB])
def test_filters(name: str, step: Any, formula: Any, settings: list[tuple[float, ...]], count: int) -> None:
    changed = 0
    for values in settings:
        for seed in CASES:
            p = descending(seed, count)
            got = step(torch.tensor(p), *values)
            same(got, formula(p, *values), 1e-8)
            assert float(got.sum()) == pytest.approx(1)
            changed += not np.allclose(got.numpy(), p)
    assert changed >= len(CASES), "the step does something"


@pytest.mark.parametrize("q, threshold", [(0.3, 0.1), (1.0, 0.05), (0.7, 0.01)])
def test_xtc_has_the_distribution_of_its_coin(q: float, threshold: float) -> None:
    for seed in CASES:
        p, ignored = descending(seed), np.random.default_rng(seed).random(VOCAB) < 0.2
        got = filters.xtc(torch.tensor(p), q, threshold, torch.tensor(ignored))
        same(got, numpy_xtc(p, q, threshold, ignored), 1e-8)
    lone = torch.tensor([0.9, 0.06, 0.04], dtype=torch.float64)
    assert filters.xtc(lone, 1.0, 0.1, torch.zeros(3, dtype=torch.bool)) is lone, "one choice is no choice"


def test_steps_on_one_or_two_tokens_keep_one() -> None:
    for p in ([1.0], [0.5, 0.5], [0.9, 0.1]):
        for _, step, _, settings in STEPS:
            got = step(torch.tensor(p, dtype=torch.float64), *settings[0])
            assert float(got.sum()) == pytest.approx(1) and len(got) == len(p)
    assert filters.tail_free(torch.tensor([0.25] * 4, dtype=torch.float64), 0.5).tolist() == [0.25] * 4


def test_mirostat_holds_the_surprise_at_tau() -> None:
    """mu after a draw, and what it is for: the mean surprise comes near to tau."""
    assert filters.next_mu(3.0, 0.125, 1.5, 0.1) == pytest.approx(3.0 - 0.1 * (3 - 1.5))
    params = SamplingParams(mirostat=True, mirostat_tau=2.0, mirostat_eta=0.2, seed=3)
    row, mu, surprise = torch.zeros(VOCAB) + torch.arange(VOCAB) / 20, 4.0, []
    for position in range(400):
        (choice,) = sample(row[None].clone(), [Draw(params, [0] * position, 0, 3, mu=mu)], VOCAB)
        assert choice is not None
        mu = choice.mu
        surprise.append(-math.log2(choice.probability))
    assert np.mean(surprise[50:]) == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("skew", [-1.0, 0.5, 2.0])
def test_skew(skew: float) -> None:
    assert filters.skewed(0.3, skew) == pytest.approx(0.3 ** math.exp(-skew))
    row, share = torch.arange(9.0) / 4, []
    for each in (0.0, skew):
        draws = [Draw(SamplingParams(skew=each), [], 0, seed) for seed in range(300)]
        choices = sample(row.repeat(300, 1), draws, 9)
        share.append(np.mean([choice.token for choice in choices if choice]))
    assert (share[1] < share[0]) == (skew > 0), "above 0 towards unlikely tokens"


def test_mask() -> None:
    row = torch.arange(6.0)
    params = SamplingParams(logit_bias=((0, 9.5), (3, -1.0)), allowed_tokens=(0, 3, 5), banned_tokens=(5,))
    mask = Mask.of(params)
    inf = math.inf
    assert mask.apply(row).tolist() == [9.5, -inf, -inf, 2.0, -inf, -inf]
    assert mask.without([0]).only([0, 3, 4]).apply(row).tolist() == [-inf, -inf, -inf, 2.0, -inf, -inf]
    assert Mask().only([2]).apply(row).tolist() == [-inf, -inf, 2.0, -inf, -inf, -inf]
    assert row.tolist() == list(range(6)) and Mask().apply(row) is row


def test_the_order_of_the_steps() -> None:
    """Each pair of neighbours, told apart by logits for which their order matters, and the whole chain."""
    row, said = torch.tensor(random_logits(5)).float(), [3, 3, 8, 3, 3, 8]
    params = SamplingParams(
        0.7, 25, 0.95, 0.01, 1.2, 0.1, 0.1, top_a=0.05, tfs=0.97, typical=0.9, mirostat=True, max_temp=2.0,
        min_temp=0.5, xtc_probability=0.4, xtc_threshold=0.05, dry_multiplier=0.5, logit_bias=((3, 4.0),),
        smoothing_factor=0.1, banned_tokens=(9,),
    )  # fmt: skip
    draw = Draw(params, said, 2, 1, mask=Mask.of(params), mu=4.0)
    expected = penalties.dry(penalties.penalise(row, said, 2, 1.2, 0.1, 0.1), said, 0.5, 1.75, 2)
    expected[3] += 4.0
    expected[9] = -torch.inf
    p = filters.soften(expected, 0.7, 0.1)
    ids = p.argsort(descending=True, stable=True)
    p = p[ids]
    for step, values in [
        (filters.top_k, (25,)), (filters.top_p, (0.95,)), (filters.top_a, (0.05,)), (filters.min_p, (0.01,)),
        (filters.tail_free, (0.97,)), (filters.typical, (0.9,)), (filters.mirostat_cut, (4.0,)),
        (filters.dynamic_temperature, (0.5, 2.0, 1.0)),
    ]:  # fmt: skip
        ids, p = ids[p > 0], p[p > 0]
        p = step(p, *values)
    ids, p = ids[p > 0], p[p > 0]
    p = filters.xtc(p, 0.4, 0.05, torch.zeros(len(p), dtype=torch.bool))
    for _, alter in LOGIT_STEPS:
        row = alter(row, draw)
    got_ids, got = distribution(row, draw)
    assert got_ids is not None and torch.equal(got_ids, ids) and torch.equal(got, p) and len(ids) > 3


def test_temperature_last_comes_after_the_filters() -> None:
    row = torch.tensor([math.log(x) for x in (0.6, 0.3, 0.1)])
    early, late = (
        distribution(row, Draw(SamplingParams(temperature=3.0, min_p=0.4, temperature_last=last), [], 0, 0))
        for last in (False, True)
    )
    assert early[0] is not None and len(early[0]) == 3
    ids, p = late
    assert ids is not None and ids.tolist() == [0, 1] or int((p > 0).sum()) == 2
    assert p[:2].tolist() == pytest.approx(softmax(np.log([0.6, 0.3]) / 3).tolist())


def test_nothing_asked_for_alters_no_bit() -> None:
    draw = Draw(SamplingParams(), random_tokens(1), 5, 1)
    assert not any(wanted(draw) for wanted, _ in LOGIT_STEPS)
    assert not any(wanted(draw.params) for wanted, _ in FILTERS)
    logits = torch.tensor(np.array([random_logits(seed) for seed in CASES])).float()
    given = logits.clone()
    choices = sample(logits, [draw] * len(CASES), VOCAB)
    assert torch.equal(logits, given)
    for row, choice in zip(logits, choices, strict=True):
        ids, p = distribution(row, draw)
        assert ids is None and torch.equal(p, row.double().softmax(0)) and choice is not None
        assert choice.probability == pytest.approx(float(p[choice.token]))


def test_presets_are_the_defaults_of_others() -> None:
    assert SamplingParams.preset("vllm") == SamplingParams.preset("neutral") == SamplingParams()
    ours = SamplingParams.preset("exllamav2", seed=1, top_k=3)
    assert (ours.temperature, ours.top_k, ours.top_p, ours.repetition_penalty, ours.seed) == (0.8, 3, 0.8, 1.025, 1)
    with pytest.raises(UsageError, match="neutral, exllamav2, vllm"):
        SamplingParams.preset("other")


def test_nothing_is_left_only_where_nothing_is_allowed() -> None:
    with pytest.raises(Refused, match="allowed_tokens"):
        SamplingParams(allowed_tokens=(1, 2), banned_tokens=(2, 1))
    (choice,) = sample(torch.zeros(1, 4), [Draw(SamplingParams(), [], 0, 0, mask=Mask(frozenset()))], 4)
    assert choice is None
