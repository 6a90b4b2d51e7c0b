"""A client of the yard for Python. It does what any Redis client can: XADD a job, XREAD its events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from redis import Redis

from lorayard.shared.connect import connect
from lorayard.shared.errors import LorayardError
from lorayard.shared.keys import Keys

FINAL = ("done", "error", "cancelled")
READ_S = 10.0
"""Longest single blocking read."""


class JobFailed(LorayardError):
    """The job ended without a text. `code`: one of `errors.REFUSALS`, or `cancelled`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


class NoAnswer(LorayardError):
    """No final event came in time. The job may still be waiting or running."""


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a job's stream. kind: tok, restart, done, error or cancelled; fields: its other fields."""

    kind: str
    fields: Mapping[str, str]

    @property
    def text(self) -> str:
        """New text of `tok`, whole text of `done`, else empty."""
        return self.fields.get("text", "")

    @property
    def final(self) -> bool:
        """Whether nothing follows."""
        return self.kind in FINAL


@dataclass(frozen=True, slots=True)
class Result:
    """A finished job. finish: `stop` or `length`; fields: all fields of its final event."""

    id: str
    text: str
    finish: str
    prompt_tokens: int
    new_tokens: int
    seed: int
    fields: Mapping[str, str]


class Client:
    """Submits jobs to one yard and reads their answers."""

    def __init__(self, redis: str | Redis, prefix: str = "yard:") -> None:
        self.redis: Redis = connect(redis) if isinstance(redis, str) else redis
        self.keys = Keys(prefix)

    def submit(self, prompt: str | None = None, *, adapter: str = "", cls: str = "normal", **fields: Any) -> str:
        """Send a job and return its id. `fields`: those of docs/wire.md, with lists as lists and flags as bools."""
        job_id = fields.pop("id", None) or secrets.token_hex(12)
        sent = {"id": job_id, "prompt": prompt, "adapter": adapter or None, **fields}
        flat: dict[Any, Any] = {name: _flat(value) for name, value in sent.items() if value is not None}
        self.redis.xadd(self.keys.stream(cls), flat)
        return str(job_id)

    def stream(self, job_id: str, timeout: float | None = None) -> Iterator[Event]:
        """Events of a job with `reply stream` as they come, from its first to its final one.

        After a `restart` the text begins anew; what an earlier attempt still says is left out.
        Raises NoAnswer when the final event has not come after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        last: bytes | str = b"0"
        attempt = 0
        while True:
            left = READ_S if deadline is None else min(READ_S, deadline - time.monotonic())
            if left <= 0:
                raise NoAnswer(f"job {job_id} has no answer after {timeout:g} s; it may still come")
            answer: Any = self.redis.xread({self.keys.out(job_id): last}, block=max(int(left * 1000), 1))
            for entry, raw in answer[0][1] if answer else ():
                last = entry
                fields = {_text(name): _text(value) for name, value in raw.items()}
                event = Event(fields.pop("ev", ""), fields)
                now_at = int(fields.get("attempt", attempt))
                if event.kind == "tok" and now_at < attempt:
                    continue
                attempt = max(attempt, now_at)
                yield event
                if event.final:
                    return

    def result(self, job_id: str, timeout: float | None = None) -> Result:
        """Wait for the end of a job with `reply stream`. Raises JobFailed, NoAnswer."""
        for event in self.stream(job_id, timeout):
            if event.final:
                return as_result(job_id, event)
        raise AssertionError("a stream ends with a final event")

    def cancel(self, job_id: str) -> None:
        """Ask for the end of a job: waiting, it never runs; running, it stops within a step."""
        self.redis.xadd(self.keys.control, {"op": "cancel", "id": job_id})


def as_result(job_id: str, event: Event) -> Result:
    """The result in a final event. Raises JobFailed if it is none."""
    fields = event.fields
    if event.kind == "cancelled":
        raise JobFailed("cancelled", f"job {job_id} was cancelled")
    if event.kind == "error":
        raise JobFailed(fields.get("code", "internal"), fields.get("error", ""))
    numbers = [int(fields.get(name, 0)) for name in ("prompt_tokens", "new_tokens", "seed")]
    return Result(job_id, event.text, fields.get("finish", ""), numbers[0], numbers[1], numbers[2], fields)


def _flat(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return json.dumps(list(value)) if isinstance(value, list | tuple) else value


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
