"""Decode steps as CUDA graphs, with the host a step behind, against the same steps run one by one by torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorayard.demo import ADAPTERS, BASE
from lorayard.worker import Cache, Generator, Lora, Model, ModelConfig, SamplingParams, Tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GREEDY = SamplingParams(temperature=0)
TEXTS = ["Write a list of fruits.", "The river", "What is the capital?", "name: Ada, age: 36", "Once upon a time"]


def make(devices: object = "cuda:0", max_batch: int = 16, **options: object) -> Generator:
    """A generator of the demo model."""
    model = Model(ModelConfig.from_directory(BASE))
    cache = Cache(model, max_tokens=64 * 256, **options)  # type: ignore[arg-type]
    model.load(cache, devices=devices)  # type: ignore[arg-type]
    return Generator(model, cache, Tokenizer.from_directory(BASE), max_batch=max_batch, slots=4, seed=1)


def sets(generator: Generator, count: int) -> list[list[object]]:
    """Base, single adapters and a sum in turn."""
    one, two, three = (Lora.from_directory(generator.model, ADAPTERS / name) for name in ("bullets", "json", "shout"))
    choice: list[list[object]] = [[], [one], [two], [three], [(one, 0.5), (three, 0.5)]]
    return [choice[i % len(choice)] for i in range(count)]


def run(generator: Generator, count: int, sampling: SamplingParams, **options: object) -> list[str]:
    """Texts of `count` prompts with mixed sets."""
    prompts = [f"{i} {TEXTS[i % len(TEXTS)]}" for i in range(count)]
    return generator.generate(prompts, loras=sets(generator, count), sampling=sampling, max_tokens=40, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=7)])
def test_graphs_give_the_tokens_of_steps_without_them(sampling: SamplingParams) -> None:
    plain, graphs = make(), make()
    plain._runner._graphs = None
    expected = run(plain, 12, sampling)
    assert run(graphs, 12, sampling) == expected
    assert graphs._runner._graphs
    graphs.table.check_integrity()
    assert graphs.table.free == graphs.cache.pages


def test_a_row_alone_gives_what_it_gives_in_a_batch() -> None:
    generator = make()
    together = run(generator, 10, GREEDY)
    for i, lora_set in enumerate(sets(generator, 10)):
        assert generator.generate([f"{i} {TEXTS[i % len(TEXTS)]}"], loras=lora_set, sampling=GREEDY, max_tokens=40) == [
            together[i]
        ]


def test_rows_that_the_host_draws_mix_with_others() -> None:
    generator = make()
    rare = SamplingParams(temperature=0, repetition_penalty=1.3)
    first = generator.enqueue("The river", max_tokens=30, sampling=GREEDY)
    second = generator.enqueue("The river", max_tokens=30, sampling=rare, logprobs=2, stop=["\n"])
    texts: dict[object, str] = {}
    while generator.busy:
        for event in generator.iterate():
            if event.finished:
                assert event.error is None
                texts[event.handle] = event.full_text or ""
    assert texts[first] == generator.generate(["The river"], sampling=GREEDY, max_tokens=30)[0]
    assert texts[second] == generator.generate(["The river"], sampling=rare, stop=["\n"], max_tokens=30)[0]


def test_cancel_and_stop_while_a_step_is_on_its_way() -> None:
    generator = make()
    handles = [generator.enqueue(text, max_tokens=50, min_tokens=20, sampling=GREEDY) for text in TEXTS]
    for _ in range(5):
        generator.iterate()
    assert generator.cancel(handles[0])
    finished = set()
    while generator.busy:
        finished |= {event.handle for event in generator.iterate() if event.finished}
    assert finished == set(handles)
    generator.table.check_integrity()
    assert generator.table.free == generator.cache.pages


@pytest.mark.parametrize("dtype", ["q8", "q6", "q4", "bf16"])
def test_graphs_over_every_cache(dtype: str) -> None:
    plain, graphs = make(dtype=dtype), make(dtype=dtype)
    plain._runner._graphs = None
    assert run(graphs, 6, GREEDY) == run(plain, 6, GREEDY)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees one CUDA device")
def test_two_devices_give_the_text_of_one() -> None:
    both = make({"cuda:0": "1500KiB", "cuda:1": "1GiB"})
    assert len(set(both.model.layer_devices)) == 2
    assert run(both, 10, GREEDY) == run(make(), 10, GREEDY)
    assert both._runner._graphs


def test_adapters_change_under_a_captured_graph(tmp_path: Path) -> None:
    generator = make(max_batch=2)
    folders = sorted(path for path in ADAPTERS.iterdir() if path.is_dir())
    loras = [Lora.from_directory(generator.model, folder) for folder in folders]
    alone = [make(max_batch=2).generate(["The river"], loras=[lora], sampling=GREEDY, max_tokens=30) for lora in loras]
    for _ in range(3):
        for lora, expected in zip(loras, alone, strict=True):
            assert generator.generate(["The river"], loras=[lora], sampling=GREEDY, max_tokens=30) == expected
