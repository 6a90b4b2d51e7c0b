"""The generator with the real demo model: what it says is what the model says, whatever shares the batch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorayard.demo import ADAPTERS, BASE, PROMPTS
from lorayard.shared.errors import AdapterError, GeneratorBusy, Refused, UsageError
from lorayard.worker import Cache, Event, Generator, Handle, Lora, Model, ModelConfig, SamplingParams, Tokenizer
from lorayard.worker.linear.linear import Linear
from lorayard.worker.models.batch import Batch

GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=4, top_k=60, top_p=0.97, repetition_penalty=1.1, seed=11)
QUESTIONS: list[str] = json.loads(PROMPTS.read_text())
Options = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> Model:
    model = Model(ModelConfig.from_directory(BASE))
    model.load(devices="cpu")
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(BASE)


@pytest.fixture(scope="module")
def adapters(model: Model) -> dict[str, Lora]:
    return {name: Lora.from_directory(model, ADAPTERS / name) for name in ("bullets", "json", "shout")}


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.fixture
def make(model: Model, tokenizer: Tokenizer) -> Any:
    def make(pages: int = 48, **options: int) -> Generator:
        return Generator(model, Cache(model, pages * 256, "fp32"), tokenizer, **options)

    return make


def run(generator: Generator, handles: Sequence[Handle]) -> list[Event]:
    """The last event of each job, after checking that the pieces make up the whole."""
    pieces: dict[Handle, list[Event]] = {handle: [] for handle in handles}
    while generator.busy:
        for event in generator.iterate():
            pieces[event.handle].append(event)
    for events in pieces.values():
        assert [event.finished for event in events] == [False] * (len(events) - 1) + [True]
        assert "".join(event.text for event in events) == events[-1].full_text
        if events[-1].finish != "error":
            assert sum(len(event.token_ids) for event in events) == events[-1].new_tokens
    generator.table.check_integrity()
    assert generator.table.free == generator.cache.pages
    return [pieces[handle][-1] for handle in handles]


def ids_of(generator: Generator, jobs: Sequence[tuple[Sequence[int], Options]]) -> list[list[int]]:
    """The new token ids of jobs that run together."""
    handles = [generator.enqueue(prompt, **options) for prompt, options in jobs]
    ids: dict[Handle, list[int]] = {handle: [] for handle in handles}
    while generator.busy:
        for event in generator.iterate():
            assert event.error is None
            ids[event.handle] += event.token_ids
    return [ids[handle] for handle in handles]


@pytest.mark.parametrize("use", [[], ["shout"], ["bullets", "json"]])
def test_greedy_ids_are_the_argmax_of_the_models_logits(
    make: Any, model: Model, adapters: dict[str, Lora], prompts: list[list[int]], use: list[str]
) -> None:
    loras = [(adapters[name], 0.7) for name in use]
    (ids,) = ids_of(make(), [(prompts[0], {"max_tokens": 12, "sampling": GREEDY, "loras": loras})])
    logits = model.logits([*prompts[0], *ids], loras)
    assert ids == logits[len(prompts[0]) - 1 : -1].argmax(-1).tolist() and len(ids) >= 8


def test_a_job_says_the_same_alone_in_a_batch_of_32_and_in_other_chunks(
    make: Any, adapters: dict[str, Lora], prompts: list[list[int]]
) -> None:
    a, b, c = adapters.values()
    sets: list[Any] = [[], [a], [b], [(c, 0.5)], [a, b], [(a, 0.3), (c, 0.9)], [(a, 0.31)]]
    jobs = [
        (prompts[i], {"max_tokens": 5, "sampling": SAMPLED if i % 2 else GREEDY, "loras": sets[i % len(sets)]})
        for i in range(32)
    ]
    together = ids_of(make(), jobs)
    assert ids_of(make(chunk=17, max_batch=9), jobs) == together
    for index in (0, 5, 13, 31):
        assert ids_of(make(chunk=3), [jobs[index]]) == [together[index]]


def test_each_linear_is_called_once_a_step_whatever_the_sets(
    make: Any, model: Model, adapters: dict[str, Lora], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    plain = Linear.__call__

    def counted(self: Linear, *args: Any, **named: Any) -> Any:
        calls[self.name] += 1
        return plain(self, *args, **named)

    monkeypatch.setattr(Linear, "__call__", counted)
    generator = make()
    for index, loras in enumerate([[], [adapters["shout"]], [adapters["json"]], list(adapters.values())]):
        generator.enqueue(prompts[index], max_tokens=4, sampling=GREEDY, loras=loras)
    generator.iterate()
    assert generator.running == 4
    assert calls == Counter([*model.linears, "lm_head"])


def test_known_pages_save_work_and_change_no_bit(
    make: Any, adapters: dict[str, Lora], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make()
    steps = watch(generator, monkeypatch)
    text = [id for prompt in prompts for id in prompt][:300]
    seen = {}
    for name, loras in {"base": [], "set": [adapters["shout"]], "scaled": [(adapters["shout"], 0.5)]}.items():
        options: Options = {"max_tokens": 6, "sampling": SAMPLED, "loras": loras}
        (seen[name],) = ids_of(generator, [(text, options)])
        computed, logits = drain(steps)
        assert computed == 300 + 5, "another set must not use these pages"
        assert ids_of(generator, [(text, options)]) == [seen[name]]
        computed, again = drain(steps)
        assert computed == 1 + 5 and torch.equal(again, logits), "a page is known and the rest copied"
        ids_of(generator, [(text[:256], options)])
        assert drain(steps)[0] == 1 + 5, "the last token of a prompt is always computed"
    assert len({tuple(ids) for ids in seen.values()}) == 3


def test_generated_pages_are_known_too(make: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make()
    text = [id for prompt in prompts for id in prompt][:250]
    options: Options = {"max_tokens": 12, "min_tokens": 12, "sampling": GREEDY}
    (ids,) = ids_of(generator, [(text, options)])
    steps = watch(generator, monkeypatch)
    follow_up = [*text, *ids]
    hit = ids_of(generator, [(follow_up, options)])
    assert drain(steps)[0] == len(follow_up) - 256 + 11
    assert ids_of(make(), [(follow_up, options)]) == hit


Steps = list[tuple[int, torch.Tensor]]


def watch(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """A list that gets the number of tokens and the logits of each step."""
    steps: Steps = []
    forward = generator.model.forward

    def watched(batch: Batch, *args: Any) -> torch.Tensor:
        logits = forward(batch, *args)
        steps.append((len(batch.token_ids), logits.clone()))
        return logits

    monkeypatch.setattr(generator.model, "forward", watched)
    return steps


def drain(steps: Steps) -> tuple[int, torch.Tensor]:
    """Tokens and logits of all steps since the last call."""
    taken = steps.copy()
    steps.clear()
    return sum(count for count, _ in taken), torch.cat([logits for _, logits in taken])


def test_warmup_leaves_no_trace(make: Any, adapters: dict[str, Lora], prompts: list[list[int]]) -> None:
    generator = make()
    generator.warmup()
    assert generator.table.known == 0 and generator.table.free == generator.cache.pages
    assert not generator.busy and generator.bank.combinations == [None] * 8
    generator.enqueue(prompts[0])
    with pytest.raises(GeneratorBusy, match="warm up"):
        generator.warmup()


def test_the_default_set_changes_only_when_idle(make: Any, adapters: dict[str, Lora], prompts: list[list[int]]) -> None:
    generator = make()
    options: Options = {"max_tokens": 8, "sampling": GREEDY}
    plain, loud = (generator.generate([prompts[0]], loras=loras, **options) for loras in ([], [adapters["shout"]]))
    assert plain != loud
    generator.set_loras([adapters["shout"]])
    assert generator.generate([prompts[0]], **options) == loud
    assert generator.generate([prompts[0]], loras=[], **options) == plain
    handle = generator.enqueue(prompts[0], **options)
    for _ in range(2):
        with pytest.raises(GeneratorBusy, match="default LoRA set"):
            generator.set_loras(None)
        generator.iterate()
    generator.cancel(handle)
    generator.set_loras(None)
    assert generator.iterate()[-1].finish == "cancelled"
    assert generator.generate([prompts[0]], **options) == plain


def test_generate_takes_one_set_or_one_for_each_prompt(
    make: Any, adapters: dict[str, Lora], prompts: list[list[int]]
) -> None:
    generator = make()
    a, b = adapters["shout"], adapters["json"]
    two, options = prompts[:2], {"max_tokens": 6, "sampling": GREEDY}
    each = {
        (i, name): generator.generate([two[i]], loras=loras, **options)[0]
        for i in (0, 1) for name, loras in {"base": [], "a": [a], "sum": [(a, 0.7), b]}.items()
    }  # fmt: skip
    assert generator.generate(two, loras=[(a, 0.7), b], **options) == [each[0, "sum"], each[1, "sum"]]
    assert generator.generate(two, loras=[[a], [(a, 0.7), b]], **options) == [each[0, "a"], each[1, "sum"]]
    assert generator.generate(two, loras=[(), (a,)], **options) == [each[0, "base"], each[1, "a"]]
    assert generator.generate(two, loras=[((a, 0.7), b), []], **options) == [each[0, "sum"], each[1, "base"]]
    with pytest.raises(UsageError, match="3 sets for 2 prompts"):
        generator.generate(two, loras=[[a], [a], [a]])
    with pytest.raises(UsageError, match="must be a list"):
        generator.generate("text")


def test_a_job_that_fails_fails_alone(make: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make()
    options: Options = {"max_tokens": 5, "sampling": GREEDY}
    expected = ids_of(make(), [(prompt, options) for prompt in prompts[:4]])
    forward = generator.model.forward

    def breaking(batch: Batch, *args: Any) -> torch.Tensor:
        if 1405 in batch.token_ids.tolist():
            raise RuntimeError("this prompt breaks the model")
        logits = forward(batch, *args)
        logits[(batch.token_ids == 1406)[batch.logit_rows]] = torch.nan
        return logits

    monkeypatch.setattr(generator.model, "forward", breaking)
    jobs = [prompts[0], [5, 1405], prompts[1], [5, 1406], prompts[2], prompts[3]]
    ends = run(generator, [generator.enqueue(prompt, **options) for prompt in jobs])
    assert [end.finish == "error" for end in ends] == [False, True, False, True, False, False]
    assert str(ends[1].error) == "this prompt breaks the model"
    assert isinstance(ends[3].error, Refused) and ends[3].error.code == "internal"
    texts = [generator.tokenizer.decode(ids) for ids in expected]
    assert [end.full_text for end in ends if end.finish != "error"] == texts


def test_generate_raises_the_error_of_a_job_and_ends_the_others(
    make: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make()
    bystander = generator.enqueue(prompts[3], max_tokens=3, sampling=GREEDY)

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(generator.model, "forward", broken)
        generator.generate(prompts[:2], max_tokens=4)
    assert [event.handle for event in generator.iterate()] == [bystander]


def test_what_cannot_run_is_refused_before_it_is_queued(make: Any, adapters: dict[str, Lora]) -> None:
    generator = make(pages=4)
    shout = adapters["shout"]
    refused: list[tuple[str, Any, Options]] = [
        ("no_prompt", [], {}),
        ("too_large", [5] * 1000, {"max_tokens": 25}),
        ("bad_field", [5, 1408], {}),
        ("bad_field", [-1], {}),
        ("bad_field", [True], {}),
        ("bad_field", [5], {"max_tokens": 0}),
        ("bad_field", [5], {"max_tokens": 4, "min_tokens": 5}),
        ("bad_field", [5], {"stop": "END"}),
        ("bad_field", [5], {"stop": [""]}),
        ("bad_field", [5], {"stop": [1408]}),
        ("bad_field", [5], {"banned_strings": [""]}),
        ("bad_field", [5], {"n": 0}),
        ("bad_field", [5], {"n": 65}),
        ("bad_field", [5], {"logprobs": 21}),
        ("bad_field", [5], {"prompt_logprobs": -1}),
        ("bad_field", [5], {"sampling": SamplingParams(logit_bias=((1408, 1.0),))}),
        ("bad_field", [5], {"sampling": SamplingParams(allowed_tokens=(1408,))}),
        ("bad_field", "half \ud800", {}),
        ("bad_adapter", [5], {"loras": [(shout, float("nan"))]}),
        ("bad_adapter", [5], {"loras": [(replace(shout, alone="use_dora"), 0.5)]}),
        ("bad_adapter", [5], {"loras": [replace(shout, alone="use_dora"), adapters["json"]]}),
    ]
    for code, prompt, options in refused:
        with pytest.raises(Refused) as caught:
            generator.enqueue(prompt, **options)
        assert caught.value.code == code
    with pytest.raises(AdapterError, match="twice"):
        generator.enqueue([5], loras=[shout, (shout, 0.5)])
    generator.limits = replace(generator.limits, max_rank=7)
    with pytest.raises(AdapterError, match="sum to 8"):
        generator.enqueue([5], loras=[shout])
    with pytest.raises(UsageError, match="no slot 8"):
        generator.enqueue([5], slot=8)
    assert not generator.busy
    generator.enqueue([5] * 1000, max_tokens=24)


def test_seeds_are_drawn_where_none_is_given(make: Any, prompts: list[list[int]]) -> None:
    options: Options = {"max_tokens": 8, "sampling": SamplingParams(temperature=50)}
    jobs = [(prompts[0], options)] * 3
    first = ids_of(make(seed=1), jobs)
    assert len({tuple(ids) for ids in first}) == 3
    assert ids_of(make(seed=1), jobs) == first
    assert ids_of(make(seed=2), jobs) != first
