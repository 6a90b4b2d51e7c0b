"""A running yard without an engine: the real dispatcher in a thread, a fake worker in another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis as redis_py

from lorayard.dispatcher.serve import Dispatcher
from lorayard.shared.embedded import EmbeddedRedis
from lorayard.shared.job import Job
from lorayard.shared.scripts import Scripts

from .fake import KEYS, FakeWorker, dead, events, publish

HOLD = "hold"
"""A job with this prompt runs until it is stopped."""


class LiveYard:
    """What a client sees of it: streams and lists."""

    def __init__(self, server: EmbeddedRedis, redis: redis_py.Redis) -> None:
        self.server = server
        self.redis: Any = redis  # its types do not know what a reply holds
        self.ran: list[str] = []
        self._threads: dict[object, tuple[threading.Thread, Callable[[], None]]] = {}

    def serve(self, **options: int) -> Dispatcher:
        """Run a dispatcher."""
        dispatcher = Dispatcher(self.server.client(), KEYS, **options)
        self._spawn(dispatcher, dispatcher.serve, dispatcher.stop)
        return dispatcher

    def work(self, slots: int = 2, seats: int = 4, gpu: str = "gpu-h-0", holder: str = "") -> FakeWorker:
        """Publish a model and run a worker that answers `echo PROMPT`."""
        publish(self.redis)
        worker = FakeWorker(Scripts(self.server.client(), KEYS), gpu, slots, seats, holder)
        assert worker.register()
        stop = threading.Event()
        self._spawn(worker, lambda: self._run(worker, stop), stop.set)
        return worker

    def _run(self, worker: FakeWorker, stop: threading.Event) -> None:
        beat = 0.0
        while not stop.wait(0.002):
            if time.monotonic() > beat:
                beat = time.monotonic() + 1
                worker.renew()
            if worker.obey():
                for lease in worker.claim():
                    job = Job.unpack(lease.request)
                    self.ran.append(job.id)
                    if job.stream:
                        worker.emit(job.id, "echo ", 0)
                    if job.prompt != HOLD:
                        said = [message["content"] for message in job.messages] if job.messages else job.prompt
                        worker.done(
                            job.id, f"echo {said}", seed=job.sampling.seed, adapter=str(job.lora),
                            adapter_digest="+".join(job.digests),
                        )  # fmt: skip

    def _spawn(self, key: object, target: Callable[[], None], stop: Callable[[], None]) -> None:
        thread = threading.Thread(target=target)
        thread.start()
        self._threads[key] = thread, stop

    def halt(self, key: object) -> None:
        """Stop a dispatcher or a worker between two steps. It says goodbye to nobody."""
        thread, stop = self._threads.pop(key)
        stop()
        thread.join()

    def close(self) -> None:
        for key in list(self._threads):
            self.halt(key)

    def send(self, to: str = "yard:in", **fields: Any) -> str:
        """XADD; the id of the job."""
        entry = self.redis.xadd(to, {"prompt": "p"} | fields).decode()
        return str(fields.get("id", entry))

    def until(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, "it has not come"
            time.sleep(0.005)
        return found

    def final(self, job_id: str) -> dict[str, str]:
        """The one final event of a job."""
        self.until(lambda: any(event["ev"] in ("done", "error", "cancelled") for event in events(self.redis, job_id)))
        return events(self.redis, job_id)[-1]

    def listed(self, job_id: str) -> dict[str, Any]:
        """The one answer in a job's reply list."""
        _, answer = self.redis.blpop(f"yard:reply:{job_id}", 20)
        return dict(json.loads(answer))

    def cancel(self, job_id: str) -> None:
        self.redis.xadd("yard:ctl", {"op": "cancel", "id": job_id})

    def status(self, job_id: str) -> str:
        return (self.redis.hget(f"rq:job:{job_id}", "status") or b"").decode()

    def running(self, job_id: str) -> None:
        """Wait until it runs."""
        self.until(lambda: self.status(job_id) == "started")

    def dead(self) -> list[dict[str, str]]:
        return dead(self.redis)


def command(yard: LiveYard, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run `lorayard WORDS` against a yard."""
    env = os.environ | {"LORAYARD_REDIS_URL": yard.server.url}
    argv = [sys.executable, "-m", "lorayard.shared.cli", *words]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, **more)


@pytest.fixture
def empty_yard(redis_server: EmbeddedRedis, redis: redis_py.Redis) -> Iterator[LiveYard]:
    """Nothing runs yet."""
    yard = LiveYard(redis_server, redis)
    yield yard
    yard.close()


@pytest.fixture
def yard(empty_yard: LiveYard) -> LiveYard:
    """A dispatcher and a worker run."""
    empty_yard.work()
    empty_yard.serve()
    return empty_yard
