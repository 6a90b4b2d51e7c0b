"""A worker without an engine, on the real scripts, and a yard for it to work in."""

from __future__ import annotations

import json
import secrets
from typing import Any

import redis as redis_py

from lorayard.shared.keys import Keys
from lorayard.shared.scripts import Lease, Message, Scripts, Superseded

KEYS = Keys()
LEASE_MS = 10_000
DIGESTS = {name: f"{at + 1:x}" * 64 for at, name in enumerate(("a", "b", "c", "d", "e", "f"))}
INFO = {
    "version": "0.1.0", "wire_version": 1, "model": "fake", "base_digest": "0" * 64, "cache_tokens": 4096,
    "max_rank": 64, "vocab_size": 1000, "has_chat_template": 1,
}  # fmt: skip


def combination(*names: str) -> str:
    return "+".join(f"{name}@{DIGESTS[name][:8]}" for name in sorted(names)) or "base"


def publish(redis: redis_py.Redis, **changes: object) -> None:
    """Write what real workers write of their model and adapters."""
    redis.hset(KEYS.info, mapping=INFO | changes)
    adapters = {name: json.dumps({"rank": 8, "digest": digest, "bytes": 1000}) for name, digest in DIGESTS.items()}
    redis.hset(KEYS.adapters, mapping=adapters)


def hold(scripts: Scripts, holder: str, silent_ms: int = 0, **digests: str) -> int:
    """Let a holder say what it has; an empty digest takes an adapter away."""
    changes = {
        name: json.dumps({"rank": 8, "digest": digest, "bytes": 1000}) if digest else ""
        for name, digest in digests.items()
    }
    return int(scripts.hold(holder, silent_ms, changes))


class FakeWorker:
    """One incarnation of a worker on a GPU. `running`: id -> lease of what it has claimed and not settled."""

    def __init__(
        self, scripts: Scripts, gpu: str = "gpu-h-0", slots: int = 2, seats: int = 4, holder: str = ""
    ) -> None:  # fmt: skip
        self.scripts, self.gpu, self.slots, self.seats, self.holder = scripts, gpu, slots, seats, holder
        self.name = f"{gpu}.{secrets.token_hex(3)}"
        self.running: dict[str, Lease] = {}
        self.renewed_ms = scripts.now_ms
        self._calls = 0

    def register(self) -> bool:
        fields = {"state": "ready", "slots": self.slots, "seats": self.seats, "window": 2 * self.seats,
                  "holder": self.holder}  # fmt: skip
        return self.scripts.register(self.gpu, self.name, LEASE_MS, fields)[0]

    def claim(self) -> list[Lease]:
        """Fill the seats."""
        self._calls += 1
        free = self.seats - len(self.running)
        leases = self.scripts.claim(self.gpu, self.name, LEASE_MS, free, f"{self._calls:08x}", len(self.running))
        self.running |= {lease.id: lease for lease in leases}
        return leases

    def emit(self, job_id: str, text: str, at: int = 0) -> int:
        lease = self.running[job_id]
        event = {"ev": "tok", "text": text, "sample": 0, "attempt": lease.attempt, "at": at}
        return self._tell(Message(lease, event))

    def done(self, job_id: str, text: str = "text", **fields: Any) -> int:
        lease = self.running.pop(job_id)
        event = {
            "ev": "done", "text": text, "finish": "stop", "gpu": self.gpu, "attempt": lease.attempt, "stop_match": "",
            "prompt_tokens": 1, "new_tokens": 2, "seed": 0, "adapter": "", "adapter_digest": "",
            "base_digest": "0" * 64, "t_queue_ms": lease.waited_ms, "t_first_ms": lease.waited_ms,
            "t_total_ms": lease.waited_ms,
        } | fields  # fmt: skip
        return self._tell(Message(lease, event, "finished"))

    def _tell(self, message: Message) -> int:
        """Whether it was taken."""
        try:
            return int(not self.scripts.report(self.gpu, self.name, [message]).lost)
        except Superseded:
            return 0

    def renew(self) -> list[str]:
        self.renewed_ms = self.scripts.now_ms
        composites = [f"{lease.id}:{lease.execution}" for lease in self.running.values()]
        return self.scripts.renew(self.gpu, self.name, LEASE_MS, 60, composites)

    def obey(self) -> int:
        """End the running jobs that must stop; returns the number of jobs that wait on the GPU's queue."""
        news = self.scripts.report(self.gpu, self.name)
        ends = []
        for order in news.stops:
            what, _, job_id = order.partition(":")
            lease = self.running.pop(job_id, None)
            if lease is not None:
                ends.append(_end(lease, what))
        if news.stops:
            self.scripts.report(self.gpu, self.name, ends, news.stops)
        return news.waiting


def _end(lease: Lease, what: str) -> Message:
    if what == "cancel":
        return Message(lease, {"ev": "cancelled"}, "canceled")
    late = {"ev": "error", "code": "expired", "error": "the deadline passed while the job was running"}
    return Message(lease, late, "failed")


def events(redis: redis_py.Redis, job_id: str) -> list[dict[str, str]]:
    """Everything in a job's stream, as texts."""
    entries = redis.xrange(KEYS.out(job_id))
    return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in entries]


def dead(redis: redis_py.Redis) -> list[dict[str, str]]:
    """Everything in yard:dead, as texts."""
    entries = redis.xrange(KEYS.dead)
    return [{name.decode(): value.decode(errors="replace") for name, value in fields.items()} for _, fields in entries]
