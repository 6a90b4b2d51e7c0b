"""Looks at a yard once a second and remembers: the last look, what changed, and an hour of figures."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from redis.exceptions import RedisError

from lorayard.shared.keys import Keys

from ..snapshot import GpuSeen, Snapshot, look

log = logging.getLogger(__name__)

STEP_S, POINTS = 5.0, 720
"""A point of the history stands for so many seconds; so many make an hour."""
CHANGES = 60
"""Changes that are remembered."""


class Change(NamedTuple):
    """Something that was different from the look before. kind: swap, closing, gone, back, state or refused."""

    time_ms: int
    kind: str
    gpu: str
    text: str


class Recorder(threading.Thread):
    """The one collector of the page, its JSON and /metrics."""

    def __init__(self, redis: Any, keys: Keys, every_s: float = 1.0) -> None:
        super().__init__(name="recorder", daemon=True)
        self._redis, self._keys, self._every_s = redis, keys, every_s
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._seen: Snapshot | None = None
        self._trouble = "the yard has not been looked at yet"
        self._changes: deque[Change] = deque(maxlen=CHANGES)
        self._points: deque[tuple[int, dict[str, Any]]] = deque(maxlen=POINTS)
        self._point_ms = 0

    def run(self) -> None:
        """Look until stopped."""
        while not self._stopping.is_set():
            self.look()
            self._stopping.wait(self._every_s)

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping.set()
        self.join()

    def look(self) -> None:
        """Look once; what Redis says against it is remembered too."""
        try:
            seen = look(self._redis, self._keys)
        except RedisError as error:
            with self._lock:
                self._trouble = f"Redis does not answer: {error}"
            return
        with self._lock:
            if self._seen is not None:
                self._changes.extend(changes(self._seen, seen))
            self._seen, self._trouble = seen, ""
            if seen.time_ms - self._point_ms >= STEP_S * 1000:
                self._point_ms = seen.time_ms
                self._points.append((seen.time_ms, _point(seen)))

    @property
    def now(self) -> tuple[Snapshot | None, str]:
        """The last look, None before the first; why there is no newer one, "" if there is."""
        with self._lock:
            return self._seen, self._trouble

    def state(self) -> dict[str, Any]:
        """The last look and the latest changes, the newest first, for JSON."""
        with self._lock:
            seen, trouble, latest = self._seen, self._trouble, list(self._changes)
        return {
            "trouble": trouble, "yard": _plain(seen) if seen else None,
            "changes": [change._asdict() for change in reversed(latest)],
        }  # fmt: skip

    def history(self) -> dict[str, Any]:
        """`times` in ms, and for each series of the yard and of each GPU of the last look a value for each time."""
        with self._lock:
            points, seen = list(self._points), self._seen
        names = [gpu.name for gpu in seen.gpus] if seen else []
        return {
            "times": [time_ms for time_ms, _ in points],
            "yard": _series([point["yard"] for _, point in points]),
            "gpus": {name: _series([point["gpus"].get(name, {}) for _, point in points]) for name in names},
        }


def _plain(seen: Snapshot) -> dict[str, Any]:
    """A snapshot for JSON, with the names of all fields."""
    gpus = [dataclasses.asdict(gpu) | {"slots": [slot._asdict() for slot in gpu.slots]} for gpu in seen.gpus]
    return dataclasses.asdict(seen) | {"gpus": gpus, "lanes": [lane._asdict() for lane in seen.lanes]}


def _point(seen: Snapshot) -> dict[str, Any]:
    queued, running = sum(gpu.queued for gpu in seen.gpus), sum(gpu.running for gpu in seen.gpus)
    return {
        "yard": {
            "tokens_per_s": round(sum(gpu.tokens_per_s for gpu in seen.gpus), 1), "running": running,
            "waiting": max(sum(seen.depth.values()) - running, queued), "memory": seen.memory,
        },
        "gpus": {
            gpu.name: {"tokens_per_s": gpu.tokens_per_s, "running": gpu.running} for gpu in seen.gpus
        },
    }  # fmt: skip


def _series(points: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Each figure by its name, None where a point lacks it."""
    names = {name for point in points for name in point}
    return {name: [point.get(name) for point in points] for name in sorted(names)}


def changes(old: Snapshot, new: Snapshot) -> Iterator[Change]:
    """What a person wants to be told of the step from one look to the next."""
    before = {gpu.name: gpu for gpu in old.gpus}
    for gpu in new.gpus:
        was = before.get(gpu.name)
        for kind, text in _of_gpu(was, gpu):
            yield Change(new.time_ms, kind, gpu.name, text)
    if new.refused > old.refused:
        count = new.refused - old.refused
        yield Change(new.time_ms, "refused", "", f"{count} {'entry' if count == 1 else 'entries'} refused")


def _of_gpu(was: GpuSeen | None, gpu: GpuSeen) -> Iterator[tuple[str, str]]:
    if was is None or was.state != gpu.state:
        kind = {"ready": "back", "silent": "gone", "no worker": "gone"}.get(gpu.state, "state")
        yield kind, f"{was.state if was else 'new'} → {gpu.state}"
    if was is None or gpu.swaps < was.swaps:  # another worker
        return
    for at, slot in enumerate(gpu.slots):
        past = was.slots[at] if at < len(was.slots) else None
        if slot.combination == "base" or past is None or past.combination == "base":
            continue
        if past.combination != slot.combination:
            yield "swap", f"slot {at}: {past.combination} → {slot.combination}"
        elif slot.state == "closing" and past.state != "closing":
            yield "closing", f"slot {at}: {slot.combination} closes and drains"
