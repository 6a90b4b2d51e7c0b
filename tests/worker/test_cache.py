"""Quantised caches: ExLlamaV2's bytes and logits, and what every type of cache keeps to."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorayard.demo import BASE
from lorayard.kernels.attention import attend, tile
from lorayard.kernels.pool import FloatPool, Pool, QuantisedPool
from lorayard.shared.errors import NotSupported, UsageError
from lorayard.worker import Cache, Generator, Model, ModelConfig, SamplingParams, Tokenizer
from lorayard.worker.cache.storage import TYPES

from ..stepper import Sequence, Stepper
from ..tiny import relative

VECTORS = Path(__file__).parents[1] / "vectors"
STORED = load_file(VECTORS / "quantised-cache.safetensors")
QUANTISED = ("q4", "q6", "q8")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo() -> Model:
    model = Model(ModelConfig.from_directory(BASE))
    model.load(devices="cpu")
    return model


def values(pool: Pool) -> Tensor:
    """All that it holds, float32 [pages, heads, page, D]."""
    pages, heads, page, _ = pool.shape
    return pool.read(torch.arange(pages * heads), page).view(pool.shape)


def fill(pool: Pool, rows: Tensor) -> None:
    """Put rows [T, heads, D] from the first place on."""
    at = torch.arange(len(rows))
    pool.write(rows, at // pool.shape[2], at % pool.shape[2])


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("half", ["k", "v"])
def test_bytes_and_scales_are_exllamav2s(name: str, half: str) -> None:
    pool = QuantisedPool((1, 2, 64, 64), getattr(TYPES[name], half), CPU)
    fill(pool, STORED[f"cache.fp16.{half}_l0_first64"].float())
    expected = [STORED[f"cache.{name}.{half}{part}_l0_first64"] for part in ("q", "s", "")]
    for got, want in zip((pool.codes[0], pool.scales[0], values(pool)[0]), expected, strict=True):
        assert torch.equal(got.transpose(0, 1), want.to(got.dtype))


def test_logits_through_the_caches_of_exllamav2(tmp_path: Path) -> None:
    """There a prompt attends to its floats and is quantised afterwards; only the single steps read what is packed."""
    folder, floats = VECTORS / "exl2-4.25bpw-h6", load_file(VECTORS / "embedding-and-head.safetensors")
    for file in ("config.json", "output.safetensors"):
        shutil.copy(folder / file, tmp_path)
    embedding = "model.embed_tokens.weight"
    save_file({embedding: floats[embedding]}, tmp_path / "floats.safetensors")
    model = Model(ModelConfig.from_directory(tmp_path))
    model.load(devices="cpu")
    tokens = json.loads((VECTORS / "input_ids.json").read_text())["long_608"]
    prefilled, sequence = Stepper(model, 1024, dtype="fp16"), Sequence()
    prompt = prefilled.step([(sequence, tokens[:600])])[0][592:]
    for name, tolerance in (("q8", 0.005), ("q6", 0.02), ("q4", 0.02)):
        stepper, then = Stepper(model, 1024, dtype=name), Sequence([], list(sequence.pages), 600)
        for i in range(model.config.num_layers):
            for old, new in zip(prefilled.cache[i], stepper.cache[i], strict=True):
                fill(new, values(old).transpose(1, 2).flatten(0, 1))
        expected = STORED[f"logits.long_cache_{name}"]
        steps = torch.cat([stepper.step([(then, [token])])[0] for token in tokens[600:]])
        assert relative(prompt, expected[:8]) < 0.005
        assert relative(steps, expected[8:]) < tolerance, name


@pytest.mark.parametrize("name", QUANTISED)
def test_attention_reads_the_dequantised_values(name: str) -> None:
    torch.manual_seed(4)
    n, shape = 50, (6, 2, 16, 64)
    q, k, v = torch.randn(n, 4, 64) * 3, torch.randn(n, 2, 64), torch.randn(n, 2, 64)
    positions, pages = torch.arange(n), torch.tensor([4, 0, 5, 2])
    tiles = tile(torch.zeros_like(positions), positions, pages[None], 16, 8, CPU)
    packed, plain = [], []
    for bits, new in ((TYPES[name].k, k), (TYPES[name].v, v)):
        assert isinstance(bits, int)
        pool, floats = QuantisedPool(shape, bits, CPU), FloatPool(shape, torch.float32, CPU)
        pool.write(new, pages[positions // 16], positions % 16)
        floats.values.copy_(values(pool))
        packed.append(pool)
        plain.append(floats)
    got, exact = attend(q, packed[0], packed[1], tiles, 0.125), attend(q, plain[0], plain[1], tiles, 0.125)
    assert torch.equal(got, exact)
    assert 1e-4 < relative(values(packed[1])[pages, :, :].transpose(1, 2).flatten(0, 1)[:n], v) < 0.15


@pytest.mark.parametrize("name", ["q4", "q6"])
def test_every_schedule_gives_the_bits_of_the_prompt_alone(demo: Model, name: str) -> None:
    """Chunks, single tokens, neighbours, other pages, and a page that another text filled."""
    draw = random.Random(name)
    first, second = ([draw.randrange(3, 1400) for _ in range(length)] for length in (300, 41))
    alone = [Stepper(demo, 1024, dtype=name).step([(Sequence(), prompt)])[0] for prompt in (first, second)]
    stepper, one, two = Stepper(demo, 2048, dtype=name, shuffle=3), Sequence(), Sequence()
    got: list[Tensor] = []
    for start, end in ((0, 7), (7, 260), (260, 261), (261, 300)):
        mixed = [(one, first[start:end])] + ([(two, second)] if start == 260 else [])
        out = stepper.step(mixed)
        got.append(out[0])
        if len(out) == 2:
            assert torch.equal(out[1], alone[1])
    assert torch.equal(torch.cat(got), alone[0])
    again = Sequence([], [one.pages[0]], 256)
    assert torch.equal(stepper.step([(again, first[256:])])[0], alone[0][256:])


def test_a_page_that_is_known_in_part_gives_the_same_tokens(demo: Model) -> None:
    """The second prompt goes on from 256 + 40 tokens of the first; its tokens are those of a new generator."""
    draw, tokenizer = random.Random(5), Tokenizer.from_directory(BASE)
    first = [draw.randrange(3, 1400) for _ in range(300)]
    second = [*first[:296], *(draw.randrange(3, 1400) for _ in range(9))]

    def answers(*prompts: list[int]) -> list[list[int]]:
        generator, ids = Generator(demo, Cache(demo, 1536, "q6"), tokenizer), list[list[int]]()
        for prompt in prompts:
            generator.enqueue(prompt, max_tokens=6, min_tokens=6, sampling=SamplingParams(temperature=0))
            ids.append([])
            while generator.busy:
                ids[-1] += [token for event in generator.iterate() for token in event.token_ids]
        return ids

    assert answers(first, second)[1] == answers(second)[0]


def test_fewer_bits_cost_more(demo: Model) -> None:
    draw = random.Random(1)
    prompt = [draw.randrange(3, 1400) for _ in range(200)]
    exact = demo.logits(prompt)
    errors = [relative(demo.logits(prompt, cache_dtype=name), exact) for name in ("fp16", "q8", "q6", "q4")]
    assert errors == sorted(errors) and errors[0] < 1e-3 and errors[1] < 0.02 and errors[3] < 0.3


@pytest.mark.parametrize("name", TYPES)
def test_a_copied_prefix_and_the_bytes_of_a_cache(demo: Model, name: str) -> None:
    cache = Cache(demo, 512, name)
    assert sum(pool.nbytes for pool in cache[0]) == cache.layer_bytes
    for pool in cache[1]:
        fill(pool, torch.randn(512, 2, 64))
    before = [values(pool) for pool in cache[1]]
    cache.copy_prefix(1, 0, 77)
    for pool, old in zip(cache[1], before, strict=True):
        new = values(pool)
        assert torch.equal(new[0, :, :77], old[1, :, :77]) and torch.equal(new[0, :, 77:], old[0, :, 77:])
        assert torch.equal(new[1], old[1])


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_read_is_finite_whatever_was_written(bits: int) -> None:
    pool = QuantisedPool((1, 1, 16, 64), bits, CPU)
    rows = torch.randn(8, 1, 64)
    rows[0, 0, 3], rows[1], rows[2], rows[3, 0, ::2], rows[4] = torch.nan, torch.inf, 6e4, -6e4, 0.0
    fill(pool, rows)
    assert values(pool).isfinite().all()
    assert not values(pool)[0, 0, 4].any() and not values(pool)[0, 0, 8:].any()


def test_refusals(demo: Model) -> None:
    class Other:
        config = ModelConfig.from_directory(BASE)
        layer_devices = ()

    object.__setattr__(Other.config, "head_dim", 96)
    with pytest.raises(NotSupported, match="a cache of q6 for head_dim 96: it takes multiples of 64"):
        Cache(Other(), 256, "q6")
    with pytest.raises(UsageError, match="one of fp16, bf16, fp32, q8, q6, q4, not 'q5'"):
        Cache(demo, 256, "q5")
