"""Our worker leaves the keys, types, fields and TTLs that RQ's own worker leaves, but for a list with reasons.

An upgrade of RQ that keeps its books otherwise fails here.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import redis as redis_py
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer

from lorayard.dispatcher.validate import record
from lorayard.shared.embedded import EmbeddedRedis
from lorayard.shared.job import Job

from ..worker.queue.conftest import GPU, Bench, FakeEngine

WORKER, TTL = f"{GPU}.aaaaaa", 500

Books = dict[str, Any]
"""`KEY` -> (type, TTL rounded to ten seconds), `KEY FIELD` -> value, or the kind of value where it must vary."""


def books(redis: Any) -> Books:
    """All of RQ's keys."""
    found: Books = {}
    for raw in redis.scan_iter("rq:*"):
        key = re.sub(r"[0-9a-f]{32}", "<hex>", raw.decode())
        kind = redis.type(raw).decode()
        found[key] = kind, round(max(redis.ttl(raw), 0), -1)
        if kind == "hash":
            found |= {f"{key} {name.decode()}": shape(value) for name, value in redis.hgetall(raw).items()}
        elif kind in ("set", "zset"):
            members = redis.smembers(raw) if kind == "set" else redis.zrange(raw, 0, -1)
            found |= {f"{key} {re.sub(r'[0-9a-f]{32}', '<hex>', member.decode())}": "member" for member in members}
    return found


def shape(value: bytes) -> str:
    """The value, or `time` or `number` for what differs from run to run."""
    text = value.decode(errors="replace")
    if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", text):
        return "time"
    return "number" if re.fullmatch(r"\d+\.\d+", text) else re.sub(r"[0-9a-f]{32}", "<hex>", text)


class Watched(SimpleWorker):
    """RQ's worker, with the books as they are while it runs a job."""

    running: Books

    def handle_job_success(self, *args: Any, **kwargs: Any) -> Any:
        self.running = books(self.connection)
        return super().handle_job_success(*args, **kwargs)


def stock(redis: redis_py.Redis, case: str) -> Books:
    """What RQ's worker writes."""
    queue = Queue(GPU, connection=redis, serializer=JSONSerializer)
    function = "operator.nothing" if case == "failing" else "operator.truth"
    queue.enqueue(function, True, job_id="j", job_timeout=-1, result_ttl=TTL, failure_ttl=TTL)
    worker = Watched([queue], name=WORKER, connection=redis, serializer=JSONSerializer)
    worker.work(burst=True, logging_level="CRITICAL")
    return worker.running if case == "running" else books(redis)


def ours(redis: redis_py.Redis, url: str, case: str) -> Books:
    """What our worker writes."""
    bench, engine = Bench(redis, url), FakeEngine(poison=2)
    job = Job("j", tokens=(1, 2 if case == "failing" else 3), ttl=TTL)
    bench.worker(engine, name=WORKER)
    assert bench.submit(job, **record(job)) == "assigned"
    bench.until(lambda: bench.redis.hget(f"rq:worker:{WORKER}", "state") == b"busy")
    running = books(redis)
    engine.gate.set()
    assert bench.final("j")["ev"] == ("error" if case == "failing" else "done")
    bench.close()
    return running if case == "running" else books(redis)


DIFFERENT = {
    "rq:clean_groups": "a lock of RQ's maintenance of job groups, which we do not use",
    "rq:job:j (attempt|batch|code|fp|gpu|keep|lane|ms|reply|req|v)": "fields of ours, that RQ ignores and keeps",
    "rq:job:j (data|description)": "another function is called",
    "rq:job:j retries_left": "RQ may give an abandoned job back, never end it: that is for our reclaim to decide",
    "rq:results:j": "the answer is in the stream that the client reads; a second copy of it would only cost memory",
    "rq:worker:[^:]*( .*)?": "one that leaves takes its record along; RQ keeps it for a minute, with a field death",
}
"""Name, as a pattern -> why ours is not as RQ's after a job."""

DIFFERENT_RUNNING = {name: why for name, why in DIFFERENT.items() if name.startswith(("rq:clean", "rq:job"))} | {
    "rq:execution:j:<hex>|rq:executions:j|rq:worker:[^: ]*(:executions)?": "a TTL: a few beats of the heart, so that "
    "what a dead worker leaves is soon gone; RQ's outlives any job",
}
"""The same while a job runs."""


@pytest.mark.parametrize("case", ["running", "good", "failing"])
def test_the_books_are_those_of_rq(redis: redis_py.Redis, redis_server: EmbeddedRedis, case: str) -> None:
    theirs = stock(redis, case)
    redis.flushall()
    mine = ours(redis, redis_server.url, case)
    listed = DIFFERENT_RUNNING if case == "running" else DIFFERENT
    differ = {name: (theirs.get(name), mine.get(name)) for name in theirs | mine if theirs.get(name) != mine.get(name)}
    unlisted = {name: both for name, both in differ.items() if not any(re.fullmatch(p, name) for p in listed)}
    assert not unlisted, "\n".join(f"{name}: RQ {a}, ours {b}" for name, (a, b) in sorted(unlisted.items()))
    needless = [p for p in listed if not any(re.fullmatch(p, name) for name in differ)]
    assert not needless
