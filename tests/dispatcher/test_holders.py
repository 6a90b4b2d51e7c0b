"""Hosts whose adapters differ: what clients discover, where jobs run, and what becomes of jobs for lost bytes."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import redis as redis_py

from lorayard.dispatcher.placer import FORSAKE_MS
from lorayard.shared.scripts import Arrival, Scripts

from .conftest import HOLD, LiveYard
from .fake import DIGESTS, KEYS, FakeWorker, combination, dead, events, hold, publish
from .yard import SimulatedYard

OLD, NEW = "0" * 64, "1" * 64


@pytest.fixture
def scripts(redis: redis_py.Redis) -> Scripts:
    return Scripts(redis, KEYS, 1_000)


def listed(scripts: Scripts) -> dict[str, str]:
    """Adapter id -> digest, as clients see it."""
    found: Any = scripts.redis.hgetall(KEYS.adapters)
    return {name.decode(): json.loads(text)["digest"] for name, text in found.items()}


def test_clients_see_the_union(scripts: Scripts) -> None:
    assert hold(scripts, "h", a=OLD, b=OLD) == 2 and hold(scripts, "i", b=OLD, c=NEW) == 2
    assert listed(scripts) == {"a": OLD, "b": OLD, "c": NEW}
    hold(scripts, "h", a="", b="")
    assert listed(scripts) == {"b": OLD, "c": NEW}


def test_the_bytes_of_most_hosts_count_and_of_the_first_among_equals(scripts: Scripts) -> None:
    hold(scripts, "i", a=NEW)
    hold(scripts, "h", a=OLD)
    assert listed(scripts) == {"a": OLD}
    hold(scripts, "j", a=NEW)
    assert listed(scripts) == {"a": NEW}
    hold(scripts, "i", a="")
    assert listed(scripts) == {"a": OLD}


def test_a_version_rises_with_every_change_and_only_then(scripts: Scripts) -> None:
    seen = []
    for digest in (OLD, NEW, ""):
        hold(scripts, "h", a=digest)
        hold(scripts, "h")
        seen.append(int(scripts.redis.hget(KEYS.holders, "h").rpartition(b":")[2]))
    assert seen == [1000, 1001, 1002]


def test_a_holder_long_silent_is_forgotten(scripts: Scripts) -> None:
    hold(scripts, "gone", a=OLD, b=OLD)
    hold(scripts, "h", b=NEW)
    assert listed(scripts) == {"a": OLD, "b": OLD}
    scripts.now_ms += 500
    hold(scripts, "h", silent_ms=501)
    assert "a" in listed(scripts)
    hold(scripts, "h", silent_ms=500)
    assert listed(scripts) == {"b": NEW} and scripts.redis.hkeys(KEYS.holders) == [b"h"]


def simulated(redis: redis_py.Redis, **digests: str) -> SimulatedYard:
    """A yard of one GPU whose host holds only these."""
    yard = SimulatedYard(Scripts(redis, KEYS), 1, gpus=1, slots=2, seats=2, longest_ms=50)
    yard.held["gpu-h-0"] = set(digests)
    hold(yard.scripts, "gpu-h-0", **{name: digests.get(name, "") for name in DIGESTS})
    return yard


def lane_of(yard: SimulatedYard, digest: str) -> str:
    """Send a job for adapter a that is bound to these bytes; -> its lane."""
    lane = f"normal:a@{digest[:8]}"
    entry = yard.redis.xadd(KEYS.stream("normal"), {"prompt": "p"})
    yard.redis.xreadgroup("yard", "d", {KEYS.stream("normal"): ">"})
    fields = {"keep": 60, "reply": "stream", "batch": "", "req": b"request", "v": 1}
    arrival = Arrival(KEYS.stream("normal"), entry.decode(), "j", lane, "fp", "", fields)
    assert yard.scripts.accept([arrival], 9) == ["accepted"]
    return lane


@pytest.mark.parametrize(
    ("held", "word"), [({"a": NEW}, "were replaced"), ({"b": NEW}, "has vanished")], ids=["replaced", "vanished"]
)
def test_jobs_for_lost_bytes_are_refused_after_a_grace(redis: redis_py.Redis, held: dict[str, str], word: str) -> None:
    yard = simulated(redis, **held)
    lane_of(yard, OLD)
    yard.placer.tick()
    yard.scripts.now_ms += FORSAKE_MS - 1
    yard.placer.tick()
    assert events(yard.redis, "j") == []
    yard.scripts.now_ms += 1
    yard.placer.tick()
    (error,) = events(yard.redis, "j")
    assert error["code"] == "no_adapter" and word in error["error"] and "adapter a" in error["error"]
    assert yard.redis.hget(KEYS.depth, "normal") == b"0" and not yard.redis.exists(KEYS.lanes)


def test_jobs_for_a_host_that_is_down_wait(redis: redis_py.Redis) -> None:
    yard = simulated(redis, b=NEW)
    hold(yard.scripts, "gpu-down-0", a=OLD)
    lane = lane_of(yard, OLD)
    for _ in range(3):
        yard.scripts.now_ms += FORSAKE_MS
        yard.workers["gpu-h-0"].renew()
        yard.placer.tick()
    assert events(yard.redis, "j") == [] and yard.scripts.forsake(lane, 9, "text") == -1
    worker = FakeWorker(yard.scripts, "gpu-down-0", holder="gpu-down-0")
    assert worker.register()
    yard.placer.tick()
    assert [lease.id for lease in worker.claim()] == ["j"]


def test_no_verdict_before_every_worker_has_said_what_it_holds(redis: redis_py.Redis) -> None:
    yard = simulated(redis, b=NEW)
    lane_of(yard, OLD)
    assert FakeWorker(yard.scripts, "gpu-new-0", holder="gpu-new-0").register()
    for _ in range(3):
        yard.scripts.now_ms += FORSAKE_MS // 2
        yard.placer.tick()
    assert events(yard.redis, "j") == []


def test_a_job_runs_where_its_adapters_are(empty_yard: LiveYard) -> None:
    scripts = Scripts(empty_yard.redis, KEYS)
    publish(empty_yard.redis)
    hold(scripts, "gpu-h-0", a=DIGESTS["a"], b=DIGESTS["b"])
    hold(scripts, "gpu-h-1", b=DIGESTS["b"], c=DIGESTS["c"])
    for at in range(2):
        empty_yard.work(gpu=f"gpu-h-{at}", holder=f"gpu-h-{at}")
    empty_yard.serve()
    for _ in range(3):  # first by the placer, then straight from ACCEPT
        for name, gpu in (("a", "gpu-h-0"), ("c", "gpu-h-1")):
            assert empty_yard.final(empty_yard.send(adapter=name))["gpu"] == gpu
    both = empty_yard.send(adapter="a+c")
    held = empty_yard.send(adapter="a", prompt=HOLD)
    empty_yard.running(held)
    hold(scripts, "gpu-h-0", a="")
    hold(scripts, "gpu-h-1", a=DIGESTS["a"])
    assert empty_yard.final(both)["gpu"] == "gpu-h-1"
    assert empty_yard.final(empty_yard.send(adapter="a"))["gpu"] == "gpu-h-1"
    assert empty_yard.status(held) == "started", "what runs has its bytes"


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [("gpu", "slots", "many"), ("gpu", "window", ""), ("slots", "0.since", "soon"), ("load", "base", "x"),
     ("gpu", "beat_ms", "now")],
)  # fmt: skip
def test_a_malformed_gpu_gets_no_jobs_and_ends_nobody(
    yard: LiveYard, caplog: pytest.LogCaptureFixture, key: str, field: str, value: str
) -> None:
    caplog.set_level(logging.WARNING)
    names = {"gpu": KEYS.gpu, "slots": KEYS.slots, "load": KEYS.load}
    good = FakeWorker(Scripts(yard.redis, KEYS), "gpu-z-0")
    assert good.register()
    yard.redis.hset(KEYS.slots("gpu-z-0"), mapping={"0": combination("a"), "0.state": "open", "0.since": 1})
    yard.redis.hset(names[key]("gpu-z-0"), field, value)
    yard.until(lambda: "gpu-z-0" in caplog.text)
    assert yard.final(yard.send(adapter="a"))["gpu"] == "gpu-h-0"
    assert not dead(yard.redis)
