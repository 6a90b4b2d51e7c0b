"""Where jobs run: the placement policy, pure, from a view of the yard to the moves to make.

A combination of adapters has a home where a slot is open for it. It goes only to GPUs whose hosts hold its adapters: a
slot whose combination its host has lost is closed at once. Then these rules:

1. House. A combination with waiting jobs and no home takes back a slot that is closing on it, else a slot that has
   drained and that nobody waits for. Once homeless for T it has priority by its time without a home, and a slot is
   closed for it: the one longest in service. A slot is closed only after T/2 in service and with jobs of its own on the
   GPU, and at most max(1, K/4) of a GPU's K slots are closing at once. Closed slots drain and are then opened anew.
2. Feed. A home without any job gets its oldest first. Then the classes by urgency, though each lower class that waits
   gets a tenth of all; in a class the lane with the oldest head first, in chunks; always to the least loaded home.
   The base needs no slot. First only up to a GPU's seats, then
3. Spread. A combination with jobs left takes a drained and unwanted slot of another GPU that has a free seat as one
   more home. What is left then goes into the queues beyond the seats, so that a GPU never waits for this policy.
4. The Lua scripts check every move again, so a view that is out of date costs a wasted move and never a wrong one.

Bound: while its GPUs live, a combination has a home after at most T + ceil(R / C) * (T/2 + 2D): R combinations, itself
among them, have been homeless as long or longer; C slots of the GPUs whose hosts hold it may be closing at once; D is
the longest time that a job runs. With T = 5 s and jobs of at most 2 s on a GPU of 8 slots, the tenth in the row waits
at most 38 s.
"""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lorayard.shared.job import BASE
from lorayard.shared.keys import CLASSES

HOLD_MS = 5000
"""T: how long a combination waits for a home before a slot is closed for it."""

CHUNK = 8
"""Jobs that a lane gives before the next lane of its class has its turn."""

LOWER_SHARE = 10
"""Each class below the most urgent gets one of so many assignments while it waits."""


class Slot(NamedTuple):
    """A row of a GPU's slot table. combination: None if it never held one. since_ms: when it was opened."""

    combination: str | None = None
    closing: bool = False
    since_ms: int = 0


@dataclass(frozen=True, slots=True)
class Gpu:
    """A live GPU. room: jobs that its queue still takes. seats: jobs it can run at once.

    load: combination -> its jobs on the GPU, queued and running. adapters: the `ID@DIGEST8` that its host holds; if
    None, it takes any.
    """

    name: str
    room: int
    seats: int
    slots: tuple[Slot, ...] = ()
    load: Mapping[str, int] = field(default_factory=dict)
    adapters: Container[str] | None = None

    def holds(self, combination: str) -> bool:
        """Whether its host has all adapters of a combination, with those bytes."""
        return (
            self.adapters is None
            or combination == BASE
            or all(adapter in self.adapters for adapter in combination.split("+"))
        )


class Lane(NamedTuple):
    """The waiting jobs of one class and combination. head_ms: when its oldest job was accepted."""

    cls: str
    combination: str
    jobs: int
    head_ms: int


@dataclass(frozen=True, slots=True)
class YardView:
    """What the policy sees. homeless_since: when each homeless combination was first seen so. owed: class -> jobs that
    it is behind its tenth."""

    gpus: tuple[Gpu, ...]
    lanes: tuple[Lane, ...]
    homeless_since: Mapping[str, int] = field(default_factory=dict)
    owed: Mapping[str, int] = field(default_factory=dict)


class Assign(NamedTuple):
    """Move up to `most` jobs from a lane to the queue of a GPU."""

    cls: str
    combination: str
    gpu: str
    most: int


class Open(NamedTuple):
    """Let a slot take jobs of a combination."""

    gpu: str
    slot: int
    combination: str


class Close(NamedTuple):
    """Let a slot drain."""

    gpu: str
    slot: int
    combination: str


Action = Assign | Open | Close


def homes(view: YardView) -> dict[str, list[Gpu]]:
    """Combination -> the GPUs with an open slot for it that may serve it; the base is at home everywhere."""
    found: dict[str, list[Gpu]] = {BASE: list(view.gpus)}
    for gpu in view.gpus:
        for slot in gpu.slots:
            if slot.combination and not slot.closing and gpu.holds(slot.combination):
                found.setdefault(slot.combination, []).append(gpu)
    return found


def homeless(view: YardView) -> set[str]:
    """Combinations with waiting jobs and no home."""
    return {lane.combination for lane in view.lanes} - homes(view).keys()


def place(view: YardView, now_ms: int, hold_ms: int = HOLD_MS) -> list[Action]:
    """The moves to make now, in order."""
    plan = _Plan(view, now_ms, hold_ms)
    plan.evict()
    plan.house()
    plan.feed(plan.seats)
    if plan.spread():
        plan.feed(plan.seats)
    plan.feed(plan.depth)
    return [*plan.moves, *(Assign(*key, most) for key, most in plan.assigned.items())]


@dataclass(slots=True, eq=False)
class _Slot:
    """A slot while moves are planned. load: jobs of its combination on the GPU. taken: spoken for in this plan."""

    gpu: str
    index: int
    combination: str | None
    closing: bool
    since_ms: int
    load: int
    taken: bool = False


class _Plan:
    """Moves made so far, and the yard as it will be after them."""

    def __init__(self, view: YardView, now_ms: int, hold_ms: int) -> None:
        self.view, self.now_ms, self.hold_ms = view, now_ms, hold_ms
        self.moves: list[Action] = []
        self.assigned: dict[tuple[str, str, str], int] = {}
        self.busy = {gpu.name: sum(gpu.load.values()) for gpu in view.gpus}
        self.seats = {gpu.name: max(gpu.seats, 1) for gpu in view.gpus}
        self.depth = {gpu.name: self.busy[gpu.name] + max(gpu.room, 0) for gpu in view.gpus}
        self.waiting = {(lane.cls, lane.combination): lane.jobs for lane in view.lanes}
        self.wanted = {lane.combination for lane in view.lanes}
        self.slots = [
            _Slot(
                gpu.name, index, slot.combination, slot.closing, slot.since_ms, gpu.load.get(slot.combination or "", 0)
            )
            for gpu in view.gpus
            for index, slot in enumerate(gpu.slots)
        ]
        self.may_close = {gpu.name: max(1, len(gpu.slots) // 4) for gpu in view.gpus}
        for slot in self.slots:
            self.may_close[slot.gpu] -= slot.closing
        self.gpus = {gpu.name: gpu for gpu in view.gpus}
        self.holders: dict[str | None, list[_Slot]] = defaultdict(list)
        for slot in self.slots:
            self.holders[slot.combination].append(slot)

    def evict(self) -> None:
        """Close the slots whose combination the host has lost, and sort out the slots that may be had."""
        for slot in self.slots:
            if slot.combination and not slot.closing and not self.gpus[slot.gpu].holds(slot.combination):
                self._close(slot)
        vacant = [
            slot
            for slot in self.slots
            if not slot.load and (slot.combination is None or slot.closing or slot.combination not in self.wanted)
        ]
        vacant.sort(key=lambda slot: (slot.combination is not None, slot.since_ms))
        self.vacant: dict[str, deque[_Slot]] = {gpu: deque() for gpu in self.gpus}
        for slot in vacant:
            self.vacant[slot.gpu].append(slot)
        self.closing = [slot for slot in self.slots if slot.closing]
        self.served = [
            slot
            for slot in sorted(self.slots, key=lambda slot: slot.since_ms)
            if not slot.closing and slot.load and self.now_ms - slot.since_ms >= self.hold_ms // 2
            and self.may_close[slot.gpu] > 0
        ]  # fmt: skip

    def house(self) -> None:
        """Rule 1."""
        urgency: dict[str, int] = {}
        for lane in self.view.lanes:
            rank = CLASSES.index(lane.cls)
            urgency[lane.combination] = min(rank, urgency.get(lane.combination, rank))

        homes = self._homes()
        order = []
        for combination in self.wanted:
            if not homes[combination]:
                since = self.view.homeless_since.get(combination, self.now_ms)
                patient = self.now_ms - since < self.hold_ms
                order.append((patient, urgency[combination] if patient else 0, since, combination))
        for patient, _, _, combination in sorted(order):
            slot = self._closing_on(combination) or self._vacant(combination)
            if slot is not None:
                self._open(slot, combination)
            elif not patient:
                self._drain_one(combination)
        self.homes = self._homes()
        self.lanes = sorted(
            (one for one in self.view.lanes if self.homes[one.combination]), key=lambda one: one.head_ms
        )

    def _closing_on(self, combination: str) -> _Slot | None:
        own = [slot for slot in self.holders[combination] if self._free_for(slot, combination)]
        return min(own, key=self._least_loaded, default=None)

    def _vacant(self, combination: str, seats: int = 0) -> _Slot | None:
        """A drained slot that nobody waits for, on a GPU with `seats` free and no other slot of the combination."""
        for gpu, vacant in tuple(self.vacant.items()):
            while vacant and vacant[0].taken:
                vacant.popleft()
            if not vacant:
                del self.vacant[gpu]
        holders = {slot.gpu for slot in self.holders[combination]}
        first = [
            vacant[0]
            for gpu, vacant in self.vacant.items()
            if gpu not in holders and self._room(gpu, self.seats) >= seats
        ]
        fit = [slot for slot in first if self.gpus[slot.gpu].holds(combination)]
        return min(fit, key=self._least_loaded, default=None)

    def _free_for(self, slot: _Slot, combination: str) -> bool:
        return not slot.taken and self.gpus[slot.gpu].holds(combination)

    def _least_loaded(self, slot: _Slot) -> tuple[float, bool, int]:
        return self.busy[slot.gpu] / self.seats[slot.gpu], slot.combination is not None, slot.since_ms

    def _open(self, slot: _Slot, combination: str) -> None:
        self.moves.append(Open(slot.gpu, slot.index, combination))
        self.may_close[slot.gpu] += slot.closing
        if slot.combination != combination:
            slot.load = 0
            self.holders[slot.combination].remove(slot)
            self.holders[combination].append(slot)
        slot.combination, slot.closing, slot.since_ms, slot.taken = combination, False, self.now_ms, True

    def _drain_one(self, combination: str) -> None:
        """Keep a slot that is closing for the combination whose turn it is, or close one more."""
        for slot in self.closing:
            if self._free_for(slot, combination):
                slot.taken = True
                self.closing.remove(slot)
                return
        for slot in self.served:
            if self._free_for(slot, combination):
                slot.taken = True
                self._close(slot)
                self.served = [one for one in self.served if not one.taken and self.may_close[one.gpu] > 0]
                return

    def _close(self, slot: _Slot) -> None:
        self.moves.append(Close(slot.gpu, slot.index, str(slot.combination)))
        self.may_close[slot.gpu] -= 1
        slot.closing = True

    def feed(self, most: Mapping[str, int]) -> None:
        """Rule 2, up to `most` jobs on each GPU."""
        self.most = most
        for lane in self.lanes:
            for slot in self.homes[lane.combination]:
                if not slot.load:
                    slot.load = self._assign(lane, slot.gpu, 1)
        for cls in reversed(CLASSES[1:]):
            own = [lane for lane in self.lanes if lane.cls == cls]
            given = sum(lane.jobs - self.waiting[cls, lane.combination] for lane in own)
            self._feed_class(own, self.view.owed.get(cls, 0) - given)
        for cls in CLASSES:
            self._feed_class([lane for lane in self.lanes if lane.cls == cls], sys.maxsize)

    def _homes(self) -> dict[str, list[_Slot]]:
        """Open slots of each combination with waiting jobs; the base is at home on every GPU."""
        homes = {one: [slot for slot in self.holders[one] if not slot.closing] for one in self.wanted}
        homes[BASE] = [_Slot(gpu, -1, BASE, False, 0, 1) for gpu in self.gpus]
        return homes

    def _room(self, gpu: str, most: Mapping[str, int]) -> int:
        return max(min(most[gpu], self.depth[gpu]) - self.busy[gpu], 0)

    def _feed_class(self, lanes: list[Lane], most: int) -> None:
        """Give `most` jobs of the class away; a turn that an earlier round left unfinished is finished first."""
        given = {lane: lane.jobs - self.waiting[lane.cls, lane.combination] for lane in lanes}
        lanes = sorted(lanes, key=lambda lane: (given[lane] // CHUNK, lane.head_ms))
        while lanes and most > 0:
            hungry = []
            for lane in lanes:
                gpus = [slot.gpu for slot in self.homes[lane.combination] if self._room(slot.gpu, self.most)]
                if gpus and self.waiting[lane.cls, lane.combination] and most > 0:
                    gpu = min(gpus, key=lambda gpu: self.busy[gpu] / self.seats[gpu])
                    moved = self._assign(lane, gpu, min(CHUNK - given[lane] % CHUNK, most))
                    given[lane] += moved
                    most -= moved
                    hungry.append(lane)
            lanes = hungry

    def _assign(self, lane: Lane, gpu: str, most: int) -> int:
        moved = min(most, self._room(gpu, self.most), self.waiting[lane.cls, lane.combination])
        if moved:
            key = (lane.cls, lane.combination, gpu)
            self.assigned[key] = self.assigned.get(key, 0) + moved
            self.waiting[lane.cls, lane.combination] -= moved
            self.busy[gpu] += moved
        return moved

    def spread(self) -> bool:
        """Rule 3; True if a second home was opened."""
        spreading = False
        for lane in self.lanes:
            homes = self.homes[lane.combination]
            if self.waiting[lane.cls, lane.combination] and not any(self._room(one.gpu, self.seats) for one in homes):
                slot = self._vacant(lane.combination, seats=1)
                if slot is not None:
                    self._open(slot, lane.combination)
                    homes.append(slot)
                    spreading = True
        return spreading
