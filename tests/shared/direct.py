"""A client that sends jobs straight to ACCEPT, and looks at what became of them."""

from __future__ import annotations

from typing import Any

import redis as redis_py

from lorayard.shared.keys import GROUP
from lorayard.shared.scripts import Arrival, Scripts

from ..dispatcher.fake import KEYS, combination

NOW_MS = 1_800_000_000_000
A = combination("a")


class Client:
    """`entry` adds and reads an entry as client and dispatcher do; `send` accepts it as a job."""

    def __init__(self, redis: redis_py.Redis) -> None:
        self.redis: Any = redis  # its types do not know what a reply holds
        self.scripts = Scripts(redis, KEYS, NOW_MS)
        for stream in (KEYS.stream("normal"), KEYS.control):
            redis.xgroup_create(stream, GROUP, mkstream=True)

    def entry(self, stream: str = KEYS.stream("normal"), **fields: Any) -> str:
        """Add an entry and read it for the group, as a dispatcher does."""
        entry = self.redis.xadd(stream, fields or {"prompt": "p"}).decode()
        self.redis.xreadgroup(GROUP, "d", {stream: ">"})
        return entry

    def arrival(
        self, job_id: str, name: str = A, cls: str = "normal", fp: str = "fp", gpu: str = "", **more: Any
    ) -> Arrival:  # fmt: skip
        """An entry that has been read and checked."""
        fields = {"keep": 60, "reply": "stream", "batch": "", "req": b"request", "v": 1, **more}
        return Arrival(KEYS.stream("normal"), self.entry(), job_id, f"{cls}:{name}", fp, gpu, fields)

    def send(self, job_id: str, *args: Any, limit: int = 100, **fields: Any) -> str:
        """The outcome of accepting a job; what it takes is as for `arrival`."""
        return self.scripts.accept([self.arrival(job_id, *args, **fields)], limit)[0]

    def cancel(self, job_id: str) -> str:
        return str(self.scripts.cancel(self.entry(KEYS.control, op="cancel", id=job_id), job_id))

    def status(self, job_id: str) -> str:
        return (self.redis.hget(f"rq:job:{job_id}", "status") or b"").decode()

    def depth(self, cls: str = "normal") -> int:
        return int(self.redis.hget(KEYS.depth, cls) or 0)

    def lane(self, name: str = A, cls: str = "normal") -> list[str]:
        return [one.decode() for one in self.redis.lrange(KEYS.lane(cls, name), 0, -1)]

    def load(self, gpu: str = "gpu-h-0") -> dict[str, int]:
        return {name.decode(): int(jobs) for name, jobs in self.redis.hgetall(KEYS.load(gpu)).items()}

    def queue(self, gpu: str = "gpu-h-0") -> list[str]:
        return [one.decode() for one in self.redis.lrange(f"rq:queue:{gpu}", 0, -1)]
