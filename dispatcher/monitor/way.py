"""A job's whole way by its id, and the refused entries: read from the raw keys, writing none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorayard.shared.keys import Keys, rq_job

from ..snapshot import clean

BOOKS = (
    "status", "lane", "gpu", "worker_name", "attempt", "deaths", "code", "created_at", "enqueued_at", "started_at",
    "ended_at", "reply", "batch",
)  # fmt: skip
"""Fields of a job's hash that are shown: all but the request itself."""
EVENTS, REFUSED = 50, 1000
"""Events of a job, and refused entries looked through for its id, the latest of each."""
SHOWN = 400
"""Characters of a value that are shown."""


def way(redis: Any, keys: Keys, job_id: str) -> dict[str, Any]:
    """`books` of the job, empty if its id is not known; its `events`, oldest first; its `refused` entries."""
    pipe = redis.pipeline(transaction=False)
    pipe.hmget(rq_job(job_id), BOOKS)
    pipe.xrevrange(keys.out(job_id), count=EVENTS)
    books, events = pipe.execute()
    return {
        "id": job_id,
        "books": {name: _cut(value) for name, value in zip(BOOKS, books, strict=True) if value},
        "events": [_shown(entry, fields) for entry, fields in reversed(events)],
        "refused": [one for one in refused(redis, keys, REFUSED) if one["fields"].get("id") == job_id],
    }


def refused(redis: Any, keys: Keys, last: int) -> list[dict[str, Any]]:
    """The latest refused entries, each with its time and fields, the newest first."""
    return [_shown(entry, fields) for entry, fields in redis.xrevrange(keys.dead, count=last)]


def _shown(entry: bytes, fields: Mapping[bytes, bytes]) -> dict[str, Any]:
    return {
        "entry": clean(entry), "time_ms": int(entry.partition(b"-")[0]),
        "fields": {_cut(name): _cut(value) for name, value in fields.items()},
    }  # fmt: skip


def _cut(value: bytes) -> str:
    text = clean(value[: 4 * SHOWN])
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
