"""A yard without dispatcher and model: jobs accepted by the real scripts, an engine that needs no model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import redis as redis_py

from lorayard.shared.job import Job
from lorayard.shared.keys import GROUP, Keys
from lorayard.shared.scripts import Arrival, Lease, Scripts
from lorayard.worker.queue.prepare import Prepared
from lorayard.worker.queue.worker import GpuWorker

GPU = "cpu-test-0"


@dataclass
class FakeEngine:
    """Says the prompt's tokens back, one a step, while `gate` is set. The token `poison` fails its job."""

    gate: threading.Event = field(default_factory=threading.Event)
    poison: int = -1
    jobs: dict[Any, deque[int]] = field(default_factory=dict)
    said: dict[Any, list[int]] = field(default_factory=dict)
    cancelled: int = 0
    most: int = 0
    step_s: float = 0.0

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def enqueue(self, prompt: Sequence[int], **options: Any) -> object:
        handle = object()
        self.jobs[handle] = deque(prompt[: options["max_tokens"]])
        self.said[handle] = []
        self.most = max(self.most, len(self.jobs))
        return handle

    def cancel(self, handle: object) -> None:
        self.cancelled += 1
        self.jobs.pop(handle, None)

    def iterate(self) -> list[Any]:
        time.sleep(self.step_s)
        if not self.gate.is_set():
            time.sleep(0.005)
            return []
        return [self._event(handle) for handle in list(self.jobs)]

    def _event(self, handle: object) -> Any:
        token = self.jobs[handle].popleft()
        self.said[handle].append(token)
        ended = not self.jobs[handle] or token == self.poison
        if ended:
            del self.jobs[handle]
        failed = token == self.poison
        return SimpleNamespace(
            handle=handle, text=f"{token} ", token_ids=[token], sample=0, logprobs=(), finished=ended, stop_match=None,
            finish="error" if failed else "length", error=RuntimeError("poison") if failed else None,
            full_text="".join(f"{t} " for t in self.said[handle]), prompt_tokens=len(self.said[handle]),
            new_tokens=len(self.said[handle]),
        )  # fmt: skip


def prepare(job: Job) -> Prepared:
    """Tokens as they are."""
    assert job.tokens is not None
    return Prepared(list(job.tokens), (), job.max_tokens or len(job.tokens))


class Bench:
    """Puts jobs on the GPU's queue and reads their answers."""

    def __init__(self, redis: redis_py.Redis, url: str) -> None:
        self.redis: Any = redis
        self.url = url
        self.keys = Keys()
        self.scripts = Scripts(redis, self.keys)
        self.redis.xgroup_create(self.keys.stream("normal"), GROUP, "0", mkstream=True)
        self.workers: list[tuple[GpuWorker, threading.Thread]] = []
        self.superseded = threading.Event()
        self.hung = threading.Event()
        self.faults: list[BaseException] = []

    def submit(self, job: Job, gpu: str = GPU, **fields: Any) -> str:
        """The outcome of ACCEPT."""
        stream = self.keys.stream("normal")
        entry = self.redis.xadd(stream, {"id": job.id})
        self.redis.xreadgroup(GROUP, "test", {stream: ">"})
        record: dict[str, Any] = {
            "req": job.pack(), "v": 1, "data": b'["f",null,[],{}]', "timeout": -1, "retries_left": 1000000,
            "keep": job.ttl, "reply": job.reply,
        } | ({"stream": "1"} if job.stream else {}) | fields  # fmt: skip
        lane = f"normal:{job.combination}"
        arrival = Arrival(stream, entry.decode(), job.id, lane, job.fingerprint(True), gpu, record)
        return self.scripts.accept([arrival], 10**6)[0]

    def cancel(self, job_id: str) -> str:
        """The outcome of CANCEL."""
        control = self.keys.control
        if not self.redis.exists(control):
            self.redis.xgroup_create(control, GROUP, "0", mkstream=True)
        entry = self.redis.xadd(control, {"op": "cancel", "id": job_id})
        self.redis.xreadgroup(GROUP, "test", {control: ">"})
        outcome: str = self.scripts.cancel(entry.decode(), job_id)
        return outcome

    def events(self, job_id: str) -> list[dict[str, str]]:
        """All events of a job so far."""
        entries = self.redis.xrange(self.keys.out(job_id))
        return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in entries]

    def final(self, job_id: str) -> dict[str, str]:
        """The final event, when it has come; fails if there is more than one."""
        self.until(lambda: any(event["ev"] in ("done", "error", "cancelled") for event in self.events(job_id)))
        [event] = [event for event in self.events(job_id) if event["ev"] in ("done", "error", "cancelled")]
        return event

    def until(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            assert not self.faults, self.faults
            time.sleep(0.005)

    def worker(self, engine: FakeEngine, name: str = f"{GPU}.aaaaaa", seats: int = 4, lease_ms: int = 10_000,
               prepare: Callable[[Job], Prepared] = prepare, gpu: str = GPU,
               hang_s: float = 60.0) -> GpuWorker:  # fmt: skip
        """A worker in a thread, in the yard."""
        beats = Scripts(redis_py.Redis.from_url(self.url), self.keys)
        scripts = Scripts(redis_py.Redis.from_url(self.url), self.keys)
        worker = GpuWorker(scripts, beats, gpu, name, seats, self.superseded.set, self.hung.set, lease_ms, hang_s)
        assert worker.join_yard(2 * lease_ms / 1000, {"slots": 2, "seats": seats, "window": 2 * seats}) is None

        def serve() -> None:
            try:
                worker.serve(engine, prepare, "basedigest")
            except BaseException as fault:
                self.faults.append(fault)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        self.workers.append((worker, thread))
        self.until(lambda: self.redis.hget(self.keys.gpu(gpu), "state") == b"ready")
        return worker

    def lease(self, job_id: str, gpu: str = GPU, name: str = f"{GPU}.aaaaaa") -> Lease:
        """Claim the one job of the queue by hand."""
        [lease] = self.scripts.claim(gpu, name, 10_000, 1, "f" * 26, 0)
        assert lease.id == job_id
        return lease

    def close(self) -> None:
        """Stop the workers."""
        for worker, thread in self.workers:
            worker.drain(0)
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def bench(redis: redis_py.Redis, redis_server: Any) -> Iterator[Bench]:
    bench = Bench(redis, redis_server.url)
    yield bench
    bench.close()


@pytest.fixture
def engine() -> FakeEngine:
    """Free running."""
    engine = FakeEngine()
    engine.gate.set()
    return engine
