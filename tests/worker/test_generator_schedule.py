"""Scheduling, text and endings, with a model that says what it is told: its next token is a table look-up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorayard.worker import Handle, Lora

from .scripted import TOKENIZER, VOCAB, Yard, lora, said, words


def test_the_end_token_ends_the_text_and_is_not_in_it() -> None:
    event = said(words("all of it"))
    assert (event.full_text, event.finish, event.stop_match) == ("all of it", "stop", 1)
    assert event.new_tokens == len(words("all of it")) + 1 and event.prompt_tokens == 1


def test_max_tokens_ends_with_all_that_was_held() -> None:
    script = words("held EN")
    event = said(script, max_tokens=len(script), stop=["ENDS"])
    assert (event.full_text, event.finish, event.stop_match) == ("held EN", "length", None)


def test_a_stop_id_is_not_in_the_text_and_loses_nothing() -> None:
    (comma,) = words(",")
    event = said([*words("one EN"), comma, *words("two")], stop=["ENDS", comma])
    assert (event.full_text, event.finish, event.stop_match) == ("one EN", "stop", comma)


def test_id_zero_can_stop() -> None:
    event = said([*words("one"), 0], stop=[0])
    assert (event.full_text, event.finish, event.stop_match) == ("one", "stop", 0)


def test_a_stop_string_may_span_tokens_and_is_not_in_the_text() -> None:
    script = words("one two. three")
    assert len(words("wo. th")) > 2
    event = said(script, stop=["x", "wo. th"])
    assert (event.full_text, event.finish, event.stop_match) == ("one t", "stop", "wo. th")


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    whole = words("aé日👩")
    for size in range(1, len(whole)):
        event = said(whole[:size])
        assert event.full_text == TOKENIZER.decode(whole[:size])
        assert said(whole[:size], max_tokens=size).full_text == event.full_text


def test_min_tokens_keeps_ids_from_stopping() -> None:
    """Where the end token is blocked the scripted model's other logits are equal, so id 0 comes."""
    event = said(words("a"), min_tokens=5, max_tokens=9)
    assert event.new_tokens == 6 and event.finish == "stop"
    stopped = said(words("a b c"), min_tokens=3, stop=["b"])
    assert stopped.full_text == "a "


TEXT = st.text(st.sampled_from("ab .\né日👩🏽\u200d🚀"), max_size=24)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_whole_text_up_to_the_stop(data: st.DataObject) -> None:
    """Several jobs at once, of valid text and of random tokens, with and without stop strings."""
    yard = Yard(chunk=data.draw(st.integers(1, 9)), max_batch=data.draw(st.integers(1, 4)))
    expected = {}
    for _ in range(data.draw(st.integers(1, 4))):
        tokens = st.lists(st.sampled_from([id for id in range(6, VOCAB)]), max_size=20)
        script = data.draw(st.one_of(TEXT.map(words), tokens))
        stop = data.draw(st.lists(st.text("ab .\né日👩", min_size=1, max_size=3), max_size=2))
        whole = TOKENIZER.decode(script)
        found = [(whole.find(string) + len(string), -len(string), string) for string in stop if string in whole]
        end, size, match = min(found, default=(len(whole), 0, None))
        handle = yard.submit(script, data.draw(st.integers(1, 30)), stop=stop, max_tokens=100)
        expected[handle] = (whole[: end + size], match or 1)
    yard.finish()
    yard.check_empty()
    for handle, wanted in expected.items():
        event = yard.last(handle)
        assert (event.full_text, event.stop_match) == wanted
        assert all("\ufffd" not in each.text for each in yard.events[handle]) or "\ufffd" in wanted[0]


def test_long_prompts_come_in_chunks_and_never_stop_those_that_generate() -> None:
    yard = Yard(chunk=32)
    talker = yard.submit([9] * 60, max_tokens=60)
    yard.step()
    long = [yard.submit(words("y"), length) for length in (1000, 200)]
    while not yard.events[long[0]] or not yard.events[long[1]]:
        before = len(yard.events[talker])
        yard.step()
        sizes = yard.model.batches[-1].sequence.bincount().tolist()
        assert sum(sizes) <= 32 + sizes.count(1)
        if not yard.events[talker][-1].finished:
            assert len(yard.events[talker]) == before + 1
    assert len(yard.model.batches) == 1 + -(-1200 // 32)
    yard.finish()
    assert [yard.last(handle).full_text for handle in long] == ["y", "y"]
    yard.check_empty()


def test_pages_for_all_tokens_are_reserved_at_the_start() -> None:
    yard = Yard(pages=5)
    first = yard.submit(words("a"), 10, max_tokens=600)
    second = yard.submit(words("b"), 300, max_tokens=200)
    third = yard.submit(words("c"), 1, max_tokens=3)
    yard.step()
    assert yard.generator.table.free == 0 and (yard.generator.running, yard.generator.queued) == (2, 1)
    yard.finish()
    assert [yard.last(handle).full_text for handle in (first, second, third)] == ["a", "b", "c"]
    yard.check_empty()


def test_a_large_job_is_passed_four_times_and_no_more() -> None:
    yard = Yard(pages=4)
    yard.submit([9] * 60, 1, max_tokens=200)
    yard.step()
    large = yard.submit(words("y"), 800, max_tokens=200)
    small = [yard.submit(words("z"), 1, max_tokens=20) for _ in range(6)]
    for _ in range(6):
        yard.step()
    assert [bool(yard.events[handle]) for handle in small] == [True] * 4 + [False] * 2
    assert not yard.events[large]
    yard.finish()
    assert yard.last(large).full_text == "y" and all(yard.last(handle).finish == "stop" for handle in small)
    yard.check_empty()


def test_a_slot_changes_only_when_its_jobs_have_drained() -> None:
    yard = Yard(slots=1)
    a, b = [lora("a")], [lora("b")]
    first = yard.submit([9] * 9, loras=a)
    yard.step()
    other = yard.submit(words("y"), loras=b)
    base = yard.submit(words("z"), loras=[])
    same = yard.submit([9] * 9, loras=[(a[0], 0.5)])
    yard.step()
    assert yard.events[base] and yard.events[same] and not yard.events[other]
    (rows,) = yard.model.batches[-1].loras
    assert rows.scales[:, 0].tolist() == [1.0, 0.5] and yard.generator.bank.combinations == [("a@digest o",)]
    yard.finish()
    assert yard.generator.bank.combinations == [("b@digest o",)] and yard.generator.bank.swaps == 1
    assert [yard.last(handle).finish for handle in (first, other, base, same)] == ["stop"] * 4
    yard.check_empty()


def test_no_job_takes_a_new_slot_before_one_that_was_passed_four_times() -> None:
    yard = Yard(slots=2, pages=40)
    yard.submit([9] * 9, loras=[lora("a")])
    yard.step()
    waiting = yard.submit(words("y"), loras=[lora("b")], slot=0)
    passing = [yard.submit(words("z"), loras=[]) for _ in range(4)]
    new = yard.submit(words("w"), loras=[lora("c")])
    resident = yard.submit(words("v"), loras=[lora("a")])
    yard.step()
    assert all(yard.events[handle] for handle in [*passing, resident])
    assert not yard.events[waiting] and not yard.events[new], "slot 1 is empty, but its turn has not come"
    yard.finish()
    assert yard.last(waiting).finish == yard.last(new).finish == "stop"
    yard.check_empty()


def test_adapters_that_cannot_be_placed_fail_their_job_alone() -> None:
    yard = Yard()
    broken = Lora("a", "digest", {"no such linear": (torch.zeros(1, 1), torch.zeros(1, 1))})
    bad, good = yard.submit(words("x"), loras=[broken]), yard.submit(words("y"))
    yard.finish()
    assert yard.last(bad).finish == "error" and isinstance(yard.last(bad).error, KeyError)
    assert yard.last(good).full_text == "y"
    yard.check_empty()


def test_cancelled_jobs_give_everything_back_at_once() -> None:
    yard = Yard(pages=4, slots=1)
    running = yard.submit(words("held EN and more"), 300, max_tokens=600, loras=[lora("a")], stop=["ENDS"])
    queued = yard.submit(words("y"), 300, max_tokens=600, loras=[lora("b")])
    while not yard.events[running] or yard.events[running][-1].text != "held ":
        yard.step()
        if len(yard.events[running]) > 3:
            break
    assert yard.generator.cancel(queued) and yard.generator.cancel(running)
    yard.check_empty()
    assert not yard.generator.cancel(running)
    yard.finish()
    assert yard.last(queued).finish == yard.last(running).finish == "cancelled"
    told = [id for event in yard.events[running] for id in event.token_ids]
    assert yard.last(running).full_text == TOKENIZER.decode(told)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_schedule_ends_every_job_once(data: st.DataObject) -> None:
    """Random jobs, sets, sizes and cancellations: one last event each, its own text, and nothing left behind."""
    limits = {name: data.draw(st.integers(low, high)) for name, low, high in
              (("pages", 4, 8), ("slots", 1, 3), ("max_batch", 1, 5), ("chunk", 1, 200))}  # fmt: skip
    yard = Yard(**limits)
    sets = [[], [lora("a")], [lora("b")], [lora("a"), lora("b")], [lora("c")]]
    texts: dict[Handle, str] = {}
    cancelled: set[Handle] = set()
    for _ in range(data.draw(st.integers(1, 20))):
        action = data.draw(st.sampled_from(["submit", "submit", "step", "step", "cancel"]))
        if action == "submit":
            text = data.draw(st.text("abc", min_size=1, max_size=6))
            handle = yard.submit(
                words(text), data.draw(st.integers(1, 600)), loras=data.draw(st.sampled_from(sets)),
                max_tokens=data.draw(st.integers(10, 300)),
            )  # fmt: skip
            texts[handle] = text
        elif action == "cancel" and texts:
            handle = data.draw(st.sampled_from(sorted(texts, key=lambda handle: handle.serial)))
            if yard.generator.cancel(handle):
                cancelled.add(handle)
        else:
            yard.step()
        yard.generator.table.check_integrity()
    yard.finish()
    yard.check_empty()
    for handle, text in texts.items():
        event = yard.last(handle)
        if handle in cancelled:
            assert event.finish == "cancelled" and text.startswith(str(event.full_text))
        else:
            assert (event.finish, event.full_text) == ("stop", text)


def test_pages_known_from_one_text_do_not_serve_another() -> None:
    """The scripted model tells texts apart by their first token, which a page found by mistake would change."""
    yard = Yard()
    first, second = (yard.submit(words(text), 600) for text in ("one", "two"))
    yard.finish()
    assert (yard.last(first).full_text, yard.last(second).full_text) == ("one", "two")
    assert yard.generator.table.known == 4


def test_the_handle_is_a_key() -> None:
    yard = Yard()
    first, second = yard.submit([]), yard.submit([])
    assert first != second and len({first, second, Handle(first.serial)}) == 2


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"chunk": 0}, {"slots": 0}])
def test_a_generator_needs_room(options: dict[str, int]) -> None:
    with pytest.raises(Exception, match="at least"):
        Yard(**options)
