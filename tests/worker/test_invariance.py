"""On the CPU a prompt gets the very same bits whatever shares its batch and however it is cut."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from lorayard.kernels.attention import attend, tile
from lorayard.kernels.gelu_mul import gelu_mul
from lorayard.kernels.linear import linear
from lorayard.kernels.lora import add_lora, tile_rows
from lorayard.kernels.pool import FloatPool
from lorayard.kernels.rms_norm import rms_norm
from lorayard.kernels.silu_mul import silu_mul
from lorayard.worker import Lora, Model, ModelConfig
from lorayard.worker.linear.linear import Linear

from ..stepper import Sequence, Stepper
from ..tiny import relative, write_adapter, write_model

Sets = list[list[tuple[Lora, float]]]
Prompts = list[list[int]]
LENGTHS = (1, 3, 17, 40, 64, 255, 257, 300)


MODELS = ["LlamaForCausalLM", "Gemma2ForCausalLM"]
"""Gemma 2 has windows in every other layer, and soft caps."""


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = write_model(
        tmp_path_factory.mktemp("invariance") / "base",
        architecture=request.param,
        intermediate_size=104,
        vocab_size=163,
    )
    model = Model(ModelConfig.from_directory(path))
    model.load(devices="cpu")
    return model


@pytest.fixture(scope="module")
def sets(model: Model) -> Sets:
    """Eight sets: the base, single adapters of several ranks and targets, one at two scales, sums."""
    base = model.config.path
    a, b, c = (
        Lora.from_directory(model, write_adapter(base.parent / name, base, seed, r, **changes))
        for name, seed, r, changes in (
            ("a", 1, 4, {}),
            ("b", 2, 7, {"target_modules": ["q_proj", "up_proj"]}),
            ("c", 3, 16, {"use_rslora": True, "rank_pattern": {"o_proj": 3}}),
        )
    )
    single = [[], [(a, 1.0)], [(b, 1.0)], [(c, 1.0)], [(a, 0.3)]]
    return [*single, [(a, 0.5), (b, 0.5)], [(c, 2.0), (a, 1.0)], [(b, -1.0), (c, 0.1)]]


@pytest.fixture(scope="module")
def prompts(model: Model) -> Prompts:
    draw = random.Random(1)
    return [[draw.randrange(model.config.vocab_size) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def alone(model: Model, sets: Sets, prompts: Prompts) -> list[torch.Tensor]:
    """Logits of every token of each prompt, in one piece with nothing beside it."""
    return [Stepper(model).step([(Sequence(loras), prompt)])[0]
            for loras, prompt in zip(sets, prompts, strict=True)]  # fmt: skip


def test_the_eight_sets_differ(model: Model, sets: Sets, prompts: Prompts) -> None:
    base = model.logits(prompts[3])
    logits = [model.logits(prompts[3], loras) for loras in sets]
    assert all(relative(each, base) > 1e-2 for each in logits[1:])
    assert all(relative(x, y) > 1e-2 for i, x in enumerate(logits) for y in logits[:i])


@pytest.mark.parametrize("seed", range(6))
def test_every_schedule_gives_the_bits_of_the_prompt_alone(
    model: Model, sets: Sets, prompts: Prompts, alone: list[torch.Tensor], seed: int
) -> None:
    """Random chunks of random prompts in random order, single tokens among them, with other pages and slots."""
    draw = random.Random(seed)
    stepper = Stepper(model, shuffle=seed)
    sequences = [Sequence(loras) for loras in sets]
    got: list[list[torch.Tensor]] = [[] for _ in sets]
    while waiting := [i for i in range(8) if sequences[i].length < len(prompts[i])]:
        chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
        cuts = [sequences[i].length + draw.choice((1, 1, 5, 64, 300)) for i in chosen]
        feeds = [(sequences[i], prompts[i][sequences[i].length : cut]) for i, cut in zip(chosen, cuts, strict=True)]
        for i, logits in zip(chosen, stepper.step(feeds), strict=True):
            got[i].append(logits)
    for parts, expected in zip(got, alone, strict=True):
        assert torch.equal(torch.cat(parts), expected)


def test_decoding_gives_the_bits_of_prefill(
    model: Model, sets: Sets, prompts: Prompts, alone: list[torch.Tensor]
) -> None:
    stepper, sequences = Stepper(model), [Sequence(loras) for loras in sets]
    stepper.step([(sequence, prompt[:-1]) for sequence, prompt in zip(sequences, prompts, strict=True) if prompt[:-1]])
    steps = stepper.step([(sequence, prompt[-1:]) for sequence, prompt in zip(sequences, prompts, strict=True)])
    for step, expected in zip(steps, alone, strict=True):
        assert torch.equal(step[0], expected[-1])


def test_two_threads_do_not_change_the_bits(model: Model, sets: Sets, prompts: Prompts) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(model.logits(prompts[-1], sets[6]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_each_linear_is_called_once_a_step_whatever_the_sets(
    model: Model, sets: Sets, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    run = Linear.__call__

    def counted(self: Linear, x: torch.Tensor) -> torch.Tensor:
        calls[self.name] += 1
        return run(self, x)

    monkeypatch.setattr(Linear, "__call__", counted)
    stepper = Stepper(model)
    sequences = [Sequence(loras) for loras in sets]
    for chunk in (slice(0, 1), slice(1, 9)):
        calls.clear()
        stepper.step([(s, p[chunk]) for s, p in zip(sequences, prompts, strict=True) if p[chunk]])
        assert dict(calls) == dict.fromkeys([*model.linears, "lm_head"], 1)
    assert len(model.linears) == 14


def test_bad_numbers_of_one_job_do_not_reach_the_next_on_its_page(
    model: Model, prompts: Prompts, alone: list[torch.Tensor]
) -> None:
    stepper = Stepper(model, tokens=256)
    for pool in stepper.cache[0]:
        assert isinstance(pool, FloatPool) and pool.values.isfinite().all()
    spoilt = model.embedding[5].clone()
    model.embedding[5] = torch.nan
    try:
        assert stepper.step([(Sequence(pages=[0]), [5] * 200)])[0].isnan().any()
    finally:
        model.embedding[5] = spoilt
    assert torch.equal(stepper.step([(Sequence(pages=[0]), prompts[0])])[0], alone[0])


@pytest.mark.parametrize(("inputs", "outputs"), [(256, 640), (640, 256), (100, 36), (64, 1408), (31, 7), (2048, 512)])
def test_kernels_keep_a_rows_bits_at_every_size_of_batch(inputs: int, outputs: int) -> None:
    torch.manual_seed(inputs)
    x, weight, scale = torch.randn(61, inputs), torch.randn(outputs, inputs), torch.randn(inputs)
    a, b = torch.randn(5, inputs), torch.randn(outputs, 5)

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        y = linear(x, weight)
        rows, scales = tile_rows(torch.arange(len(x)), torch.ones(len(x), 5))
        add_lora(x, y, rows, scales, a.expand(len(rows), -1, -1), b.expand(len(rows), -1, -1))
        return [y, rms_norm(x, scale, 1e-5), silu_mul(x, x + 1), gelu_mul(x, x + 1)]

    whole = run(x)
    for start, end in ((0, 1), (60, 61), (3, 11), (5, 61), (17, 26)):
        for part, full in zip(run(x[start:end].clone()), whole, strict=True):
            assert torch.equal(part, full[start:end])


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (1, 0.0), (5, 0.0), (8, 2.0), (17, 0.0), (100, 2.0)])
def test_attention_over_many_pages_is_exact(window: int, cap: float) -> None:
    """Four pages, against the textbook's softmax over the whole past; chunks that begin anywhere get the same bits."""
    torch.manual_seed(2)
    n, page = 50, 16
    pools = [FloatPool((6, 2, page, 8), torch.float32, torch.device("cpu")) for _ in range(2)]
    q, k, v = torch.randn(n, 4, 8) * 3, torch.randn(n, 2, 8), torch.randn(n, 2, 8)
    positions, table = torch.arange(n), torch.tensor([[4, 0, 5, 2]])
    for pool, new in zip(pools, (k, v), strict=True):
        pool.write(new, table[0, positions // page], positions % page)

    def run(chunk: torch.Tensor) -> torch.Tensor:
        tiles = tile(torch.zeros_like(chunk), chunk, table, page, 8, torch.device("cpu"), window)
        return attend(q[chunk], pools[0], pools[1], tiles, 0.3, cap)

    got = run(positions)
    wide_k, wide_v = (t.repeat_interleave(2, 1).transpose(0, 1) for t in (k, v))
    scores = q.transpose(0, 1) @ wide_k.transpose(1, 2) * 0.3
    scores = cap * torch.tanh(scores / cap) if cap else scores
    behind = positions[:, None] - positions
    scores = scores.masked_fill((behind < 0) | (behind >= (window or n)), -torch.inf)
    assert torch.allclose(got, (scores.softmax(-1) @ wide_v).transpose(0, 1), atol=1e-5)
    for start in range(0, n, 7):
        assert torch.equal(run(positions[start : start + 9]), got[start : start + 9])


def test_pages_outside_every_window_are_not_read() -> None:
    positions, table = torch.tensor([40, 41, 42]), torch.tensor([[0, 1, 2]])
    tiles = tile(torch.zeros_like(positions), positions, table, 16, 8, torch.device("cpu"), 4)
    assert (tiles.first.tolist(), tiles.active) == ([4], (1, 1))
