"""The dispatcher's loop: intake and placement in one thread, for as long as it takes Redis to come back."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import socket
import threading
import time

from redis import Redis
from redis.exceptions import RedisError

from lorayard.shared.connect import is_away
from lorayard.shared.keys import Keys
from lorayard.shared.scripts import Scripts

from .ingress import Ingress
from .placer import Placer

log = logging.getLogger(__name__)

BUSY_TICK_S = 0.02
"""Between two looks at the yard while jobs wait in lanes."""

IDLE_TICK_S = 0.1
"""Between two looks while nothing waits: deadlines and silent workers are noticed this late."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
"""How long Redis is left alone after an error; doubled each time in a row."""

DEFAULT_LIMIT = 100_000


class Dispatcher:
    """Serves one yard. `limit`: most jobs of a class that may wait before more are refused as busy."""

    def __init__(self, redis: Redis, keys: Keys, limit: int = DEFAULT_LIMIT) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        scripts = Scripts(redis, keys)
        self.ingress = Ingress(redis, scripts, limit)
        self.placer = Placer(redis, scripts, self.name)
        self._stop = threading.Event()
        self._tick_at = 0.0

    def stop(self) -> None:
        """Make `serve` return after the entries at hand. Safe in a signal handler and from other threads."""
        self._stop.set()

    def serve(self) -> None:
        """Work until `stop`. Whatever a death leaves half done is found by the next dispatcher."""
        gc.freeze()  # a full collection else walks all modules and holds up a turn by 20 ms
        pause = 0.0
        ready = False
        while not self._stop.is_set():
            try:
                if not ready:
                    self.ingress.make_groups()
                self.step()
                if pause:
                    log.warning("Redis serves us again")
                ready, pause = True, 0.0
            except RedisError as error:
                if not is_away(error):
                    raise
                if not pause:
                    log.warning("Redis does not serve us, trying again until it does: %s", error)
                ready, pause = False, min(max(2 * pause, FIRST_PAUSE_S), LONGEST_PAUSE_S)
                self._stop.wait(pause)

    def step(self) -> None:
        """One turn: what has come in, then the placer if it is time."""
        tick_s = BUSY_TICK_S if self.placer.view.lanes else IDLE_TICK_S
        left_s = self._tick_at + tick_s - time.monotonic()
        outcomes = self.ingress.step(max(int(left_s * 1000), 0), self.placer.gpu_for)
        if left_s <= 0 or outcomes["accepted"]:
            self.placer.tick()
            self._tick_at = time.monotonic()
