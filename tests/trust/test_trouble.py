"""Redis killed, full, read-only, loading, slow, failed over, stormed: all wait, nothing is lost or told twice."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis as redis_py
from redis.backoff import ConstantBackoff
from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeout
from redis.retry import Retry

from lorayard.dispatcher.client import Client
from lorayard.dispatcher.serve import Dispatcher
from lorayard.shared.connect import connect, is_away
from lorayard.shared.keys import Keys
from lorayard.shared.scripts import Scripts
from lorayard.worker.queue.worker import SOCKET_TIMEOUT_S, GpuWorker

from ..dispatcher.fake import publish
from ..worker.queue.conftest import GPU, FakeEngine, prepare
from .conftest import BINARIES, Starter
from .proxy import Proxy


class Yard:
    """The real dispatcher and worker in threads, with a fake engine, on any Redis. `redis` is the client's."""

    def __init__(self, url: str, direct: str | None = None, lease_ms: int = 10_000) -> None:
        self.redis: Any = connect(direct or url, retry=Retry(ConstantBackoff(0.1), 100))
        self.faults: list[BaseException] = []
        publish(self.redis)
        self.engine = FakeEngine(step_s=0.002)
        self.engine.gate.set()
        self.dispatcher = Dispatcher(connect(url), Keys())
        scripts = [Scripts(connect(url, socket_timeout=SOCKET_TIMEOUT_S), Keys()) for _ in range(2)]
        self.worker = GpuWorker(scripts[0], scripts[1], GPU, f"{GPU}.aaaaaa", 8, self._fail, self._fail, lease_ms)
        assert self.worker.join_yard(30, {"slots": 2, "seats": 8, "window": 16}) is None
        self._threads = [threading.Thread(target=self._run, args=[target]) for target in (self._serve, self._work)]
        for thread in self._threads:
            thread.start()

    def _fail(self) -> None:
        """The worker wants to end for good, which nothing here is a reason for."""
        self.faults.append(AssertionError())

    def _serve(self) -> None:
        self.dispatcher.serve()

    def _work(self) -> None:
        self.worker.serve(self.engine, prepare, "basedigest")

    def _run(self, target: Any) -> None:
        try:
            target()
        except BaseException as fault:
            logging.getLogger(__name__).exception("a thread of the yard ended")
            self.faults.append(fault)

    def submit(self, count: int, name: str = "j", tokens: int = 20, **fields: Any) -> list[str]:
        """Send jobs; their ids."""
        ids = [f"{name}-{at}" for at in range(count)]
        for job in ids:
            self.redis.xadd("yard:in", {"id": job, "tokens": str(list(range(1, tokens + 1))), **fields})
        return ids

    def all_done(self, jobs: list[str], seconds: float = 40) -> None:
        """Each job has its one final event with its whole text."""
        deadline = time.monotonic() + seconds
        for job in jobs:
            while not (events := self.redis.xrange(f"yard:out:{job}")) or events[-1][1][b"ev"] in (b"tok", b"restart"):
                assert not self.faults, self.faults
                assert time.monotonic() < deadline, f"{job} has no answer; {self.redis.hgetall(f'rq:job:{job}')}"
                time.sleep(0.01)
            final = events[-1][1]
            assert final[b"ev"] == b"done" and len(final[b"text"].split()) == int(final[b"new_tokens"]), final
            assert sum(fields[b"ev"] == b"done" for _, fields in events) == 1

    def close(self) -> None:
        self.dispatcher.stop()
        self.worker.drain(0)
        for thread in self._threads:
            thread.join(30)
        assert not self.faults, self.faults


@pytest.fixture
def yard() -> Iterator[Any]:
    """Opens yards, and closes them before their servers."""
    yards: list[Yard] = []

    def open_on(*args: Any, **options: Any) -> Yard:
        yards.append(Yard(*args, **options))
        return yards[-1]

    yield open_on
    for one in yards:
        one.close()


@pytest.fixture
def trouble(server: Starter, yard: Any) -> Any:
    """(server, yard): the yard's fixture is asked for later, so the yard closes while its server still runs."""
    return server, yard


def until(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.01)


@pytest.mark.parametrize("binary", BINARIES)
def test_what_passes_is_told_from_what_does_not(server: Starter, binary: str) -> None:
    redis = server(binary=binary).client()
    write = redis.register_script("return redis.call('SET', 'k', 'v')")
    write()

    def away(action: Any) -> bool:
        with pytest.raises(redis_py.RedisError) as error:
            action()
        return is_away(error.value)

    def both() -> list[bool]:
        pipe = redis.pipeline(transaction=False)
        write(client=pipe)
        return [away(lambda: redis.set("k", "v")), away(write), away(pipe.execute)]

    redis.config_set("maxmemory", 1)
    assert both() == [True] * 3, "full"
    redis.config_set("maxmemory", 0)
    redis.config_set("min-replicas-to-write", 1)
    assert both() == [True] * 3, "without its replicas"
    redis.config_set("min-replicas-to-write", 0)
    redis.replicaof("127.0.0.1", "1")
    assert both() == [True] * 3, "a replica"
    redis.config_set("replica-serve-stale-data", "no")
    assert both() == [True] * 3, "a replica without data"
    redis.replicaof("no", "one")
    assert away(lambda: redis.xreadgroup("g", "c", {"nowhere": ">"})), "its data are lost"
    redis.lpush("list", 1)
    assert not away(lambda: redis.get("list")) and not away(lambda: redis.execute_command("NONSENSE"))
    redis.acl_setuser("poor", enabled=True, nopass=True, commands=["+get"])
    assert not away(
        lambda: redis_py.Redis(port=redis.get_connection_kwargs()["port"], username="poor", password="x").set("a", 1)
    )
    assert is_away(RedisConnectionError()) and is_away(RedisTimeout()) and not is_away(ValueError())


def counted_memory(redis: Any) -> int:
    """Bytes that maxmemory is held against."""
    memory = redis.info("memory")
    return int(memory["used_memory"]) - int(memory["mem_not_counted_for_evict"])


APPEND = ("--appendonly", "yes", "--save", "", "--appendfsync", "always")


def test_killed_and_restarted_under_load(trouble: Any) -> None:
    server, open_yard = trouble
    redis = server(*APPEND)
    yard = open_yard(redis.url)
    jobs = yard.submit(60)
    until(lambda: yard.redis.exists(f"yard:out:{jobs[5]}"))
    redis.kill()
    time.sleep(1.0)
    redis.start()
    yard.all_done(jobs + yard.submit(5, "later"))


@pytest.mark.parametrize("binary", BINARIES)
def test_full_under_load(trouble: Any, binary: str) -> None:
    """Running jobs finish, clients are refused, all goes on when there is room again, nothing is lost."""
    server, open_yard = trouble
    redis = server(*APPEND, binary=binary)
    yard = open_yard(redis.url)
    yard.engine.gate.clear()
    jobs = yard.submit(40, stream=1)
    until(lambda: yard.redis.zcard(f"rq:wip:{GPU}") == 8 and yard.redis.xlen("yard:in") == 0)
    ballast = [f"ballast-{at}" for at in range(128)]  # small ones, so that no buffer of the connection counts
    for name in ballast:
        yard.redis.set(name, bytes(64 << 10))
    yard.redis.config_set("maxmemory", counted_memory(yard.redis) - (4 << 20))
    with pytest.raises(OutOfMemoryError):
        yard.submit(1, "refused")
    yard.engine.gate.set()
    yard.all_done(jobs[:8])
    with pytest.raises(OutOfMemoryError):
        yard.submit(1, "refused")
    yard.redis.delete(*ballast)
    yard.all_done(jobs + yard.submit(5, "later"))


def test_read_only_for_a_while(trouble: Any, caplog: pytest.LogCaptureFixture) -> None:
    server, open_yard = trouble
    redis = server(*APPEND)
    yard = open_yard(redis.url)
    jobs = yard.submit(30, tokens=60)
    until(lambda: yard.redis.zcard(f"rq:wip:{GPU}"))
    yard.redis.config_set("replica-read-only", "yes")
    yard.redis.replicaof("127.0.0.1", "1")
    with pytest.raises(ReadOnlyError):
        yard.submit(1, "refused")
    time.sleep(1.0)
    yard.redis.replicaof("no", "one")
    yard.all_done(jobs + yard.submit(5, "later"))
    assert caplog.text.count("Redis does not serve us") <= 2


def test_loading(server: Starter) -> None:
    """A Redis that reads its data back is waited for."""
    redis = server("--save", "")
    client = redis.client()
    for at in range(20):
        client.set(f"key-{at}", os.urandom(4096))  # fit for no compression
    client.save()
    redis.kill()
    redis.words = ("--save", "", "--key-load-delay", "50000", "--loading-process-events-interval-bytes", "1024")
    redis.ready = "Server initialized"
    redis.start()
    until(lambda: loads(redis.client()))
    found = connect(redis.url)
    assert found.dbsize() == 20 and not loads(found)


def loads(redis: Any) -> bool:
    try:
        redis.ping()
    except RedisConnectionError as error:  # at first nobody listens yet
        return isinstance(error, BusyLoadingError)
    return False


def test_seconds_of_latency(trouble: Any) -> None:
    server, open_yard = trouble
    redis = server(*APPEND)
    proxy = Proxy(redis.port)
    yard = open_yard(proxy.url, redis.url)
    yard.all_done(yard.submit(5, "fast"))
    proxy.delay_s = 0.5  # an answer takes 1 s
    yard.all_done(yard.submit(3, "slow", tokens=1))
    proxy.delay_s = 4.0  # more than a worker waits
    late = yard.submit(8, "late", stream=1)
    time.sleep(4)
    proxy.delay_s = 0.0
    proxy.cut()
    yard.all_done(late)


def test_connections_cut_again_and_again(trouble: Any) -> None:
    server, open_yard = trouble
    redis = server(*APPEND)
    proxy = Proxy(redis.port)
    yard = open_yard(proxy.url, redis.url, lease_ms=2000)
    jobs = yard.submit(60, stream=1, tokens=40)
    for _ in range(10):
        time.sleep(0.15)
        proxy.cut()
    yard.all_done(jobs)
    client = Client(yard.redis)
    for job in jobs:
        events = list(client.stream(job, 1))
        again = max([at for at, event in enumerate(events) if event.kind == "restart"], default=-1)
        said = "".join(event.text for event in events[again + 1 : -1])
        assert said.split() == [str(token) for token in range(1, 41)], "no token is told twice"


def test_more_clients_than_redis_takes(trouble: Any) -> None:
    server, open_yard = trouble
    redis = server(*APPEND, "--maxclients", "40")
    yard = open_yard(redis.url)
    jobs = yard.submit(20, tokens=200)
    storm = [redis.client() for _ in range(60)]
    refused = 0
    for one in storm:
        try:
            one.ping()
        except (ResponseError, RedisConnectionError):
            refused += 1
    assert refused >= 15
    for one in storm:
        one.close()
    yard.all_done(jobs + yard.submit(5, "later"))
