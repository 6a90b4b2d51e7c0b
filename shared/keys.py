"""Every Redis name. Ours start with a prefix (default `yard:`); RQ's stay `rq:`, so one yard per Redis database."""

from __future__ import annotations

from dataclasses import dataclass

CLASSES = ("urgent", "normal", "batch")
"""Job classes, most urgent first."""

GROUP = "yard"
"""Consumer group of the dispatchers on every stream."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Names under one prefix. `prefix` ends with the separator."""

    prefix: str = "yard:"

    def stream(self, cls: str) -> str:
        """Intake stream of a class: `yard:in:urgent`, `yard:in`, `yard:in:batch`."""
        return f"{self.prefix}in" if cls == "normal" else f"{self.prefix}in:{cls}"

    @property
    def control(self) -> str:
        """Stream of control entries (`op cancel id ID`, `op forget ids LIST`)."""
        return f"{self.prefix}ctl"

    def out(self, job_id: str) -> str:
        """Stream of a job's events."""
        return f"{self.prefix}out:{job_id}"

    def reply(self, job_id: str) -> str:
        """List that takes the one answer of a job with `reply list`."""
        return f"{self.prefix}reply:{job_id}"

    def results(self, batch: str) -> str:
        """Shared result stream of the jobs with `reply batch`."""
        return f"{self.prefix}res:{batch}"

    @property
    def dead(self) -> str:
        """Stream of refused entries, about the last 100,000."""
        return f"{self.prefix}dead"

    @property
    def info(self) -> str:
        """Hash: version, model, base_digest, limits. Written by workers; the dispatcher waits for it."""
        return f"{self.prefix}info"

    @property
    def adapters(self) -> str:
        """Hash: adapter id -> JSON {rank, digest, bytes}, of all that any host holds."""
        return f"{self.prefix}adapters"

    @property
    def holders(self) -> str:
        """Hash: holder -> `BEAT_MS:VERSION`. A holder is a supervisor, named after the first of its GPUs."""
        return f"{self.prefix}holders"

    def held(self, holder: str) -> str:
        """Hash like `adapters`, of what the workers of one supervisor hold."""
        return f"{self.prefix}held:{holder}"

    def lane(self, cls: str, combination: str) -> str:
        """List of the ids that wait for one combination in one class, oldest first."""
        return f"{self.prefix}lane:{cls}:{combination}"

    @property
    def lanes(self) -> str:
        """Sorted set `CLASS:COMBINATION` -> accept time of the head in ms, for lanes that may hold jobs."""
        return f"{self.prefix}lanes"

    @property
    def depth(self) -> str:
        """Hash: class -> number of jobs accepted and not yet final."""
        return f"{self.prefix}depth"

    @property
    def deadlines(self) -> str:
        """Sorted set: id -> deadline in unix ms, for jobs that are not final."""
        return f"{self.prefix}deadlines"

    def cancelled(self, job_id: str) -> str:
        """Mark of a cancellation that came before its job; lives for an hour."""
        return f"{self.prefix}cancelled:{job_id}"

    @property
    def gpus(self) -> str:
        """Set of the names of all GPU queues ever seen."""
        return f"{self.prefix}gpus"

    def gpu(self, name: str) -> str:
        """Hash: what the worker on a GPU says of itself (worker, slots, seats, window, beat_ms, state, ...)."""
        return f"{self.prefix}gpu:{name}"

    def slots(self, name: str) -> str:
        """Hash: the slot table of a GPU; field `I` -> combination, `I.state` -> open|closing, `I.since` -> ms."""
        return f"{self.prefix}slots:{name}"

    def load(self, name: str) -> str:
        """Hash: combination -> jobs assigned to this GPU that have not left it (queued or running)."""
        return f"{self.prefix}load:{name}"

    def stops(self, name: str) -> str:
        """List of running job ids that the worker on a GPU must stop (cancelled)."""
        return f"{self.prefix}stops:{name}"


def rq_job(job_id: str) -> str:
    """RQ's hash of a job; the request is msgpack in field `req`, the rest is RQ's plus lane, ms, attempt, gpu."""
    return f"rq:job:{job_id}"


def rq_queue(name: str) -> str:
    """RQ's list of the jobs queued on a GPU."""
    return f"rq:queue:{name}"


def rq_wip(name: str) -> str:
    """RQ's started registry of a GPU queue: `JOB:EXECUTION` -> end of its lease in unix seconds."""
    return f"rq:wip:{name}"
