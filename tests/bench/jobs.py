"""Speed of the queue: real Redis, dispatcher and worker, and an engine that answers every job in its first step.

    python tests/bench/jobs.py [--jobs 20000]

Throughput is of jobs that are already on the GPU's queue, with answers in one result stream. CPU is user and system
time of the process, all its threads together.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import click
import redis as redis_py

from lorayard.demo import BASE
from lorayard.dispatcher.serve import Dispatcher
from lorayard.dispatcher.validate import record
from lorayard.shared.connect import connect
from lorayard.shared.embedded import EmbeddedRedis
from lorayard.shared.job import Job, SamplingParams
from lorayard.shared.keys import GROUP, Keys
from lorayard.shared.scripts import Arrival, Scripts
from lorayard.worker.queue.adapters import AdapterLibrary
from lorayard.worker.queue.prepare import Prepared, Preparer
from lorayard.worker.queue.worker import LEASE_MS, SOCKET_TIMEOUT_S, GpuWorker
from lorayard.worker.text.tokenizer import Tokenizer

KEYS = Keys()
GPU = "cpu-bench-0"
SEATS = 64
INFO = {
    "version": "0", "wire_version": 1, "model": "fake", "base_digest": "0" * 64, "cache_tokens": 4096, "max_rank": 64,
    "vocab_size": 1000, "has_chat_template": 0,
}  # fmt: skip
SPAWN = multiprocessing.get_context("spawn")


class Engine:
    """Ends all jobs with one token in the next step; never, while `held`."""

    def __init__(self, held: bool = False) -> None:
        self.held = held
        self.jobs: list[object] = []

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def enqueue(self, prompt: Any, **options: Any) -> object:
        self.jobs.append(handle := object())
        return handle

    def cancel(self, handle: object) -> None:
        if handle in self.jobs:
            self.jobs.remove(handle)

    def iterate(self) -> list[Any]:
        if self.held:
            time.sleep(0.005)
            return []
        ended, self.jobs = self.jobs, []
        return [
            SimpleNamespace(
                handle=handle,
                text="x",
                token_ids=[1],
                sample=0,
                logprobs=(),
                finished=True,
                finish="length",
                stop_match=None,
                full_text="x",
                prompt_tokens=4,
                new_tokens=1,
                error=None,
            )  # fmt: skip
            for handle in ended
        ]


def prepare(job: Job) -> Prepared:
    return Prepared(list(job.tokens or ()), (), job.max_tokens or 1)


def prepare_texts() -> Callable[[Job], Prepared]:
    """As a real worker does it, with the demo's tokenizer."""

    def load(path: Path) -> NoReturn:
        raise AssertionError(f"the jobs of this bench have no adapter, so not {path}")

    return Preparer(Tokenizer.from_directory(BASE), AdapterLibrary(dict, load, keep=1), capacity=4096)


def run_worker(url: str, gpu: str, go: Event, end: Event, pipe: Any, held: bool, texts: bool, lease_ms: int) -> None:
    """A worker process: says that it has joined, serves from `go` until `end`, tells its CPU time and its beats."""
    scripts, beats = (Scripts(connect(url, socket_timeout=SOCKET_TIMEOUT_S), KEYS) for _ in range(2))
    times: list[float] = []
    renew = beats.renew

    def timed(*args: Any) -> list[str]:
        times.append(time.monotonic())
        return renew(*args)

    beats.renew = timed  # type: ignore[method-assign, assignment]
    worker = GpuWorker(
        scripts, beats, gpu, f"{gpu}.{'held' if held else 'free'}", SEATS, lambda: None, lambda: None, lease_ms
    )
    holder = worker.join_yard(60, {"slots": 2, "seats": SEATS, "window": 10**6})
    assert holder is None, holder
    preparer = prepare_texts() if texts else prepare
    worker._publish("ready")  # jobs may be assigned before it serves
    while scripts.redis.hget(KEYS.gpu(gpu), "state") != b"ready":
        time.sleep(0.01)
    pipe.send(None)
    go.wait()
    times.clear()

    def drain() -> None:
        end.wait()
        worker.drain(0)

    threading.Thread(target=drain, daemon=True).start()
    before = cpu_s()
    worker.serve(Engine(held), preparer, "0" * 64)
    pipe.send((cpu_s() - before, times))


def run_dispatcher(url: str) -> None:
    Dispatcher(connect(url), KEYS).serve()


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Yard:
    """An empty Redis and the processes on it."""

    def __init__(self, url: str, redis: redis_py.Redis) -> None:
        self.url = url
        self.redis: Any = redis
        self.scripts = Scripts(redis, KEYS)
        redis.flushall()
        redis.hset(KEYS.info, mapping=INFO)
        redis.xgroup_create(KEYS.stream("normal"), GROUP, "0", mkstream=True)
        self.processes: list[Any] = []

    def worker(self, gpu: str = GPU, held: bool = False, texts: bool = False, lease_ms: int = LEASE_MS) -> Any:
        """A worker that has joined: its process, events that start and end its work, and the pipe it reports on."""
        here, there = SPAWN.Pipe()
        go, end = SPAWN.Event(), SPAWN.Event()
        process = self._start(run_worker, self.url, gpu, go, end, there, held, texts, lease_ms)
        here.recv()
        return SimpleNamespace(process=process, go=go.set, end=end.set, report=here.recv)

    def dispatcher(self) -> Any:
        return self._start(run_dispatcher, self.url)

    def _start(self, target: Callable[..., None], *args: Any) -> Any:
        process = SPAWN.Process(target=target, args=args, daemon=True)
        process.start()
        self.processes.append(process)
        return process

    def preassign(self, jobs: int, **fields: Any) -> float:
        """Put jobs on the GPU's queue; returns seconds of this process for a job."""
        start, stream = cpu_s(), KEYS.stream("normal")
        for first in range(0, jobs, 200):
            ids = [f"j{at}" for at in range(first, min(first + 200, jobs))]
            pipe = self.redis.pipeline(transaction=False)
            for job_id in ids:
                pipe.xadd(stream, {"id": job_id})
            entries = [entry.decode() for entry in pipe.execute()]
            self.redis.xreadgroup(GROUP, "bench", {stream: ">"})
            arrivals = []
            for job_id, entry in zip(ids, entries, strict=True):
                job = Job(job_id, sampling=SamplingParams(seed=7), max_tokens=1, reply="batch", batch="b",
                          **{"tokens": (1, 2, 3, 4)} | fields)  # fmt: skip
                arrivals.append(Arrival(stream, entry, job_id, "normal:base", job_id, GPU, record(job)))
            outcomes = set(self.scripts.accept(arrivals, 10**6))
            assert outcomes == {"assigned"}, outcomes
        return (cpu_s() - start) / jobs

    def redis_cpu_s(self) -> float:
        used = self.redis.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])

    def until(self, condition: Callable[[], object], pause_s: float = 0.01, within_s: float = 60) -> float:
        """Seconds until it is true."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < within_s, "it does not come true"
            time.sleep(pause_s)
        return time.monotonic() - start

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def throughput(yard: Yard, jobs: int) -> Iterator[tuple[str, str, str]]:
    worker = yard.worker()
    yard.preassign(jobs)
    yard.redis.config_resetstat()
    redis_before = yard.redis_cpu_s()
    worker.go()
    wall = yard.until(lambda: yard.redis.xlen(KEYS.results("b")) == jobs, 0.02)
    redis_s = yard.redis_cpu_s() - redis_before
    worker.end()
    cpu, _ = worker.report()
    yield "claim + settle, one worker", f"{jobs / wall:,.0f} jobs/s", "5,000"
    yield "CPU of the worker", f"{1e6 * cpu / jobs:.0f} us a job", "< 100"
    yield "CPU of Redis", f"{1e6 * redis_s / jobs:.0f} us a job", "< 200"


def intake(yard: Yard, jobs: int) -> Iterator[tuple[str, str, str]]:
    dispatcher = Dispatcher(connect(yard.url), KEYS)
    dispatcher.ingress.make_groups()
    pipe = yard.redis.pipeline(transaction=False)
    for at in range(jobs):
        pipe.xadd(KEYS.stream("normal"), {"id": f"i{at}", "tokens": "[1,2,3,4]", "reply": "batch", "batch": "i"})
    pipe.execute()
    before, start, redis_before = cpu_s(), time.monotonic(), yard.redis_cpu_s()
    accepted = 0
    while accepted < jobs:
        accepted += dispatcher.ingress.step(0, lambda combination: "")["accepted"]
    wall, redis_s = time.monotonic() - start, yard.redis_cpu_s() - redis_before
    yield "accept, one dispatcher", f"{jobs / wall:,.0f} jobs/s", ""
    yield "CPU of the dispatcher", f"{1e6 * (cpu_s() - before) / jobs:.0f} us a job", "< 130"
    yield "CPU of Redis", f"{1e6 * redis_s / jobs:.0f} us a job", ""


def latency(yard: Yard, jobs: int) -> Iterator[tuple[str, str, str]]:
    worker = yard.worker()
    yard.dispatcher()
    worker.go()
    times = []
    for at in range(jobs + 5):
        start = time.monotonic()
        yard.redis.xadd(KEYS.stream("normal"), {"id": f"l{at}", "tokens": "[1,2,3,4]"})
        answer = yard.redis.xread({KEYS.out(f"l{at}"): "0"}, block=30_000)
        assert answer[0][1][0][1][b"ev"] == b"done", answer
        times.append(1e3 * (time.monotonic() - start))
        time.sleep(0.003)
    times = sorted(times[5:])
    yield "submit to answer, idle, p50", f"{statistics.median(times):.1f} ms", "< 10"
    yield "submit to answer, idle, p99", f"{times[int(0.99 * len(times))]:.1f} ms", "< 25"


def death(yard: Yard, supervised: bool) -> Iterator[tuple[str, str, str]]:
    held = yard.worker(held=True)
    yard.preassign(SEATS)
    yard.dispatcher()
    held.go()
    yard.until(lambda: yard.redis.zcard(f"rq:wip:{GPU}") == SEATS)
    yard.worker("cpu-bench-1").go()
    held.process.kill()
    start = time.monotonic()
    held.process.join()
    if supervised:
        yard.scripts.reclaim(GPU, f"{GPU}.held")  # what a supervisor does when its child ends
    yard.until(lambda: yard.redis.xlen(KEYS.results("b")) == SEATS)
    by, goal = ("supervisor", "< 1") if supervised else ("lease", "< 15")
    yield f"{SEATS} jobs answered after kill -9, by its {by}", f"{time.monotonic() - start:.2f} s", goal


def beats(yard: Yard, prompts: int) -> Iterator[tuple[str, str, str]]:
    worker = yard.worker(texts=True, lease_ms=1000)
    text = ("The quick brown fox jumps over 13 lazy dogs. " * 24000)[: (1 << 20) - 1000]
    yard.preassign(prompts, tokens=None, prompt=text)
    worker.go()
    yard.until(lambda: yard.redis.xlen(KEYS.results("b")) == prompts, within_s=600)
    worker.end()
    _, times = worker.report()
    late = max(b - a for a, b in zip(times, times[1:], strict=False)) - 0.25
    yield f"latest of {len(times)} heartbeats during {prompts} prompts of 1 MiB", f"{1e3 * late:.0f} ms", "< 100"


@click.command(context_settings={"show_default": True})
@click.option("--jobs", default=20_000, help="Jobs of the throughput rows; fewer for the others.")
def main(jobs: int) -> None:
    """Measure the queue."""
    parts: list[Callable[[Yard], Iterator[tuple[str, str, str]]]] = [
        lambda yard: throughput(yard, jobs), lambda yard: intake(yard, jobs // 4),
        lambda yard: latency(yard, jobs // 40), lambda yard: death(yard, True), lambda yard: death(yard, False),
        lambda yard: beats(yard, 20),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder), max_memory=1 << 30) as server:
        redis = server.client()
        click.echo(f"Redis {redis.info('server')['redis_version']}, {multiprocessing.cpu_count()} cores")
        click.echo(f"{'':<52} {'measured':>16} {'goal':>8}")
        for part in parts:
            with contextlib.closing(Yard(server.url, redis)) as yard:
                for what, measured, goal in part(yard):
                    click.echo(f"{what:<52} {measured:>16} {goal:>8}")


if __name__ == "__main__":
    main()
