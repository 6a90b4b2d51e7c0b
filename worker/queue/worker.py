"""The worker: takes jobs from its GPU queue, keeps the engine full, and tells Redis what comes out."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from redis.exceptions import RedisError
from rq.serializers import JSONSerializer
from rq.worker.base import BaseWorker

from lorayard.shared.connect import is_away
from lorayard.shared.errors import AdapterError, Refused
from lorayard.shared.job import Job, SamplingParams
from lorayard.shared.keys import rq_queue
from lorayard.shared.scripts import Lease, Message, News, Scripts, Value

from .figures import Figures
from .heartbeat import RECORD_S, Heartbeat
from .helper import Helper
from .outbox import Outbox
from .prepare import Prepared
from .running import Running
from .spec import HANG_S

log = logging.getLogger(__name__)

LEASE_MS = 10_000
"""Silence after which a worker counts as dead and its jobs run elsewhere."""
SOCKET_TIMEOUT_S = 3
"""How long a Redis that says nothing may hold up the engine, or the heart."""
IDLE_S = 0.5  # longest blocking look at an empty queue, so also what SIGTERM may wait for
PAUSE_S = 0.02  # between looks when there is nothing to wait for
AWAY_S = 0.5  # between tries while Redis is away
LEAVE_S = 5.0  # for giving back what is left when Redis is away


class Engine(Protocol):
    """What the worker needs of `Generator`."""

    @property
    def busy(self) -> bool: ...
    def enqueue(
        self, prompt: Sequence[int], *, max_tokens: int, min_tokens: int, sampling: SamplingParams,
        loras: Sequence[Any], stop: Sequence[str | int], slot: int | None, n: int, logprobs: int | None,
        prompt_logprobs: int | None, token_healing: bool, banned_strings: Sequence[str],
    ) -> Any: ...  # fmt: skip
    def cancel(self, handle: Any) -> object: ...
    def iterate(self) -> Sequence[Any]: ...


class GpuWorker(BaseWorker):
    """RQ's worker of one GPU queue, with many jobs in flight: the record is RQ's, the work loop is ours.

    In the heartbeat's thread `superseded` is called when the GPU has been given to another worker, `hung` when a step
    of the engine takes longer than `hang_s`. `beat_scripts` has the heartbeat's own connection.
    """

    connection_timeout = SOCKET_TIMEOUT_S
    """RQ raises the socket's timeout to this; its own choice would let the engine wait far longer."""

    def __init__(
        self, scripts: Scripts, beat_scripts: Scripts, gpu: str, name: str, seats: int,
        superseded: Callable[[], object], hung: Callable[[], object], lease_ms: int = LEASE_MS,
        hang_s: float = HANG_S,
    ) -> None:  # fmt: skip
        super().__init__(
            [gpu], name=name, connection=scripts.redis, serializer=JSONSerializer, worker_ttl=RECORD_S - 60
        )
        self.scripts, self.gpu, self.seats, self.lease_ms = scripts, gpu, seats, lease_ms
        self.heart = Heartbeat(beat_scripts, gpu, name, lease_ms, self._status, superseded, hang_s, hung)
        self._condition = "loading"
        self._outbox = Outbox(scripts, gpu, name)
        self._running: dict[str, Running] = {}
        self._handles: dict[Any, Running] = {}
        self._obeyed: list[str] = []
        self._waiting = 0
        self._found_job = False
        self._retry_at = 0.0
        self._drain_until: float | None = None
        self._figures = Figures()
        self.sensors: Callable[[], Mapping[str, Value]] = dict
        """What the GPU's sensors say, as fields of yard:gpu:GPU."""

    def join_yard(self, wait_s: float, fields: Mapping[str, Value]) -> str | None:
        """Take the GPU and start the heart. Waits for a predecessor that may be dead; -> its name if it lives on.

        `fields` go into yard:gpu:GPU.
        """
        deadline = time.monotonic() + wait_s
        while True:
            ok, detail = self.scripts.register(self.gpu, self.name, self.lease_ms, {**fields, **self._status()})
            if ok:
                break
            if time.monotonic() > deadline or self._drain_until is not None:
                return str(detail)
            time.sleep(PAUSE_S)
        self.register_birth()  # type: ignore[no-untyped-call]
        self.heart.start()
        return None

    def drain(self, grace_s: float) -> None:
        """Take no more jobs; those in flight have `grace_s` to end. Fit for a signal handler."""
        until = time.monotonic() + grace_s
        self._drain_until = min(self._drain_until or until, until)

    @property
    def draining(self) -> bool:
        """Whether `drain` has been called."""
        return self._drain_until is not None

    def serve(self, engine: Engine, prepare: Callable[[Job], Prepared], base_digest: str) -> None:
        """Work until drained, then give back what is left and leave the yard. Raises Superseded."""
        self._engine, self._helper, self._base_digest = engine, Helper(prepare), base_digest
        self._helper.start()
        self._publish("ready")
        while not self._drained():
            self._turn()
        self.leave()

    def _turn(self) -> None:
        self.heart.turned()
        news = self._exchange()
        if news is not None:
            self._obey(news)
            self._claim()
        self._admit()
        if self._engine.busy:
            self._step()
        elif not self._helper.busy and (news is None or not self._outbox.messages):
            self._idle(news)

    def _exchange(self) -> News | None:
        """Send and listen; None while Redis is away."""
        if time.monotonic() < self._retry_at:
            return None
        try:
            news = self._outbox.exchange(self._obeyed)
        except RedisError as error:
            self._back_off(error)
            return None
        self._retry_at = 0.0
        self._waiting = news.waiting
        return news

    def _back_off(self, error: RedisError) -> None:
        if not is_away(error):
            raise error
        if not self._retry_at:
            log.warning("Redis is away, the jobs in flight go on: %s", error)
        self._retry_at = time.monotonic() + AWAY_S

    def _obey(self, news: News) -> None:
        for job_id, execution in [*news.lost, *self.heart.take_lost()]:
            running = self._running.get(job_id)
            if running is not None and running.lease.execution == execution:
                log.warning("job %s: the lease is lost, it runs elsewhere", job_id)
                self._end(running, [])
                self._figures.ended["lost"] += 1
        for stop in news.stops:
            reason, _, job_id = stop.partition(":")
            if job_id in self._running:
                self._end(self._running[job_id], [self._running[job_id].stopped(reason)])
        self._obeyed = news.stops

    def _end(self, running: Running, messages: Sequence[Message]) -> None:
        """Let go of a job, with what its client must hear."""
        if running.handle is not None and self._handles.pop(running.handle, None) is not None:
            self._engine.cancel(running.handle)
        del self._running[running.lease.id]
        self.heart.drop(running.lease)
        self._outbox.messages += messages
        self._figures.ended.update(message.status for message in messages if message.status)

    def _claim(self) -> None:
        free = self.seats - len(self._running)
        if not self._waiting or free <= 0 or self._drain_until is not None:
            return
        try:
            leases = self.scripts.claim(
                self.gpu, self.name, self.lease_ms, free, secrets.token_hex(13), len(self._running)
            )
        except RedisError as error:  # what it may have started comes back through the heartbeat
            self._back_off(error)
            return
        self._found_job &= not leases
        for lease in leases:
            self.heart.hold(lease)
            self._figures.waited(lease.waited_ms)
            self._start(lease)

    def _start(self, lease: Lease) -> None:
        if lease.id in self._running:  # RQ's clean-up took the lease and queued the job again
            self._end(self._running[lease.id], [])
        self._running[lease.id] = running = Running(lease)
        self._helper.put(running)

    def _admit(self) -> None:
        """Hand to the engine what has been prepared and not been stopped meanwhile."""
        for running in self._helper.ready(0 if self._engine.busy or not self._helper.busy else PAUSE_S):
            if self._running.get(running.lease.id) is running:
                try:
                    self._enqueue(running)
                except Exception as error:
                    self._fail(running, error)

    def _enqueue(self, running: Running) -> None:
        if isinstance(running.prepared, Exception):
            raise running.prepared
        job, ready = running.job, running.prepared
        running.handle = self._engine.enqueue(
            ready.token_ids, max_tokens=ready.max_tokens, min_tokens=job.min_tokens, sampling=job.sampling,
            loras=ready.loras, stop=job.stop, slot=running.lease.slot, n=job.n, logprobs=job.logprobs,
            prompt_logprobs=job.prompt_logprobs, token_healing=job.token_healing, banned_strings=job.banned_strings,
        )  # fmt: skip
        self._handles[running.handle] = running
        self._figures.prompt_tokens += len(ready.token_ids)

    def _fail(self, running: Running, error: BaseException) -> None:
        if isinstance(error, Refused):
            message = running.refused(error.code, str(error))
        elif isinstance(error, AdapterError):
            message = running.refused("no_adapter", str(error))
        else:
            log.error("job %s failed", running.lease.id, exc_info=error)
            message = running.refused("internal", f"a fault of worker {self.name}; its log has the traceback")
        self._end(running, [message])

    def _step(self) -> None:
        events = self._engine.iterate()
        now = time.monotonic()
        for event in events:
            running = self._handles.get(event.handle)
            if running is None:
                continue
            running.add(event, now)
            self._figures.tokens += len(event.token_ids)
            if event.finished:
                self._finish(running, event, now)
            elif running.due(event.sample, now) and not self._retry_at:
                self._outbox.messages.append(running.cut(event.sample, now))

    def _finish(self, running: Running, event: Any, now: float) -> None:
        if event.finish == "error":
            self._fail(running, event.error)
        elif running.ended:
            del self._handles[running.handle]
            self._end(running, running.done(self.gpu, self._base_digest, now))

    def _idle(self, news: News | None) -> None:
        """Wait for a job, by a blocking command that takes the head of the queue and puts it back."""
        if news is None or self._found_job or self._drain_until is not None:
            self._found_job = False  # the one that was found is not for us: suspended, or a newer format
            time.sleep(PAUSE_S)
            return
        queue = rq_queue(self.gpu)
        try:
            self._found_job = self.connection.blmove(queue, queue, IDLE_S, "LEFT", "LEFT") is not None  # type: ignore[arg-type]
        except RedisError as error:
            self._back_off(error)

    def _status(self) -> dict[str, Value]:
        """Fields of yard:gpu:GPU that change."""
        in_hand = list(self._running.values())
        ready = {running.lease.slot for running in in_hand if running.handle is not None}
        loading = {running.lease.slot for running in in_hand if running.handle is None} - ready - {None}
        return {
            "state": self._condition, "running": len(in_hand), "queued": self._waiting,
            "loading": json.dumps(sorted(loading)), "still_s": round(self.heart.still_s, 1),
            **self._figures.fields(), **self.sensors(),
        }  # fmt: skip

    def _publish(self, condition: str) -> None:
        self._condition = condition
        self.heart.hasten()

    def _drained(self) -> bool:
        if self._drain_until is None:
            return False
        if self._condition != "draining":
            self._publish("draining")
            try:
                self.scripts.drain(self.gpu, self.name)
            except RedisError as error:
                self._back_off(error)
        return time.monotonic() > self._drain_until or not (self._running or self._outbox.messages)

    def leave(self) -> None:
        """Give back what is held and leave the GPU."""
        self.heart.stop()
        deadline = time.monotonic() + LEAVE_S
        while time.monotonic() < deadline:
            try:
                self._outbox.exchange()
                back = self.scripts.release(self.gpu, self.name)
                log.info("%s left the yard and gave back %d jobs", self.name, max(back, 0))
                return
            except RedisError as error:
                self._back_off(error)
                time.sleep(AWAY_S)
        log.warning("Redis is away: the jobs that were in flight run again when their leases have ended")
