"""A job in a worker's hands: its lease, its place in the engine, and the text that its client has not seen yet."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lorayard.shared.job import Job
from lorayard.shared.scripts import Lease, Message, Value

from .prepare import Prepared

EVENT_TOKENS = 8
EVENT_S = 0.05
"""A `tok` event goes out when it has so many tokens, or so long after the one before; the first token at once."""


@dataclass(slots=True, eq=False)
class Told:
    """What the engine has said of one sample: its events' ids and logprobs, and text not yet sent."""

    text: str = ""
    at: int = 0
    """Index of the text's first token."""
    sent: float = 0.0
    ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    last: Any = None
    """The engine's last event of the sample."""


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
    first: float | None = None
    """When its first token came."""
    _samples: dict[int, Told] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether every sample has had its last event."""
        return sum(told.last is not None for told in self._samples.values()) == self.job.n

    def add(self, event: Any, now: float) -> None:
        """Take what the engine has made of a sample in a step."""
        if event.token_ids and self.first is None:
            self.first = now
        told = self._samples.setdefault(event.sample, Told())
        told.text += event.text
        told.ids += event.token_ids
        told.logprobs += event.logprobs
        if event.finished:
            told.last = event

    def due(self, sample: int, now: float) -> bool:
        """Whether the text that is held of a sample should go out now."""
        told = self._samples[sample]
        enough = len(told.ids) - told.at >= EVENT_TOKENS or now - told.sent >= EVENT_S
        return self.job.stream and bool(told.text) and enough

    def cut(self, sample: int, now: float) -> Message:
        """The text of a sample held so far as a `tok` event."""
        told = self._samples[sample]
        event: dict[str, Value] = {
            "ev": "tok", "text": told.text, "sample": sample, "attempt": self.lease.attempt, "at": told.at,
        }  # fmt: skip
        told.text, told.at, told.sent = "", len(told.ids), now
        return Message(self.lease, event)

    def done(self, gpu: str, base_digest: str, now: float) -> list[Message]:
        """The last text and the `done` event of a job that has ended."""
        waited, samples = self.lease.waited_ms, [self._samples[sample] for sample in range(self.job.n)]
        fields: dict[str, Value] = {
            "ev": "done", **self._answer(samples), "prompt_tokens": samples[0].last.prompt_tokens,
            "new_tokens": sum(told.last.new_tokens for told in samples), "seed": self.job.sampling.seed or 0,
            "adapter": str(self.job.lora), "adapter_digest": "+".join(self.job.digests), "base_digest": base_digest,
            "gpu": gpu, "attempt": self.lease.attempt, "t_queue_ms": waited,
            "t_first_ms": waited + _ms((self.first or now) - self.claimed),
            "t_total_ms": waited + _ms(now - self.claimed), **self._asked(samples),
        }  # fmt: skip
        rest = [sample for sample, told in enumerate(samples) if self.job.stream and told.text]
        return [*(self.cut(sample, now) for sample in rest), Message(self.lease, fields, "finished")]

    def _answer(self, samples: list[Told]) -> dict[str, Value]:
        """What was said and why it ended: of one sample as it is, of several in JSON lists."""
        if len(samples) == 1:
            last = samples[0].last
            return {"text": last.full_text, "finish": last.finish, "stop_match": _text(last.stop_match)}
        lasts = [told.last for told in samples]
        return {
            "texts": _json([last.full_text for last in lasts]), "finishes": _json([last.finish for last in lasts]),
            "stop_matches": _json([_text(last.stop_match) for last in lasts]),
        }  # fmt: skip

    def _asked(self, samples: list[Told]) -> dict[str, Value]:
        """Token ids and logprobs, if asked for; of several samples in a list of lists."""
        fields: dict[str, Value] = {}
        if self.job.return_token_ids:
            ids = [told.ids for told in samples]
            fields["token_ids"] = _json(ids if self.job.n > 1 else ids[0])
        if self.job.logprobs is not None:
            logprobs = [_plain(told.logprobs) for told in samples]
            fields["logprobs"] = _json(logprobs if self.job.n > 1 else logprobs[0])
        if self.job.prompt_logprobs is not None:
            fields["prompt_logprobs"] = _json(_plain(samples[0].last.prompt_logprobs))
        return fields

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


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _plain(logprobs: Iterable[Any]) -> list[dict[str, Any]]:
    """As the wire has it, with six decimals."""
    return [
        {"id": each.id, "logprob": round(each.logprob, 6), "top": [[id, round(value, 6)] for id, value in each.top]}
        for each in logprobs
    ]


def _text(stop_match: str | int | None) -> Value:
    return "" if stop_match is None else stop_match
