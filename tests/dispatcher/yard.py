"""A simulated yard: real Redis, real scripts, real intake and placer; only the engine and the clock are made up."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

from lorayard.dispatcher.ingress import Ingress
from lorayard.dispatcher.place import homeless
from lorayard.dispatcher.placer import Placer
from lorayard.shared.keys import CLASSES
from lorayard.shared.scripts import Scripts, Superseded

from .fake import DIGESTS, KEYS, LEASE_MS, FakeWorker, combination, hold, publish

AUDIT = (Path(__file__).parent / "audit.lua").read_text()
HOLD_MS = 5000
START_MS = 1_800_000_000_000
SETS = ["", "a", "b", "c", "d", "e", "f", "a+b", "a*0.5+c"]


class SimulatedYard:
    """Operations of clients, workers and time, each followed by a check of everything that must always hold."""

    def __init__(
        self, scripts: Scripts, seed: int, *, gpus: int, slots: int, seats: int, longest_ms: int
    ) -> None:  # fmt: skip
        self.scripts, self.redis, self.random = scripts, scripts.redis, random.Random(seed)
        scripts.now_ms = START_MS
        redis = self.redis
        self.ingress = Ingress(redis, self.scripts, limit=1000)
        self.placer = Placer(redis, self.scripts, "placer", HOLD_MS)
        self.ingress.make_groups()
        publish(redis)
        self.slots, self.seats, self.longest_ms = slots, seats, longest_ms
        self.ids: list[str] = []
        self.sent: dict[str, dict[str, Any]] = {}
        self.due: dict[tuple[str, str], int] = {}
        self.silent: list[FakeWorker] = []
        self.held: dict[str, set[str]] = {}
        self.workers = {name: self._worker(name) for name in (f"gpu-h-{at}" for at in range(gpus))}
        self.audit = redis.register_script(AUDIT)
        self.homeless: dict[str, tuple[int, int]] = {}
        self.unfinished = self.longest_homeless_ms = 0
        self.widest_gap_ms = 0
        self.unread = False

    @property
    def now_ms(self) -> int:
        return self.scripts.now_ms

    def _worker(self, gpu: str) -> FakeWorker:
        worker = FakeWorker(self.scripts, gpu, self.slots, self.seats, gpu)
        assert worker.register()
        if gpu not in self.held:
            self.held[gpu] = set(DIGESTS)
            hold(self.scripts, gpu, **DIGESTS)
        return worker

    # What clients do.

    def submit(self, adapter: str | None = None) -> None:
        job_id = f"j{len(self.ids)}"
        adapter = self.random.choice(SETS) if adapter is None else adapter
        fields: dict[str, Any] = {"id": job_id, "prompt": "p", "adapter": adapter}
        if self.random.random() < 0.15:
            fields["deadline_ms"] = self.now_ms + self.random.randrange(1, 4 * HOLD_MS)
        cls = self.random.choice(CLASSES)
        self.ids.append(job_id)
        self.sent[job_id] = fields | {"cls": cls}
        self.add(KEYS.stream(cls), fields)

    def add(self, stream: str, fields: dict[Any, Any]) -> None:
        self.redis.xadd(stream, fields)
        self.unread = True

    def repeat(self) -> None:
        if self.ids:
            fields = dict(self.sent[self.random.choice(self.ids)])
            cls = fields.pop("cls")
            if self.random.random() < 0.3:
                fields["prompt"] = "another"
            self.add(KEYS.stream(cls), fields)

    def cancel(self) -> None:
        if self.ids:
            early = f"j{len(self.ids)}"
            self.add(KEYS.control, {"op": "cancel", "id": self.random.choice([*self.ids, early])})

    # What happens to workers.

    def crash(self) -> None:
        """A worker dies; its supervisor sees it, or nobody does and only its silence tells."""
        gpu = self.random.choice(list(self.workers))
        worker = self.workers.pop(gpu)
        if self.random.random() < 0.5:
            self.scripts.reclaim(gpu, worker.name)
        self.silent.append(worker)
        self.homeless.clear()

    def leave(self) -> None:
        """A worker stops in an orderly way."""
        gpu = self.random.choice(list(self.workers))
        worker = self.workers.pop(gpu)
        if self.random.random() < 0.5:
            self.scripts.drain(gpu, worker.name)
            self.check()
        self.scripts.release(gpu, worker.name)
        self.homeless.clear()

    def join(self) -> None:
        """A worker registers on a GPU whose worker died; refused while the dead one's lease may run."""
        if self.silent:
            gpu = self.silent[0].gpu
            worker = FakeWorker(self.scripts, gpu, self.slots, self.seats, gpu)
            if worker.gpu not in self.workers and worker.register():
                self.workers[worker.gpu] = worker
                self.silent.pop(0)
                self.homeless.clear()

    def haunt(self) -> None:
        """A worker taken for dead goes on: nothing that it does may count."""
        for worker in self.silent:
            if self.scripts.redis.hget(KEYS.gpu(worker.gpu), "worker") == worker.name.encode():
                continue  # nobody has taken its place: it is only slow
            try:
                assert not worker.claim()
                raise AssertionError("a worker without a GPU must be told so")
            except Superseded:
                pass
            for job_id in list(worker.running):
                assert worker.emit(job_id, "ghost") == 0 and worker.done(job_id) == 0

    def shelve(self) -> None:
        """A folder vanishes from a host, or comes back."""
        gpu, name = self.random.choice(list(self.held)), self.random.choice(list(DIGESTS))
        self.held[gpu] ^= {name}
        hold(self.scripts, gpu, **{name: DIGESTS[name] if name in self.held[gpu] else ""})
        self.homeless.clear()

    # What another placer does, whose view is old, or who has no idea.

    def meddle(self) -> None:
        for _ in range(4):
            gpu, slot = self.random.choice([*self.workers, "gpu-h-9"]), self.random.randrange(self.slots + 1)
            name = combination(*self.random.choice(("a", "b", "c", "ab")))
            move = self.random.choice(("open", "close", "assign"))
            if move == "assign":
                self.scripts.assign(f"{self.random.choice(CLASSES)}:{name}", gpu, 3)
            else:
                getattr(self.scripts, move)(gpu, slot, name)
            self.check()
        self.homeless.clear()

    def press(self, hot: list[str]) -> None:
        """Keep lanes so full that their slots never drain by themselves, and now and then send one of another set."""
        waiting = {lane.combination for lane in self.placer.view.lanes if lane.jobs > 2}
        for adapter in hot:
            if combination(*sets(adapter)) not in waiting:
                for _ in range(6):
                    self.submit(adapter)
        if self.random.random() < 0.2:
            self.submit()

    # Time.

    def turn(self, ms: int) -> None:
        """Time passes: the engines finish what is due, obey, claim; the dispatcher takes in and places."""
        self.scripts.now_ms += ms
        self.widest_gap_ms = max(self.widest_gap_ms, ms)
        for worker in self.workers.values():
            waiting = worker.obey()
            for job_id in [one for one in worker.running if self.due[worker.name, one] <= self.now_ms]:
                assert worker.done(job_id) == 1
            if self.now_ms - worker.renewed_ms >= LEASE_MS // 4:
                assert worker.renew() == []
            if waiting:
                self._claim(worker)
        if self.unread:
            self.ingress.step(0, self.placer.gpu_for)
            self.unread = False
        self.placer.tick()
        self.check()
        self.check_holders()
        self.watch_homes()

    def _claim(self, worker: FakeWorker) -> None:
        for lease in worker.claim():
            self.due[worker.name, lease.id] = self.now_ms + self.random.randint(1, self.longest_ms)

    # What must always hold.

    def check(self) -> None:
        truth = json.loads(self.audit(args=[KEYS.prefix, *self.ids]), object_hook=_without_mark)
        self.unfinished = sum(map(int, truth["depth"].values()))
        where: Counter[str] = Counter()
        for gpu, facts in truth["gpus"].items():
            self._check_gpu(gpu, facts, where)
        for lane, ids in truth["lanes"].items():
            for job_id in set(ids):
                status, its_lane, *_ = truth["jobs"][job_id]
                where[job_id] += status == "deferred" and its_lane == lane
        depth: Counter[str] = Counter()
        for job_id, (status, lane, _, finals) in truth["jobs"].items():
            if not status:
                continue
            live = status in ("deferred", "queued", "started")
            depth[lane.partition(":")[0]] += live
            assert where[job_id] == live, f"{job_id} is {status} and in {where[job_id]} places"
            assert finals == (not live), f"{job_id} is {status} with {finals} final events"
        assert {cls: int(truth["depth"].get(cls, 0)) for cls in CLASSES} == {cls: depth[cls] for cls in CLASSES}

    def _check_gpu(self, gpu: str, facts: dict[str, Any], where: Counter[str]) -> None:
        slots = {name: value for name, value in facts["slots"].items() if name.isdigit()}
        held = list(slots.values())
        assert len(set(held)) == len(held) <= self.slots, f"{gpu} holds {held}"
        load: Counter[str] = Counter()
        queued = [row for row in facts["queued"] if row[1:3] == ["queued", gpu]]
        running = [row for row in facts["running"] if row[1:3] == ["started", gpu]]
        assert len(running) == len(facts["running"])
        for job_id, _, _, lane in [*queued, *running]:
            name = lane.partition(":")[2]
            where[job_id] += 1
            load[name] += 1
            assert name == "base" or name in held, f"{job_id} of {name} is on {gpu}, which holds {held}"
        for _, _, _, lane in queued:
            closing = [slot for slot in slots if facts["slots"][f"{slot}.state"] == "closing"]
            assert lane.partition(":")[2] not in [slots[slot] for slot in closing]
        for worker in (one for one in self.workers.values() if one.gpu == gpu):
            for job_id, lease in worker.running.items():
                name = combination(*sets(self.sent[job_id]["adapter"]))
                assert lease.slot is None if name == "base" else slots[str(lease.slot)] == name
        counted = {name: int(jobs) for name, jobs in facts["load"].items()}
        assert counted == load, f"{gpu} counts {counted}, has {dict(load)}"

    def check_holders(self) -> None:
        """After the placer, jobs are queued only where their adapters are."""
        for gpu, held in self.held.items():
            if held == DIGESTS.keys():
                continue
            for job_id in map(bytes.decode, self.redis.lrange(f"rq:queue:{gpu}", 0, -1)):
                missing = {*sets(self.sent[job_id]["adapter"])} - held
                assert not missing, f"{job_id} is queued on {gpu}, which has no {missing}"

    def watch_homes(self) -> None:
        """The documented bound: homeless for at most T + ceil(R / C) * (T/2 + 2D), the ticks' own time aside."""
        if self.silent or not self.workers:
            return
        now = homeless(self.placer.view)
        known = {name: since for name, since in self.homeless.items() if name in now}
        for name in now - known.keys():
            known[name] = (self.now_ms, len(now))
        self.homeless = known
        serving = {name: sum(gpu.holds(name) for gpu in self.placer.view.gpus) for name in known}
        for name, (since, rank) in known.items():
            if not serving[name]:
                continue
            closing = serving[name] * max(1, self.slots // 4)
            self.longest_homeless_ms = max(self.longest_homeless_ms, self.now_ms - since)
            rounds = math.ceil(rank / closing)
            bound = HOLD_MS + rounds * (HOLD_MS // 2 + 2 * self.longest_ms) + (3 * rounds + 2) * self.widest_gap_ms
            assert self.now_ms - since <= bound, f"{name} is homeless for {self.now_ms - since} ms, bound {bound}"

    def finish(self) -> None:
        """Everything ends: with workers on all GPUs and time, every job gets its one final event."""
        for worker in self.silent:
            self.scripts.reclaim(worker.gpu, worker.name)
        self.silent.clear()
        self.homeless.clear()
        for gpu in [name.decode() for name in self.redis.smembers(KEYS.gpus)]:
            if gpu not in self.workers:
                self.workers[gpu] = self._worker(gpu)
        for _ in range(2000):
            self.turn(max(self.longest_ms, HOLD_MS))
            if not self.unfinished:
                return
        raise AssertionError(f"{self.unfinished} jobs are never answered")


def sets(adapter: str) -> list[str]:
    """Adapter ids of an expression."""
    return [term.partition("*")[0] for term in adapter.split("+") if term]


def _without_mark(found: dict[str, Any]) -> dict[str, Any]:
    """Lua's empty table is a JSON list, so every map of the audit carries a mark."""
    found.pop("none", None)
    return found
