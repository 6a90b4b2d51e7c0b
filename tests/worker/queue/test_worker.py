"""The worker's loop, on a real Redis with the real scripts; only the engine is not real."""

from __future__ import annotations

import json
import time

from lorayard.shared.errors import Refused
from lorayard.shared.job import Job, SamplingParams
from lorayard.shared.scripts import Message
from lorayard.worker.queue.prepare import Prepared
from lorayard.worker.queue.worker import GpuWorker

GPU = "cpu-test-0"
MANY = tuple(range(100, 140))


def job(job_id: str, tokens=MANY, **fields) -> Job:
    return Job(job_id, tokens=tokens, sampling=SamplingParams(seed=7), **fields)


def text_of(events: list[dict[str, str]]) -> str:
    return "".join(event["text"] for event in events if event["ev"] == "tok")


def test_answers_with_every_field(bench, engine):
    bench.worker(engine)
    assert bench.submit(job("a")) == "assigned"
    done = bench.final("a")
    assert done["text"] == "".join(f"{token} " for token in MANY)
    assert {name: done[name] for name in ("ev", "finish", "seed", "gpu", "attempt", "adapter", "base_digest")} == {
        "ev": "done", "finish": "length", "seed": "7", "gpu": GPU, "attempt": "1", "adapter": "",
        "base_digest": "basedigest",
    }  # fmt: skip
    assert 0 <= int(done["t_queue_ms"]) <= int(done["t_first_ms"]) <= int(done["t_total_ms"])
    assert len(bench.events("a")) == 1  # no stream was asked for


def test_streams_events_that_join_to_the_text(bench, engine):
    engine.step_s = 0.002
    bench.worker(engine)
    bench.submit(job("s", stream=True))
    done, events = bench.final("s"), bench.events("s")
    tokens = [event for event in events if event["ev"] == "tok"]
    assert text_of(events) == done["text"]
    assert [event["at"] for event in tokens[:2]] == ["0", "1"], "the first token goes out at once"
    assert 2 < len(tokens) < len(MANY) / 2, "later ones in groups"
    for event in tokens:
        assert int(event["at"]) == MANY.index(int(event["text"].split()[0]))


def test_fills_its_seats_and_no_more(bench, engine):
    engine.gate.clear()
    bench.worker(engine, seats=4)
    for i in range(9):
        assert bench.submit(job(f"j{i}")) == "assigned"
    bench.until(lambda: len(engine.jobs) == 4)
    assert bench.redis.llen(f"rq:queue:{GPU}") == 5
    assert bench.redis.zcard(f"rq:wip:{GPU}") == 4
    engine.gate.set()
    assert all(bench.final(f"j{i}")["ev"] == "done" for i in range(9))
    assert engine.most == 4


def test_refusals_keep_their_code_and_others_go_on(bench, engine):
    def prepare(job):
        if job.id == "bad":
            raise Refused("too_large", "it is too large")
        if job.id == "broken":
            raise ValueError("a bug")
        return Prepared(list(job.tokens), (), len(job.tokens))

    bench.worker(engine, prepare=prepare)
    for name in ("bad", "broken", "good"):
        bench.submit(job(name))
    assert bench.final("bad") == {"ev": "error", "code": "too_large", "error": "it is too large"}
    broken = bench.final("broken")
    assert broken["code"] == "internal" and "bug" not in broken["error"]
    assert bench.final("good")["ev"] == "done"


def test_a_sequence_that_fails_is_alone(bench, engine):
    engine.poison = 666
    bench.worker(engine)
    bench.submit(job("bad", tokens=(1, 2, 666, 3)))
    bench.submit(job("good"))
    assert bench.final("bad")["code"] == "internal"
    assert bench.final("good")["ev"] == "done"


def test_cancel_and_deadline_stop_a_running_job(bench, engine):
    engine.gate.clear()
    bench.worker(engine)
    bench.submit(job("c", stream=True))
    bench.submit(job("d"), deadline_ms=int(time.time() * 1000) + 300)
    bench.until(lambda: len(engine.jobs) == 2)
    assert bench.cancel("c") == "stopping"
    bench.until(lambda: bench.scripts.expire() == 1)
    engine.gate.set()
    assert bench.final("c") == {"ev": "cancelled"}
    assert bench.final("d")["code"] == "expired"
    assert engine.cancelled == 2
    assert bench.redis.llen(bench.keys.stops(GPU)) in (0, 2)
    bench.until(lambda: bench.redis.llen(bench.keys.stops(GPU)) == 0)


def test_another_attempt_restarts_the_stream(bench, engine):
    dead = f"{GPU}.dddddd"
    bench.scripts.register(GPU, dead, 10_000, {"slots": 2, "window": 8, "state": "ready"})
    bench.submit(job("r", stream=True))
    lease = bench.lease("r", name=dead)
    lost = Message(lease, {"ev": "tok", "text": "lost ", "sample": 0, "attempt": 1, "at": 0})
    assert bench.scripts.report(GPU, dead, [lost]).lost == []
    assert bench.scripts.reclaim(GPU, dead) == 1
    bench.worker(engine)
    bench.scripts.assign("normal:base", GPU, 8)
    done, events = bench.final("r"), bench.events("r")
    assert done["attempt"] == "2"
    assert events[1] == {"ev": "restart", "attempt": "2"}
    assert text_of(events[1:]) == done["text"]


def test_drains_then_hands_over(bench, engine):
    engine.gate.clear()
    worker: GpuWorker = bench.worker(engine, seats=1)
    bench.submit(job("runs", stream=True))
    bench.until(lambda: engine.busy)
    bench.submit(job("waits"))
    worker.drain(60)
    engine.gate.set()
    assert bench.final("runs")["ev"] == "done"
    bench.workers.pop()[1].join(5)
    assert bench.redis.lrange(bench.keys.lane("normal", "base"), 0, -1) == [b"waits"]
    assert bench.redis.hget("rq:job:waits", "attempt") is None
    assert not bench.redis.exists(bench.keys.gpu(GPU), f"rq:worker:{worker.name}", f"rq:wip:{GPU}", "rq:workers")


def test_past_its_grace_it_gives_back_what_runs(bench, engine):
    worker = bench.worker(engine)
    engine.step_s = 0.05
    bench.submit(job("long", stream=True))
    bench.until(lambda: bench.events("long"))
    worker.drain(0.1)
    bench.workers.pop()[1].join(5)
    assert bench.redis.lrange(bench.keys.lane("normal", "base"), 0, -1) == [b"long"]
    assert bench.redis.hget("rq:job:long", "deaths") is None
    engine.step_s = 0
    bench.worker(engine, name=f"{GPU}.bbbbbb")
    bench.scripts.assign("normal:base", GPU, 8)
    assert bench.final("long")["attempt"] == "2"


def test_a_newer_request_is_left_for_newer_workers(bench, engine):
    bench.worker(engine)
    bench.submit(job("new"), v=2)
    bench.submit(job("old"))
    assert bench.final("old")["ev"] == "done"
    assert bench.redis.lrange(f"rq:queue:{GPU}", 0, -1) == [b"new"]


def test_rq_suspend_pauses(bench, engine):
    bench.worker(engine)
    bench.redis.set("rq:suspended", 1)
    bench.submit(job("p"))
    time.sleep(0.3)
    assert not bench.events("p")
    bench.redis.delete("rq:suspended")
    assert bench.final("p")["ev"] == "done"


def test_list_reply_is_one_json_object(bench, engine):
    bench.worker(engine)
    bench.submit(job("l", reply="list"))
    _, answer = bench.redis.blpop("yard:reply:l", 5)
    done = json.loads(answer)
    assert (done["ev"], done["new_tokens"], done["seed"]) == ("done", len(MANY), "7")


def test_the_engine_never_waits_long_for_redis(bench, engine):
    worker = bench.worker(engine)
    assert worker.connection.connection_pool.connection_kwargs["socket_timeout"] == 3
