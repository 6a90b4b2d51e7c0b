"""The loop: answers at once when idle, outlives Redis, stops when told, survives hostile entries and kill -9."""

from __future__ import annotations

import logging
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from lorayard.dispatcher.client import Client
from lorayard.shared.embedded import EmbeddedRedis

from .conftest import HOLD, LiveYard
from .fake import KEYS, events, publish


def test_an_idle_yard_assigns_within_milliseconds(yard: LiveYard) -> None:
    yard.final(yard.send(adapter="a"))  # opens a slot
    took = []
    for _ in range(30):
        time.sleep(0.01)
        job = yard.send(adapter="a")
        yard.final(job)
        (entry, fields), *_ = yard.redis.xrange(KEYS.out(job))
        took.append(int(entry.split(b"-")[0]) - int(job.split("-")[0]))
        assert fields[b"ev"] == b"done"
    assert statistics.median(took) <= 30, f"{took} ms from XADD to the final event"


def test_a_slot_is_opened_for_a_new_adapter_within_milliseconds(yard: LiveYard) -> None:
    job = yard.send(adapter="b")
    yard.final(job)
    entry = yard.redis.xrange(KEYS.out(job))[0][0]
    assert int(entry.split(b"-")[0]) - int(job.split("-")[0]) < 500


def test_waits_for_a_redis_that_restarts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    server = EmbeddedRedis(tmp_path)
    yard = LiveYard(server, server.client())
    try:
        yard.serve()
        publish(yard.redis)
        server.close()
        yard.until(lambda: "does not serve us" in caplog.text)
        server = yard.server = EmbeddedRedis(tmp_path)
        yard.redis = server.client()
        job = yard.send(prompt="p", adapter="nobody")
        assert yard.final(job)["code"] == "no_adapter"
        yard.until(lambda: "serves us again" in caplog.text)
        assert caplog.text.count("does not serve us") == 1, "one sentence however long it takes"
    finally:
        yard.close()
        server.close()


def test_a_queue_without_a_worker_is_given_back(empty_yard: LiveYard) -> None:
    empty_yard.serve()
    worker = empty_yard.work()
    empty_yard.halt(worker)
    job = empty_yard.send()
    empty_yard.until(lambda: empty_yard.status(job) == "queued")
    empty_yard.redis.delete(KEYS.gpu(worker.gpu))
    empty_yard.until(lambda: empty_yard.status(job) == "deferred")
    empty_yard.work()
    assert empty_yard.final(job)["ev"] == "done"


def test_rq_reads_our_jobs(yard: LiveYard) -> None:
    held, over = yard.send(prompt=HOLD, adapter="a*0.5"), yard.send()
    yard.running(held)
    yard.final(over)
    seen = [RqJob.fetch(job, connection=yard.redis, serializer=JSONSerializer) for job in (held, over)]
    assert [job.get_status() for job in seen] == ["started", "finished"]
    assert {job.func_name for job in seen} == {"lorayard.worker.queue.process.generate"}
    assert seen[0].description == "generate a*0.5" and seen[0].origin == "gpu-h-0" and seen[0].ended_at is None
    yard.cancel(held)


def test_groups_lost_with_the_data_are_made_again(yard: LiveYard) -> None:
    yard.redis.delete("yard:in", "yard:ctl", "yard:in:urgent", "yard:in:batch")
    assert yard.final(yard.send())["ev"] == "done"


def test_an_entry_deleted_while_pending_stops_nobody(yard: LiveYard) -> None:
    entry = yard.redis.xadd("yard:in", {"prompt": "p"})
    yard.redis.xdel("yard:in", entry)
    assert yard.final(yard.send())["ev"] == "done"


COMMAND = [sys.executable, "-m", "lorayard.shared.cli", "dispatcher"]


def start(server: EmbeddedRedis) -> subprocess.Popen[str]:
    env = os.environ | {"LORAYARD_REDIS_URL": server.url}
    process = subprocess.Popen(COMMAND, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and "serves" in process.stderr.readline()
    return process


def test_the_command_stops_on_sigterm(empty_yard: LiveYard) -> None:
    empty_yard.work()
    with start(empty_yard.server) as process:
        assert empty_yard.final(empty_yard.send())["ev"] == "done"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_kill_9_with_unread_entries_loses_none(empty_yard: LiveYard) -> None:
    """Kills at several moments; an entry that was taken and not finished comes back after 5 s."""
    empty_yard.work(seats=16)
    client = Client(empty_yard.server.client())
    jobs = []
    for moment in (0.0, 0.02, 0.05):
        with start(empty_yard.server) as process:
            jobs += [client.submit(prompt="p", adapter=name) for name in ("", "a", "b") for _ in range(70)]
            time.sleep(moment)
            process.kill()
    empty_yard.serve()
    for job in jobs:
        assert client.result(job, 30).text == "echo p"
        assert len(events(empty_yard.redis, job)) == 1
    assert empty_yard.redis.xlen("yard:in") == 0


def test_one_entry_that_fails_stops_no_other(yard: LiveYard) -> None:
    """A script fails on the foreign value that somebody has put where a job belongs."""
    yard.redis.set("rq:job:broken", "a text")
    for at in range(20):
        yard.send(id="broken" if at == 10 else f"j{at}")
    for at in range(20):
        if at != 10:
            assert yard.final(f"j{at}")["ev"] == "done"
    yard.redis.delete("rq:job:broken")
    assert yard.final(yard.send(id="broken"))["ev"] == "done"
