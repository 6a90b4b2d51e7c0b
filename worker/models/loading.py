"""Parts of a model read by several threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
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
