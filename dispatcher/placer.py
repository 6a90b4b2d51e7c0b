"""Carries the policy out: reads the yard from Redis, applies the moves, ends what is overdue, finds the dead."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import OutOfMemoryError, RedisError

from lorayard.shared.job import BASE
from lorayard.shared.keys import CLASSES, rq_queue
from lorayard.shared.scripts import Scripts

from .place import HOLD_MS, LOWER_SHARE, Action, Assign, Gpu, Lane, Open, Slot, YardView, homeless, place

log = logging.getLogger(__name__)

LEASE_MS = 10_000
"""A worker that has been silent for longer is dead. Workers renew every quarter of it."""

MOST_LANES = 2048
"""Lanes looked at in one tick: those with the oldest heads."""

MOST_OWED = 32
LOCK_MS = 2000
"""How long a placer that died keeps the others from placing."""


class _Seen(NamedTuple):
    """What a look at the yard tells beside the view. deadline_ms: the next one.

    beats: GPU -> (worker, last beat), of those that have a worker or, whatever the reason, a queue without one.
    """

    now_ms: int
    deadline_ms: float
    beats: Mapping[str, tuple[str, int]]


class Placer:
    """One per dispatcher. Several at once are never wrong, since every move is checked by its script."""

    def __init__(self, redis: Redis, scripts: Scripts, name: str, hold_ms: int = HOLD_MS) -> None:
        self.redis, self.scripts, self.keys = redis, scripts, scripts.keys
        self.name, self.hold_ms = name, hold_ms
        self.view = YardView((), ())
        self._homeless: dict[str, int] = {}
        self._owed: dict[str, float] = dict.fromkeys(CLASSES[1:], 0.0)

    def tick(self) -> None:
        """Look at the yard, and move what should move if this placer is the one that places now."""
        seen = self._look()
        if self._is_mine():
            if seen.deadline_ms <= seen.now_ms:
                self.scripts.expire()
            self._bury_dead(seen)
            self._apply(place(self.view, seen.now_ms, self.hold_ms))

    def gpu_for(self, combination: str) -> str:
        """The least busy GPU that could start a job of the combination at once, "" if none could.

        By the last view, which counts the jobs that were sent this way since.
        """
        fit = [
            gpu
            for gpu in self.view.gpus
            if gpu.room > 0 and self._busy[gpu.name] < gpu.seats
            and (combination == BASE or any(s.combination == combination and not s.closing for s in gpu.slots))
        ]  # fmt: skip
        if not fit:
            return ""
        best = min(fit, key=lambda gpu: self._busy[gpu.name] / gpu.seats).name
        self._busy[best] += 1
        return best

    def _is_mine(self) -> bool:
        """Take or keep the right to place. Without memory for the mark there is no right, and every placer places."""
        key = f"{self.keys.prefix}placer"
        pipe = self.redis.pipeline(transaction=False)
        pipe.set(key, self.name, nx=True, px=LOCK_MS)
        pipe.get(key)
        pipe.pttl(key)
        taken, holder, left_ms = pipe.execute(raise_on_error=False)
        if isinstance(taken, OutOfMemoryError):
            return True
        if isinstance(taken, RedisError):
            raise taken
        if holder == self.name.encode() and left_ms < LOCK_MS // 2:
            self.redis.set(key, self.name, xx=True, px=LOCK_MS)
        return bool(holder == self.name.encode())

    def _look(self) -> _Seen:
        """Refresh the view."""
        pipe = self.redis.pipeline(transaction=False)
        pipe.time()
        pipe.smembers(self.keys.gpus)
        pipe.zrange(self.keys.lanes, 0, MOST_LANES - 1, withscores=True)
        pipe.zrange(self.keys.deadlines, 0, 0, withscores=True)
        (seconds, micros), names, lanes, deadlines = pipe.execute()
        now_ms = self.scripts.now_ms or int(seconds) * 1000 + int(micros) // 1000
        gpu_names = sorted(name.decode() for name in names)
        lane_names = [name.decode().partition(":")[::2] for name, _ in lanes]
        for gpu in gpu_names:
            pipe.hgetall(self.keys.gpu(gpu))
            pipe.hgetall(self.keys.slots(gpu))
            pipe.hgetall(self.keys.load(gpu))
            pipe.llen(rq_queue(gpu))
        for cls, combination in lane_names:
            pipe.llen(self.keys.lane(cls, combination))
        answers = pipe.execute()
        facts = {gpu: answers[4 * at : 4 * at + 4] for at, gpu in enumerate(gpu_names)}
        self._see(
            [_gpu(gpu, *said) for gpu, said in facts.items() if said[0].get(b"state") == b"ready"],
            [
                Lane(cls, combination, jobs, int(head))
                for (cls, combination), jobs, (_, head) in zip(
                    lane_names, answers[4 * len(gpu_names) :], lanes, strict=True
                )
                if jobs and cls in CLASSES
            ],
            now_ms,
        )
        beats = {
            gpu: (said.get(b"worker", b"").decode(), int(said.get(b"beat_ms", 0)))
            for gpu, (said, _, _, queued) in facts.items()
            if said or queued
        }
        return _Seen(now_ms, deadlines[0][1] if deadlines else math.inf, beats)

    def _see(self, gpus: list[Gpu], lanes: list[Lane], now_ms: int) -> None:
        """Put the view together with what this placer remembers."""
        view = YardView(tuple(gpus), tuple(lanes))
        self._homeless = {name: self._homeless.get(name, now_ms) for name in homeless(view)}
        owed = {cls: int(jobs) for cls, jobs in self._owed.items()}
        self.view = YardView(view.gpus, view.lanes, self._homeless, owed)
        self._busy = {gpu.name: sum(gpu.load.values()) for gpu in gpus}

    def _bury_dead(self, seen: _Seen) -> None:
        """Jobs of workers that have fallen silent go back to their lanes."""
        for gpu, (worker, beat_ms) in seen.beats.items():
            if seen.now_ms - beat_ms >= LEASE_MS:
                back = self.scripts.reclaim(gpu, worker, LEASE_MS)
                if back >= 0:
                    log.warning("%s is silent or gone: %d jobs go back", worker or gpu, back)

    def _apply(self, moves: Iterable[Action]) -> None:
        moves = list(moves)
        if not moves:
            return
        pipe = self.redis.pipeline(transaction=False)
        for move in moves:
            if isinstance(move, Assign):
                self.scripts.assign(f"{move.cls}:{move.combination}", move.gpu, move.most, pipe)
            elif isinstance(move, Open):
                self.scripts.open(move.gpu, move.slot, move.combination, pipe)
            else:
                self.scripts.close(move.gpu, move.slot, move.combination, pipe)
        moved: Counter[str] = Counter()
        for move, answer in zip(moves, pipe.execute(raise_on_error=False), strict=True):
            if isinstance(answer, RedisError):
                log.error("%s failed: %s", move, answer)
            elif isinstance(move, Assign):
                moved[move.cls] += answer
        self._settle_shares(moved)

    def _settle_shares(self, moved: Mapping[str, int]) -> None:
        """Every lower class that waits is owed its part of what was moved."""
        total, waiting = sum(moved.values()), {lane.cls for lane in self.view.lanes}
        for cls, owed in self._owed.items():
            due = owed + total / LOWER_SHARE - moved.get(cls, 0)
            self._owed[cls] = min(max(due, 0.0), MOST_OWED) if cls in waiting else 0.0


def _gpu(
    name: str, said: Mapping[bytes, Any], table: Mapping[bytes, bytes], load: Mapping[bytes, Any], queued: int
) -> Gpu:
    """A GPU from its hashes. The number of slots is what its worker says; the table has those once used."""
    return Gpu(
        name,
        int(said.get(b"window", 0)) - queued,
        int(said.get(b"seats", 1)),
        tuple(_slot(table, index) for index in range(int(said.get(b"slots", 0)))),
        {combination.decode(): int(jobs) for combination, jobs in load.items()},
    )


def _slot(table: Mapping[bytes, bytes], index: int) -> Slot:
    combination = table.get(b"%d" % index)
    if combination is None:
        return Slot()
    return Slot(combination.decode(), table[b"%d.state" % index] == b"closing", int(table[b"%d.since" % index]))
