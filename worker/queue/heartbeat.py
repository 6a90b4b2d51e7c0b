"""The heart of a worker: a thread that renews its leases whatever the engine is doing. It knows only ids."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from lorayard.shared.connect import is_away
from lorayard.shared.scripts import Lease, Scripts, Superseded, Value

log = logging.getLogger(__name__)

RECORD_S = 80
"""How long RQ's record of a worker outlives its last beat."""
LONGEST_LOOK_S = 5.0
"""What counts at most between two looks at the engine: a process that was stopped for a while does not hang."""


class Heartbeat(threading.Thread):
    """Beats four times a lease, at least once a second, over a connection of its own.

    `status()` gives the fields of yard:gpu:GPU to publish with a beat. This thread ends by calling `superseded()` when
    the GPU has been given to another worker, or `hung()` when after the first `turned()` none has come for `hang_s`.
    """

    def __init__(
        self, scripts: Scripts, gpu: str, worker: str, lease_ms: int,
        status: Callable[[], Mapping[str, Value]], superseded: Callable[[], object], hang_s: float,
        hung: Callable[[], object],
    ) -> None:  # fmt: skip
        super().__init__(name="heartbeat", daemon=True)
        self._scripts, self._gpu, self._worker, self._lease_ms = scripts, gpu, worker, lease_ms
        self._status, self._superseded, self._hang_s, self._hung = status, superseded, hang_s, hung
        self.still_s = 0.0
        """How long the engine's thread has made no turn."""
        self._turns = self._seen = 0
        self._looked = 0.0
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

    def turned(self) -> None:
        """The engine's thread begins another turn."""
        self._turns += 1

    def hasten(self) -> None:
        """Let the next beat come at once, to publish a change."""
        self._wake.set()

    def run(self) -> None:
        """Beat until stopped."""
        interval = min(1.0, self._lease_ms / 4000)
        away = False
        while not self._stopping.is_set():
            if self._hangs():
                log.critical("worker %s: no step of its engine ended in %g s, so it ends", self._worker, self._hang_s)
                self._hung()
                return
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

    def _hangs(self) -> bool:
        now = time.monotonic()
        if self._turns == self._seen and self._turns:
            self.still_s += min(now - self._looked, LONGEST_LOOK_S)
        else:
            self.still_s = 0.0
        self._seen, self._looked = self._turns, now
        return self.still_s > self._hang_s

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping.set()
        self._wake.set()
        self.join()
