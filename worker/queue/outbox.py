"""What a worker has to tell Redis. It waits here while Redis is away, and nothing is told twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lorayard.shared.scripts import Lease, Scripts, Superseded, Value


class Message(NamedTuple):
    """An event of a job; with a status it is the final one."""

    lease: Lease
    event: Mapping[str, Value]
    status: str = ""


class News(NamedTuple):
    """Jobs that wait in the GPU queue, `cancel:ID` and `expire:ID` to obey, (id, execution) of leases found lost."""

    waiting: int
    stops: list[str]
    lost: list[tuple[str, str]]


@dataclass
class Outbox:
    """Sends all messages and asks for news in one pipeline."""

    scripts: Scripts
    gpu: str
    worker: str
    messages: list[Message] = field(default_factory=list)
    _in_doubt: bool = False

    def exchange(self, obeyed: Iterable[str] = ()) -> News:
        """Send, then listen. If it raises, the messages stay for the next call. Raises Superseded or a RedisError."""
        if self._in_doubt and self.messages:
            self._forget_delivered()
        pipe = self.scripts.redis.pipeline(transaction=False)
        for lease, event, status in self.messages:
            if status:
                self.scripts.settle(self.gpu, self.worker, lease.id, lease.execution, status, event, pipe)
            else:
                self.scripts.emit(self.gpu, lease.id, lease.execution, event, pipe)
        self.scripts.listen(self.gpu, self.worker, obeyed, pipe)
        self._in_doubt = True
        *taken, heard = pipe.execute()
        self._in_doubt = False
        lost = [(m.lease.id, m.lease.execution) for m, ok in zip(self.messages, taken, strict=True) if not ok]
        self.messages.clear()
        if heard == 0:
            raise Superseded(f"{self.gpu} has been given to another worker")
        return News(heard[0], [stop.decode() for stop in heard[1:]], lost)

    def _forget_delivered(self) -> None:
        """Drop the `tok` events that arrived although the answer was lost: they are at the end of the job's stream.

        A final event needs no such care, since a second one is refused by its script.
        """
        newest = {}
        for lease in {message.lease for message in self.messages if not message.status}:
            entries: Any = self.scripts.redis.xrevrange(self.scripts.keys.out(lease.id), count=1)
            fields = entries[0][1] if entries else {}
            if fields.get(b"ev") == b"tok" and int(fields[b"attempt"]) == lease.attempt:
                newest[lease] = int(fields[b"at"])
        self.messages = [m for m in self.messages if m.status or int(m.event["at"]) > newest.get(m.lease, -1)]
