"""What a worker has to tell Redis. It waits here while Redis is away, and nothing is told twice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lorayard.shared.scripts import Lease, Message, News, Scripts


@dataclass
class Outbox:
    """Sends all messages and asks for news in one call."""

    scripts: Scripts
    gpu: str
    worker: str
    messages: list[Message] = field(default_factory=list)
    _in_doubt: bool = False

    def exchange(self, obeyed: Iterable[str] = ()) -> News:
        """Send, then listen. If it raises, the messages stay for the next call. Raises Superseded or a RedisError."""
        if self._in_doubt and self.messages:
            self._forget_delivered()
        self._in_doubt = True
        news = self.scripts.report(self.gpu, self.worker, self.messages, obeyed)
        self._in_doubt = False
        self.messages.clear()
        return news

    def _forget_delivered(self) -> None:
        """Drop the `tok` events that arrived although the answer was lost: they are at the end of the job's stream.

        A final event needs no such care, since a second one is refused by its script.
        """
        for lease in {message.lease for message in self.messages if not message.status}:
            entries: Any = self.scripts.redis.xrevrange(self.scripts.keys.out(lease.id), count=1)
            fields = entries[0][1] if entries else {}
            if fields.get(b"ev") == b"tok" and int(fields[b"attempt"]) == lease.attempt:
                self._forget(lease, (int(fields[b"sample"]), int(fields[b"at"])))

    def _forget(self, lease: Lease, newest: tuple[int, int]) -> None:
        """Drop the lease's `tok` events up to the one with this (sample, at), if it is among them."""
        ours = [message for message in self.messages if message.lease == lease and not message.status]
        places = [(int(message.event["sample"]), int(message.event["at"])) for message in ours]
        delivered = ours[: places.index(newest) + 1] if newest in places else []
        self.messages = [message for message in self.messages if not any(message is each for each in delivered)]
