"""Every step of the sampler against its definition, and rows that do not know of each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorayard.kernels import sample as kernel
from lorayard.kernels.sample import ROW
from lorayard.shared.job import SamplingParams
from lorayard.worker.generate.mask import Mask
from lorayard.worker.generate.sampler import (
    Choice,
    Draw,
    fill_rows,
    on_device,
    sample,
    sample_on_host,
    uniform,
    uniforms,
)

VOCAB = 32


def draw(
    token_ids: list[int] | None = None, prompt: int = 0, seed: int = 0, blocked: tuple[int, ...] = (), **params: float
) -> Draw:  # fmt: skip
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    return Draw(sampling, token_ids or [], prompt, seed, mask=Mask(blocked=frozenset(blocked)))


def one(logits: list[float], each: Draw) -> int | None:
    return tokens(sample(torch.tensor([logits]), [each], len(logits)))[0]


def tokens(choices: list[Choice | None]) -> list[int | None]:
    return [None if choice is None else choice.token for choice in choices]


def support(logits: list[float], count: int = 400, **params: float) -> set[int]:
    """The ids that are ever drawn."""
    drawn = {one(logits, draw(seed=seed, **params)) for seed in range(count)}
    assert None not in drawn
    return {id for id in drawn if id is not None}


def test_greedy_takes_the_largest_and_the_lowest_id_of_equals() -> None:
    assert one([0.0, 3.0, 3.0, 1.0], draw(temperature=0)) == 1
    assert one([-5.0] * 9, draw(temperature=0)) == 0


def test_frequencies_follow_the_probabilities() -> None:
    logits = [0.0, math.log(2), math.log(5)]
    drawn = tokens(sample(torch.tensor([logits] * 3000), [draw(seed=seed) for seed in range(3000)], 3))
    shares = [drawn.count(id) / 3000 for id in range(3)]
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)
    colder = [draw(seed=seed, temperature=0.5) for seed in range(3000)]
    cold = tokens(sample(torch.tensor([logits] * 3000), colder, 3))
    assert cold.count(2) / 3000 == pytest.approx(25 / 30, abs=0.03)


def test_top_k_keeps_the_k_largest_and_the_lowest_ids_of_equals() -> None:
    assert support([1.0, 2.0, 2.0, 2.0, 0.0], top_k=2) == {1, 2}
    assert support([1.0, 2.0, 3.0], top_k=99) == {0, 1, 2}


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = [math.log(p) for p in (0.15, 0.5, 0.05, 0.3)]
    assert support(logits, top_p=0.6) == {1, 3}
    assert support(logits, top_p=0.5) == {1}
    assert support(logits, top_p=1e-6) == {1}


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = [math.log(p) for p in (0.15, 0.5, 0.05, 0.3)]
    assert support(logits, min_p=0.5) == {1, 3}
    assert support(logits, min_p=1.0) == {1}


def test_each_filter_sees_what_the_one_before_left() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert support(logits, top_k=2, top_p=0.55) == {0}
    assert support(logits, top_p=0.55) == {0, 1}


def test_repetition_penalty_counts_the_prompt_and_the_sign() -> None:
    each = draw([0, 1], prompt=1, temperature=0, repetition_penalty=2)
    assert one([4.0, 3.0, 2.5], each) == 2
    assert one([-1.0, -1.5, -1.9], each) == 2
    assert one([4.0, 3.0, 1.9], each) == 0


def test_frequency_and_presence_count_generated_tokens_only() -> None:
    tokens = [2, 2, 2, 0, 0, 1]
    assert one([3.0, 2.4, 0.0], draw(tokens, 3, temperature=0, frequency_penalty=0.5)) == 0
    assert one([3.0, 2.6, 0.0], draw(tokens, 3, temperature=0, frequency_penalty=0.5)) == 1
    assert one([3.0, 2.6, 2.4], draw(tokens, 3, temperature=0, presence_penalty=0.7)) == 2
    assert one([3.0, 2.6, 2.4], draw(tokens, 3, temperature=0, presence_penalty=0.5)) == 0


def test_blocked_ids_and_ids_without_a_token_never_come() -> None:
    assert one([1.0, 9.0, 5.0], draw(temperature=0, blocked=(1,))) == 2
    assert tokens(sample(torch.tensor([[1.0, 2.0, 9.0]]), [draw(temperature=0)], 2)) == [1]
    assert one([1.0, 2.0], draw(temperature=0, blocked=(0, 1))) is None


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_numbers_is_told_apart(bad: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [bad, 1.0]])
    good, broken = sample(logits, [draw(temperature=temperature)] * 2, 2)
    assert good is not None and broken is None


def test_extreme_temperatures_stay_in_range() -> None:
    assert support([1.0, 2.0, 3.0], 50, temperature=1e-9) == {2}
    assert support([1.0, 2.0, 3.0], 200, temperature=100.0) == {0, 1, 2}


def test_the_random_numbers_are_these() -> None:
    """Fixed for ever, or a retried job would tell another story: these values are the contract."""
    assert [uniform(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]] == PINNED
    drawn = [uniform(seed, 0, position) for seed in range(50) for position in range(50)]
    assert len(set(drawn)) == 2500 and sum(drawn) / 2500 == pytest.approx(0.5, abs=0.02)
    assert 0 <= uniform((1 << 64) - 1, 3, 1 << 20) < 1


PINNED = [0.13870941014555427, 0.6935121390102292, 0.2691303195904541, 0.18436667429957676]


def test_a_draw_goes_through_what_the_filters_left_in_the_order_of_ids() -> None:
    shares = (0.15, 0.5, 0.05, 0.3)
    logits = [math.log(p) for p in shares]
    for seed in range(200):
        number = uniform(seed, 0, 0)
        assert one(logits, draw(seed=seed)) == int((np.cumsum(shares) <= number).sum())
        left = np.array([0.15, 0.5, 0, 0.3]) / 0.95
        assert one(logits, draw(seed=seed, top_k=3)) == int((left.cumsum() <= number).sum())


def test_what_the_kernel_is_told() -> None:
    draws = [
        draw([5] * 7, seed=(1 << 64) - 1, temperature=0.5, top_k=1 << 31, top_p=0.5, min_p=0.25, blocked=(9, 4)),
        draw(temperature=0),
        draw(temperature=1e-200),
    ]
    rows = np.empty(3, ROW)
    fill_rows(rows, draws, [4, -1, 0])
    assert rows["number"].tolist() == [uniform((1 << 64) - 1, 0, 7), uniform(0, 0, 0), uniform(0, 0, 0)]
    assert rows["temperature"].tolist()[:2] == [0.5, 0] and rows["temperature"][2] > 0
    assert rows["seat"].tolist() == [4, -1, 0] and rows["banned"].tolist() == [[4, 9] + [-1] * 6, [-1] * 8, [-1] * 8]
    assert rows[0].tolist()[2:5] == (0.5, 0.25, (1 << 31) - 1)
    again = [Draw(SamplingParams(), [], 0, seed, sample=2, attempt=seed % 3) for seed in range(9)]
    assert uniforms(again).tolist() == [uniform(each.seed, 2, 0, each.attempt) for each in again]


def test_the_kernel_takes_rows_that_ask_for_no_more_than_it_does() -> None:
    assert on_device(draw(temperature=0.3, top_k=9, top_p=0.1, min_p=0.3, blocked=tuple(range(8))))
    assert not on_device(draw(blocked=tuple(range(9))))
    assert not on_device(Draw(SamplingParams(), [], 0, 0, mask=Mask(allowed=frozenset([1]))))
    for setting in ({"skew": 0.1}, {"mirostat": True}, {"frequency_penalty": -0.1}, {"max_temp": 2.0}, {"tfs": 0.5}):
        assert not on_device(draw(**setting))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_gpu_draws_what_the_host_does(dtype: torch.dtype) -> None:
    """Another token may come where the number is within rounding of a boundary: in less than 1 of 1000 rows here."""
    logits = (torch.randn(2000, 5000, device="cuda") * 3).to(dtype)
    settings = [{}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}, {"skew": 0.5},
                {"top_k": 40, "top_p": 0.7, "min_p": 0.02, "temperature": 1.3}, {"blocked": (1, 2)}]  # fmt: skip
    draws = [draw(seed=seed, **settings[seed % len(settings)]) for seed in range(len(logits))]  # type: ignore[arg-type]
    there, here = sample(logits.clone(), draws, 4990), sample_on_host(logits.float().cpu(), draws, 4990)
    other = sum(a.token != b.token for a, b in zip(there, here, strict=True) if a and b)
    assert None not in there and None not in here and other <= 2
    assert sample(logits[7:9].clone(), draws[7:9], 4990) == there[7:9]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    temperature_last=st.booleans(),
    max_temp=st.sampled_from([0.0, 0.0, 2.0]),
    smoothing_factor=st.sampled_from([0.0, 0.0, 0.4]),
    top_a=st.sampled_from([0.0, 0.0, 0.3]),
    tfs=st.sampled_from([1.0, 1.0, 0.8]),
    typical=st.sampled_from([1.0, 1.0, 0.7]),
    mirostat=st.booleans(),
    xtc_probability=st.sampled_from([0.0, 0.0, 0.5]),
    skew=st.sampled_from([0.0, 0.0, 0.7]),
    repetition_range=st.sampled_from([-1, 3]),
    repetition_decay=st.sampled_from([0, 3]),
    dry_multiplier=st.sampled_from([0.0, 0.0, 1.0]),
    logit_bias=st.sampled_from([(), ((3, 2.0), (7, -2.0))]),
    allowed_tokens=st.sampled_from([None, None, tuple(range(9))]),
)


@settings(max_examples=60, deadline=None)
@given(params=st.lists(PARAMS, min_size=1, max_size=24), seed=st.integers(0, 1 << 32))
def test_a_row_draws_the_same_alone_and_among_others(params: list[SamplingParams], seed: int) -> None:
    logits = 3 * torch.randn(len(params), VOCAB, generator=torch.Generator().manual_seed(seed))
    said = torch.randint(VOCAB, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
    draws = [Draw(each, said, 4, seed, mask=Mask.of(each), mu=3, ignored=frozenset([5])) for each in params]
    together = sample(logits.clone(), draws, VOCAB)
    alone = [sample(logits[i : i + 1].clone(), [each], VOCAB)[0] for i, each in enumerate(draws)]
    assert together == alone


def test_the_kernel_is_not_asked_for_more_tokens_than_it_takes() -> None:
    """Gemma 3 has 262,208, which the host draws from."""
    assert kernel.takes(256_000) and kernel.takes(262_144) and not kernel.takes(262_208)
