"""Simulation of routing: the placement policy itself, `dispatcher/place.py`, in a yard whose workers are arithmetic.

    python tests/bench/routing.py [--gpus 4 --slots 8 --adapters 64]

A worker runs at most 64 jobs at once. A step gives each of them a token and takes 12 ms + 0.10 ms for each job + 0.15
ms for each combination among them (about a 7B model); loading an adapter holds the worker up for 20 ms. A job has 128
tokens on average, log-normal. Arrivals are Poisson, at 0.85 of what the GPUs could do with full batches; adapters are
Zipf with exponent 1. A wait is the time from arrival to the first step; jobs that still wait at the end count with
their age, so that starvation shows. The time of place() is of this process' CPU.

The naive policy gives a GPU a new bank of adapters, those with the oldest jobs, when no job of its bank is left.
"""

from __future__ import annotations

import bisect
import gc
import heapq
import itertools
import math
import random
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import click

from lorayard.dispatcher.place import Action, Assign, Gpu, Lane, Open, Slot, YardView, homeless, place
from lorayard.dispatcher.placer import MOST_LANES
from lorayard.dispatcher.serve import BUSY_TICK_S

SEATS = 64
WINDOW = 2 * SEATS
TOKENS = 128
SIGMA = 0.6
UTILISATION = 0.85
LOAD_S = 0.020

Policy = Callable[[YardView, int], list[Action]]


def step_s(jobs: int, combinations: int) -> float:
    return (12 + 0.10 * jobs + 0.15 * combinations) / 1000


class Job(NamedTuple):
    combination: str
    arrived: float
    tokens: int


class Worker:
    """One GPU's queue, slots and batch."""

    def __init__(self, name: str, slots: int) -> None:
        self.name = name
        self.slots = [Slot()] * slots
        self.queue: deque[Job] = deque()
        self.load: Counter[str] = Counter()
        self.loads = self.done = 0
        self.active = False
        self._resident: list[str | None] = [None] * slots
        self._ends: list[tuple[int, str]] = []
        self._running: Counter[str] = Counter()
        self._step = 0

    def gpu(self) -> Gpu:
        return Gpu(self.name, WINDOW - len(self.queue), SEATS, tuple(self.slots), dict(self.load))

    def step(self, now: float, started: Callable[[Job, float], None]) -> float:
        """End and start jobs; -> seconds that the next step takes, 0 if nothing runs."""
        while self._ends and self._ends[0][0] <= self._step:
            _, combination = heapq.heappop(self._ends)
            for counter in (self._running, self.load):
                counter[combination] -= 1
                if not counter[combination]:
                    del counter[combination]
            self.done += 1
        loads = 0
        while self.queue and len(self._ends) < SEATS:
            job = self.queue.popleft()
            loads += self._make_resident(job.combination)
            heapq.heappush(self._ends, (self._step + job.tokens, job.combination))
            self._running[job.combination] += 1
            started(job, now)
        self._step += 1
        self.loads += loads
        return step_s(len(self._ends), len(self._running)) + loads * LOAD_S if self._ends else 0.0

    def _make_resident(self, combination: str) -> bool:
        index = next(at for at, slot in enumerate(self.slots) if slot.combination == combination)
        fresh = self._resident[index] != combination
        self._resident[index] = combination
        return fresh


class Yard:
    """Lanes and workers in simulated time."""

    def __init__(self, gpus: int, slots: int, adapters: int, policy: Policy, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.policy = policy
        self.workers = {f"g{at}": Worker(f"g{at}", slots) for at in range(gpus)}
        self.lanes: dict[str, deque[Job]] = {}
        self.names = [f"a{at}" for at in range(adapters)]
        self.weights = list(itertools.accumulate(1 / (at + 1) for at in range(adapters)))
        self.offered = UTILISATION * gpus * SEATS / step_s(SEATS, min(slots, adapters)) / TOKENS
        self.homeless: dict[str, int] = {}
        self.waits: list[float] = []
        self.placing: list[float] = []
        self.events: list[tuple[float, int, str]] = []

    def run(self, warm_s: float, seconds: float) -> None:
        """Simulate; waits are noted of jobs that arrive after `warm_s`."""
        self.warm_s, self._count = warm_s, itertools.count()
        self._at(0.0, "arrival")
        self._at(0.0, "tick")
        done: dict[str, tuple[int, int]] = {}
        while (now := self.events[0][0]) < seconds:
            if not done and now >= warm_s:
                done = {worker.name: (worker.done, worker.loads) for worker in self.workers.values()}
            _, _, what = heapq.heappop(self.events)
            if what == "arrival":
                self._arrive(now)
            elif what == "tick":
                self._tick(now)
            elif (took := self.workers[what].step(now, self._started)) > 0:
                self._at(now + took, what)
            else:
                self.workers[what].active = False
        span = seconds - warm_s
        self.done = sum(worker.done - done[worker.name][0] for worker in self.workers.values()) / span
        self.loads = sum(worker.loads - done[worker.name][1] for worker in self.workers.values()) / span
        queued = itertools.chain(*self.lanes.values(), *(worker.queue for worker in self.workers.values()))
        self.waits += [seconds - job.arrived for job in queued if job.arrived >= warm_s]

    def _at(self, when: float, what: str) -> None:
        heapq.heappush(self.events, (when, next(self._count), what))

    def _arrive(self, now: float) -> None:
        chosen = bisect.bisect(self.weights, self.random.random() * self.weights[-1])
        tokens = max(1, int(self.random.lognormvariate(math.log(TOKENS) - SIGMA**2 / 2, SIGMA)))
        job = Job(self.names[min(chosen, len(self.names) - 1)], now, tokens)
        self.lanes.setdefault(job.combination, deque()).append(job)
        self._at(now + self.random.expovariate(self.offered), "arrival")

    def _started(self, job: Job, now: float) -> None:
        if job.arrived >= self.warm_s:
            self.waits.append(now - job.arrived)

    def _tick(self, now: float) -> None:
        """What a placer does: look, place, apply."""
        now_ms = int(now * 1000)
        lanes = [Lane("normal", name, len(jobs), int(jobs[0].arrived * 1000)) for name, jobs in self.lanes.items()]
        lanes = heapq.nsmallest(MOST_LANES, lanes, key=lambda lane: lane.head_ms)
        view = YardView(tuple(worker.gpu() for worker in self.workers.values()), tuple(lanes))
        self.homeless = {name: self.homeless.get(name, now_ms) for name in homeless(view)}
        gc.disable()  # it would walk the simulation's heap
        start = time.thread_time()
        moves = self.policy(YardView(view.gpus, view.lanes, self.homeless), now_ms)
        self.placing.append(time.thread_time() - start)
        gc.enable()
        for move in moves:
            self._apply(move, now, now_ms)
        self._at(now + BUSY_TICK_S, "tick")

    def _apply(self, move: Action, now: float, now_ms: int) -> None:
        worker = self.workers[move.gpu]
        if isinstance(move, Assign):
            lane = self.lanes[move.combination]
            for _ in range(move.most):
                worker.queue.append(lane.popleft())
            worker.load[move.combination] += move.most
            if not lane:
                del self.lanes[move.combination]
            if not worker.active:
                worker.active = True
                self._at(now, worker.name)
        elif isinstance(move, Open):
            assert (
                worker.slots[move.slot].combination in (None, move.combination)
                or not worker.load[worker.slots[move.slot].combination or ""]
            ), "a slot may only be opened anew when it has drained"
            worker.slots[move.slot] = Slot(move.combination, False, now_ms)
        else:
            worker.slots[move.slot] = worker.slots[move.slot]._replace(closing=True)


def swap_on_drain(view: YardView, now_ms: int) -> list[Action]:
    """The naive policy."""
    moves: list[Action] = []
    lanes = sorted(view.lanes, key=lambda lane: lane.head_ms)
    waiting = {lane.combination: lane.jobs for lane in lanes}
    homes = {slot.combination for gpu in view.gpus for slot in gpu.slots}
    for gpu in view.gpus:
        bank = [slot.combination for slot in gpu.slots if slot.combination]
        if not gpu.load and not any(waiting.get(one) for one in bank):
            bank = [lane.combination for lane in lanes if lane.combination not in homes][: len(gpu.slots)]
            moves += [Open(gpu.name, index, combination) for index, combination in enumerate(bank)]
            homes |= set(bank)
        room = gpu.room
        for lane in lanes:
            most = min(room, waiting[lane.combination])
            if lane.combination in bank and most > 0:
                moves.append(Assign(lane.cls, lane.combination, gpu.name, most))
                waiting[lane.combination] -= most
                room -= most
    return moves


HEAD = ("GPUs", "slots", "adapters", "policy", "offered/s", "done/s", "p50 s", "p99 s", "max s", "loads/s",
        "place() ms", "p99 ms")  # fmt: skip
POLICIES: dict[str, Policy] = {"place": place, "naive": swap_on_drain}


def row(gpus: int, slots: int, adapters: int, policy: str, warm_s: float, seconds: float) -> Sequence[str]:
    """Simulate one yard."""
    yard = Yard(gpus, slots, adapters, POLICIES[policy])
    yard.run(warm_s, seconds)
    return (
        str(gpus), str(slots), str(adapters), policy, f"{yard.offered:,.0f}", f"{yard.done:,.0f}",
        f"{statistics.median(yard.waits):.2f}", f"{_p99(yard.waits):.2f}", f"{max(yard.waits):.1f}",
        f"{yard.loads:.1f}", f"{1e3 * statistics.median(yard.placing):.2f}", f"{1e3 * _p99(yard.placing):.1f}",
    )  # fmt: skip


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


@click.command(context_settings={"show_default": True})
@click.option("--gpus", multiple=True, type=int, default=(4,), help="Give it again for more; so the next two.")
@click.option("--slots", multiple=True, type=int, default=(8, 32))
@click.option("--adapters", multiple=True, type=int, default=(16, 64, 256, 1000))
@click.option("--seconds", default=60.0, help="Simulated time that is measured.")
@click.option("--warm", default=20.0, help="Simulated time before that.")
def main(gpus: tuple[int, ...], slots: tuple[int, ...], adapters: tuple[int, ...], seconds: float, warm: float) -> None:
    """Print one line for each yard and policy."""
    for cells in itertools.chain(
        [HEAD, ["---"] * len(HEAD)],
        (row(*yard, warm, warm + seconds) for yard in itertools.product(gpus, slots, adapters, POLICIES)),
    ):
        click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
