"""Carries the policy out: reads the yard from Redis, applies the moves, ends what is overdue, finds the dead."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from redis import Redis
from redis.exceptions import OutOfMemoryError, RedisError

from lorayard.shared.keys import CLASSES, rq_queue
from lorayard.shared.scripts import Scripts

from .place import HOLD_MS, LOWER_SHARE, Action, Assign, Gpu, Lane, Open, Slot, YardView, homeless, homes, place
from .published import Holdings, whole

log = logging.getLogger(__name__)

LEASE_MS = 10_000
"""A worker that has been silent for longer is dead. Workers renew every quarter of it."""

MOST_LANES = 2048
"""Lanes looked at in one tick: those with the oldest heads."""

MOST_OWED = 32
FORSAKE_MS = 10_000
"""How long jobs wait for adapters that no host holds any more, which may be a folder that is just being exchanged."""

MOST_FORSAKEN = 500
"""Jobs of a lane refused in one tick for that."""

RECONNECT_MS = 5000
"""How long workers have to beat again after a time in which this placer did not see Redis, so perhaps nobody did."""

GAP_MS = 2000
"""A pause between two looks that counts as such a time."""

LOCK_MS = 2000
"""How long a placer that died keeps the others from placing."""


class _Fact(NamedTuple):
    """What Redis has of one GPU: what its worker says, its slot table, its load, the length of its queue."""

    said: Mapping[bytes, bytes]
    table: Mapping[bytes, bytes]
    load: Mapping[bytes, bytes]
    queued: int


class _Seen(NamedTuple):
    """What a look at the yard tells beside the view. deadline_ms: the next one.

    beats: GPU -> (worker, last beat), of those that have a worker or, whatever the reason, a queue without one.
    all_known: whether every worker's holder has said which adapters it has.
    """

    now_ms: int
    deadline_ms: float
    beats: Mapping[str, tuple[str, int]]
    all_known: bool


class Placer:
    """One per dispatcher. Several at once are never wrong, since every move is checked by its script."""

    def __init__(self, redis: Redis, scripts: Scripts, name: str, hold_ms: int = HOLD_MS) -> None:
        self.redis, self.scripts, self.keys = redis, scripts, scripts.keys
        self.name, self.hold_ms = name, hold_ms
        self.view = YardView((), ())
        self.holdings = Holdings(redis, scripts.keys)
        self._homeless: dict[str, int] = {}
        self._missing: dict[str, int] = {}
        self._malformed: set[str] = set()
        self._owed: dict[str, float] = dict.fromkeys(CLASSES[1:], 0.0)
        self._homes: dict[str, list[Gpu]] | None = None
        self._looked_ms = self._gap_ms = 0

    def tick(self) -> None:
        """Look at the yard, and move what should move if this placer is the one that places now."""
        seen = self._look()
        if self._is_mine():
            if seen.deadline_ms <= seen.now_ms:
                self.scripts.expire()
            self._bury_dead(seen)
            self._apply(place(self.view, seen.now_ms, self.hold_ms))
            self._forsake(seen)

    def gpu_for(self, combination: str) -> str:
        """The least busy GPU that could start a job of the combination at once, "" if none could.

        By the last view, which counts the jobs that were sent this way since.
        """
        if self._homes is None:
            self._homes = homes(self.view)
        at_home = self._homes.get(combination, ())
        fit = [gpu for gpu in at_home if gpu.room > 0 and self._busy[gpu.name] < gpu.seats]
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
        pipe.hgetall(self.keys.holders)
        (seconds, micros), names, lanes, deadlines, holders = pipe.execute()
        self.holdings.refresh(holders)
        now_ms = self.scripts.now_ms or int(seconds) * 1000 + int(micros) // 1000
        facts, lengths = self._facts(
            sorted(name.decode(errors="replace") for name in names), [name for name, _ in lanes]
        )
        gpus = [self._gpu(gpu, fact) for gpu, fact in facts.items() if fact.said.get(b"state") == b"ready"]
        waiting = [
            Lane(cls, combination, jobs, int(head))
            for (name, head), jobs in zip(lanes, lengths, strict=True)
            for cls, _, combination in [name.decode().partition(":")]
            if jobs and cls in CLASSES
        ]
        self._see([gpu for gpu in gpus if gpu is not None], waiting, now_ms)
        beats = {
            gpu: (fact.said.get(b"worker", b"").decode(errors="replace"), whole(fact.said.get(b"beat_ms")))
            for gpu, fact in facts.items()
            if fact.said or fact.queued
        }
        named = {fact.said.get(b"holder", b"").decode(errors="replace") for fact in facts.values() if fact.said}
        return _Seen(now_ms, deadlines[0][1] if deadlines else math.inf, beats, all(map(self.holdings.knows, named)))

    def _facts(self, gpus: list[str], lanes: list[bytes]) -> tuple[dict[str, _Fact], list[int]]:
        """What Redis says of each GPU, and how many jobs each lane has."""
        pipe = self.redis.pipeline(transaction=False)
        for gpu in gpus:
            pipe.hgetall(self.keys.gpu(gpu))
            pipe.hgetall(self.keys.slots(gpu))
            pipe.hgetall(self.keys.load(gpu))
            pipe.llen(rq_queue(gpu))
        for lane in lanes:
            cls, _, combination = lane.decode().partition(":")
            pipe.llen(self.keys.lane(cls, combination))
        answers = pipe.execute()
        facts = {gpu: _Fact(*answers[4 * at : 4 * at + 4]) for at, gpu in enumerate(gpus)}
        return facts, answers[4 * len(gpus) :]

    def _gpu(self, name: str, fact: _Fact) -> Gpu | None:
        """A GPU from its hashes; None, with one word in the log, if they are malformed: it gets no jobs."""
        try:
            gpu = _gpu(name, fact, self.holdings.of(fact.said.get(b"holder", b"").decode()))
        except (ValueError, KeyError) as error:
            if name not in self._malformed:
                log.error("%s gets no jobs, since what is said of it is malformed: %r", name, error)
            self._malformed.add(name)
            return None
        self._malformed.discard(name)
        return gpu

    def _see(self, gpus: list[Gpu], lanes: list[Lane], now_ms: int) -> None:
        """Put the view together with what this placer remembers."""
        view = YardView(tuple(gpus), tuple(lanes))
        self._homeless = {name: self._homeless.get(name, now_ms) for name in homeless(view)}
        owed = {cls: int(jobs) for cls, jobs in self._owed.items()}
        self.view = YardView(view.gpus, view.lanes, self._homeless, owed)
        self._busy = {gpu.name: sum(gpu.load.values()) for gpu in gpus}
        self._homes = None
        if now_ms - self._looked_ms > GAP_MS:
            self._gap_ms = now_ms
        self._looked_ms = now_ms

    def _bury_dead(self, seen: _Seen) -> None:
        """Jobs of workers that have fallen silent go back to their lanes.

        Not just after Redis was away: then all are silent, and come back one by one.
        """
        if seen.now_ms - self._gap_ms < RECONNECT_MS:
            return
        for gpu, (worker, beat_ms) in seen.beats.items():
            if seen.now_ms - beat_ms >= LEASE_MS:
                back = self.scripts.reclaim(gpu, worker, LEASE_MS)
                if back >= 0:
                    log.warning("%s is silent or gone: %d jobs go back", worker or gpu, back)

    def _forsake(self, seen: _Seen) -> None:
        """Refuse the jobs whose adapters no host holds any more. A host that is down still holds its own."""
        missing = filter(self.holdings.missing, self._homeless) if seen.all_known else ()
        self._missing = {name: self._missing.get(name, seen.now_ms) for name in missing}
        for lane in self.view.lanes:
            if seen.now_ms - self._missing.get(lane.combination, seen.now_ms) >= FORSAKE_MS:
                reason = f"{self.holdings.reason(lane.combination)}; submit it again"
                ended = self.scripts.forsake(f"{lane.cls}:{lane.combination}", MOST_FORSAKEN, reason)
                if ended > 0:
                    log.warning("%d jobs are refused: %s", ended, reason)

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


def _gpu(name: str, fact: _Fact, adapters: frozenset[str] | None) -> Gpu:
    """A GPU from its hashes. The number of slots is what its worker says; the table has those once used."""
    return Gpu(
        name,
        int(fact.said.get(b"window", 0)) - fact.queued,
        int(fact.said.get(b"seats", 1)),
        tuple(_slot(fact.table, index) for index in range(int(fact.said.get(b"slots", 0)))),
        {combination.decode(): int(jobs) for combination, jobs in fact.load.items()},
        adapters,
    )


def _slot(table: Mapping[bytes, bytes], index: int) -> Slot:
    combination = table.get(b"%d" % index)
    if combination is None:
        return Slot()
    return Slot(combination.decode(), table[b"%d.state" % index] == b"closing", int(table[b"%d.since" % index]))
