"""Every script on a real Redis, in every state a job can be in, with memory to spare and with none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis as redis_py
from redis.exceptions import OutOfMemoryError

from lorayard.shared.scripts import Superseded

from ..dispatcher.fake import KEYS, LEASE_MS, FakeWorker, combination, dead, events
from .direct import NOW_MS, A, Client


@pytest.fixture(params=["memory to spare", "memory full"])
def client(redis: redis_py.Redis, request: pytest.FixtureRequest) -> Iterator[Client]:
    """With "memory full" clients are refused and the scripts, which finish what is in the system, are not."""
    client = Client(redis)
    if request.param == "memory full":
        client.entry = _entry_while_full(client)  # type: ignore[method-assign]
        redis.config_set("maxmemory", "1")
    yield client
    redis.config_set("maxmemory", 256 << 20)


def _entry_while_full(client: Client) -> Any:
    """The entries of such a test came before the memory was full."""

    def entry(stream: str = KEYS.stream("normal"), **fields: Any) -> str:
        client.redis.config_set("maxmemory", 256 << 20)
        added = Client.entry(client, stream, **fields)
        client.redis.config_set("maxmemory", "1")
        with pytest.raises(OutOfMemoryError):
            client.redis.xadd(stream, {"prompt": "p"})
        return added

    return entry


@pytest.fixture
def worker(client: Client) -> FakeWorker:
    """A worker with two slots, one open for a, and four seats."""
    worker = FakeWorker(client.scripts)
    assert worker.register()
    assert client.scripts.open(worker.gpu, 0, A) == 1
    return worker


def test_accept_puts_a_job_into_its_lane(client: Client) -> None:
    assert client.send("j") == "accepted"
    assert (client.status("j"), client.lane(), client.depth()) == ("deferred", ["j"], 1)
    assert client.redis.zscore(KEYS.lanes, f"normal:{A}") == NOW_MS
    assert client.redis.xlen(KEYS.stream("normal")) == 0 and events(client.redis, "j") == []


def test_accept_assigns_at_once_where_the_slot_is_open(client: Client, worker: FakeWorker) -> None:
    assert client.send("j", gpu=worker.gpu) == "assigned"
    assert (client.status("j"), client.queue(), client.load()) == ("queued", ["j"], {A: 1})
    assert client.send("k", combination("b"), gpu=worker.gpu) == "accepted", "no slot is open for b"
    assert client.send("l", "base", gpu=worker.gpu) == "assigned", "the base needs no slot"


def test_accept_does_not_pass_jobs_that_wait(client: Client, worker: FakeWorker) -> None:
    client.send("j")
    assert client.send("k", gpu=worker.gpu) == "accepted"
    assert client.lane() == ["j", "k"]


def test_an_entry_is_accepted_once(client: Client) -> None:
    job = client.arrival("j")
    assert client.scripts.accept([job, job], 100) == ["accepted", "stale"]
    assert client.scripts.accept([job], 100) == ["stale"]
    assert client.scripts.reject(KEYS.stream("normal"), job.entry, "j", "fp", "bad_field", "no") == "stale"
    assert client.depth() == 1


def test_a_known_id_is_ignored_or_in_conflict(client: Client) -> None:
    client.send("j")
    assert client.send("j") == "duplicate"
    assert client.send("j", fp="other") == "conflict"
    assert client.depth() == 1 and events(client.redis, "j") == []
    assert [entry["code"] for entry in dead(client.redis)] == ["bad_id"]


def test_busy_may_be_sent_again(client: Client) -> None:
    client.send("j", limit=1)
    assert client.send("k", limit=1) == "busy"
    assert events(client.redis, "k")[-1]["code"] == "busy" and client.depth() == 1
    assert [entry["code"] for entry in dead(client.redis)] == ["busy"]
    assert client.send("k", limit=2) == "accepted"
    assert events(client.redis, "k") == [], "the new attempt begins with an empty stream"


def test_a_deadline_that_has_passed(client: Client) -> None:
    assert client.send("j", deadline_ms=NOW_MS) == "expired"
    assert events(client.redis, "j")[-1]["code"] == "expired" and client.depth() == 0


def test_a_cancellation_may_come_before_its_job(client: Client) -> None:
    assert client.cancel("j") == "remembered"
    assert client.send("j") == "cancelled"
    assert [event["ev"] for event in events(client.redis, "j")] == ["cancelled"]
    assert client.depth() == 0 and client.lane() == []
    assert client.send("j") == "duplicate"


def test_reject_answers_a_new_id_only(client: Client) -> None:
    def reject(job_id: str, fp: str = "raw") -> str:
        return str(client.scripts.reject(KEYS.stream("normal"), client.entry(), job_id, fp, "bad_field", "why", ttl=60))

    assert reject("j") == "rejected"
    assert events(client.redis, "j") == [{"ev": "error", "code": "bad_field", "error": "why"}]
    assert reject("j") == "duplicate", "a refused id is remembered like any other"
    assert client.send("j") == "conflict"
    client.send("live")
    assert reject("live") == "rejected" and events(client.redis, "live") == []
    assert reject("") == "rejected"
    assert [entry["code"] for entry in dead(client.redis)] == ["bad_field", "bad_id", "bad_field", "bad_field"]


def test_refused_entries_are_cut(client: Client) -> None:
    fields = {f"f{at}": "x" * 5000 for at in range(70)}
    entry = client.entry(**fields)
    client.scripts.reject(KEYS.stream("normal"), entry, "", "", "bad_field", "why")
    buried = dead(client.redis)[0]
    assert len(buried) == 5 + 64 and buried["cut"] == "1" and len(buried["f0"]) == 4096


def test_assign_moves_up_to_the_window(client: Client, worker: FakeWorker) -> None:
    for at in range(12):
        client.send(f"j{at}")
    assert client.scripts.assign(f"normal:{A}", worker.gpu, 3) == 3
    assert client.scripts.assign(f"normal:{A}", worker.gpu, 100) == 5, "the window is 8"
    assert client.queue() == [f"j{at}" for at in range(8)] and client.load() == {A: 8}


def test_assign_puts_urgent_jobs_first(client: Client, worker: FakeWorker) -> None:
    client.send("n", gpu=worker.gpu)
    for name in ("u1", "u2"):
        client.send(name, cls="urgent")
    client.scripts.assign(f"urgent:{A}", worker.gpu, 8)
    assert client.queue() == ["u1", "u2", "n"]


def test_assign_needs_an_open_slot_and_a_live_gpu(client: Client, worker: FakeWorker) -> None:
    client.send("j", combination("b"))
    assert client.scripts.assign(f"normal:{combination('b')}", worker.gpu, 8) == 0
    client.send("k")
    assert client.scripts.assign(f"normal:{A}", "gpu-h-9", 8) == 0
    client.scripts.close(worker.gpu, 0, A)
    assert client.scripts.assign(f"normal:{A}", worker.gpu, 8) == 0


def test_assign_drops_an_empty_lane_and_skips_the_cancelled(client: Client, worker: FakeWorker) -> None:
    for name in ("j", "k", "l"):
        client.send(name)
    client.cancel("k")
    assert client.scripts.assign(f"normal:{A}", worker.gpu, 8) == 2
    assert client.queue() == ["j", "l"] and client.redis.zcard(KEYS.lanes) == 0


def test_a_slot_is_opened_only_when_drained(client: Client, worker: FakeWorker) -> None:
    client.send("j", gpu=worker.gpu)
    b = combination("b")
    assert client.scripts.open(worker.gpu, 0, b) == 0, "queued"
    worker.claim()
    assert client.scripts.open(worker.gpu, 0, b) == 0, "running"
    assert client.scripts.close(worker.gpu, 0, A) == 0
    assert client.scripts.open(worker.gpu, 0, b) == 0, "closing and still running"
    worker.done("j")
    assert client.scripts.open(worker.gpu, 0, b) == 1
    assert client.redis.hget(KEYS.gpu(worker.gpu), "swaps") == b"1"


def test_open_refuses_a_second_slot_and_what_is_not_there(client: Client, worker: FakeWorker) -> None:
    assert client.scripts.open(worker.gpu, 1, A) == 0, "slot 0 has it"
    assert client.scripts.open(worker.gpu, 2, combination("b")) == 0, "there are two slots"
    assert client.scripts.open("gpu-h-9", 0, A) == 0, "there is no such GPU"


def test_close_returns_what_is_queued_and_may_be_undone(client: Client, worker: FakeWorker) -> None:
    for name in ("j", "k", "l"):
        client.send(name, gpu=worker.gpu)
    worker.seats = 1
    worker.claim()
    assert client.scripts.close(worker.gpu, 0, combination("b")) == -1
    assert client.scripts.close(worker.gpu, 0, A) == 2
    assert client.lane() == ["k", "l"] and client.load() == {A: 1}
    assert client.scripts.open(worker.gpu, 0, A) == 1, "its own combination may come back at any time"
    assert client.scripts.assign(f"normal:{A}", worker.gpu, 8) == 2


def test_claim_settle_and_the_books(client: Client, worker: FakeWorker) -> None:
    client.send("j", gpu=worker.gpu, stream=1)
    client.scripts.now_ms += 250
    (lease,) = worker.claim()
    assert (lease.id, lease.request, lease.attempt, lease.slot, lease.waited_ms) == ("j", b"request", 1, 0, 250)
    assert client.status("j") == "started" and client.redis.zcard(f"rq:wip:{worker.gpu}") == 1
    assert worker.emit("j", "he") == 1
    assert worker.done("j", "hello") == 1
    assert [event["ev"] for event in events(client.redis, "j")] == ["tok", "done"]
    assert (client.status("j"), client.load(), client.depth()) == ("finished", {}, 0)
    assert client.redis.zcard(f"rq:wip:{worker.gpu}") == 0 and client.redis.ttl("rq:job:j") == 60
    assert client.redis.hget("rq:job:j", "req") is None, "a tombstone does not keep the request"


def test_the_base_is_claimed_without_a_slot(client: Client, worker: FakeWorker) -> None:
    client.send("j", "base", gpu=worker.gpu)
    assert worker.claim()[0].slot is None


def test_claim_leaves_newer_requests_and_ends_late_ones(client: Client, worker: FakeWorker) -> None:
    client.send("new", gpu=worker.gpu, v=2)
    client.send("late", gpu=worker.gpu, deadline_ms=NOW_MS + 5)
    client.send("j", gpu=worker.gpu)
    client.scripts.now_ms += 5
    assert [lease.id for lease in worker.claim()] == ["j"]
    assert client.queue() == ["new"] and events(client.redis, "late")[-1]["code"] == "expired"
    assert client.load() == {A: 2}


def test_a_lost_lease_can_neither_emit_nor_settle(client: Client, worker: FakeWorker) -> None:
    client.send("j", gpu=worker.gpu)
    worker.claim()
    assert client.scripts.reclaim(worker.gpu, worker.name) == 1
    assert worker.emit("j", "ghost") == 0 and worker.done("j") == 0
    assert events(client.redis, "j") == [] and client.lane() == ["j"]
    with pytest.raises(Superseded):
        worker.claim()
    with pytest.raises(Superseded):
        worker.renew()


def test_cancel_in_every_state(client: Client, worker: FakeWorker) -> None:
    b = combination("b")
    client.send("waits", b)
    client.send("runs", gpu=worker.gpu)
    worker.claim()
    client.send("queued", gpu=worker.gpu)
    assert [client.cancel(job) for job in ("waits", "queued", "runs")] == ["cancelled", "cancelled", "stopping"]
    assert client.redis.zscore(KEYS.lanes, f"normal:{b}") is None, "a lane of cancelled jobs wants no slot"
    assert client.load() == {A: 1} and client.queue() == []
    worker.obey()
    for job in ("waits", "queued", "runs"):
        assert [event["ev"] for event in events(client.redis, job)] == ["cancelled"]
        assert client.cancel(job) == "over"
    assert client.depth() == 0 and client.load() == {}


def test_forget_takes_answered_jobs_alone(client: Client, worker: FakeWorker) -> None:
    for job in ("queued", "runs", "waits"):
        client.send(job, combination("b") if job == "waits" else A, gpu=worker.gpu)
    client.cancel("queued")
    entry = client.entry(KEYS.control, op="forget")
    assert client.scripts.forget(entry, ["waits", "queued", "runs", "nobody"]) == "1"
    assert client.scripts.forget(entry, ["waits"]) == "stale"
    assert [client.status(job) for job in ("waits", "queued", "runs")] == ["deferred", "", "queued"]
    assert client.depth() == 2 and client.send("queued") == "accepted"


def test_a_cancelled_job_of_a_dead_worker_does_not_run_again(client: Client, worker: FakeWorker) -> None:
    client.send("j", gpu=worker.gpu)
    worker.claim()
    client.cancel("j")
    assert client.scripts.reclaim(worker.gpu, worker.name) == 0
    assert [event["ev"] for event in events(client.redis, "j")] == ["cancelled"] and client.depth() == 0


def test_expire_ends_the_waiting_and_tells_the_running(client: Client, worker: FakeWorker) -> None:
    soon = {"deadline_ms": NOW_MS + 10}
    client.send("runs", gpu=worker.gpu, **soon)
    worker.claim()
    client.send("queued", gpu=worker.gpu, **soon)
    client.send("waits", combination("b"), **soon)
    client.send("later", gpu=worker.gpu, deadline_ms=NOW_MS + 1000)
    assert client.scripts.expire() == 0
    client.scripts.now_ms += 10
    assert client.scripts.expire() == 3
    worker.obey()
    for job in ("runs", "queued", "waits"):
        assert [event["code"] for event in events(client.redis, job)] == ["expired"]
    assert client.depth() == 1 and client.load() == {A: 1}


def test_reclaim_keeps_the_order_of_arrival(client: Client, worker: FakeWorker) -> None:
    for at in range(6):
        client.send(f"j{at}", gpu=worker.gpu)
        client.scripts.now_ms += 1
    worker.claim()
    client.send("j6")
    assert client.scripts.reclaim(worker.gpu, worker.name) == 6
    assert client.lane() == [f"j{at}" for at in range(7)]
    assert client.redis.zscore(KEYS.lanes, f"normal:{A}") == NOW_MS
    assert client.redis.exists(KEYS.gpu(worker.gpu), KEYS.load(worker.gpu), KEYS.slots(worker.gpu)) == 0


def test_reclaim_of_the_silent_needs_silence_and_the_right_name(client: Client, worker: FakeWorker) -> None:
    client.scripts.now_ms += LEASE_MS - 1
    assert client.scripts.reclaim(worker.gpu, worker.name, LEASE_MS) == -1
    assert client.scripts.reclaim(worker.gpu, "somebody", 0) == -1
    assert not FakeWorker(client.scripts, worker.gpu).register(), "the old one may still live"
    client.scripts.now_ms += 1
    assert client.scripts.reclaim(worker.gpu, worker.name, LEASE_MS) == 0


def test_reclaim_of_a_queue_without_a_worker(client: Client, worker: FakeWorker) -> None:
    client.send("j", gpu=worker.gpu)
    assert client.scripts.reclaim(worker.gpu, "", LEASE_MS) == -1, "it has one"
    client.redis.delete(KEYS.gpu(worker.gpu))
    assert client.scripts.reclaim(worker.gpu, "", LEASE_MS) == 1
    assert client.lane() == ["j"] and client.load() == {}


def test_register_takes_over_from_the_dead(client: Client, worker: FakeWorker) -> None:
    client.send("j", gpu=worker.gpu)
    worker.claim()
    client.scripts.now_ms += LEASE_MS
    assert FakeWorker(client.scripts, worker.gpu).register()
    assert client.lane() == ["j"] and worker.done("j") == 0


def test_release_counts_no_death_and_a_second_attempt_restarts_the_text(client: Client, worker: FakeWorker) -> None:
    client.send("j", gpu=worker.gpu, stream=1)
    client.send("k", gpu=worker.gpu)
    worker.seats = 1
    worker.claim()
    worker.emit("j", "old")
    assert client.scripts.release(worker.gpu, worker.name) == 2
    assert client.lane() == ["j", "k"] and client.redis.hget("rq:job:j", "deaths") is None
    assert client.scripts.release(worker.gpu, worker.name) == -1
    again = FakeWorker(client.scripts, worker.gpu)
    again.register()
    client.scripts.open(again.gpu, 0, A)
    client.scripts.assign(f"normal:{A}", again.gpu, 8)
    again.claim()
    restart = events(client.redis, "j")[-1]
    assert (restart["ev"], restart["attempt"]) == ("restart", "2")


def test_drain_gives_back_what_is_queued_only(client: Client, worker: FakeWorker) -> None:
    worker.seats = 1
    for name in ("j", "k"):
        client.send(name, gpu=worker.gpu)
    worker.claim()
    assert client.scripts.drain(worker.gpu, worker.name) == 1
    assert client.lane() == ["k"] and client.scripts.assign(f"normal:{A}", worker.gpu, 8) == 0
    assert worker.done("j") == 1


def test_answers_go_where_they_were_asked_for(client: Client, worker: FakeWorker) -> None:
    replies = {"l": {"reply": "list"}, "b": {"reply": "batch", "batch": "corpus"}, "n": {"reply": "none"}}
    for name, reply in replies.items():
        client.send(name, gpu=worker.gpu, **reply)
    worker.claim()
    for name in replies:
        worker.done(name)
    assert client.redis.lpop(KEYS.reply("l")).startswith(b"{")
    ((_, fields),) = client.redis.xrange(KEYS.results("corpus"))
    assert fields[b"id"] == b"b" and fields[b"ev"] == b"done"
    assert client.redis.exists(*(KEYS.out(name) for name in replies)) == 0
    assert client.redis.ttl(KEYS.results("corpus")) == 60


def test_an_answered_job_that_rq_requeues_is_dropped(client: Client, worker: FakeWorker) -> None:
    client.send("j", gpu=worker.gpu)
    worker.claim()
    worker.done("j")
    client.redis.config_set("maxmemory", 256 << 20)
    client.redis.hset("rq:job:j", "status", "queued")
    client.redis.rpush(f"rq:queue:{worker.gpu}", "j")
    assert client.cancel("j") == "over"
    assert worker.claim() == [] and client.queue() == []
    assert client.depth() == 0 and client.load() == {}


@pytest.mark.parametrize("reply", ["stream", "list", "batch"])
def test_a_client_that_breaks_its_own_answer_harms_nobody(client: Client, worker: FakeWorker, reply: str) -> None:
    for job_id in ("broken", "sound"):
        client.send(job_id, gpu=worker.gpu, reply=reply, batch="b", stream=1)
    assert len(worker.claim()) == 2
    assert client.scripts.release(worker.gpu, worker.name) == 2
    for name in (KEYS.out("broken"), KEYS.reply("broken"), KEYS.results("b")):
        client.redis.config_set("maxmemory", 256 << 20)
        client.redis.set(name, "not what the yard writes")
    assert worker.register() and client.scripts.open(worker.gpu, 0, A) == 1
    assert client.scripts.assign(f"normal:{A}", worker.gpu, 9) == 2
    assert [lease.attempt for lease in worker.claim()] == [2, 2]
    assert worker.emit("broken", "text") == 1 and worker.done("broken") == 1 and worker.done("sound") == 1
    assert [client.status(job_id) for job_id in ("broken", "sound")] == ["finished", "finished"]
    assert client.depth() == 0 and client.load() == {}
    if reply == "stream":
        assert [event["ev"] for event in events(client.redis, "sound")][-1] == "done"
