"""A stream entry becomes a checked job, or a refusal that reaches its client."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lorayard.shared import WIRE_VERSION
from lorayard.shared.errors import Refused
from lorayard.shared.job import MAX_LOGPROBS, MAX_RANK_SUM, MAX_SAMPLES, Job, LoraSet, SamplingParams
from lorayard.shared.scripts import Value

from .fields import REPLIES, SAMPLING, read
from .published import Published

log = logging.getLogger(__name__)

JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
RESERVED_ID = re.compile(r"[ub]?\d+-\d+")
ENTRY_PREFIX = {"urgent": "u", "normal": "", "batch": "b"}
"""What the default id of a class begins with; the entry's own id follows."""

DEFAULT_TTL = 3600
MAX_TTL = 30 * 86400
MAX_STOPS = 64
MAX_BANNED = 1000
MAX_TIME_MS = 1 << 53

STUB = zlib.compress(json.dumps(["lorayard.worker.queue.process.generate", None, [], {}]).encode())
"""RQ's field `data`: its JSON serialiser shows a function name and nothing of the request."""


class Entry(NamedTuple):
    """An entry of an intake stream."""

    cls: str
    entry: str
    fields: Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Judged:
    """An entry with its verdict: a job or a refusal. `id` is "" if the client's is malformed."""

    id: str
    fingerprint: str
    reply: str
    batch: str
    ttl: int
    job: Job | None = None
    refusal: Refused | None = None


def judge(entry: Entry, yard: Published) -> Judged:
    """Check one entry against the contract and the yard. Never raises."""
    values, refusal = read(entry.fields)
    try:
        job_id = _job_id(entry, values)
    except Refused as bad_id:
        return Judged("", _raw_fingerprint(entry), *_route(values), refusal=bad_id)
    fingerprint = ""
    try:
        if refusal is not None:
            raise refusal
        job = _job(job_id, entry.cls, values)
        fingerprint = job.fingerprint("seed" not in values)
        return Judged(job_id, fingerprint, *_route(values), job=_bind(job, values.get("adapter_digest"), yard))
    except Refused as refused:
        return Judged(job_id, fingerprint or _raw_fingerprint(entry), *_route(values), refusal=refused)
    except Exception:
        log.exception("entry %s of class %s could not be checked", entry.entry, entry.cls)
        fault = Refused("internal", "the dispatcher failed on this request; its log has the traceback")
        return Judged(job_id, fingerprint or _raw_fingerprint(entry), *_route(values), refusal=fault)


def record(job: Job) -> dict[str, Value]:
    """Fields of the job's hash: RQ's own, so that its tools read the job, and ours."""
    fields: dict[str, Value] = {
        "data": STUB, "description": f"generate {str(job.lora) or 'base'}", "timeout": -1, "result_ttl": job.ttl,
        "failure_ttl": job.ttl, "retries_left": 1_000_000, "group_id": "", "success_callback_name": "",
        "failure_callback_name": "", "stopped_callback_name": "", "v": WIRE_VERSION, "req": job.pack(),
        "keep": job.ttl, "reply": job.reply, "batch": job.batch or "",
    }  # fmt: skip
    if job.stream:
        fields["stream"] = 1
    if job.deadline_ms is not None:
        fields["deadline_ms"] = job.deadline_ms
    return fields


def _raw_fingerprint(entry: Entry) -> str:
    """Digest of the entry as sent, for requests that are refused before they mean anything."""
    digest = hashlib.blake2b(entry.cls.encode(), digest_size=16)
    for name, value in sorted(entry.fields.items()):
        digest.update(b"%d %d " % (len(name), len(value)) + name + value)
    return digest.hexdigest()


def _job_id(entry: Entry, values: Mapping[str, Any]) -> str:
    if b"id" not in entry.fields and "id" not in values:
        return ENTRY_PREFIX[entry.cls] + entry.entry
    job_id = values.get("id", "")
    if not JOB_ID.fullmatch(job_id):
        raise Refused("bad_id", f"id must match {JOB_ID.pattern}, not {job_id[:80]!r}")
    if RESERVED_ID.fullmatch(job_id):
        raise Refused("bad_id", f"id {job_id} has the form of the ids that the yard gives; choose another")
    return str(job_id)


def _route(values: Mapping[str, Any]) -> tuple[str, str, int]:
    """Reply, batch and ttl for the answer of a job, sound or not: what is malformed takes its default."""
    batch = values.get("batch", "")
    reply = values.get("reply", "stream")
    if reply not in REPLIES or (reply == "batch" and not JOB_ID.fullmatch(batch)):
        reply = "stream"
    ttl = values.get("ttl", DEFAULT_TTL)
    return reply, batch if reply == "batch" else "", ttl if 1 <= ttl <= MAX_TTL else DEFAULT_TTL


def _job(job_id: str, cls: str, values: Mapping[str, Any]) -> Job:
    """The request by itself, before the yard is asked for digests and limits."""
    lora = LoraSet.of(values["adapters"]) if "adapters" in values else LoraSet.parse(values.get("adapter", ""))
    sampling = {name: values[name] for name in SAMPLING if name in values}
    sampling.setdefault("seed", secrets.randbits(64))
    messages, tokens = values.get("messages"), values.get("tokens")
    job = Job(
        id=job_id,
        cls=cls,
        lora=lora,
        prompt=values.get("prompt"),
        messages=None if messages is None else _messages(messages),
        tokens=None if tokens is None else _tokens(tokens),
        add_bos=values.get("add_bos"),
        max_tokens=values.get("max_tokens"),
        min_tokens=values.get("min_tokens", 0),
        sampling=SamplingParams(**sampling),
        stop=_stop(values.get("stop", [])),
        stream=values.get("stream", False),
        reply=values.get("reply", "stream"),
        batch=values.get("batch"),
        deadline_ms=values.get("deadline_ms"),
        ttl=values.get("ttl", DEFAULT_TTL),
        n=values.get("n", 1),
        logprobs=values.get("logprobs"),
        prompt_logprobs=values.get("prompt_logprobs"),
        return_token_ids=values.get("return_token_ids", False),
        token_healing=values.get("token_healing", False),
        banned_strings=_banned(values.get("banned_strings", [])),
    )
    _check_prompt(job)
    _check_counts(job)
    _check_reply(job)
    return job


def _messages(value: list[Any]) -> tuple[dict[str, str], ...]:
    for at, message in enumerate(value):
        texts = isinstance(message, dict) and all(isinstance(part, str) for part in message.values())
        if not texts or message.keys() != {"role", "content"}:
            raise Refused(
                "bad_field", f"messages[{at}] must have a role and a content, both text, and nothing else yet"
            )
        _utf8(f"messages[{at}]", *message.values())
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _tokens(value: list[Any]) -> tuple[int, ...]:
    if not value or not all(type(token) is int and 0 <= token < 1 << 32 for token in value):
        raise Refused("bad_field", "tokens must be a list of at least one token id")
    return tuple(value)


def _stop(value: list[Any]) -> tuple[str | int, ...]:
    if len(value) > MAX_STOPS:
        raise Refused("bad_field", f"stop has at most {MAX_STOPS} entries, not {len(value)}")
    for item in value:
        if not (type(item) is int and 0 <= item < 1 << 32) and not (isinstance(item, str) and item):
            raise Refused(
                "bad_field", f"stop must be a list of texts that are not empty and token ids, not {item!r:.80}"
            )
        if isinstance(item, str):
            _utf8("stop", item)
    return tuple(value)


def _banned(value: list[Any]) -> tuple[str, ...]:
    if len(value) > MAX_STOPS or not all(isinstance(item, str) and 0 < len(item) <= MAX_BANNED for item in value):
        raise Refused(
            "bad_field", f"banned_strings must be a list of at most {MAX_STOPS} texts of 1 to {MAX_BANNED} characters"
        )
    _utf8("banned_strings", *value)
    return tuple(value)


def _utf8(name: str, *texts: str) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise Refused("bad_field", f"{name} has half of a surrogate pair, which is no character") from None


def _check_prompt(job: Job) -> None:
    given = [name for name in ("prompt", "messages", "tokens") if getattr(job, name) is not None]
    if len(given) != 1:
        raise Refused("no_prompt", f"exactly one of prompt, messages and tokens, not {' and '.join(given) or 'none'}")
    if job.messages == ():
        raise Refused("bad_field", "messages must have at least one message")


def _check_counts(job: Job) -> None:
    if not 1 <= job.n <= MAX_SAMPLES:
        raise Refused("bad_field", f"n must be between 1 and {MAX_SAMPLES}, not {job.n}")
    for name, count in (("logprobs", job.logprobs), ("prompt_logprobs", job.prompt_logprobs)):
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise Refused("bad_field", f"{name} must be between 0 and {MAX_LOGPROBS}, not {count}")
    if job.max_tokens is not None and job.max_tokens < 1:
        raise Refused("bad_field", f"max_tokens must be at least 1, not {job.max_tokens}")
    if job.min_tokens < 0 or (job.max_tokens is not None and job.min_tokens > job.max_tokens):
        raise Refused("bad_field", f"min_tokens must be between 0 and max_tokens, not {job.min_tokens}")
    if not 1 <= job.ttl <= MAX_TTL:
        raise Refused("bad_field", f"ttl must be between 1 and {MAX_TTL} seconds, not {job.ttl}")
    if job.deadline_ms is not None and not 0 <= job.deadline_ms < MAX_TIME_MS:
        raise Refused("bad_field", f"deadline_ms must be a time in unix milliseconds, not {job.deadline_ms}")


def _check_reply(job: Job) -> None:
    if job.reply not in REPLIES:
        raise Refused("bad_field", f"reply must be one of {', '.join(REPLIES)}, not {job.reply[:80]!r}")
    if job.stream and job.reply != "stream":
        raise Refused("bad_field", f"stream 1 needs reply stream, not {job.reply}")
    if (job.batch is None) == (job.reply == "batch"):
        raise Refused("bad_field", "batch is the name of the result stream of reply batch; give both or neither")
    if job.batch is not None and not JOB_ID.fullmatch(job.batch):
        raise Refused("bad_field", f"batch must match {JOB_ID.pattern}, not {job.batch[:80]!r}")


def _bind(job: Job, asked: str | None, yard: Published) -> Job:
    """Bind the job to the adapters' present bytes, and hold it against the model's limits."""
    for name in job.lora.ids:
        if name not in yard.adapters:
            raise Refused("no_adapter", f"there is no adapter {name}; the hash of adapters lists those that exist")
    adapters = [yard.adapters[name] for name in job.lora.ids]
    digests = tuple(adapter.digest for adapter in adapters)
    if asked is not None and asked != "+".join(digests):
        raise Refused("no_adapter", f"adapter_digest is {'+'.join(digests)!r}, not {asked[:80]!r}")
    rank, most = sum(adapter.rank for adapter in adapters), min(MAX_RANK_SUM, yard.max_rank)
    if rank > most:
        raise Refused("bad_adapter", f"the ranks of {job.lora} add up to {rank}; a slot holds {most}")
    if job.messages is not None and not yard.has_chat_template:
        raise Refused("bad_field", "messages needs a chat template, which this model does not have; send prompt")
    _check_room(job, yard)
    return replace(job, digests=digests) if digests else job


def _check_room(job: Job, yard: Published) -> None:
    tokens = job.tokens or ()
    stop = [item for item in job.stop if isinstance(item, int)]
    for name, ids in (("tokens", tokens), ("stop", stop), *job.sampling.token_fields().items()):
        if max(ids, default=0) >= yard.vocab_size:
            raise Refused("bad_field", f"{name} has token id {max(ids)}; the model has ids below {yard.vocab_size}")
    # A text has at least one token, which the worker counts; here only what is certain.
    wanted = max(len(tokens), 1) + max(job.max_tokens or 1, job.min_tokens)
    if wanted > yard.cache_tokens:
        raise Refused(
            "too_large", f"prompt and new tokens are at least {wanted}; the cache holds {yard.cache_tokens} a job"
        )
