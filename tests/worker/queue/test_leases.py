"""Whatever is lost, taken away or said twice: each job has one final event, and its text is whole."""

from __future__ import annotations

import os
import signal
import time

import pytest
import redis as redis_py
from rq.job import Job as RQJob
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from lorayard.shared.embedded import EmbeddedRedis
from lorayard.shared.job import Job, SamplingParams
from lorayard.shared.scripts import Superseded

GPU = "cpu-test-0"
NEXT = f"{GPU}.bbbbbb"
MANY = tuple(range(100, 140))


def job(job_id: str, **fields) -> Job:
    return Job(job_id, tokens=MANY, sampling=SamplingParams(seed=7), stream=True, **fields)


def text_of(events: list[dict[str, str]]) -> str:
    """What a client has that follows the contract."""
    text, attempt = "", 1
    for event in events:
        if event["ev"] == "restart":
            text, attempt = "", int(event["attempt"])
        elif event["ev"] == "tok" and int(event["attempt"]) == attempt:
            text += event["text"]
    return text


def expire_leases(redis) -> None:
    """What `rq info` does, long after the leases have ended."""
    StartedJobRegistry(GPU, connection=redis, serializer=JSONSerializer).cleanup(timestamp=10**10)


def test_a_worker_that_was_given_up_writes_nothing_more(bench, engine):
    engine.gate.clear()
    old = bench.worker(engine)
    bench.submit(job("z"))
    bench.until(lambda: engine.busy)
    assert bench.scripts.reclaim(GPU, old.name) == 1
    engine.gate.set()
    bench.workers.pop()[1].join(5)
    assert isinstance(bench.faults.pop(), Superseded)
    bench.until(bench.superseded.is_set)
    assert bench.events("z") == []
    assert not bench.redis.exists(bench.keys.gpu(GPU)), "its last beat made the GPU look alive"
    bench.worker(engine, name=NEXT)
    bench.scripts.assign("normal:base", GPU, 8)
    assert bench.final("z")["attempt"] == "2"


def test_an_engine_that_hangs_ends_its_worker(bench, engine, caplog):
    worker = bench.worker(engine, lease_ms=1000, hang_s=1)
    time.sleep(1.3)
    assert worker.heart.is_alive(), "a worker with nothing to do does not hang"
    engine.step_s = 3.0
    bench.submit(job("h"))
    bench.until(lambda: float(bench.redis.hget(bench.keys.gpu(GPU), "still_s")) >= 0.5)
    assert not bench.hung.is_set()
    bench.until(bench.hung.is_set, 2)
    assert f"worker {worker.name}: no step of its engine ended in 1 s" in caplog.text
    engine.step_s = 0.0
    assert bench.scripts.reclaim(GPU, worker.name) == 1  # as its supervisor does when the process has ended
    bench.workers.pop()[1].join(5)
    assert isinstance(bench.faults.pop(), Superseded)
    bench.worker(engine, name=NEXT)
    bench.scripts.assign("normal:base", GPU, 8)
    assert bench.final("h")["attempt"] == "2"


def test_a_claim_whose_answer_was_lost_comes_back(bench, engine):
    bench.worker(engine, lease_ms=1000)
    bench.redis.set("rq:suspended", 1)
    bench.submit(job("lost"))
    lease = bench.lease("lost")
    bench.redis.delete("rq:suspended")
    bench.redis.zincrby(f"rq:wip:{GPU}", -12, f"lost:{lease.execution}")  # as if so many seconds had passed
    bench.until(lambda: bench.scripts.assign("normal:base", GPU, 8))
    assert bench.final("lost")["attempt"] == "2"
    assert bench.redis.hgetall(bench.keys.load(GPU)) == {}


def test_rq_cleaning_up_after_a_dead_worker_loses_nothing(bench, engine):
    bench.scripts.register(GPU, f"{GPU}.dddddd", 10_000, {"slots": 2, "window": 8, "state": "ready"})
    bench.submit(job("q", ttl=1))
    bench.lease("q", name=f"{GPU}.dddddd")
    expire_leases(bench.redis)
    assert bench.redis.lrange(f"rq:queue:{GPU}", 0, -1) == [b"q"], "RQ queued it again"
    assert bench.redis.ttl("rq:job:q") == -1, "RQ must not set it to expire"
    assert RQJob.fetch("q", connection=bench.redis, serializer=JSONSerializer).retries_left == 999_999
    assert bench.scripts.reclaim(GPU, f"{GPU}.dddddd") == 1
    bench.worker(engine, name=NEXT)
    bench.scripts.assign("normal:base", GPU, 8)
    assert bench.final("q")["ev"] == "done"
    assert bench.redis.hgetall(bench.keys.load(GPU)) == {}


def test_rq_cleaning_up_under_a_live_worker_gives_one_answer(bench, engine):
    engine.gate.clear()
    bench.worker(engine)
    bench.submit(job("two"))
    bench.until(lambda: engine.busy)
    expire_leases(bench.redis)
    bench.until(lambda: bench.redis.hget("rq:job:two", "attempt") == b"2")
    engine.gate.set()
    done = bench.final("two")
    assert done["attempt"] == "2" and text_of(bench.events("two")) == done["text"]
    bench.until(lambda: not engine.busy)
    assert bench.redis.hgetall(bench.keys.load(GPU)) == {}
    assert bench.redis.hget(bench.keys.depth, "normal") == b"0"


def test_rq_never_finds_a_lease_ended_before_we_do(bench, engine):
    bench.scripts.register(GPU, NEXT, 10_000, {"slots": 2, "window": 8, "state": "ready"})
    bench.submit(job("m"))
    lease = bench.lease("m", name=NEXT)
    seconds, _ = bench.redis.time()
    score = bench.redis.zscore(f"rq:wip:{GPU}", f"m:{lease.execution}")
    assert score >= seconds + 60 + 9


@pytest.mark.parametrize("lost_answer", [1, 2, 3, 5])
def test_what_is_sent_again_arrives_once(bench, engine, monkeypatch, lost_answer):
    engine.step_s = 0.01
    calls = []
    worker = bench.worker(engine)
    report = worker.scripts.report

    def cut_off(gpu, name, messages, obeyed):
        news = report(gpu, name, messages, obeyed)
        if messages:
            calls.append(news)
            if len(calls) == lost_answer:
                raise redis_py.ConnectionError("the answer is lost")
        return news

    monkeypatch.setattr(worker.scripts, "report", cut_off)
    bench.submit(job("once"))
    done, events = bench.final("once"), bench.events("once")
    assert len(calls) > lost_answer
    assert text_of(events) == done["text"] == "".join(f"{token} " for token in MANY)
    assert worker.heart.is_alive()


@pytest.mark.parametrize("kill", [False, True])
def test_jobs_go_on_while_redis_is_away(tmp_path, bench, engine, kill):
    engine.step_s = 0.02
    with EmbeddedRedis(tmp_path) as server:
        other = type(bench)(server.client(), server.url)
        other.worker(engine)
        other.submit(job("away"))
        other.until(lambda: other.events("away"))
        if kill:
            os.kill(server.client().info("server")["process_id"], signal.SIGKILL)
    said = max(len(tokens) for tokens in engine.said.values())
    bench.until(lambda: not engine.busy)
    assert said < len(MANY)
    with EmbeddedRedis(tmp_path) as server:
        other.redis = server.client()
        done = other.final("away")
        assert text_of(other.events("away")) == done["text"] == "".join(f"{token} " for token in MANY)
        assert done["attempt"] == "1"
        other.close()
