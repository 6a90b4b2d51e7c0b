"""The thread that prepares jobs while the engine runs others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from lorayard.shared.job import Job

from .prepare import Prepared
from .running import Running


class Helper(threading.Thread):
    """Unpacks and prepares one job after another. The other methods are for the one thread that gives it work."""

    def __init__(self, prepare: Callable[[Job], Prepared]) -> None:
        super().__init__(name="prepare", daemon=True)
        self._prepare = prepare
        self._todo: SimpleQueue[Running] = SimpleQueue()
        self._done: SimpleQueue[Running] = SimpleQueue()
        self._out = 0

    @property
    def busy(self) -> bool:
        """Whether `ready` has something to give, now or later."""
        return self._out > 0

    def put(self, running: Running) -> None:
        """Have a job prepared."""
        self._out += 1
        self._todo.put(running)

    def ready(self, wait_s: float) -> list[Running]:
        """The jobs that are prepared, or failed to be; waits so long for the first."""
        ready: list[Running] = []
        try:
            while self._out:
                ready.append(self._done.get(timeout=wait_s) if wait_s and not ready else self._done.get_nowait())
                self._out -= 1
        except Empty:
            pass
        return ready

    def run(self) -> None:
        """Prepare for ever; the thread ends with the process."""
        while True:
            running = self._todo.get()
            try:
                running.job = Job.unpack(running.lease.request)
                running.prepared = self._prepare(running.job)
            except Exception as error:
                running.prepared = error
            self._done.put(running)
