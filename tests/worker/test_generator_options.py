"""Samples, logprobs, healing, masks, banned strings, deadlines, each held against the model or a plain definition."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorayard.shared.errors import Refused
from lorayard.worker import Event, SamplingParams, Tokenizer
from lorayard.worker.models.batch import Batch

from .demo_generator import TEXT, Options, demo_model, ids_of, make, run
from .scripted import STARTS, TOKENIZER, VOCAB, Step, Yard, said, words

GREEDY = SamplingParams(temperature=0)


# Every draw of these depends on something that a retry has to build again.
LIVELY: list[Options] = [
    {"sampling": SamplingParams(3, seed=1, mirostat=True, mirostat_tau=4.0, mirostat_eta=0.5)},
    {"sampling": SamplingParams(4, top_k=90, seed=2, dry_multiplier=2.0, repetition_range=20, repetition_decay=9)},
    {"sampling": SamplingParams(3, seed=3, xtc_probability=0.6, xtc_threshold=0.01, max_temp=4.0, typical=0.9)},
    {"sampling": SamplingParams(5, seed=4, top_p=0.9, skew=0.3, frequency_penalty=0.4), "banned_strings": ["e", " a"]},
    {"sampling": SamplingParams(4, seed=5, mirostat=True), "banned_strings": ["o", "t"], "n": 2},
    {"sampling": SamplingParams(3, seed=6, tfs=0.97, temperature_last=True, top_a=0.01), "token_healing": True},
]


def test_the_same_seed_gives_the_same_text_alone_in_a_batch_after_a_kill_and_on_another_worker() -> None:
    prompts = [TOKENIZER.encode(TEXT[at : at + 40]) for at in range(8)]
    jobs = [(prompts[at % 8], {"max_tokens": 8} | LIVELY[at % len(LIVELY)]) for at in range(27)]
    together = [ids_of(events) for events in run(make(), jobs)]
    assert len(together) == 31 and len(set(map(tuple, together))) > 20
    other = make(chunk=7, max_batch=5)
    killed = [other.enqueue(prompt, **options) for prompt, options in jobs]
    for _ in range(12):
        other.iterate()
    for handle in killed:
        other.cancel(handle)
    other.iterate()
    assert [ids_of(events) for events in run(other, jobs)] == together
    alone = [ids_of(events) for job in jobs[:6] for events in run(make(chunk=5), [job])]
    assert alone == together[:7]


def test_samples_differ_and_the_first_is_that_of_a_single_one() -> None:
    options: Options = {"max_tokens": 8, "sampling": SamplingParams(temperature=3, seed=9)}
    texts = make().generate([TEXT, "zip"], n=3, **options)
    assert len(set(texts)) == 6
    assert make().generate([TEXT], **options) == [texts[0]] and make().generate(["zip"], n=2, **options) == texts[3:5]


@pytest.mark.parametrize("chunk", [7, 512])
def test_logprobs_are_the_models(chunk: int) -> None:
    prompt = TOKENIZER.encode(TEXT)[:40]
    params = SamplingParams(temperature=2, seed=3, repetition_penalty=1.5, top_k=50)
    options: Options = {"max_tokens": 6, "sampling": params, "logprobs": 3, "prompt_logprobs": 2, "n": 2}
    bystander = (prompt[:9], {"max_tokens": 9, "sampling": params})
    first, second, _ = run(make(chunk=chunk), [(prompt, options), bystander])
    for events in (first, second):
        ids = ids_of(events)
        expected = demo_model().logits([*prompt, *ids], []).log_softmax(-1)
        told = [each for event in events for each in event.logprobs]
        assert [each.id for each in told] == ids
        check_logprobs(told, expected[len(prompt) - 1 : -1], 3)
    given = first[-1].prompt_logprobs
    assert given is not None and [each.id for each in given] == prompt[1:]
    check_logprobs(given, expected[: len(prompt) - 1], 2)
    assert second[-1].prompt_logprobs is None, "they are the same"


def check_logprobs(told: Sequence[Any], expected: torch.Tensor, count: int) -> None:
    assert len(told) == len(expected)
    for each, row in zip(told, expected, strict=True):
        values, ids = row[: TOKENIZER.vocab_size].topk(count)
        assert [id for id, _ in each.top] == ids.tolist()
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert each.logprob == pytest.approx(float(row[each.id]), abs=1e-4)


def test_logprobs_ask_for_nothing_else() -> None:
    """The same tokens come, known pages or not, with and without logprobs; count 0 tells only the token's own."""
    prompt = (TOKENIZER.encode(TEXT) * 12)[:300]
    options: Options = {"max_tokens": 5, "sampling": SamplingParams(temperature=2, seed=8)}
    generator = make()
    (plain,) = run(generator, [(prompt, options)])
    (with_own,) = run(generator, [(prompt, options | {"logprobs": 0, "prompt_logprobs": 0})])
    assert ids_of(plain) == ids_of(with_own) and with_own[-1].prompt_logprobs is not None
    assert len(with_own[-1].prompt_logprobs) == 299, "of tokens in known pages too"
    assert all(each.top == () for event in with_own for each in event.logprobs)
    assert plain[-1].prompt_logprobs is None and not any(event.logprobs for event in plain)


def test_a_healed_prompt_ends_in_another_token_and_the_text_goes_on_from_it() -> None:
    """`pri` + `nt` becomes `print`, if the model says so: only what the prompt lacked is text."""
    whole = next(id for id in range(6, VOCAB) if len(TOKENIZER.decode([id])) > 3 and TOKENIZER.decode([id]).isalpha())
    text = TOKENIZER.decode([whole])
    begun = next(id for id in range(6, VOCAB) if id != whole and text.startswith(TOKENIZER.decode([id]) or "no text"))
    left = text[len(TOKENIZER.decode([begun])) :]
    yard = Yard()
    # what comes first does not begin as the prompt ended, so it is passed over; 700 stands for nothing in particular
    handle = yard.submit([(700, whole, begun), *words("x y")], 3, tail=[9, begun], token_healing=True)
    start = STARTS[0]
    yard.model.scripts[start] = (2, yard.model.scripts[start][1])
    yard.finish()
    event = yard.last(handle)
    assert event.full_text == left + "x y" and event.prompt_tokens == 3
    assert [id for each in yard.events[handle] for id in each.token_ids] == [*words("x y"), 1]
    yard.check_empty()


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from("ab .\né日len zip"), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_prompt_and_text_join_whatever_heals(text: str, seed: int) -> None:
    """Compared with the tokens that were really drawn, which start with the one that heals."""
    prompt = TOKENIZER.encode(text)
    yard = Yard()
    drawn: list[int] = []
    generator = yard.generator
    generator.model.forward = lambda batch, *_: noise(batch, seed)  # type: ignore[method-assign]
    handle = generator.enqueue(prompt, max_tokens=4, sampling=GREEDY, token_healing=True, stop=[prompt[-1]])
    (sample,) = generator._jobs[handle]
    events: list[Event] = []
    while generator.busy:
        events += generator.iterate()
        drawn = sample.token_ids
    stopped = events[-1].finish == "stop"
    assert events[-1].full_text is not None
    said = TOKENIZER.decode(drawn[:-1] if stopped else drawn)
    assert TOKENIZER.decode(prompt) + events[-1].full_text == said
    assert ids_of(events) == drawn[len(prompt) :] and events[-1].prompt_tokens == len(prompt)


def noise(batch: Batch, seed: int) -> torch.Tensor:
    """Logits that depend on the last token and its place alone."""
    rows = batch.logit_rows
    keys = (batch.token_ids[rows] * 1000 + batch.positions[rows]).tolist()
    return torch.stack([torch.randn(VOCAB, generator=torch.Generator().manual_seed(key + seed)) for key in keys])


def test_a_special_token_is_not_healed() -> None:
    for prompt in ([0, 0], [5]):
        options: Options = {"max_tokens": 5, "sampling": GREEDY}
        plain, healed = run(make(), [(prompt, options), (prompt, options | {"token_healing": True})])
        assert plain[-1].full_text == healed[-1].full_text


def test_bias_and_allowed_and_banned_tokens() -> None:
    hot: Options = {"temperature": 5.0, "seed": 1}
    options: Options = {"max_tokens": 12, "min_tokens": 12}

    def ids(**params: Any) -> set[int]:
        (events,) = run(make(), [(TEXT, options | {"sampling": SamplingParams(**hot | params)})])
        return set(ids_of(events))

    allowed = tuple(range(300, 320))
    assert ids(allowed_tokens=allowed) <= set(allowed) and len(ids(allowed_tokens=allowed)) > 3
    assert ids(allowed_tokens=allowed, banned_tokens=allowed[1:]) == {300}
    assert ids(logit_bias=((777, 1000.0),)) == {777}
    assert not ids() & ids(banned_tokens=tuple(ids()))


BAN = st.lists(st.text("ab .é日", min_size=1, max_size=3), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_banned_strings_never_come_and_nothing_else_is_lost(data: st.DataObject) -> None:
    """Against a plain search: the first text, in the model's order of preference, that has none of the strings."""
    pool = [words(text)[0] for text in ("a", "b", " ", "é", "日", ".", "ab", " a", "c")]
    options = st.lists(st.sampled_from(pool), min_size=2, max_size=4, unique=True).map(lambda ids: (*ids, 1000))
    script: list[tuple[int, ...]] = data.draw(st.lists(options, max_size=12))
    banned, stop = data.draw(BAN), data.draw(st.sampled_from([[], ["ca"], ["c"]]))
    limit = data.draw(st.integers(1, 14))
    yard = Yard(chunk=data.draw(st.integers(1, 9)))
    others = [yard.submit(words("one two"), 5, max_tokens=9) for _ in range(data.draw(st.integers(0, 2)))]
    handle = yard.submit(script, data.draw(st.integers(1, 9)), max_tokens=limit, banned_strings=banned, stop=stop)
    yard.finish()
    yard.check_empty()
    event = yard.last(handle)
    assert event.full_text is not None
    assert not any(string.lower() in event.full_text.lower() for string in banned)
    told = [id for each in yard.events[handle] for id in each.token_ids]
    whole = TOKENIZER.decode(told)
    if isinstance(event.stop_match, str):
        assert whole.startswith(event.full_text + event.stop_match)
    else:
        assert whole == event.full_text and (event.finish == "length") == (told[-1] != 1)
    for place, id in enumerate(told[:-1]):
        assert id in script[place]
    assert all(yard.last(other).full_text == "one two" for other in others)


def test_banned_text_is_taken_back_to_where_it_began() -> None:
    script: list[Step] = [*words("so "), (*words("B")[:1], *words("x")), *words("ad."), *words(" end")]
    event = said(script, banned_strings=["bad"])
    assert event.full_text == "so xad. end"
    assert said(script, banned_strings=["bat", "bad apple"]).full_text == "so Bad. end", "a mere beginning is let go"
    cut = len(words("so ")) + 2
    assert said(script, banned_strings=["bad."], max_tokens=cut).full_text == TOKENIZER.decode(
        [step if isinstance(step, int) else step[0] for step in script][:cut]
    )


def test_a_cancelled_job_tells_what_it_held() -> None:
    yard = Yard()
    handle = yard.submit(words("bad luck"), banned_strings=["bad luck!"])
    for _ in range(3):
        yard.step()
    assert not yard.events[handle]
    yard.generator.cancel(handle)
    yard.step()
    event = yard.last(handle)
    assert event.finish == "cancelled" and event.full_text and "bad luck".startswith(event.full_text)


def test_a_ban_of_all_that_may_come_ends_the_job() -> None:
    few = tuple(words(letter)[0] for letter in "abc")
    texts = {id: TOKENIZER.decode([id]) for id in range(VOCAB)}
    many = tuple(id for id, text in texts.items() if text and "\ufffd" not in text)
    for allowed, sentence in ((few, "no token to choose"), (many, "1000 times")):
        yard = Yard()
        banned = sorted({texts[id][0] for id in allowed})
        params = SamplingParams(temperature=0, allowed_tokens=allowed)
        handle = yard.submit([tuple(words("ab"))], banned_strings=banned, sampling=params)
        yard.finish()
        (event,) = yard.events[handle]
        assert isinstance(event.error, Refused) and sentence in str(event.error)
        yard.check_empty()


def test_pages_with_text_that_was_taken_back_are_never_known() -> None:
    """After rewinds over the end of a page, follow-ups of the old and the new text have the bits of fresh ones."""
    prompt = (TOKENIZER.encode(TEXT) * 12)[:250]
    options: Options = {"max_tokens": 16, "min_tokens": 16, "sampling": SamplingParams(temperature=3, seed=5)}
    (plain,) = run(make(), [(prompt, options)])
    assert plain[-1].full_text is not None
    for begin, end in ((3, 9), (5, 8)):  # token 6 is the first of the second page
        generator = make()
        ban = [TOKENIZER.decode(ids_of(plain)[begin:end])]
        assert ban[0] in plain[-1].full_text
        (events,) = run(generator, [(prompt, options | {"banned_strings": ban})])
        assert ids_of(events) != ids_of(plain)
        assert generator.table.known == 1
        again = {"max_tokens": 3, "sampling": GREEDY, "logprobs": 5}
        for follow_up in ([*prompt, *ids_of(events)], [*prompt, *ids_of(plain)]):
            (known,), (fresh,) = run(generator, [(follow_up, again)]), run(make(), [(follow_up, again)])
            assert [event.logprobs for event in known] == [event.logprobs for event in fresh]


def test_another_draw_is_made_where_text_was_taken_back() -> None:
    """Where one of two tokens is banned the other comes; with the old number the draw would depend on the ban."""
    tokens = tuple(words(text)[0] for text in "abcdefgh")
    params = [SamplingParams(temperature=100, seed=seed, allowed_tokens=tokens) for seed in range(80)]
    jobs = [(TEXT, {"max_tokens": 1, "sampling": each, "banned_strings": ["a", "b"]}) for each in params]
    drawn = [ids_of(events)[0] for events in run(make(), jobs)]
    share = [drawn.count(token) / len(drawn) for token in tokens]
    assert share[:2] == [0, 0] and max(share[2:]) < 0.35 and min(share[2:]) > 0.03


def test_a_deadline_ends_a_job_within_a_batch() -> None:
    yard = Yard()
    now = time.monotonic()
    late = yard.submit([9] * 30, deadline=now - 1)
    soon = yard.submit([9] * 30, deadline=now + 0.2, n=2)
    fine = yard.submit(words("y"), deadline=now + 60)
    yard.step()
    assert isinstance(yard.events[late][0].error, Refused) and yard.events[late][0].error.code == "expired"
    assert len(yard.events[soon]) == 2
    while time.monotonic() < now + 0.2:
        time.sleep(0.05)
    yard.finish()
    assert [event.finish for event in yard.events[soon][-2:]] == ["error", "error"]
    assert yard.last(fine).full_text == "y"
    yard.check_empty()


def test_words_that_dry_and_xtc_leave_alone() -> None:
    generator = make()
    tokenizer: Tokenizer = generator.tokenizer
    for id in range(tokenizer.vocab_size):
        text = tokenizer.decode([words("a")[0], id])[1:]
        assert (id in generator._words.breakers) == (not text or any(char in '.,!?<>[](){}\n\t"' for char in text))
        assert (id in generator._words.line_ends) == (not text or "\n" in text)
    use = SamplingParams(dry_multiplier=1, xtc_probability=0.5)
    assert (
        generator._breakers(use) == generator._words.breakers and generator._ignored(use) == generator._words.line_ends
    )
    own = SamplingParams(dry_multiplier=1, xtc_probability=0.5, dry_breakers=(7,), xtc_ignore=())
    assert (generator._breakers(own), generator._ignored(own)) == (frozenset([7]), frozenset())
