"""The Lua scripts as typed calls. Everything that moves a job is one of them, so every move is atomic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
from redis import Redis
from redis.client import Pipeline

from . import WIRE_VERSION
from .keys import Keys

LUA = Path(__file__).parent / "lua"
EARLY_CANCEL_S = 3600
"""How long a cancellation that came before its job is remembered."""

MOST_ARRIVALS, MOST_BYTES = 32, 1 << 20
"""Entries, and bytes of several entries together, in one call of ACCEPT, which takes Redis about 0.1 ms an entry."""

Value = str | bytes | int | float


class Arrival(NamedTuple):
    """A stream entry that is a valid job. lane: CLASS:COMBINATION. gpu: where it may run at once, "" for nowhere.

    fields: of the job's hash.
    """

    stream: str
    entry: str
    id: str
    lane: str
    fingerprint: str
    gpu: str
    fields: Mapping[str, Value]


class Lease(NamedTuple):
    """A job that a worker has claimed. `waited_ms` is the time since it was accepted; slot is None for the base."""

    id: str
    execution: str
    request: bytes
    attempt: int
    slot: int | None
    waited_ms: int


class Message(NamedTuple):
    """An event of a leased job. It begins with `ev`, and for an error goes on with `code`.

    status: "" for new text; finished, failed or canceled for the final event.
    """

    lease: Lease
    event: Mapping[str, Value]
    status: str = ""


class News(NamedTuple):
    """Jobs that wait in the GPU queue, `cancel:ID` and `expire:ID` to obey, (id, execution) of leases found lost."""

    waiting: int
    stops: list[str]
    lost: list[tuple[str, str]]


class Superseded(Exception):
    """The GPU has been given to another worker: this one must stop without touching anything."""


class Scripts:
    """One method a script; the head of each .lua file says what it does, its arguments and its answer.

    With `pipe` the call is queued on that pipeline and the method returns None; the answer is in `pipe.execute()`,
    except for `claim`, whose rows `leases` reads. `now_ms` replaces Redis' clock, for tests and simulations.
    """

    def __init__(self, redis: Redis, keys: Keys, now_ms: int = 0) -> None:
        self.redis, self.keys, self.now_ms = redis, keys, now_ms
        common = (LUA / "common.lua").read_text()
        self._scripts = {
            path.stem: redis.register_script(common + path.read_text())
            for path in LUA.glob("*.lua")
            if path.stem != "common"
        }

    def _run(self, name: str, keys: Iterable[str], args: Iterable[Value], pipe: Pipeline | None = None) -> Any:
        answer = self._scripts[name](keys=list(keys), args=[self.keys.prefix, self.now_ms, *args], client=pipe)
        return None if pipe is not None else _text(answer)

    def accept(self, arrivals: Iterable[Arrival], limit: int) -> list[str]:
        """-> for each accepted | assigned | duplicate | conflict | busy | expired | cancelled | stale, or `-ERROR`.

        limit: most jobs of a class that may wait. Redis serves others between calls of at most `MOST_ARRIVALS`.
        """
        rows = [msgpack.packb((*each[:-1], _texts(each.fields)), use_bin_type=False) for each in arrivals]
        return [outcome for part in _parts(rows) for outcome in self._run("accept", [], [limit, *part])]

    def reject(
        self, stream: str, entry: str, job_id: str, fingerprint: str, code: str, message: str,
        reply: str = "stream", batch: str = "", ttl: int = 3600, pipe: Pipeline | None = None,
    ) -> Any:  # fmt: skip
        """-> rejected | duplicate | stale. `job_id` is "" if it is malformed."""
        return self._run("reject", [stream], [entry, job_id, fingerprint, code, message, reply, batch, ttl], pipe)

    def assign(self, lane: str, gpu: str, most: int, pipe: Pipeline | None = None) -> Any:
        """-> number of jobs moved"""
        return self._run("assign", [], [lane, gpu, most], pipe)

    def open(self, gpu: str, slot: int, combination: str, pipe: Pipeline | None = None) -> Any:
        """-> 1 if the slot now takes jobs of the combination"""
        return self._run("open", [], [gpu, slot, combination], pipe)

    def close(self, gpu: str, slot: int, combination: str, pipe: Pipeline | None = None) -> Any:
        """-> number of queued jobs put back into their lanes, -1 if the slot holds another combination"""
        return self._run("close", [], [gpu, slot, combination], pipe)

    def cancel(self, entry: str, job_id: str, pipe: Pipeline | None = None) -> Any:
        """-> cancelled | stopping | remembered | over | stale"""
        return self._run("cancel", [self.keys.control], [entry, job_id, EARLY_CANCEL_S], pipe)

    def forget(self, entry: str, ids: Sequence[str], pipe: Pipeline | None = None) -> Any:
        """-> number of answered jobs that are forgotten, or stale"""
        return self._run("forget", [self.keys.control], [entry, *ids], pipe)

    def expire(self, most: int = 1000, pipe: Pipeline | None = None) -> Any:
        """-> number of deadlines that were due"""
        return self._run("expire", [], [most], pipe)

    def register(self, gpu: str, worker: str, dead_after_ms: int, fields: Mapping[str, Value]) -> tuple[bool, Any]:
        """-> (True, jobs put back) or (False, name of the live worker that has the GPU)"""
        ok, detail = self._run("register", [], [gpu, worker, dead_after_ms, *_flat(fields)])
        return bool(ok), detail

    def reclaim(self, gpu: str, worker: str, silent_ms: int = 0, pipe: Pipeline | None = None) -> Any:
        """-> number of jobs put back, -1 if the GPU is not (or no longer) that worker's, or it is not silent"""
        return self._run("reclaim", [], [gpu, worker, silent_ms], pipe)

    def release(self, gpu: str, worker: str) -> int:
        """-> number of jobs put back, -1 if the GPU has been given to another worker"""
        return int(self._run("release", [], [gpu, worker]))

    def claim(self, gpu: str, worker: str, lease_ms: int, most: int, execution: str, running: int) -> list[Lease]:
        """Raises Superseded. `execution` is random hex, new for each call; at most 256 jobs a call."""
        args: list[Value] = [gpu, worker, lease_ms, min(most, 256), WIRE_VERSION, execution, running]
        packed = self._scripts["claim"](keys=[], args=[self.keys.prefix, self.now_ms, *args])
        if packed == 0:
            raise Superseded(f"{gpu} has been given to another worker")
        rows = msgpack.unpackb(packed, raw=True) if packed else []
        return [
            Lease(i.decode(), e.decode(), request, attempt, slot if slot >= 0 else None, int(waited))
            for i, e, request, attempt, slot, waited in rows
        ]

    def renew(
        self, gpu: str, worker: str, lease_ms: int, record_s: int, composites: Sequence[str],
        fields: Mapping[str, Value] | None = None,
    ) -> list[str]:  # fmt: skip
        """-> the `ID:EXECUTION` whose lease is lost; `fields` go into yard:gpu:GPU. Raises Superseded."""
        args = [gpu, worker, lease_ms, record_s, len(composites), *composites, *_flat(fields or {})]
        lost = self._run("renew", [], args)
        if lost == 0:
            raise Superseded(f"{gpu} has been given to another worker")
        return list(lost)

    def hold(self, holder: str, silent_ms: int, changes: Mapping[str, str], pipe: Pipeline | None = None) -> Any:
        """-> number of ids that changed. `changes`: id -> JSON {rank, digest, bytes}, or "" if it is gone."""
        return self._run("hold", [], [holder, silent_ms, *_flat(changes)], pipe)

    def forsake(self, lane: str, most: int, message: str, pipe: Pipeline | None = None) -> Any:
        """-> number of jobs ended as no_adapter, -1 if a host holds their adapters"""
        return self._run("forsake", [], [lane, most, message], pipe)

    def drain(self, gpu: str, worker: str) -> int:
        """-> number of queued jobs put back, -1 if the GPU has been given to another worker"""
        return int(self._run("drain", [], [gpu, worker]))

    def report(
        self, gpu: str, worker: str, messages: Sequence[Message] = (), obeyed: Iterable[str] = ()
    ) -> News:  # fmt: skip
        """Tell what came of running jobs, hear what is new. `obeyed`: stops of earlier news. Raises Superseded."""
        rows = [(lease.id, lease.execution, status, _texts(event)) for lease, event, status in messages]
        heard = self._run("report", [], [gpu, worker, msgpack.packb(rows), *obeyed])
        if heard == 0:
            raise Superseded(f"{gpu} has been given to another worker")
        waiting, taken, stops = heard
        lost = [(m.lease.id, m.lease.execution) for m, ok in zip(messages, taken, strict=True) if not ok]
        return News(waiting, stops, lost)


def _parts(rows: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """The rows in order, as many at a time as one call may have."""
    start = size = 0
    for at, row in enumerate(rows):
        if at > start and (at - start == MOST_ARRIVALS or size + len(row) > MOST_BYTES):
            yield rows[start:at]
            start, size = at, 0
        size += len(row)
    if rows:
        yield rows[start:]


def _flat(fields: Mapping[str, Value]) -> list[Value]:
    return [part for pair in fields.items() for part in pair]


def _texts(fields: Mapping[str, Value]) -> list[str | bytes]:
    """To be packed into one argument: client and server read it far faster than many arguments."""
    return [part if isinstance(part, (str, bytes)) else str(part) for pair in fields.items() for part in pair]


def _text(answer: Any) -> Any:
    if isinstance(answer, bytes):
        return answer.decode()
    return [_text(part) for part in answer] if isinstance(answer, list) else answer
