"""The heart of a worker: a thread that renews its leases whatever the engine is doing. It knows only ids."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from lorayard.shared.connect import is_away
from lorayard.shared.scripts import Lease, Scripts, Superseded, Value

log = logging.getLogger(__name__)

RECORD_S = 80
"""How long RQ's record of a worker outlives its last beat."""


class Heartbeat(threading.Thread):
    """Beats four times a lease, at least once a second, over a connection of its own.

    `status()` gives the fields of yard:gpu:GPU to publish with a beat. `superseded()` is called, once, in this thread
    when the GPU has been given to another worker.
    """

    def __init__(
        self, scripts: Scripts, gpu: str, worker: str, lease_ms: int,
        status: Callable[[], Mapping[str, Value]], superseded: Callable[[], object],
    ) -> None:  # fmt: skip
        super().__init__(name="heartbeat", daemon=True)
        self._scripts, self._gpu, self._worker, self._lease_ms = scripts, gpu, worker, lease_ms
        self._status, self._superseded = status, superseded
        self._held: set[str] = set()
        self._lost: set[str] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._wake = threading.Event()

    def hold(self, lease: Lease) -> None:
        """Renew this lease from now on."""
        with self._lock:
            self._held.add(f"{lease.id}:{lease.execution}")

    def drop(self, lease: Lease) -> None:
        """Renew it no longer: it has ended."""
        with self._lock:
            self._held.discard(f"{lease.id}:{lease.execution}")
            self._lost.discard(f"{lease.id}:{lease.execution}")

    def take_lost(self) -> list[tuple[str, str]]:
        """(id, execution) of the leases that have been lost since the last call."""
        with self._lock:
            lost, self._lost = self._lost, set()
            self._held -= lost
        return [(job_id, execution) for job_id, _, execution in (composite.partition(":") for composite in lost)]

    def beat(self) -> None:
        """Renew now. Raises Superseded or a RedisError."""
        with self._lock:
            held = list(self._held)
        lost = self._scripts.renew(self._gpu, self._worker, self._lease_ms, RECORD_S, held, self._status())
        with self._lock:
            self._lost |= self._held.intersection(lost)

    def hasten(self) -> None:
        """Let the next beat come at once, to publish a change."""
        self._wake.set()

    def run(self) -> None:
        """Beat until stopped."""
        interval = min(1.0, self._lease_ms / 4000)
        away = False
        while not self._stopping.is_set():
            try:
                self.beat()
                away = False
            except Superseded:
                self._superseded()
                return
            except Exception as error:
                if not is_away(error):
                    raise
                if not away:
                    log.warning("no heartbeat reaches Redis: %s", error)
                away = True
            self._wake.wait(interval)
            self._wake.clear()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping.set()
        self._wake.set()
        self.join()
