"""LoRA sets, sampling parameters and the packed request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorayard.shared.errors import REFUSALS, Refused
from lorayard.shared.job import ADAPTER_ID, Job, LoraSet, SamplingParams, combination

ids = st.from_regex(ADAPTER_ID, fullmatch=True)
scales = st.integers(-(10**9), 10**9).map(lambda n: n / 1000)
sets = st.dictionaries(ids, scales, max_size=8).map(lambda pairs: LoraSet.of(list(pairs.items())))


@given(sets)
def test_a_set_reads_back_from_its_text(lora: LoraSet) -> None:
    assert LoraSet.parse(str(lora)) == lora
    assert lora.ids == tuple(sorted(lora.ids))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("", ""), ("sql", "sql"), ("sql*1.0", "sql"), ("b*0.30+a", "a+b*0.3"), ("a*-2", "a*-2"), (" a + b ", "a+b")],
)
def test_the_canonical_text(text: str, canonical: str) -> None:
    assert str(LoraSet.parse(text)) == canonical


@pytest.mark.parametrize(
    "text",
    ["+", "a+", "a+a", "a*", "a*x", "a*1e3", "a*nan", "../x", "a/b", ".hidden", "a*0.5*2", "a" * 65,
     "+".join("abcdefghi"), "a b", "\u0661", "a*\u0661"],
)  # fmt: skip
def test_malformed_sets_are_refused(text: str) -> None:
    with pytest.raises(Refused) as refused:
        LoraSet.parse(text)
    assert refused.value.code == "bad_adapter"


def test_a_combination_has_no_scales_but_the_bytes() -> None:
    assert combination((), ()) == "base"
    assert combination(("a", "b"), ("12345678ff", "abcdefabcd")) == "a@12345678+b@abcdefab"


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": "1"}, {"temperature": True}, {"top_k": 1.5}, {"top_k": -1}, {"top_p": 0},
     {"top_p": 1.1}, {"min_p": -0.1}, {"repetition_penalty": 0}, {"seed": -1}, {"seed": 1 << 64}, {"seed": 1.0},
     {"temperature": float("nan")}, {"mirostat": 1}, {"temperature_last": "yes"}, {"dry_range": 0.5},
     {"smoothing_curve": 0.5}, {"top_a": 2}, {"logit_bias": ((1, float("inf")),)}, {"logit_bias": ((-1, 1.0),)},
     {"allowed_tokens": ()}, {"banned_tokens": (True,)}, {"xtc_ignore": ("a",)}, {"dry_breakers": (-1,)}],
)  # fmt: skip
def test_sampling_outside_its_ranges_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(Refused, match=next(iter(wrong))) as refused:
        SamplingParams(**wrong)  # type: ignore[arg-type]
    assert refused.value.code == "bad_field"


FULL = Job(
    id="j", cls="batch", lora=LoraSet.parse("a*0.5+b"), digests=("1" * 64, "2" * 64),
    messages=({"role": "user", "content": "héllo"},), add_bos=False, max_tokens=7, min_tokens=2,
    sampling=SamplingParams(temperature=0.5, seed=(1 << 64) - 1), stop=("\n", 3), reply="batch", batch="c",
    deadline_ms=1 << 50, ttl=60,
)  # fmt: skip


@pytest.mark.parametrize("job", [FULL, Job("k", prompt="p"), Job("l", tokens=(1, 2, 3), stream=True)])
def test_a_request_unpacks_to_itself(job: Job) -> None:
    assert Job.unpack(job.pack()) == job


def test_a_newer_request_is_not_guessed_at() -> None:
    body = msgpack.unpackb(FULL.pack()) | {"v": 2}
    with pytest.raises(Refused) as refused:
        Job.unpack(msgpack.packb(body))
    assert refused.value.code == "internal"


def test_the_fingerprint_is_the_request() -> None:
    fingerprint = FULL.fingerprint(drawn_seed=False)
    assert replace(FULL, digests=()).fingerprint(False) == fingerprint, "bytes are bound later"
    assert replace(FULL, max_tokens=8).fingerprint(False) != fingerprint
    other = replace(FULL, sampling=replace(FULL.sampling, seed=1))
    assert other.fingerprint(False) != fingerprint
    assert other.fingerprint(True) == FULL.fingerprint(True), "a drawn seed is no part of the request"


@pytest.mark.parametrize(
    ("job", "digest"),
    [(FULL, "e6350bb195243ee06a66b5d62134e7fd"), (Job("k", prompt="p"), "06b8e6c8e72829864798dba9ff44651b"),
     (Job("l", tokens=(1, 2, 3), stream=True), "28e85285833943ea33901e68b243d4d8")],
)  # fmt: skip
def test_a_new_field_changes_no_older_fingerprint(job: Job, digest: str) -> None:
    """These digests are of the first version: a client that sends an id again must meet the one it sent before."""
    assert job.fingerprint(drawn_seed=False) == digest


@pytest.mark.parametrize(
    "changes",
    [{"n": 2}, {"logprobs": 0}, {"prompt_logprobs": 1}, {"return_token_ids": True}, {"token_healing": True},
     {"banned_strings": ("x",)}, {"sampling": SamplingParams(top_a=0.5, logit_bias=((3, 1.0),), allowed_tokens=(1,))}],
)  # fmt: skip
def test_a_new_field_is_part_of_the_request(changes: dict[str, Any]) -> None:
    plain = Job("k", prompt="p")
    changed = replace(plain, **changes)
    assert changed.fingerprint(False) != plain.fingerprint(False) and Job.unpack(changed.pack()) == changed


def test_every_code_has_a_meaning() -> None:
    assert all(meaning for meaning in REFUSALS.values())
    with pytest.raises(AssertionError):
        Refused("no_such_code", "x")
