"""How a run tells of itself: a bar on a terminal, plain lines elsewhere, JSON lines for machines."""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager
from typing import Any

import click
from redis.exceptions import RedisError

from lorayard.shared.keys import Keys

from .pump import Pump

LINE_S = 10.0
"""Between two plain lines."""
JSON_S = 1.0
SWAPS_S = 1.0
"""Between two looks at the yard's swaps."""


class Swaps:
    """How often the yard's slots took another set since the first call."""

    def __init__(self, redis: Any, keys: Keys) -> None:
        self.redis, self.keys = redis, keys
        self._last: dict[bytes, int] = {}
        self._count, self._next = 0, 0.0

    def __call__(self) -> int:
        """The number, at most a second old; as it was, if Redis does not answer."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SWAPS_S
            try:
                gpus = self.redis.smembers(self.keys.gpus)
                said = {gpu: int(self.redis.hget(self.keys.gpu(gpu.decode()), "swaps") or 0) for gpu in gpus}
            except RedisError:
                return self._count
            for gpu, swaps in said.items():
                last = self._last.get(gpu, swaps)
                self._count += swaps - last if swaps >= last else swaps  # a new worker counts from 0
            self._last |= said
        return self._count


def facts(pump: Pump, total: int | None, swaps: int) -> dict[str, Any]:
    """Texts and rates of a run so far; eta_s: seconds to the end, if the total is known and anything is done."""
    counts = pump.counts
    seconds = max(time.monotonic() - counts.started, 1e-3)
    fresh = counts.ended - counts.skipped
    left = None if total is None else total - counts.ended
    return {
        "done": counts.done, "rejected": counts.rejected, "failed": counts.failed, "skipped": counts.skipped,
        "total": total, "under_way": len(pump.out), "texts_per_s": round(fresh / seconds, 1),
        "tokens_per_s": round(counts.tokens / seconds, 1),
        "eta_s": round(left * seconds / fresh) if left is not None and fresh else None, "swaps": swaps,
        **({"away": pump.away} if pump.away else {}),
    }  # fmt: skip


def lasting(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    for unit, size, digits in (("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.{digits}f} {unit}"
    return f"{seconds:,.0f} s"


class Lines(AbstractContextManager["Lines"]):
    """Plain lines, or JSON lines."""

    def __init__(self, total: int | None, swaps: Swaps, as_json: bool) -> None:
        self.total, self.swaps, self.as_json = total, swaps, as_json
        self._next = 0.0

    def __exit__(self, *_: object) -> None:
        self._next = 0.0

    def heard(self, pump: Pump) -> None:
        """Say how it goes, now and then."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + (JSON_S if self.as_json else LINE_S)
            self.say(pump)

    def say(self, pump: Pump) -> None:
        """Say how it goes."""
        said = facts(pump, self.total, self.swaps())
        click.echo(json.dumps(said) if self.as_json else sentence(said), err=not self.as_json)
        sys.stdout.flush()


def sentence(said: dict[str, Any]) -> str:
    """`120 of 1,000 texts, 3 failed, 84.1 texts/s, 5,300 tokens/s, 11 s left`."""
    ended = said["done"] + said["rejected"] + said["failed"] + said["skipped"]
    parts = [f"{ended:,}{'' if said['total'] is None else ' of ' + format(said['total'], ',')} texts"]
    parts += [f"{said[name]:,} {name}" for name in ("failed", "rejected", "swaps") if said[name]]
    parts += [f"{said['texts_per_s']:,} texts/s", f"{said['tokens_per_s']:,} tokens/s"]
    if said["eta_s"] is not None:
        parts.append(f"{lasting(said['eta_s'])} left")
    if said.get("away"):
        parts.append(f"Redis is away: {said['away']}")
    return ", ".join(parts)


class Bar(AbstractContextManager["Bar"]):
    """A progress bar that stays when it is done."""

    def __init__(self, total: int | None, swaps: Swaps) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.swaps = swaps
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def heard(self, pump: Pump) -> None:
        """Move the bar."""
        said = facts(pump, None, self.swaps())
        words = sentence(said).partition(" texts, ")[2]
        self._bar.update(self._task, completed=pump.counts.ended, description=words)
