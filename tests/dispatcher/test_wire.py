"""Every row of docs/wire.md has a test: those of the queue are here, the worker's rows name theirs."""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from redis.exceptions import OutOfMemoryError

from lorayard.dispatcher.place import LOWER_SHARE

from .conftest import HOLD, LiveYard
from .fake import DIGESTS, INFO, combination, events

ROOT = Path(__file__).parent.parent.parent
HERE = "tests/dispatcher/test_wire.py"
YARD, GENERATOR = "tests/cluster/test_yard.py", "tests/worker/test_generator_schedule.py"
HOLDERS = "tests/dispatcher/test_holders.py"
OPTIONS, STEPS = "tests/worker/test_generator_options.py", "tests/worker/test_sampler_steps.py"
ASKED = "tests/cluster/test_yard.py::test_several_samples_with_what_was_asked_for"
FORMS = "tests/dispatcher/test_validate.py::test_flat_and_payload_mean_the_same"
REFUSALS, SCRIPTS = "tests/dispatcher/test_validate.py::test_refusals", "tests/shared/test_scripts.py"

PROOF: dict[str, list[str]] = {
    "submit.prompt": [f"{YARD}::test_prompt_messages_tokens_and_payload", REFUSALS],
    "submit.add-bos": ["tests/worker/test_tokenizer.py::test_first_token_is_never_doubled"],
    "submit.max-tokens": [
        "tests/worker/test_generator_schedule.py::test_max_tokens_ends_with_all_that_was_held",
        REFUSALS,
    ],
    "submit.min-tokens": ["tests/worker/test_generator_schedule.py::test_min_tokens_keeps_ids_from_stopping", REFUSALS],
    "submit.sampling": ["tests/shared/test_job.py::test_sampling_outside_its_ranges_is_refused_by_name"],
    "submit.seed": [f"{YARD}::test_a_drawn_seed_is_told_and_repeats_the_text"],
    "submit.stop": [f"{YARD}::test_stop_strings_end_the_text", REFUSALS],
    "submit.banned-strings": [f"{OPTIONS}::test_banned_strings_never_come_and_nothing_else_is_lost", ASKED],
    "submit.tokens-allowed": [f"{OPTIONS}::test_bias_and_allowed_and_banned_tokens", REFUSALS],
    "submit.token-healing": [
        f"{OPTIONS}::test_a_healed_prompt_ends_in_another_token_and_the_text_goes_on_from_it",
        FORMS,
    ],
    "submit.n": [f"{OPTIONS}::test_samples_differ_and_the_first_is_that_of_a_single_one", ASKED, REFUSALS],
    "submit.logprobs": [f"{OPTIONS}::test_logprobs_are_the_models", ASKED, REFUSALS],
    "submit.return-token-ids": [ASKED],
    "event.done-samples": [ASKED],
    "event.done-asked": [ASKED],
    "sampling.penalties": [f"{STEPS}::test_penalties", FORMS],
    "sampling.dry": [f"{STEPS}::test_dry", f"{OPTIONS}::test_words_that_dry_and_xtc_leave_alone", FORMS],
    "sampling.smoothing": [f"{STEPS}::test_temperature_and_smoothing", FORMS],
    "sampling.filters": [f"{STEPS}::test_filters", FORMS],
    "sampling.mirostat": [f"{STEPS}::test_mirostat_holds_the_surprise_at_tau", FORMS],
    "sampling.temperature": [
        f"{STEPS}::test_temperature_last_comes_after_the_filters",
        f"{STEPS}::test_the_order_of_the_steps",
    ],
    "sampling.xtc": [f"{STEPS}::test_xtc_has_the_distribution_of_its_coin", FORMS],
    "sampling.skew": [f"{STEPS}::test_skew"],
    "submit.later": ["tests/dispatcher/test_validate.py::test_later_features_are_refused_by_name"],
    "event.tok": [f"{YARD}::test_streamed_text_joins_to_the_whole"],
    "event.done": ["tests/worker/queue/test_worker.py::test_answers_with_every_field"],
    "code.crashed": ["tests/shared/test_suspects.py::test_groups_shrink_and_the_innocent_finish"],
    "code.internal": ["tests/worker/queue/test_worker.py::test_a_sequence_that_fails_is_alone"],
    "dead.cut": [f"{SCRIPTS}::test_refused_entries_are_cut"],
    "discover.adapters": [f"{YARD}::test_a_new_folder_is_a_new_adapter_and_replaced_bytes_another"],
    "discover.union": [f"{HOLDERS}::test_the_bytes_of_most_hosts_count_and_of_the_first_among_equals"],
    "promise.hosts": [f"{HOLDERS}::test_a_job_runs_where_its_adapters_are"],
    "promise.lost-bytes": [
        f"{HOLDERS}::test_jobs_for_lost_bytes_are_refused_after_a_grace",
        f"{HOLDERS}::test_jobs_for_a_host_that_is_down_wait",
    ],
    "promise.fence": [f"{SCRIPTS}::test_a_lost_lease_can_neither_emit_nor_settle"],
    "promise.suspects": ["tests/shared/test_suspects.py::test_groups_shrink_and_the_innocent_finish"],
    "promise.no-starvation": ["tests/dispatcher/test_schedules.py::test_random_schedules_keep_every_promise"],
    "promise.no-mixing": ["tests/dispatcher/test_schedules.py::test_random_schedules_keep_every_promise"],
    "promise.bytes": [f"{YARD}::test_a_job_never_runs_with_other_bytes_than_it_was_accepted_for"],
    "promise.redis-restart": ["tests/dispatcher/test_serve.py::test_waits_for_a_redis_that_restarts"],
}
"""Row of docs/wire.md -> the tests that prove it."""


def proves(*rows: str) -> Callable[[Any], Any]:
    """Enter a test of this file into `PROOF`."""

    def enter(test: Any) -> Any:
        for row in rows:
            PROOF.setdefault(row, []).append(f"{HERE}::{test.__name__}")
        return test

    return enter


def test_every_row_has_a_test_and_every_test_exists() -> None:
    rows = re.findall(r"^\| `([a-z0-9.-]+)` \|", (ROOT / "docs/wire.md").read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows)) > 50
    assert set(rows) == PROOF.keys()
    for test in {test for tests in PROOF.values() for test in tests}:
        path, _, name = test.partition("::")
        found = {
            node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert name in found, test


@proves("submit.class", "submit.default-id")
@pytest.mark.parametrize(("stream", "letter"), [("yard:in:urgent", "u"), ("yard:in", ""), ("yard:in:batch", "b")])
def test_classes_and_default_ids(yard: LiveYard, stream: str, letter: str) -> None:
    job = letter + yard.send(stream)
    assert yard.final(job)["text"] == "echo p"
    cls = {"u": "urgent", "": "normal", "b": "batch"}[letter]
    assert yard.redis.hget(f"rq:job:{job}", "lane") == f"{cls}:base".encode()


@proves("submit.id", "submit.reserved-id", "code.bad-id", "dead.entry", "dead.no-id")
def test_ids(yard: LiveYard) -> None:
    assert yard.final(yard.send(id="my-Job_1"))["ev"] == "done"
    for bad in ("a b", "../x", "x" * 65, "17-0", "u17-0"):
        yard.send(id=bad, colour="red")
    yard.until(lambda: len(yard.dead()) == 5)
    assert {one["code"] for one in yard.dead()} == {"bad_id"}
    assert yard.dead()[0].keys() == {"entry", "to", "cut", "code", "error", "prompt", "id", "colour"}
    assert not list(yard.redis.scan_iter("yard:out:*x*"))


@proves("submit.adapter", "submit.adapter-digest", "code.bad-adapter", "code.no-adapter")
def test_adapters(yard: LiveYard) -> None:
    asked = {"adapter": "b*0.5+a", "adapter_digest": f"{DIGESTS['a']}+{DIGESTS['b']}"}
    job = yard.send(**asked)
    assert yard.final(job)["ev"] == "done"
    assert yard.redis.hget(f"rq:job:{job}", "lane") == f"normal:{combination('a', 'b')}".encode()
    assert yard.final(yard.send(adapter="a+a"))["code"] == "bad_adapter"
    assert yard.final(yard.send(adapter="nobody"))["code"] == "no_adapter"
    assert yard.final(yard.send(adapter="a", adapter_digest="0" * 64))["code"] == "no_adapter"


@proves("submit.unknown", "code.bad-field", "code.no-prompt", "code.too-large", "code.bad-payload",
        "event.error")  # fmt: skip
def test_refusals_reach_the_client(yard: LiveYard) -> None:
    cases = {
        "bad_field": {"colour": "red"}, "no_prompt": {"tokens": "[1]"}, "too_large": {"max_tokens": 4096},
        "bad_payload": {"payload": b"\xc1"},
    }  # fmt: skip
    for code, fields in cases.items():
        error = yard.final(yard.send(id=f"id-{code}", **fields))
        assert (error["ev"], error["code"]) == ("error", code) and error["error"]
    assert yard.final(yard.send(n=65))["code"] == "bad_field" and yard.final(yard.send(n=1))["ev"] == "done"
    assert [one["code"] for one in yard.dead()] == [*cases, "bad_field"]


@proves("submit.stream", "submit.reply", "answer.stream")
def test_streams(yard: LiveYard) -> None:
    job = yard.send(stream=1)
    yard.final(job)
    assert [event["ev"] for event in events(yard.redis, job)] == ["tok", "done"]
    job = yard.send()
    yard.final(job)
    assert [event["ev"] for event in events(yard.redis, job)] == ["done"]
    assert yard.redis.ttl(f"yard:out:{job}") > 3500


@proves("answer.list")
def test_list_reply(yard: LiveYard) -> None:
    job = yard.send(reply="list")
    said = yard.listed(job)
    assert (said["ev"], said["text"], said["attempt"]) == ("done", "echo p", 1)
    refused = yard.send(reply="list", stream=1)
    assert yard.listed(refused)["code"] == "bad_field"


@proves("answer.batch", "submit.batch")
def test_batch_reply(yard: LiveYard) -> None:
    yard.redis.xgroup_create("yard:res:corpus", "sink", "0", mkstream=True)
    jobs = {"b" + yard.send("yard:in:batch", reply="batch", batch="corpus", prompt=str(at)) for at in range(5)}
    jobs.add("b" + yard.send("yard:in:batch", reply="batch", batch="corpus", temperature="hot"))
    yard.until(lambda: yard.redis.xlen("yard:res:corpus") == 6)
    ((_, entries),) = yard.redis.xreadgroup("sink", "s1", {"yard:res:corpus": ">"})
    assert {fields[b"id"].decode() for _, fields in entries} == jobs
    assert yard.redis.ttl("yard:res:corpus") > 3500
    assert yard.final(yard.send(batch="corpus"))["code"] == "bad_field"
    assert yard.final(yard.send(reply="batch"))["code"] == "bad_field"


@proves("answer.none")
def test_no_reply(yard: LiveYard) -> None:
    job = yard.send(reply="none")
    yard.until(lambda: yard.status(job) == "finished")
    assert not yard.redis.exists(f"yard:out:{job}", f"yard:reply:{job}")


@proves("submit.deadline", "code.expired")
def test_deadlines(yard: LiveYard) -> None:
    now_ms = int(time.time() * 1000)
    assert yard.final(yard.send(deadline_ms=now_ms - 1))["code"] == "expired"
    job = yard.send(prompt=HOLD, deadline_ms=now_ms + 400)
    yard.running(job)
    assert yard.final(job)["code"] == "expired" and int(time.time() * 1000) >= now_ms + 400
    assert yard.final(yard.send(deadline_ms=now_ms + 60_000))["ev"] == "done"


@proves("submit.ttl", "id.forgotten")
def test_ttl(yard: LiveYard) -> None:
    assert yard.final(yard.send(id="j", ttl=1))["ev"] == "done"
    yard.until(lambda: not yard.redis.exists("yard:out:j", "rq:job:j"))
    assert yard.final(yard.send(id="j", prompt="another"))["text"] == "echo another"
    assert yard.final(yard.send(ttl=0))["code"] == "bad_field"


@proves("submit.payload")
def test_payload(yard: LiveYard) -> None:
    packed = msgpack.packb({"id": "packed", "prompt": "x", "adapters": [{"name": "a", "scale": 0.5}], "stream": True})
    yard.redis.xadd("yard:in", {"payload": packed, "prompt": "flat"})
    assert yard.final("packed")["text"] == "echo flat"
    assert yard.redis.hget("rq:job:packed", "lane") == f"normal:{combination('a')}".encode()


@proves("id.duplicate", "id.conflict", "id.refused")
def test_the_same_id_again(yard: LiveYard) -> None:
    yard.send(id="j")
    first = yard.final("j")
    yard.send(id="j")
    yard.send(id="j", prompt="another")
    yard.until(lambda: [one["code"] for one in yard.dead()] == ["bad_id"])
    assert events(yard.redis, "j") == [first] and yard.ran == ["j"]
    yard.send(id="k", colour="red")
    refused = yard.final("k")
    yard.send(id="k", colour="red")
    yard.send(id="k")
    yard.until(lambda: [one["code"] for one in yard.dead()] == ["bad_id", "bad_field", "bad_id"])
    assert events(yard.redis, "k") == [refused]


@proves("id.busy", "code.busy")
def test_busy(empty_yard: LiveYard) -> None:
    empty_yard.work()
    empty_yard.serve(limit=1)
    held = empty_yard.send(prompt=HOLD)
    empty_yard.running(held)
    empty_yard.send(id="j")
    assert empty_yard.final("j")["code"] == "busy"
    empty_yard.cancel(held)
    empty_yard.final(held)
    empty_yard.send(id="j")
    empty_yard.until(lambda: [event["ev"] for event in events(empty_yard.redis, "j")] == ["done"])


@proves("cancel.waiting", "cancel.running", "cancel.early", "cancel.bad", "event.cancelled")
def test_cancel(yard: LiveYard) -> None:
    held = [yard.send(prompt=HOLD) for _ in range(4)]
    for job in held:
        yard.running(job)
    waiting = yard.send()
    yard.cancel(waiting)
    assert yard.final(waiting) == {"ev": "cancelled"} and waiting not in yard.ran
    for job in held:
        yard.cancel(job)
        assert yard.final(job) == {"ev": "cancelled"}
    yard.cancel("early")
    yard.until(lambda: yard.redis.exists("yard:cancelled:early"))
    assert 3500 < yard.redis.ttl("yard:cancelled:early") <= 3600
    assert yard.final(yard.send(id="early")) == {"ev": "cancelled"} and "early" not in yard.ran
    for bad in ({"op": "stop", "id": "j"}, {"op": "cancel"}, {"op": "cancel", "id": "a b"}):
        yard.redis.xadd("yard:ctl", bad)
    yard.until(lambda: [one["code"] for one in yard.dead()] == ["bad_field", "bad_field", "bad_id"])


@proves("forget.ids")
def test_forget(yard: LiveYard) -> None:
    job, held = yard.send(id="j"), yard.send(id="held", prompt=HOLD)
    yard.final(job)
    yard.running(held)
    yard.redis.xadd("yard:ctl", {"op": "forget", "ids": '["j", "held", "unknown"]'})
    yard.until(lambda: not yard.redis.exists("rq:job:j", "yard:out:j"))
    assert yard.redis.zscore(f"rq:finished:{yard.redis.hget('rq:job:held', 'origin').decode()}", "j") is None
    yard.cancel(held)
    assert yard.final(held) == {"ev": "cancelled"}, "what runs is left alone"
    yard.send(id="j", prompt="another")
    yard.until(lambda: yard.ran.count("j") == 2)
    for bad in ({"ids": "j"}, {"ids": "[]"}, {"ids": '["j"]', "id": "j"}, {"ids": '["a b"]'}):
        yard.redis.xadd("yard:ctl", {"op": "forget", **bad})
    yard.until(lambda: [one["code"] for one in yard.dead()] == ["bad_field"] * 3 + ["bad_id"])


@proves("discover.info")
def test_discovery(yard: LiveYard) -> None:
    row = next(line for line in (ROOT / "docs/wire.md").read_text().splitlines() if "`discover.info`" in line)
    assert set(re.findall(r"`([a-z_]+)`", row.split("|")[3])) == INFO.keys()
    facts = ast.parse((ROOT / "worker/queue/facts.py").read_text())
    written = {node.value for node in ast.walk(facts) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert written >= INFO.keys(), "what real workers write"


@proves("promise.entry-once")
def test_two_dispatchers_accept_each_entry_once(yard: LiveYard) -> None:
    yard.serve()
    jobs = [yard.send() for _ in range(200)]
    for job in jobs:
        assert yard.final(job)["ev"] == "done" and len(events(yard.redis, job)) == 1
    assert sorted(yard.ran) == sorted(jobs)


@proves("promise.no-worker")
def test_jobs_wait_for_a_worker(empty_yard: LiveYard) -> None:
    empty_yard.serve()
    job = empty_yard.send()
    empty_yard.cancel("early")
    empty_yard.until(lambda: empty_yard.redis.exists("yard:cancelled:early"))
    assert empty_yard.redis.xlen("yard:in") == 1, "cancellations are read, jobs are not"
    empty_yard.work()
    assert empty_yard.final(job)["ev"] == "done"


@proves("promise.dispatcher-death")
def test_what_a_dead_dispatcher_took_is_taken_again(empty_yard: LiveYard) -> None:
    empty_yard.work()
    empty_yard.halt(empty_yard.serve())
    job = empty_yard.send()
    redis = empty_yard.redis
    ((_, ((entry, _),)),) = redis.xreadgroup("yard", "dispatcher", {"yard:in": ">"})
    redis.execute_command("XCLAIM", "yard:in", "yard", "dispatcher", 0, entry, "IDLE", 4500)
    taken_at = time.monotonic() - 4.5
    empty_yard.serve()
    assert empty_yard.final(job)["ev"] == "done"
    assert time.monotonic() - taken_at > 5, "it may still be at work"


@proves("promise.runs-again", "event.restart")
def test_a_dead_workers_job_runs_again(empty_yard: LiveYard) -> None:
    empty_yard.serve()
    worker = empty_yard.work()
    job = empty_yard.send(prompt=HOLD, stream=1)
    empty_yard.running(job)
    empty_yard.halt(worker)
    empty_yard.redis.hset(f"yard:gpu:{worker.gpu}", "beat_ms", 0)
    empty_yard.until(lambda: empty_yard.status(job) == "deferred")
    empty_yard.work()
    empty_yard.until(lambda: empty_yard.redis.hget(f"rq:job:{job}", "attempt") == b"2")
    assert [event["ev"] for event in events(empty_yard.redis, job)][:2] == ["tok", "restart"]


@proves("promise.classes")
def test_classes_keep_their_shares(empty_yard: LiveYard) -> None:
    empty_yard.work(seats=1)
    batch = [f"b{empty_yard.send('yard:in:batch')}" for _ in range(20)]
    urgent = [f"u{empty_yard.send('yard:in:urgent')}" for _ in range(100)]
    empty_yard.serve()
    for job in (*batch, *urgent):
        empty_yard.final(job)
    while_urgent = empty_yard.ran[: max(empty_yard.ran.index(job) for job in urgent) + 1]
    share = sum(job in batch for job in while_urgent)
    assert len(urgent) // LOWER_SHARE - 3 <= share <= len(urgent) // LOWER_SHARE + 5


@proves("promise.full-memory")
def test_a_full_redis_still_finishes_its_work(yard: LiveYard) -> None:
    held = yard.send(prompt=HOLD)
    yard.running(held)
    try:
        jobs = [yard.send(adapter=name) for name in ("a", "b", "c", "d")]
        yard.cancel(held)
        yard.redis.config_set("maxmemory", 1)
        with pytest.raises(OutOfMemoryError):
            yard.send()
        assert all(yard.final(job)["ev"] == "done" for job in jobs)
        assert yard.final(held) == {"ev": "cancelled"}
    finally:
        yard.redis.config_set("maxmemory", 256 << 20)
