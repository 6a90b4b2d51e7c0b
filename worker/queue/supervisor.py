"""The supervisor of a host's workers: starts them, gives back the jobs of a dead one at once, starts it again."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from lorayard.shared.children import spawn, stop
from lorayard.shared.connect import is_away
from lorayard.shared.errors import FileError, UsageError
from lorayard.shared.scripts import Scripts

from ..lora.folders import scan
from .spec import SUPERSEDED, WorkerSpec

log = logging.getLogger(__name__)

POLL_S = 0.05
SCAN_S = 2.0
FORGET_MS = 24 * 3600 * 1000
"""Another holder that has been silent for so long, all of it while we were there, is forgotten with its adapters."""
CHANGES = 500
"""Most changes told in one call."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
HEALTHY_S = 60.0
"""A child that crashes sooner makes the next pause twice as long."""
STOP_MARGIN_S = 15.0
"""What a child gets beyond its grace, for the step it is in and for Redis, before it is killed."""


@dataclass
class Child:
    """One GPU with its present process. Names in `dead` are workers whose jobs have yet to be given back."""

    spec: WorkerSpec
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = FIRST_PAUSE_S / 2
    start_at: float = 0.0
    dead: list[str] = field(default_factory=list)


class Supervisor:
    """Keeps one process for each spec. `redis_url` goes to the children by environment, since arguments are public."""

    def __init__(self, scripts: Scripts, redis_url: str, specs: Sequence[WorkerSpec]) -> None:
        self._scripts, self._redis_url = scripts, redis_url
        self._holder = specs[0].gpu
        self._children = [Child(replace(spec, holder=self._holder)) for spec in specs]
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let `run` end. Fit for a signal handler."""
        self._stopping.set()

    def run(self) -> int:
        """Supervise until stopped; -> exit status. A fault of the user in a child, which has named it, ends all."""
        roots = [Path(root) for root in self._children[0].spec.adapters]
        publisher = threading.Thread(
            target=self._publish, args=[AdapterList(self._scripts, self._holder, roots)], daemon=True
        )
        publisher.start()
        status = 0
        while not status and not self._stopping.wait(POLL_S):
            status = max(self._tend(child) for child in self._children)
        self._stopping.set()
        living = [child for child in self._children if child.process is not None]
        grace_s = max(child.spec.grace_s for child in self._children) + STOP_MARGIN_S
        stop([child.process for child in living if child.process is not None], grace_s)
        for child in living:
            child.dead.append(child.spec.worker)
            self._give_back(child)
        publisher.join()
        return status

    def _tend(self, child: Child) -> int:
        """Start a child that is due, notice one that has ended; -> status to end with, or 0."""
        now = time.monotonic()
        if child.process is None:
            if now >= child.start_at:
                self._start(child, now)
        elif child.process.poll() is not None:
            status = child.process.returncode
            child.process = None
            child.dead.append(child.spec.worker)
            if status in (UsageError.exit_status, FileError.exit_status):
                return status
            crashed = status not in (0, SUPERSEDED) and now - child.started < HEALTHY_S
            child.pause = min(2 * child.pause, LONGEST_PAUSE_S) if crashed else FIRST_PAUSE_S
            child.start_at = now + child.pause
            log.warning("worker %s ended (%d), another starts in %g s", child.spec.worker, status, child.pause)
        self._give_back(child)
        return 0

    def _start(self, child: Child, now: float) -> None:
        child.spec = replace(child.spec, worker=f"{child.spec.gpu}.{secrets.token_hex(3)}")
        child.started = now
        child.process = spawn(
            [sys.executable, "-m", "lorayard.worker.queue.process", child.spec.dump()],
            parent_death=signal.SIGTERM,
            env=os.environ | {"LORAYARD_REDIS_URL": self._redis_url},
        )

    def _give_back(self, child: Child) -> None:
        """The jobs of dead workers return to their lanes; while Redis is away they wait for the next try."""
        while child.dead:
            try:
                back = self._scripts.reclaim(child.spec.gpu, child.dead[0])
            except RedisError as error:
                if not is_away(error):
                    raise
                return
            if back > 0:
                log.warning("%d jobs of worker %s are back in their lanes", back, child.dead[0])
            child.dead.pop(0)

    def _publish(self, adapters: AdapterList) -> None:
        while not self._stopping.is_set():
            try:
                adapters.refresh()
            except Exception:
                log.exception("the adapters could not be looked at; the next try is in %g s", SCAN_S)
            self._stopping.wait(SCAN_S)


class AdapterList:
    """Publishes the folders below the roots as what one holder has."""

    def __init__(self, scripts: Scripts, holder: str, roots: Sequence[Path]) -> None:
        self._scripts, self._holder, self._roots = scripts, holder, roots
        self._redis: Any = scripts.redis
        self._since = time.monotonic()
        self._problems: set[str] = set()

    def refresh(self) -> None:
        """Publish new, changed and vanished adapters, log each problem once."""
        found = scan(self._roots)
        for problem in set(found.problems) - self._problems:
            log.warning("an adapter is passed over: %s", problem)
        self._problems = set(found.problems)
        wanted = {
            name: json.dumps({"rank": folder.rank, "digest": folder.digest, "bytes": folder.bytes})
            for name, folder in found.items()
        }
        try:
            self._tell(wanted)
        except RedisError as error:
            if not is_away(error):
                raise

    def _tell(self, wanted: Mapping[str, str]) -> None:
        held = self._redis.hgetall(self._scripts.keys.held(self._holder))
        present = {name.decode(): text.decode() for name, text in held.items()}
        changes = [(name, text) for name, text in wanted.items() if present.get(name) != text]
        changes += [(name, "") for name in present.keys() - wanted.keys()]
        silent_ms = FORGET_MS if (time.monotonic() - self._since) * 1000 >= FORGET_MS else 0
        for start in range(0, max(len(changes), 1), CHANGES):
            self._scripts.hold(self._holder, silent_ms, dict(changes[start : start + CHANGES]))
