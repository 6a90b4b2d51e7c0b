"""Requests against the contract: what is accepted as what, and what is refused with which code and sentence."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorayard.dispatcher.fields import FIELDS, LATER, MAX_REQUEST, SAMPLING
from lorayard.dispatcher.published import Adapter, Published, read_adapters
from lorayard.dispatcher.validate import Entry, Judged, judge, record
from lorayard.shared.errors import REFUSALS
from lorayard.shared.job import Job, LoraSet, SamplingParams

from .fake import DIGESTS

ADAPTERS = {name: Adapter(8, digest, 1000) for name, digest in DIGESTS.items()} | {"wide": Adapter(60, "9" * 64, 1)}
YARD = Published(cache_tokens=100, max_rank=64, vocab_size=1000, has_chat_template=True, adapters=ADAPTERS)


def judged(cls: str = "normal", yard: Published = YARD, **fields: Any) -> Judged:
    raw = {name.encode(): value if isinstance(value, bytes) else str(value).encode() for name, value in fields.items()}
    return judge(Entry(cls, "17-0", raw), yard)


def accepted(**fields: Any) -> Job:
    verdict = judged(**fields)
    assert verdict.job is not None, verdict.refusal
    return verdict.job


def payload(**values: Any) -> bytes:
    packed: bytes = msgpack.packb(values)
    return packed


def test_defaults() -> None:
    job = accepted(prompt="p")
    assert job.id == "17-0" and job.lora == LoraSet() and job.combination == "base"
    assert (job.max_tokens, job.min_tokens, job.reply, job.ttl, job.stream) == (None, 0, "stream", 3600, False)
    assert job.sampling.temperature == 1 and job.sampling.seed is not None


@pytest.mark.parametrize(("cls", "job_id"), [("urgent", "u17-0"), ("normal", "17-0"), ("batch", "b17-0")])
def test_the_default_id_of_each_class(cls: str, job_id: str) -> None:
    assert judged(cls, prompt="p").id == job_id


def test_flat_and_payload_mean_the_same() -> None:
    flat = accepted(
        id="j", adapter="b*0.5+a", tokens="[1, 2]", add_bos=0, max_tokens=5, temperature="0.5", top_k=3, seed=7,
        stop='["x", 4]', stream=1, deadline_ms=99, ttl=60, n=2, logprobs=0, prompt_logprobs=20, return_token_ids=1,
        token_healing=1, banned_strings='["y"]', logit_bias='{"7": -2, "3": 1.5}', allowed_tokens="[1, 3]",
        banned_tokens="[3]", mirostat=1, xtc_ignore="[]", dry_breakers="[9]", tfs="0.9", repetition_range=-1,
    )  # fmt: skip
    packed = payload(
        id="j", adapters=[{"name": "b", "scale": 0.5}, {"name": "a"}], tokens=[1, 2], add_bos=False, max_tokens=5,
        temperature=0.5, top_k=3, seed=7, stop=["x", 4], stream=True, deadline_ms=99, ttl=60, n=2, logprobs=0,
        prompt_logprobs=20, return_token_ids=True, token_healing=True, banned_strings=["y"],
        logit_bias={"3": 1.5, "7": -2}, allowed_tokens=[1, 3], banned_tokens=[3], mirostat=True, xtc_ignore=[],
        dry_breakers=[9], tfs=0.9, repetition_range=-1,
    )  # fmt: skip
    assert accepted(payload=packed) == flat
    assert flat.digests == (DIGESTS["a"], DIGESTS["b"])
    assert (flat.n, flat.logprobs, flat.token_healing, flat.banned_strings) == (2, 0, True, ("y",))
    assert flat.sampling.logit_bias == ((3, 1.5), (7, -2.0)) and flat.sampling.xtc_ignore == ()
    assert Job.unpack(flat.pack()) == flat
    assert accepted(payload=packed, max_tokens=6, adapter="").max_tokens == 6
    assert accepted(payload=packed, adapter="c").lora == LoraSet.parse("c"), "flat fields override"


BAD: dict[str, list[dict[str, Any]]] = {
    "bad_id": [
        {"id": "a b"}, {"id": ""}, {"id": "x" * 65}, {"id": "../x"}, {"id": "17-0"}, {"id": "u1-2"}, {"id": "b1-2"},
        {"id": b"\xff"},
    ],
    "bad_field": [
        {"temprature": 1}, {"temperature": "hot"}, {"temperature": "nan"}, {"temperature": -1}, {"top_k": "1.5"},
        {"seed": -1}, {"seed": 1 << 64}, {"max_tokens": 0}, {"max_tokens": "ten"}, {"max_tokens": "9" * 30},
        {"min_tokens": -1}, {"min_tokens": 6, "max_tokens": 5}, {"stream": 2}, {"stream": "true"}, {"n": 0}, {"n": 65},
        {"logprobs": 21}, {"prompt_logprobs": -1}, {"banned_strings": '[""]'}, {"banned_strings": "[1]"},
        {"banned_strings": '["\\ud800"]'}, {"banned_strings": json.dumps(["x"] * 65)},
        {"banned_strings": json.dumps(["x" * 1001])}, {"logit_bias": "[1]"},
        {"logit_bias": '{"x": 1}'}, {"logit_bias": '{"01": 1}'}, {"logit_bias": '{"1": 1e9}'},
        {"logit_bias": json.dumps({"1": 10**400})}, {"logit_bias": '{"1": NaN}'},
        {"logit_bias": '{"1000": 1}'}, {"allowed_tokens": "[]"}, {"allowed_tokens": "[1000]"},
        {"banned_tokens": "[-1]"}, {"allowed_tokens": "[1]", "banned_tokens": "[1]"}, {"xtc_ignore": "1"},
        {"dry_breakers": "[1000]"}, {"mirostat": 2}, {"smoothing_curve": 5}, {"top_a": -1}, {"dry_range": "1.5"},
        {"stream": 1, "reply": "list"}, {"reply": "mail"}, {"reply": "batch"}, {"batch": "c"},
        {"reply": "batch", "batch": "a b"}, {"ttl": 0}, {"ttl": 10**9}, {"deadline_ms": -1}, {"deadline_ms": 1 << 60},
        {"stop": "x"}, {"stop": "[1.5]"}, {"stop": '[""]'}, {"stop": json.dumps(["x"] * 65)}, {"stop": "[1000]"},
        {"stop": '["\\ud800"]'}, {"adapters": "[]"}, {b"prompt".decode(): b"\xff"}, {"prompt": None, "tokens": "[]"},
        {"prompt": None, "tokens": "[1000]"}, {"prompt": None, "tokens": "[-1]"}, {"prompt": None, "tokens": "[true]"},
        {"prompt": None, "tokens": "[" * 100_000}, {"prompt": None, "messages": "[]"},
        {"prompt": None, "messages": '["x"]'}, {"prompt": None, "messages": '[{"role": "user"}]'},
        {"prompt": None, "messages": '[{"role": "user", "content": [1]}]'},
        {"prompt": None, "messages": '[{"role": "user", "content": "x", "tool_calls": "y"}]'},
        {"prompt": None, "messages": '[{"role": "user", "content": "\\ud800"}]'},
        {"payload": payload(temperature="1")}, {"payload": payload(stream=2)}, {"payload": payload(stop="x")},
        {"payload": payload(id=5)}, {"payload": payload(nonsense=1)},
    ],
    "bad_payload": [{"payload": b""}, {"payload": b"\xc1"}, {"payload": msgpack.packb([1])},
                    {"payload": b"\x81\x01\x02"}, {"payload": payload(a=1) + b"x"}, {"payload": b"\x91" * 5000}],
    "bad_adapter": [{"adapter": "../x"}, {"adapter": "a+a"}, {"adapter": "a*x"}, {"adapter": "wide+a"},
                    {"payload": payload(adapters="a")}, {"payload": payload(adapters=[{"id": "a"}])},
                    {"payload": payload(adapters=[{"name": "a", "scale": "1"}])},
                    {"payload": payload(adapters=[{"name": "a", "scale": float("inf")}])}],
    "no_prompt": [{"prompt": None}, {"tokens": "[1]"}, {"messages": '[{"role": "user", "content": "x"}]'}],
    "no_adapter": [{"adapter": "unknown"}, {"adapter": "a", "adapter_digest": "0" * 64},
                   {"adapter": "a+b", "adapter_digest": DIGESTS["a"]},
                   {"adapter": "a", "adapter_digest": DIGESTS["a"][:8]}],
    "too_large": [{"max_tokens": 100}, {"min_tokens": 100}, {"prompt": "x" * MAX_REQUEST},
                  {"prompt": None, "tokens": json.dumps([1] * 100)},
                  {"prompt": None, "tokens": json.dumps([1] * 50), "max_tokens": 51}],
}  # fmt: skip
CASES = [(code, fields) for code, cases in BAD.items() for fields in cases]


@pytest.mark.parametrize(("code", "fields"), CASES)
def test_refusals(code: str, fields: dict[str, Any]) -> None:
    given_fields = {name: value for name, value in ({"prompt": "p"} | fields).items() if value is not None}
    verdict = judged(**given_fields)
    assert verdict.job is None and verdict.refusal is not None
    assert verdict.refusal.code == code, verdict.refusal
    assert len(str(verdict.refusal)) < 400 and "\n" not in str(verdict.refusal)


def test_every_setting_of_the_sampler_is_a_field_and_every_field_is_documented() -> None:
    assert list(SAMPLING) == [field.name for field in dataclasses.fields(SamplingParams)]
    named = set(re.findall(r"`(\w+)`", (Path(__file__).parent.parent.parent / "docs/wire.md").read_text()))
    assert FIELDS.keys() <= named


def test_each_refusal_of_the_dispatcher_has_a_case() -> None:
    by_others = {"expired", "busy", "crashed", "internal"}
    assert BAD.keys() == REFUSALS.keys() - by_others


@pytest.mark.parametrize("name", sorted(LATER))
def test_later_features_are_refused_by_name(name: str) -> None:
    assert str(judged(prompt="p", **{name: 1}).refusal) == f"{name} is not supported yet"


def test_the_digest_of_a_set_is_asked_in_order_of_ids() -> None:
    assert accepted(prompt="p", adapter="b+a", adapter_digest=f"{DIGESTS['a']}+{DIGESTS['b']}")


def test_a_model_without_a_template_takes_no_messages() -> None:
    yard = Published(100, 64, 1000, False, {})
    refusal = judged(yard=yard, messages='[{"role": "user", "content": "x"}]').refusal
    assert refusal is not None and refusal.code == "bad_field"


def test_a_refusal_is_answered_where_the_client_listens() -> None:
    verdict = judged(id="j", prompt="p", reply="list", ttl=60, temperature="hot")
    assert (verdict.id, verdict.reply, verdict.ttl) == ("j", "list", 60)
    verdict = judged(payload=payload(id="j", reply="batch", batch="c", nonsense=1))
    assert (verdict.id, verdict.reply, verdict.batch) == ("j", "batch", "c")
    verdict = judged(id="j", reply="batch", batch="a b", ttl=-1, prompt="p")
    assert (verdict.reply, verdict.batch, verdict.ttl) == ("stream", "", 3600)
    assert judged(id="j", prompt="x" * MAX_REQUEST, reply="list").reply == "list"


def test_the_fingerprint_survives_a_change_of_the_yard() -> None:
    before = judged(id="j", prompt="p", adapter="a", temperature="1.0")
    gone = judged(yard=Published(100, 64, 1000, True, {}), id="j", prompt="p", adapter="a*1", temperature="1")
    assert gone.refusal is not None and gone.fingerprint == before.fingerprint
    assert judged(id="j", prompt="q", adapter="a").fingerprint != before.fingerprint
    there, back = ('[{"role": "user", "content": "x"}]', '[{"content": "x", "role": "user"}]')
    assert judged(id="j", messages=there).fingerprint == judged(id="j", messages=back).fingerprint


def test_what_the_job_hash_holds_is_what_rq_expects() -> None:
    fields = record(accepted(prompt="p", deadline_ms=5, stream=1))
    assert {"data", "timeout", "result_ttl", "failure_ttl", "description", "v", "req", "keep", "reply"} <= fields.keys()
    assert fields["stream"] == 1 and fields["deadline_ms"] == 5 and "ttl" not in fields


def test_malformed_adapters_count_as_absent() -> None:
    good = b'{"rank": 8, "digest": "abcdef0123", "bytes": 5}'
    found = read_adapters({b"a": good, b"b": b"{", b"c": b"[]", b"../d": good, b"e": b'{"rank": 8, "digest": "x:y"}'})
    assert found == {"a": Adapter(8, "abcdef0123", 5)}


names = st.sampled_from([*FIELDS, *sorted(LATER)[:3], "payload", "unknown"]).map(str.encode)


binaries = st.binary(max_size=40) | st.text(max_size=20).map(lambda text: text.encode(errors="replace"))
leaves = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=5)
values = st.recursive(
    leaves | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.dictionaries(names, binaries))
def test_nothing_that_is_sent_is_a_fault_of_ours(fields: dict[bytes, bytes]) -> None:
    verdict = judge(Entry("normal", "17-0", fields), YARD)
    assert (verdict.job is None) == (verdict.refusal is not None)
    assert verdict.refusal is None or verdict.refusal.code != "internal"


@settings(max_examples=300)
@given(values, st.sampled_from([*FIELDS, "adapters"]))
def test_nothing_in_a_payload_is_a_fault_of_ours(value: Any, name: str) -> None:
    verdict = judged(payload=payload(**({"prompt": "p"} | {name: value})))
    assert verdict.refusal is None or verdict.refusal.code != "internal"
