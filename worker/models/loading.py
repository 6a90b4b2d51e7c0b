"""Parts of a model read by several threads, and how fast that goes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
LINE_S = 5.0
THREADS = 4
"""Layers that are read at a time; each may need memory of its own on the CPU until it is on its device."""


def in_order(tasks: Iterable[Callable[[], T]], threads: int = THREADS) -> Iterator[T]:
    """The tasks' results in order; a task begins only when fewer than `threads` results are awaited.

    The first error is raised when its turn has come; no further task begins then.
    """
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads, "reader") as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) == threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Pace:
    """Says how a load goes: `say` is given words every LINE_S seconds, and at the end of a load that took so long."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.begun = self.said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """For Model.load's progress."""
        now = time.monotonic()
        if now - self.said > LINE_S or done == total and now - self.begun > LINE_S:
            self.said = now
            self.say(self.words(done, total))

    def words(self, done: int, total: int) -> str:
        """Such as `1.25 of 4.70 GB, 0.83 GB/s`."""
        rate = done / max(time.monotonic() - self.begun, 1e-6)
        return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s"
