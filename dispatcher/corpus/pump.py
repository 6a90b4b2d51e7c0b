"""Fills a corpus: rows to the yard through a bounded window, answers into shards, each text once.

The order that makes it once: an answer is acknowledged in Redis only after its shard is on the disk and the ledger
says so. Whatever dies in between, the answer comes again, and the ledger knows it. A job's id is made of the text's
position, so sending it twice is sending it once.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from redis.exceptions import RedisError

from lorayard.shared.connect import is_away
from lorayard.shared.keys import Keys

from ..answers import SINK, Collecting, Event
from .folder import Folder, ForeignFolder
from .gates import gates
from .ledger import DONE, FAILED, REJECTED, Ended
from .request import Maker, Request, in_order
from .shards import fitted
from .source import Row

READER = "corpus"
READ, READ_MS = 500, 100
AGAIN_S = 60.0
"""A job without an answer for so long is sent again, in case Redis lost it; if not, that has no effect."""
GATHER_S = 0.02
"""Pause after a read that was not full: answers come a few at a time, and a turn for many costs little more."""
LOOK_S = 0.5
"""Between two looks for such jobs."""
AWAY_S = 0.5
BUSY_S = 1.0


@dataclass(slots=True)
class Counts:
    """What this run has done. tokens: new ones."""

    done: int = 0
    rejected: int = 0
    failed: int = 0
    skipped: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> int:
        """Texts that have ended, in this run or before."""
        return self.done + self.rejected + self.failed + self.skipped


class _Sent(NamedTuple):
    request: Request
    at: float


class Pump:
    """One run. `heard(pump)` is called in every turn; `wish()` says `pause` or `cancel` to end before the end."""

    def __init__(
        self, redis: Any, keys: Keys, folder: Folder, maker: Maker, rows: Iterator[Row],
        heard: Callable[[Pump], object] = lambda pump: None, wish: Callable[[], str] = lambda: "",
    ) -> None:  # fmt: skip
        self.redis, self.keys, self.folder, self.maker = redis, keys, folder, maker
        self.heard, self.wish = heard, wish
        self.counts = Counts()
        self.out: dict[int, _Sent] = {}
        self.away = ""
        self._texts = in_order(map(self._fitted, itertools.chain.from_iterable(map(maker.requests, rows))))
        self._exhausted = False
        self._gates = gates(folder.corpus.accept)
        self._results = keys.results(folder.batch)
        self._reading = Collecting()
        self._early: dict[int, tuple[Any, Event]] = {}
        self._again: list[tuple[float, Request]] = []
        self._clear()
        self._flushed = time.monotonic()
        self._look_at = 0.0
        self._shard = 1 + max((int(name[5:].partition(".")[0]) for name in folder.ledger.shards()), default=-1)

    def run(self) -> bool:
        """Work until every text has ended, or it is wished to end; -> whether all have. Raises FileError."""
        self.folder.accepted.sweep(self.folder.ledger.shards())
        self.folder.rejected.sweep(self.folder.ledger.shards())
        while not self._over():
            wish = self.wish()
            try:
                if wish:
                    self._end(wish)
                    return self._over()
                self._feed()
                self._collect()
                self._flush(at_once=self._exhausted and not self.out)
                self.away = ""
            except RedisError as error:
                if not is_away(error):
                    raise
                self.away = str(error)
                self._reading = Collecting()  # what was read and not acknowledged comes again
                self.out = {position: one._replace(at=0) for position, one in self.out.items()}  # and all is sent again
                time.sleep(AWAY_S)
            self.heard(self)
        return True

    def _over(self) -> bool:
        return self._exhausted and not self.out and not self._again and not self._ended

    def _end(self, wish: str) -> None:
        """Keep what has come; a cancelled corpus calls its jobs back."""
        self._flush(at_once=True)
        if wish == "cancel":
            pipe = self.redis.pipeline(transaction=False)
            for position in self.out:
                pipe.xadd(self.keys.control, {"op": "cancel", "id": self._id(position)})
            pipe.execute()

    def _fitted(self, request: Request) -> Request:
        """With its columns as they go into a shard, or with the fault that they do not."""
        if request.fault:
            return request
        try:
            return request._replace(columns=fitted(request.columns, self.folder.types))
        except ValueError as error:
            return request._replace(columns={}, fields={}, fault=str(error))

    def _feed(self) -> None:
        """Send texts until the window is full."""
        room = self.folder.corpus.run.window - len(self.out) - len(self._again)
        now, sent = time.monotonic(), []
        while self._again and self._again[0][0] <= now:
            sent.append(self._again.pop(0)[1])
        while len(sent) < min(room, READ):
            request = next(self._texts, None)
            if request is None:
                self._exhausted = True
                break
            if self._wanted(request):
                sent.append(request)
        late = []
        if now >= self._look_at:
            late = [one.request for one in self.out.values() if now - one.at > AGAIN_S][:READ]
            self._look_at = now + LOOK_S
        self._send(sent + late)

    def _wanted(self, request: Request) -> bool:
        """Whether it has to be sent: it has not ended, can be sent, and no earlier run has its answer waiting."""
        ledger = self.folder.ledger
        if ledger.has(request.position):
            if ledger.key(request.position) != request.key:
                raise ForeignFolder(
                    f"text {request.position} of the input is another than the one that was answered; "
                    f"{self.folder.path} belongs to the input as it was"
                )
            self.counts.skipped += 1
            return False
        if request.fault:
            code, colon, reason = request.fault.partition(": ")
            named = bool(colon) and code.isidentifier()
            self._fail(request, code if named else "bad_row", reason if named else request.fault)
            return False
        if request.position in self._early:
            entry, event = self._early.pop(request.position)
            self._settle(entry, request, event)
            return False
        for term in filter(None, request.adapter.split("+")):
            name = term.partition("*")[0]
            self.folder.bind(name, self.maker.adapters[name])
        return True

    def _send(self, requests: list[Request]) -> None:
        if not requests:
            return
        run, now = self.folder.corpus.run, time.monotonic()
        common = {"reply": "batch", "batch": self.folder.batch, "ttl": run.ttl}
        pipe = self.redis.pipeline(transaction=False)
        for request in requests:
            self.out[request.position] = _Sent(request, now)
            pipe.xadd(self.keys.stream(run.cls), {"id": self._id(request.position), **request.fields, **common})
        pipe.execute()

    def _id(self, position: int) -> str:
        generation = self.folder.ledger.generations.get(position, 0)
        return f"{self.folder.batch}-{position}{f'-{generation}' if generation else ''}"

    def _collect(self) -> None:
        """Take answers, waiting a moment for the first."""
        pipe = self.redis.pipeline(transaction=False)
        pipe.xgroup_create(self._results, SINK, "0", mkstream=True)
        pipe.xreadgroup(SINK, READER, {self._results: self._reading.cursor}, count=READ, block=READ_MS)
        found = self._reading.results(*pipe.execute(raise_on_error=False))
        if len(found) < READ:
            time.sleep(GATHER_S)
        ledger = self.folder.ledger
        for entry, job_id, event in found:
            position, generation = self._named(job_id)
            if generation != ledger.generations.get(position, 0) or ledger.has(position):
                self._answered.append((entry, job_id))  # a text that was retried since, or that is safe already
            elif position in self._ended:
                continue
            elif (sent := self.out.get(position)) is not None:
                self._settle(entry, sent.request, event)
            else:
                self._early[position] = entry, event

    def _named(self, job_id: str) -> tuple[int, int]:
        position, _, generation = job_id.removeprefix(f"{self.folder.batch}-").partition("-")
        return int(position), int(generation or 0)

    def _settle(self, entry: Any, request: Request, event: Event) -> None:
        """Take one final event."""
        self.out.pop(request.position, None)
        fields = event.fields
        if event.kind != "done":
            code = fields.get("code", event.kind)
            self._answered.append((entry, self._id(request.position)))
            if code == "busy":  # the same id may be sent again, later
                self._again.append((time.monotonic() + BUSY_S, request))
            elif code == "cancelled":  # by `corpus cancel`, before this run
                self.folder.ledger.again(request.position)
                self._again.append((time.monotonic(), request))
            else:
                self._fail(request, code, fields.get("error", ""))
            return
        row = {
            **request.columns, "row_key": request.key, "sample": request.sample, "text": fields["text"],
            "finish_reason": fields["finish"],
            "prompt_tokens": int(fields["prompt_tokens"]), "new_tokens": int(fields["new_tokens"]),
            "adapter": fields["adapter"], "adapter_digest": fields["adapter_digest"],
            "base_digest": fields["base_digest"], "seed": int(fields["seed"]), "attempts": int(fields["attempt"]),
            "gpu": fields["gpu"], "t_queue_ms": int(fields["t_queue_ms"]), "t_first_ms": int(fields["t_first_ms"]),
            "t_total_ms": int(fields["t_total_ms"]),
        }  # fmt: skip
        self._answered.append((entry, self._id(request.position)))
        self.counts.tokens += row["new_tokens"]
        gate = next((name for name, passes in self._gates.items() if not passes(row)), None)
        if gate is None:
            self.counts.done += 1
            self._rows.append(row)
        else:
            self.counts.rejected += 1
            self._turned_down.append(row | {"reason": gate})
        self._ended[request.position] = Ended(
            request.position, request.name, request.key, DONE if gate is None else REJECTED, "", row["adapter"],
            row["new_tokens"], gate or "",
        )  # fmt: skip

    def _fail(self, request: Request, code: str, reason: str) -> None:
        self.counts.failed += 1
        name, why = (text.encode(errors="replace").decode() for text in (request.name, reason))
        self._ended[request.position] = Ended(
            request.position, name, request.key, FAILED, "", request.adapter, 0, code, why
        )  # fmt: skip

    def _flush(self, at_once: bool = False) -> None:
        """Write what has come when it is enough or old enough: shard, ledger, acknowledgement, in this order."""
        output, now = self.folder.corpus.output, time.monotonic()
        if not (at_once or len(self._ended) >= output.shard_rows or now - self._flushed >= output.flush_s):
            return
        names = {DONE: "", REJECTED: "", FAILED: ""}
        shards = []
        for state, place, rows in (
            (DONE, self.folder.accepted, self._rows), (REJECTED, self.folder.rejected, self._turned_down),
        ):  # fmt: skip
            if rows:
                names[state] = place.write(self._shard, rows)
                shards.append((names[state], len(rows)))
                self._shard += 1
        if self._ended:
            self.folder.ledger.commit((one._replace(shard=names[one.state]) for one in self._ended.values()), shards)
        answered = self._answered
        self._clear()
        self._flushed = now
        for first in range(0, len(answered), READ):
            entries, ids = zip(*answered[first : first + READ], strict=True)
            pipe = self.redis.pipeline(transaction=False)
            pipe.xadd(self.keys.control, {"op": "forget", "ids": json.dumps(ids)})  # so Redis' memory is bounded
            pipe.xack(self._results, SINK, *entries)
            pipe.xdel(self._results, *entries)
            pipe.execute()

    def _clear(self) -> None:
        """Nothing has come that is not safe."""
        self._ended: dict[int, Ended] = {}
        self._rows: list[dict[str, Any]] = []
        self._turned_down: list[dict[str, Any]] = []
        self._answered: list[tuple[Any, str]] = []
