"""What a client sends and what it makes of Redis' replies, without any I/O: that is what `client.py` adds."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from lorayard.shared.errors import LorayardError

FINAL = ("done", "error", "cancelled")
READ_S = 10.0
"""Longest single blocking read."""

SINK = "sink"
"""Consumer group of those that read a batch's results."""


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
    """A finished job. finish: `stop` or `length`; fields: all fields of its final event.

    Of several samples text and finish are empty; `texts` and `finishes` are among the fields.
    """

    id: str
    text: str
    finish: str
    prompt_tokens: int
    new_tokens: int
    seed: int
    fields: Mapping[str, str]


def submission(prompt: str | None, adapter: str, fields: Mapping[str, Any]) -> tuple[str, dict[Any, Any]]:
    """(id, fields of the stream entry) of a job; an id is drawn unless `fields` has one."""
    job_id = fields.get("id") or secrets.token_hex(12)
    sent = {**fields, "id": job_id, "prompt": prompt, "adapter": adapter or None}
    return str(job_id), {name: _flat(value) for name, value in sent.items() if value is not None}


def as_result(job_id: str, event: Event) -> Result:
    """The result in a final event. Raises JobFailed if it is none."""
    fields = event.fields
    if event.kind == "cancelled":
        raise JobFailed("cancelled", f"job {job_id} was cancelled")
    if event.kind == "error":
        raise JobFailed(fields.get("code", "internal"), fields.get("error", ""))
    numbers = [int(fields.get(name, 0)) for name in ("prompt_tokens", "new_tokens", "seed")]
    return Result(job_id, event.text, fields.get("finish", ""), numbers[0], numbers[1], numbers[2], fields)


class Patience:
    """Seconds that a reader waits, None: for ever, cut into blocking reads."""

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self.renew()

    def renew(self) -> None:
        """Begin to wait anew."""
        self._until = None if self.timeout is None else time.monotonic() + self.timeout

    def next_s(self) -> float:
        """How long the next read may block, 0 if there is no time left."""
        return READ_S if self._until is None else max(min(READ_S, self._until - time.monotonic()), 0.0)

    def for_job(self, job_id: str) -> float:
        """`next_s`. Raises NoAnswer when it is 0."""
        if not (seconds := self.next_s()):
            raise NoAnswer(f"job {job_id} has no answer after {self.timeout:g} s; it may still come")
        return seconds


class Reading:
    """The stream of one job, read so far up to entry `last`."""

    def __init__(self) -> None:
        self.last: bytes | str = b"0"
        self._attempt = 0

    def events(self, reply: Any) -> Iterator[Event]:
        """Events of a reply to XREAD, without what an earlier attempt says after a `restart`."""
        for entry, raw in reply[0][1] if reply else ():
            self.last = entry
            event = _event(raw)
            attempt = int(event.fields.get("attempt", self._attempt))
            if event.kind != "tok" or attempt >= self._attempt:
                self._attempt = max(attempt, self._attempt)
                yield event


class Collecting:
    """The results of a batch, read by one of a group: at first what it had taken before and not acknowledged."""

    def __init__(self) -> None:
        self.cursor: bytes | str = b"0"

    def results(self, made: Any, reply: Any) -> list[tuple[bytes | str, str, Event]]:
        """(entry, job id, final event) of the replies to XGROUP CREATE and XREADGROUP. Raises what they are."""
        if isinstance(made, Exception) and not str(made).startswith("BUSYGROUP"):
            raise made
        if isinstance(reply, ResponseError) and str(reply).startswith(("NOGROUP", "UNBLOCKED")):
            return []  # the stream expired meanwhile; the group is made again
        if isinstance(reply, Exception):
            raise reply
        entries = reply[0][1] if reply else []
        if self.cursor != b">":
            self.cursor = entries[-1][0] if entries else b">"
        return [(entry, _text(raw.get(b"id", raw.get("id"))), _event(raw)) for entry, raw in entries if raw]


def from_list(reply: Any) -> Event:
    """The event in a reply to BLPOP of a job with `reply list`."""
    fields = {name: str(value) for name, value in json.loads(reply[1]).items()}
    return Event(fields.pop("ev", ""), fields)


def _event(raw: Mapping[Any, Any]) -> Event:
    fields = {_text(name): _text(value) for name, value in raw.items()}
    return Event(fields.pop("ev", ""), fields)


def _flat(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return json.dumps(list(value)) if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
