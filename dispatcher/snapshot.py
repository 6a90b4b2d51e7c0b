"""The yard at one moment, for people: read from the raw keys, writing none, and whatever is malformed shows as 0."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis.exceptions import RedisError

from lorayard.shared.job import BASE
from lorayard.shared.keys import CLASSES, Keys, rq_queue

from .placer import LEASE_MS
from .published import whole

LANES_SHOWN = 20
"""Lanes in a snapshot: those with the oldest heads."""


class SlotSeen(NamedTuple):
    """A slot, or the base if it has jobs. state: open, closing or loading. jobs: on the GPU, queued and running."""

    combination: str
    state: str
    jobs: int


@dataclass(frozen=True, slots=True)
class GpuSeen:
    """A GPU. state: what its worker says, or `silent` past its lease, or `no worker`."""

    name: str
    state: str
    queued: int
    running: int
    seats: int
    tokens_per_s: float
    swaps: int
    slots: tuple[SlotSeen, ...]
    beat_age_s: float
    figures: Mapping[str, float]
    """What else its worker counts and measures, by the names of `FIGURES`; a name that it does not say is absent."""
    wait_bounds_s: tuple[float, ...]
    wait_buckets: tuple[int, ...]
    """Jobs claimed by how long they had waited: at most each bound, and more."""


FIGURES = (
    "tokens", "prompt_tokens", "prompt_tokens_per_s", "jobs_finished", "jobs_failed", "jobs_canceled", "jobs_lost",
    "wait_sum_ms", "wait_p50_ms", "wait_p95_ms", "wait_p99_ms", "vram_used", "vram_total", "util_percent",
    "temperature_c", "power_w", "still_s",
)  # fmt: skip


class LaneSeen(NamedTuple):
    """A lane with waiting jobs; age_s: since its oldest was accepted."""

    name: str
    jobs: int
    age_s: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """info: yard:info, empty before a worker has joined. depth: jobs of a class that are accepted and not final.

    unread: jobs in the intake streams, lag_s: since the oldest of them came.
    memory: bytes that Redis uses, -1 if it does not say; memory_limit: 0 if none.
    """

    time_ms: int
    info: Mapping[str, str]
    gpus: tuple[GpuSeen, ...]
    lanes: tuple[LaneSeen, ...]
    lanes_in_all: int
    depth: Mapping[str, int]
    unread: int
    lag_s: float
    refused: int
    adapters: int
    memory: int
    memory_limit: int


def clean(value: bytes | str) -> str:
    """As a text that can be printed: control characters would reach the terminal."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def look(redis: Any, keys: Keys) -> Snapshot:
    """Look at a yard in two round trips. `redis` gives bytes."""
    pipe = redis.pipeline(transaction=False)
    pipe.time()
    pipe.hgetall(keys.info)
    pipe.smembers(keys.gpus)
    pipe.zrange(keys.lanes, 0, LANES_SHOWN - 1, withscores=True)
    pipe.zcard(keys.lanes)
    pipe.hgetall(keys.depth)
    pipe.xlen(keys.dead)
    pipe.hlen(keys.adapters)
    for cls in CLASSES:
        pipe.xlen(keys.stream(cls))
        pipe.xrange(keys.stream(cls), count=1)
    pipe.info("memory")
    *found, memory = pipe.execute(raise_on_error=False)  # an ACL may forbid INFO, and nothing else
    for one in found:
        if isinstance(one, RedisError):
            raise one
    (seconds, micros), info, gpus, lanes, lanes_in_all, depth, refused, adapters, *intake = found
    now_ms = seconds * 1000 + micros // 1000
    names = sorted((name.decode(errors="replace") for name in gpus), key=_by_number)
    oldest_ms = min((whole(entry.partition(b"-")[0]) for [(entry, _)] in filter(None, intake[1::2])), default=now_ms)
    memory = {} if isinstance(memory, RedisError) else memory
    gpus_seen, lengths = _details(redis, keys, names, [name for name, _ in lanes], now_ms)
    return Snapshot(
        now_ms, _texts(info), gpus_seen,
        tuple(
            LaneSeen(clean(name), jobs, max(now_ms - ms, 0) / 1000)
            for (name, ms), jobs in zip(lanes, lengths, strict=True)
        ),
        lanes_in_all, {cls: whole(depth.get(cls.encode())) for cls in CLASSES}, sum(intake[::2]),
        max(now_ms - oldest_ms, 0) / 1000, refused, adapters,
        memory.get("used_memory", -1), memory.get("maxmemory", 0),
    )  # fmt: skip


def _details(
    redis: Any, keys: Keys, gpus: list[str], lanes: list[bytes], now_ms: int
) -> tuple[tuple[GpuSeen, ...], list[int]]:
    pipe = redis.pipeline(transaction=False)
    for gpu in gpus:
        for key in (keys.gpu, keys.slots, keys.load):
            pipe.hgetall(key(gpu))
        pipe.llen(rq_queue(gpu))
    for lane in lanes:
        cls, _, combination = lane.decode(errors="replace").partition(":")
        pipe.llen(keys.lane(cls, combination))
    answers = pipe.execute()
    seen = tuple(_gpu(gpu, now_ms, *answers[4 * at : 4 * at + 4]) for at, gpu in enumerate(gpus))
    return seen, answers[4 * len(gpus) :]


def _gpu(
    name: str, now_ms: int, said: Mapping[bytes, bytes], table: Mapping[bytes, bytes], load: Mapping[bytes, bytes],
    queued: int,
) -> GpuSeen:  # fmt: skip
    jobs = {combination: whole(count) for combination, count in load.items()}
    loading = _numbers(said.get(b"loading"))
    slots = tuple(
        SlotSeen(clean(table[index]), _slot_state(table, index, int(index) in loading), jobs.get(table[index], 0))
        for index in sorted(filter(bytes.isdigit, table), key=int)
    )
    if BASE.encode() in jobs:
        slots += (SlotSeen(BASE, "open", jobs[BASE.encode()]),)
    state = clean(said.get(b"state", b"no worker"))
    age_ms = max(now_ms - whole(said.get(b"beat_ms")), 0) if said else 0
    if age_ms >= LEASE_MS:
        state = "silent"
    return GpuSeen(
        clean(name), state, queued, max(sum(jobs.values()) - queued, 0), whole(said.get(b"seats")),
        _decimal(said.get(b"tokens_per_s", b"0")), whole(said.get(b"swaps")), slots,
        age_ms / 1000, {name: _decimal(said[name.encode()]) for name in FIGURES if said.get(name.encode())},
        _numbers(said.get(b"wait_bounds_s")), tuple(map(int, _numbers(said.get(b"wait_buckets")))),
    )  # fmt: skip


def _slot_state(table: Mapping[bytes, bytes], index: bytes, loading: bool) -> str:
    if table.get(index + b".state") == b"closing":
        return "closing"
    return "loading" if loading else "open"


def _numbers(said: bytes | None) -> tuple[float, ...]:
    """A JSON list of numbers; () if it is none."""
    try:
        found = json.loads(said or b"[]")
        return tuple(each for each in map(float, found) if math.isfinite(each))
    except (ValueError, TypeError, RecursionError):
        return ()


def _texts(found: Mapping[bytes, bytes]) -> dict[str, str]:
    return {clean(name): clean(value) for name, value in found.items()}


def _decimal(said: bytes) -> float:
    try:
        number = float(said)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


def _by_number(name: str) -> list[tuple[int, str]]:
    """So that gpu-h-10 comes after gpu-h-9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", name)]
