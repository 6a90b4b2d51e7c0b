"""Clients of the yard for Python. They do what any Redis client can: XADD a job, XREAD its events.

A connection that is lost raises redis' ConnectionError, and the next call connects again. Nothing is sent twice behind
your back; it is safe to do so yourself: `submit` again with the same `id` and fields has no effect if the first has
arrived, and `stream` and `result` of an id may be called again, from anywhere, until the job's `ttl` is over.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

from redis import Redis
from redis import asyncio as redis_asyncio

from lorayard.shared.connect import close_async, connect, connect_async
from lorayard.shared.keys import Keys

from .answers import (
    SINK,
    Collecting,
    Event,
    JobFailed,
    NoAnswer,
    Patience,
    Reading,
    Result,
    as_result,
    from_list,
    submission,
)

__all__ = ["AsyncClient", "Client", "Event", "JobFailed", "NoAnswer", "Result", "as_result"]


class Client:
    """Submits jobs to one yard and reads their answers."""

    def __init__(self, redis: str | Redis, prefix: str = "yard:") -> None:
        self.redis: Any = connect(redis) if isinstance(redis, str) else redis
        self.keys = Keys(prefix)

    def submit(self, prompt: str | None = None, *, adapter: str = "", cls: str = "normal", **fields: Any) -> str:
        """Send a job and return its id. `fields`: those of docs/wire.md, with lists as lists and flags as bools."""
        job_id, entry = submission(prompt, adapter, fields)
        self.redis.xadd(self.keys.stream(cls), entry)
        return job_id

    def stream(self, job_id: str, timeout: float | None = None) -> Iterator[Event]:
        """Events of a job with `reply stream` as they come, from its first to its final one.

        After a `restart` the text begins anew; what an earlier attempt still says is left out.
        Raises NoAnswer when the final event has not come after `timeout` seconds.
        """
        patience, reading, key = Patience(timeout), Reading(), self.keys.out(job_id)
        while True:
            block = _ms(patience.for_job(job_id))
            for event in reading.events(self.redis.xread({key: reading.last}, block=block)):
                yield event
                if event.final:
                    return

    def result(self, job_id: str, timeout: float | None = None) -> Result:
        """Wait for the end of a job with `reply stream`. Raises JobFailed, NoAnswer."""
        for event in self.stream(job_id, timeout):
            if event.final:
                return as_result(job_id, event)
        raise AssertionError("a stream ends with a final event")

    def take(self, job_id: str, timeout: float | None = None) -> Result:
        """Wait for the answer of a job with `reply list`, which is there once. Raises JobFailed, NoAnswer."""
        patience, key = Patience(timeout), self.keys.reply(job_id)
        while not (reply := self.redis.blpop([key], patience.for_job(job_id))):
            pass
        return as_result(job_id, from_list(reply))

    def results(
        self, batch: str, timeout: float | None = None, reader: str = "reader"
    ) -> Generator[tuple[str, Event], None, None]:  # fmt: skip
        """(job id, final event) of the jobs with `reply batch` as they end; stops after `timeout` s without any.

        An answer is deleted when the next is asked for, so store it before. What a reader had when it died comes again
        to a reader of the same name; several names share the work.
        """
        patience, collecting, key = Patience(timeout), Collecting(), self.keys.results(batch)
        while seconds := patience.next_s():
            pipe = self.redis.pipeline(transaction=False)
            pipe.xgroup_create(key, SINK, "0", mkstream=True)
            pipe.xreadgroup(SINK, reader, {key: collecting.cursor}, count=100, block=_ms(seconds))
            for entry, job_id, event in collecting.results(*pipe.execute(raise_on_error=False)):
                yield job_id, event
                pipe.xack(key, SINK, entry)
                pipe.xdel(key, entry)
                pipe.execute()
                patience.renew()

    def cancel(self, job_id: str) -> None:
        """Ask for the end of a job: waiting, it never runs; running, it stops within a step."""
        self.redis.xadd(self.keys.control, {"op": "cancel", "id": job_id})


class AsyncClient:
    """`Client` for asyncio, with the same verbs. `async with` closes its connections; `redis` may be a client's own."""

    def __init__(self, redis: str | redis_asyncio.Redis, prefix: str = "yard:") -> None:
        self.redis: Any = connect_async(redis) if isinstance(redis, str) else redis
        self.keys = Keys(prefix)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await close_async(self.redis)

    async def submit(
        self, prompt: str | None = None, *, adapter: str = "", cls: str = "normal", **fields: Any
    ) -> str:  # fmt: skip
        """See `Client.submit`."""
        job_id, entry = submission(prompt, adapter, fields)
        await self.redis.xadd(self.keys.stream(cls), entry)
        return job_id

    async def stream(self, job_id: str, timeout: float | None = None) -> AsyncIterator[Event]:
        """See `Client.stream`."""
        patience, reading, key = Patience(timeout), Reading(), self.keys.out(job_id)
        while True:
            block = _ms(patience.for_job(job_id))
            for event in reading.events(await self.redis.xread({key: reading.last}, block=block)):
                yield event
                if event.final:
                    return

    async def result(self, job_id: str, timeout: float | None = None) -> Result:
        """See `Client.result`."""
        async for event in self.stream(job_id, timeout):
            if event.final:
                return as_result(job_id, event)
        raise AssertionError("a stream ends with a final event")

    async def take(self, job_id: str, timeout: float | None = None) -> Result:
        """See `Client.take`."""
        patience, key = Patience(timeout), self.keys.reply(job_id)
        while not (reply := await self.redis.blpop([key], patience.for_job(job_id))):
            pass
        return as_result(job_id, from_list(reply))

    async def results(
        self, batch: str, timeout: float | None = None, reader: str = "reader"
    ) -> AsyncIterator[tuple[str, Event]]:
        """See `Client.results`."""
        patience, collecting, key = Patience(timeout), Collecting(), self.keys.results(batch)
        while seconds := patience.next_s():
            pipe = self.redis.pipeline(transaction=False)
            pipe.xgroup_create(key, SINK, "0", mkstream=True)
            pipe.xreadgroup(SINK, reader, {key: collecting.cursor}, count=100, block=_ms(seconds))
            for entry, job_id, event in collecting.results(*await pipe.execute(raise_on_error=False)):
                yield job_id, event
                pipe.xack(key, SINK, entry)
                pipe.xdel(key, entry)
                await pipe.execute()
                patience.renew()

    async def cancel(self, job_id: str) -> None:
        """See `Client.cancel`."""
        await self.redis.xadd(self.keys.control, {"op": "cancel", "id": job_id})


def _ms(seconds: float) -> int:
    return max(int(seconds * 1000), 1)
