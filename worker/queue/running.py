"""A job in a worker's hands: its lease, its place in the engine, and the text that its client has not seen yet."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from lorayard.shared.job import Job
from lorayard.shared.scripts import Lease, Message, Value

from .prepare import Prepared

EVENT_TOKENS = 8
EVENT_S = 0.05
"""A `tok` event goes out when it has so many tokens, or so long after the one before; the first token at once."""


@dataclass(slots=True, eq=False)
class Running:
    """A claimed job."""

    lease: Lease
    job: Job = field(init=False)
    """Set when it is prepared, as is `prepared`."""
    prepared: Prepared | Exception = field(init=False)
    handle: Any = None
    """The engine's, once the job has been handed to it."""
    claimed: float = field(default_factory=time.monotonic)
    tokens: int = 0
    first: float | None = None
    """When its first token came."""
    _text: str = ""
    _at: int = 0
    _sent: float = 0.0

    def add(self, text: str, tokens: int, now: float) -> None:
        """Take what the engine has made of the job in a step."""
        if tokens and self.first is None:
            self.first = now
        self.tokens += tokens
        self._text += text

    def due(self, now: float) -> bool:
        """Whether the text that is held should go out now."""
        enough = self.tokens - self._at >= EVENT_TOKENS or now - self._sent >= EVENT_S
        return self.job.stream and bool(self._text) and enough

    def cut(self, now: float) -> Message:
        """The text held so far as a `tok` event."""
        event: dict[str, Value] = {
            "ev": "tok", "text": self._text, "sample": 0, "attempt": self.lease.attempt, "at": self._at,
        }  # fmt: skip
        self._text, self._at, self._sent = "", self.tokens, now
        return Message(self.lease, event)

    def done(self, event: Any, gpu: str, base_digest: str, now: float) -> list[Message]:
        """The last text and the `done` event, from the engine's last event of the job."""
        waited = self.lease.waited_ms
        fields: dict[str, Value] = {
            "ev": "done", "text": event.full_text, "finish": event.finish, "stop_match": _text(event.stop_match),
            "prompt_tokens": event.prompt_tokens, "new_tokens": event.new_tokens, "seed": self.job.sampling.seed or 0,
            "adapter": str(self.job.lora), "adapter_digest": "+".join(self.job.digests), "base_digest": base_digest,
            "gpu": gpu, "attempt": self.lease.attempt, "t_queue_ms": waited,
            "t_first_ms": waited + _ms((self.first or now) - self.claimed),
            "t_total_ms": waited + _ms(now - self.claimed),
        }  # fmt: skip
        rest = [self.cut(now)] if self.job.stream and self._text else []
        return [*rest, Message(self.lease, fields, "finished")]

    def refused(self, code: str, message: str) -> Message:
        """The final event of a job that cannot go on."""
        return Message(self.lease, {"ev": "error", "code": code, "error": message}, "failed")

    def stopped(self, reason: str) -> Message:
        """The final event of a job that was told to stop: `cancel`, or `expire` for its deadline."""
        if reason == "expire":
            return self.refused("expired", "the deadline passed while the job was running")
        return Message(self.lease, {"ev": "cancelled"}, "canceled")


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _text(stop_match: str | int | None) -> Value:
    return "" if stop_match is None else stop_match
