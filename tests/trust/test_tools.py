"""RQ's tools on a busy yard: they show it, disturb nothing, and nobody loads a pickle that somebody has planted."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py

from lorayard.dispatcher.serve import Dispatcher
from lorayard.dispatcher.snapshot import look
from lorayard.shared.children import spawn, stop
from lorayard.shared.embedded import EmbeddedRedis, find_server
from lorayard.shared.job import Job

from ..dispatcher.fake import KEYS
from ..worker.queue.conftest import GPU, Bench, FakeEngine
from .conftest import Starter, free_port, run
from .monitored import Mirror
from .test_users import guarded, url_of


class Dashboard:
    """The launcher as a process, and what its pages say."""

    def __init__(self, url: str, signs: Path) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "lorayard.dispatcher.monitor", "dashboard", "--port", str(self.port)]
        with signs.open("ab") as log:
            self.process = spawn(
                command, env=os.environ | {"LORAYARD_REDIS_URL": url}, parent_death=9, stdout=log, stderr=log
            )
        self.signs = signs

    def get(self, page: str) -> tuple[int, Any]:
        """Status and JSON of a page below /0/data/."""
        deadline = time.monotonic() + 20
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/0/data/{page}.json", timeout=10) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                return error.code, None
            except urllib.error.URLError:
                assert time.monotonic() < deadline and self.process.poll() is None, self.signs.read_text()
                time.sleep(0.05)


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[Any]:
    shown: list[Dashboard] = []

    def start(url: str) -> Dashboard:
        shown.append(Dashboard(url, tmp_path / "dashboard.log"))
        return shown[-1]

    yield start
    stop([one.process for one in shown], 5)


def rq_info(url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorayard.dispatcher.monitor", "info", "--raw"]
    return subprocess.run(
        command, env=os.environ | {"LORAYARD_REDIS_URL": url}, capture_output=True, text=True, timeout=30
    )


def books(redis: Any) -> dict[bytes, Any]:
    """All keys with what is in them, but for times and heartbeats."""
    read = {b"hash": redis.hgetall, b"list": lambda key: redis.lrange(key, 0, -1), b"set": redis.smembers,
            b"zset": lambda key: redis.zrange(key, 0, -1), b"string": redis.get, b"stream": redis.xrange}  # fmt: skip
    found = {
        key: read[redis.type(key)](key) for key in redis.scan_iter() if b"placer" not in key and b"gpu:" not in key
    }
    for fields in found.values():
        if isinstance(fields, dict):
            fields.pop(b"last_heartbeat", None)
    return found


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Bench]:
    """A bench on a server with the shipped users, worked at as `service`."""
    server = guarded(tmp_path / "redis", find_server()[0])
    url = url_of(server, "service")
    bench = Bench(redis_py.Redis.from_url(url), url)
    yield bench
    bench.close()
    server.close()


def test_the_tools_show_a_busy_yard_and_disturb_nothing(work: Bench, dashboard: Any) -> None:
    engine = FakeEngine()
    engine.gate.set()
    work.worker(engine)
    work.submit(Job("over", tokens=(1,)))
    work.final("over")
    engine.gate.clear()
    jobs = [f"j{at}" for at in range(6)]
    assert [work.submit(Job(job, tokens=(1, 2))) for job in jobs] == ["assigned"] * 6
    admin = redis_py.Redis.from_url(work.url.replace("service", "admin"))
    work.until(lambda: work.redis.llen(f"rq:queue:{GPU}") == 2)
    work.until(lambda: any(admin.hget(key, "state") == b"busy" for key in admin.smembers("rq:workers")))
    page = dashboard(work.url)
    page.get("queues")
    before = books(admin)
    _agree(page, work.url, "j0")
    assert books(admin) == before
    engine.gate.set()
    assert {work.final(job)["text"] for job in jobs} == {"1 2 "}
    assert admin.acl_log() == []


def _agree(page: Dashboard, url: str, running: str) -> None:
    """What the pages and `rq info` say of four running, two queued and one finished job."""
    status, said = page.get("queues")
    [queue] = said["queues"]
    assert status == 200 and (queue["name"], queue["count"]) == (GPU, 2)
    assert (queue["started_job_registry_count"], queue["finished_job_registry_count"]) == (4, 1)
    status, said = page.get("workers")
    assert status == 200 and [worker["state"] for worker in said["workers"]] == ["busy"]
    for registry, count in (("started", 4), ("finished", 1), ("queued", 2)):
        status, said = page.get(f"jobs/{GPU}/{registry}/8/asc/1")
        assert status == 200 and len(said["jobs"]) == count, registry
    status, said = page.get(f"job/{running}")
    assert status == 200 and said["status"] == "started" and said["id"] == running
    told = rq_info(url)
    assert told.returncode == 0 and f"queue {GPU} 2" in told.stdout and f"{GPU}." in told.stdout, told


def test_top_and_monitor_agree(server: Starter) -> None:
    """Whoever replays what MONITOR shows has the yard that `top` shows, and `top` adds nothing to it."""
    first, second = server(), server()
    mirror = Mirror(first.client(), second.client())
    bench, engine = Bench(first.client(), first.url), FakeEngine()
    bench.worker(engine)
    jobs = [f"j{at}" for at in range(6)]
    assert [bench.submit(Job(job, tokens=(1, 2))) for job in jobs] == ["assigned"] * 6
    bench.until(lambda: bench.redis.llen(f"rq:queue:{GPU}") == 2)
    for state in ((2, 4), (0, 0)):
        bench.until(lambda state=state: _loads(bench.redis) == state)  # type: ignore[misc]
        mirror.catch_up()
        assert _loads(second.client()) == state
        told = run_top(first.url)
        assert f"gpu {GPU} ready queued {state[0]} running {state[1]}/4 " in told and told == run_top(second.url), told
        engine.gate.set()
    bench.close()


def _loads(redis: Any) -> tuple[int, int]:
    """(queued, running) of the GPU."""
    [gpu] = look(redis, KEYS).gpus
    return gpu.queued, gpu.running


def run_top(url: str) -> str:
    """What `lorayard top --once` says of the GPU, but for the speed, which changes with the next beat."""
    words = [sys.executable, "-m", "lorayard.shared.cli", "top", "--once", "--redis", url]
    told = "".join(line for line in run(*words).splitlines(True) if line.startswith("gpu "))
    return re.sub(r"tokens/s \S+ in/s \S+ wait-ms \S+ ", "", told)


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_planted_pickle_is_never_loaded(
    redis: redis_py.Redis, redis_server: EmbeddedRedis, dashboard: Any, tmp_path: Path
) -> None:
    bench, engine = Bench(redis, redis_server.url), FakeEngine()
    engine.gate.set()
    mark = tmp_path / "loaded"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    mark.rmdir()  # it works
    dispatcher = Dispatcher(bench.redis, KEYS)
    planted = {"data": bomb, "meta": bomb, "result": b64encode(bomb), "exc_info": bomb}
    bench.worker(engine)
    assert bench.submit(Job("req", tokens=(1,)), req=bomb, **planted) == "assigned"
    assert bench.final("req")["code"] == "internal"
    bench.redis.hset(KEYS.info, mapping={"cache_tokens": 100, "max_rank": 8, "vocab_size": 9, "has_chat_template": 0})
    bench.redis.xadd("yard:in", {"id": "payload", "payload": bomb})
    bench.redis.xadd("yard:in", {"id": "prompt", "prompt": bomb, "tokens": bomb, "stop": bomb})
    dispatcher.ingress.make_groups()
    while bench.redis.xlen("yard:in"):
        dispatcher.step()
    assert bench.final("payload")["code"] == "bad_payload" and bench.final("prompt")["ev"] == "error"
    _plant_in_rq(bench.redis, planted, bomb)
    page = dashboard(bench.url)
    for what in ("queues", "workers", f"jobs/{GPU}/finished/8/asc/1", f"jobs/{GPU}/failed/8/asc/1",
                 f"jobs/{GPU}/started/8/asc/1", f"jobs/{GPU}/queued/8/asc/1", "job/evil", "job/req"):  # fmt: skip
        page.get(what)
        assert not mark.exists(), what
    said = rq_info(bench.url)
    assert not mark.exists(), said
    assert not mark.exists()
    bench.close()


def _plant_in_rq(redis: Any, planted: dict[str, bytes], bomb: bytes) -> None:
    """A job full of pickles in every registry, with a result, and a lease that has ended."""
    redis.hset("rq:job:evil", mapping=planted | {"status": "started", "origin": GPU, "created_at": "", "timeout": 9})
    redis.xadd("rq:results:evil", {"type": 1, "return_value": b64encode(bomb), "created_at": 1})
    redis.sadd("rq:queues", f"rq:queue:{GPU}")
    for registry in ("finished", "failed"):
        redis.zadd(f"rq:{registry}:{GPU}", {"evil": time.time() + 1000})
    redis.zadd(f"rq:wip:{GPU}", {"evil:e1": 1})
