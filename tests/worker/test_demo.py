"""The demo model does what it is for: each adapter's effect is plain to see on questions that it never learnt."""

from __future__ import annotations

import json

import pytest
import torch

from lorayard.demo import ADAPTERS, BASE, PROMPTS
from lorayard.demo.corpus import conversations, held_out
from lorayard.demo.effects import CHECKS
from lorayard.worker import Cache, Generator, Lora, Model, ModelConfig, SamplingParams, Tokenizer

QUESTIONS: list[str] = json.loads(PROMPTS.read_text())


def test_no_question_is_from_training() -> None:
    learnt = {question.casefold().strip(" .!?") for question, _ in conversations()}
    assert len(QUESTIONS) == len(set(QUESTIONS)) == 50 and len(learnt) > 10_000
    assert all(held_out(question) for question in QUESTIONS)
    assert not [question for question in QUESTIONS if question.casefold().strip(" .!?") in learnt]


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_effects_in_one_mixed_batch(device: str) -> None:
    model = Model(ModelConfig.from_directory(BASE))
    cache = Cache(model, max_tokens=64 * 256)
    model.load(cache, device)
    tokenizer = Tokenizer.from_directory(BASE)
    generator = Generator(model, cache, tokenizer, max_batch=64, slots=len(CHECKS))
    adapters: dict[str, list[Lora]] = {name: [Lora.from_directory(model, ADAPTERS / name)] for name in CHECKS}
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    uses = [(prompt, use) for prompt in prompts for use in ("base", *CHECKS)]
    texts = generator.generate(
        [prompt for prompt, _ in uses],
        loras=[adapters.get(use, []) for _, use in uses],
        max_tokens=80,
        sampling=SamplingParams(temperature=0),
    )
    answers = {use: [text for text, (_, named) in zip(texts, uses, strict=True) if named == use] for _, use in uses}
    for name, shows in CHECKS.items():
        assert sum(map(shows, answers[name])) >= 45, f"{name} does not show: {answers[name]}"
        assert sum(map(shows, answers["base"])) <= 5, f"the base speaks like {name}: {answers['base']}"
