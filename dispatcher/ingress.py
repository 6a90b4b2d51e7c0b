"""Intake: stream entries become jobs or refusals, control entries cancel jobs. Any number of dispatchers may read."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby
from typing import Any

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from lorayard.shared.connect import is_away
from lorayard.shared.errors import Refused
from lorayard.shared.keys import CLASSES, GROUP
from lorayard.shared.scripts import Arrival, Scripts

from .published import Published, read_published
from .validate import JOB_ID, Entry, Judged, judge, record

log = logging.getLogger(__name__)

CONSUMER = "dispatcher"
"""All dispatchers share one consumer, so none leaves a name behind; XACK decides who takes an entry."""

ROUND = 64
"""Most entries of a class taken at once; each may have a MiB."""

BATCH_SHARE = ROUND // 10 + 1
"""Entries of class batch taken even while the other classes fill a round: a tenth."""

RECLAIM_IDLE_MS = 5000
"""An entry that a dispatcher took and did not finish for this long is taken by another."""

MOST_FORGOTTEN = 1000
"""Ids of one control entry."""

RECLAIM_EVERY_S = 1.0
PUBLISHED_EVERY_S = 1.0

Batch = list[tuple[str, str, Mapping[bytes, bytes]]]
"""(stream, entry id, fields)"""


class Ingress:
    """Reads the three intake streams and the control stream. `limit`: most jobs of a class that may wait."""

    def __init__(self, redis: Redis, scripts: Scripts, limit: int) -> None:
        self.redis, self.scripts, self.keys, self.limit = redis, scripts, scripts.keys, limit
        self.yard: Published | None = None
        self._classes = {self.keys.stream(cls): cls for cls in CLASSES}
        self._yard_at = self._reclaim_at = float("-inf")
        self._cursors: dict[str, str] = {}
        self._foreground = 0

    def make_groups(self) -> None:
        """Create the consumer group of every stream; a stream's present entries count as unread."""
        for stream in (*self._classes, self.keys.control):
            try:
                self.redis.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    def step(self, wait_ms: int, gpu_for: Callable[[str], str]) -> Counter[str]:
        """Handle what has come, waiting for it at most `wait_ms`; 0 does not wait. Returns the outcomes, counted.

        `gpu_for` names the GPU that a job of a combination may go to at once, "" for none.
        """
        self._refresh_yard()
        batch = self._abandoned() + self._unread()
        if not batch and wait_ms:
            batch = self._wait(wait_ms)
        return self._handle(batch, gpu_for)

    def _streams(self) -> list[str]:
        """Jobs are left unread until a worker has said what it can do; cancellations never wait."""
        return [*(self._classes if self.yard else ()), self.keys.control]

    def _refresh_yard(self) -> None:
        if time.monotonic() - self._yard_at >= PUBLISHED_EVERY_S:
            self.yard = read_published(self.redis, self.keys)
            self._yard_at = time.monotonic()

    def _unread(self) -> Batch:
        """One round by urgency; batch takes what the other classes left of the last round, at least a tenth."""
        pipe = self.redis.pipeline(transaction=False)
        streams = self._streams()
        for stream in streams:
            count = max(ROUND - self._foreground, BATCH_SHARE) if self._classes.get(stream) == "batch" else ROUND
            pipe.xreadgroup(GROUP, CONSUMER, {stream: ">"}, count=count)
        answers = dict(zip(streams, pipe.execute(), strict=True))
        batch = {stream: _entries(answer) for stream, answer in answers.items()}
        self._foreground = sum(len(batch.get(self.keys.stream(cls), ())) for cls in ("urgent", "normal"))
        return [entry for entries in batch.values() for entry in entries]

    def _wait(self, wait_ms: int) -> Batch:
        streams: dict[Any, Any] = dict.fromkeys(self._streams(), ">")
        answer: Any = self.redis.xreadgroup(GROUP, CONSUMER, streams, count=BATCH_SHARE, block=wait_ms)
        return _entries(answer)

    def _abandoned(self) -> Batch:
        """Entries that a dispatcher took and left, because it died or its Redis connection did."""
        if time.monotonic() - self._reclaim_at < RECLAIM_EVERY_S:
            return []
        self._reclaim_at = time.monotonic()
        streams = self._streams()
        pipe = self.redis.pipeline(transaction=False)
        for stream in streams:
            cursor = self._cursors.get(stream, "0-0")
            pipe.xautoclaim(stream, GROUP, CONSUMER, RECLAIM_IDLE_MS, cursor, count=ROUND)
        batch: Batch = []
        for stream, answer in zip(streams, pipe.execute(), strict=True):
            self._cursors[stream] = answer[0].decode()
            batch += _entries([(stream.encode(), answer[1])])
        return batch

    def _handle(self, batch: Batch, gpu_for: Callable[[str], str]) -> Counter[str]:
        if not batch:
            return Counter()
        steps: Iterator[Any] = (self._step(stream, entry, fields, gpu_for) for stream, entry, fields in batch)
        outcomes: list[str] = []
        for are_jobs, group in groupby(steps, lambda step: isinstance(step, Arrival)):  # so the order is kept
            send = partial(self.scripts.accept, limit=self.limit) if are_jobs else self._run
            outcomes += send(group)
        failures = [outcome for outcome in outcomes if outcome.startswith("-")]
        if failures:
            log.error("%d of %d entries failed: %s", len(failures), len(outcomes), failures[0][1:])
        return Counter(outcome for outcome in outcomes if not outcome.startswith("-"))

    def _run(self, calls: Iterable[Any]) -> list[str]:
        """The outcomes of script calls, each of which takes the pipeline that it is sent by."""
        pipe = self.redis.pipeline(transaction=False)
        for call in calls:
            call(pipe=pipe)
        answers: list[Any] = pipe.execute(raise_on_error=False)
        away = next((answer for answer in answers if isinstance(answer, RedisError) and is_away(answer)), None)
        if away is not None:
            raise away
        return [f"-{answer}" if isinstance(answer, RedisError) else answer.decode() for answer in answers]

    def _step(
        self, stream: str, entry: str, fields: Mapping[bytes, bytes], gpu_for: Callable[[str], str]
    ) -> Arrival | partial[Any]:
        """What is to be done about an entry: the job to accept, or a script call."""
        if stream == self.keys.control:
            return self._control(entry, fields)
        judged = self._judge(Entry(self._classes[stream], entry, fields))
        job, refusal = judged.job, judged.refusal
        if job is not None:
            lane, gpu = f"{job.cls}:{job.combination}", gpu_for(job.combination)
            return Arrival(stream, entry, job.id, lane, judged.fingerprint, gpu, record(job))
        assert refusal is not None
        return partial(
            self.scripts.reject, stream, entry, judged.id, judged.fingerprint, refusal.code, str(refusal),
            judged.reply, judged.batch, judged.ttl,
        )  # fmt: skip

    def _judge(self, entry: Entry) -> Judged:
        """The verdict on the yard as it is: an adapter that seems unknown or changed is looked up again first."""
        assert self.yard is not None  # jobs are not read before
        judged = judge(entry, self.yard)
        if judged.refusal is not None and judged.refusal.code == "no_adapter":
            self.yard = read_published(self.redis, self.keys) or self.yard
            judged = judge(entry, self.yard)
        return judged

    def _control(self, entry: str, fields: Mapping[bytes, bytes]) -> partial[Any]:
        try:
            if fields.get(b"op") == b"forget":
                return partial(self.scripts.forget, entry, forgotten_ids(fields))
            return partial(self.scripts.cancel, entry, cancelled_id(fields))
        except Refused as refusal:
            return partial(self.scripts.reject, self.keys.control, entry, "", "", refusal.code, str(refusal))


def forgotten_ids(fields: Mapping[bytes, bytes]) -> list[str]:
    """The ids that a control entry lets the yard forget. Raises Refused."""
    try:
        ids = json.loads(fields.get(b"ids", b""))
    except (ValueError, RecursionError):
        ids = None
    if fields.keys() != {b"op", b"ids"} or not isinstance(ids, list) or not 0 < len(ids) <= MOST_FORGOTTEN:
        raise Refused("bad_field", f"`op forget` takes ids, a JSON list of 1 to {MOST_FORGOTTEN}, and nothing else")
    for job_id in ids:
        if not isinstance(job_id, str) or not JOB_ID.fullmatch(job_id):
            raise Refused("bad_id", f"an id must match {JOB_ID.pattern}, not {str(job_id)[:80]!r}")
    return ids


def cancelled_id(fields: Mapping[bytes, bytes]) -> str:
    """The id that a control entry cancels. Raises Refused."""
    if fields.get(b"op") != b"cancel" or fields.keys() != {b"op", b"id"}:
        raise Refused(
            "bad_field", "a control entry must be `op cancel id ID` or `op forget ids LIST`, and nothing else"
        )
    job_id = fields[b"id"].decode(errors="replace")
    if not JOB_ID.fullmatch(job_id):
        raise Refused("bad_id", f"id must match {JOB_ID.pattern}, not {job_id[:80]!r}")
    return job_id


def _entries(answer: Iterable[tuple[bytes, Iterable[tuple[bytes | None, Mapping[bytes, bytes] | None]]]]) -> Batch:
    """(stream, entry, fields) of a read. An entry that somebody deleted while it was pending comes without fields."""
    return [
        (stream.decode(), entry.decode(), fields)
        for stream, entries in answer
        for entry, fields in entries
        if entry is not None and fields is not None
    ]
