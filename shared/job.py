"""The job: what a client asks for, checked once and frozen."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import msgpack

from . import WIRE_VERSION
from .errors import Refused
from .sampling import SamplingParams, packed

__all__ = [
    "ADAPTER_ID",
    "BASE",
    "MAX_LOGPROBS",
    "MAX_RANK_SUM",
    "MAX_SAMPLES",
    "Job",
    "LoraSet",
    "SamplingParams",
    "combination",
]

ADAPTER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_ADAPTERS = 8
MAX_RANK_SUM = 256
MAX_SAMPLES = 64
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class LoraSet:
    """(adapter id, scale) pairs, sorted by id; empty is the base model."""

    adapters: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> LoraSet:
        """Read `ID(*decimal)?` joined by `+`, such as `sql*0.7+pirate*0.3`; "" is the base.

        Raises Refused("bad_adapter"): malformed, more than 8, an id twice, or a scale that is not finite.
        """
        if not text:
            return cls()
        return cls.of([_adapter_term(term.strip()) for term in text.split("+")])

    @classmethod
    def of(cls, pairs: list[tuple[str, float]]) -> LoraSet:
        """Build from pairs in any order, with the checks of `parse`."""
        if len(pairs) > MAX_ADAPTERS:
            raise Refused("bad_adapter", f"a LoRA set has at most {MAX_ADAPTERS} adapters, not {len(pairs)}")
        for name, scale in pairs:
            if not ADAPTER_ID.fullmatch(name):
                raise Refused("bad_adapter", f"adapter id {name[:80]!r} must match {ADAPTER_ID.pattern}")
            if not math.isfinite(scale):
                raise Refused("bad_adapter", f"the scale of adapter {name} must be a finite number")
        ids = sorted(name for name, _ in pairs)
        twice = [a for a, b in zip(ids, ids[1:], strict=False) if a == b]
        if twice:
            raise Refused("bad_adapter", f"adapter {twice[0]} is named twice")
        return cls(tuple(sorted(pairs)))

    @property
    def ids(self) -> tuple[str, ...]:
        """Adapter ids in order."""
        return tuple(name for name, _ in self.adapters)

    def __str__(self) -> str:
        """The shortest form that `parse` reads back."""
        return "+".join(name if scale == 1 else f"{name}*{_decimal(scale)}" for name, scale in self.adapters)


def _adapter_term(term: str) -> tuple[str, float]:
    name, star, scale = term.partition("*")
    if star and not re.fullmatch(r"-?[0-9]{1,9}(\.[0-9]{1,9})?", scale.strip()):
        raise Refused("bad_adapter", f"{term[:80]!r} must be ID or ID*decimal, such as sql*0.7")
    return name.strip(), float(scale) if star else 1.0


def _decimal(value: float) -> str:
    return f"{value:.9f}".rstrip("0").rstrip(".")


BASE = "base"
"""The combination of the empty set."""


def combination(ids: tuple[str, ...], digests: tuple[str, ...]) -> str:
    """Name of what a slot holds: `ID@DIGEST8` joined by `+`, without scales; `base` for none.

    The digest is part of the name, so replaced bytes are another combination with lanes and slots of its own.
    """
    return "+".join(f"{name}@{digest[:8]}" for name, digest in zip(ids, digests, strict=True)) or BASE


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted request. Exactly one of prompt, messages and tokens is set."""

    id: str
    cls: str = "normal"
    lora: LoraSet = LoraSet()
    digests: tuple[str, ...] = ()
    """Content digest of each adapter of `lora`, bound when the job was accepted."""
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tokens: tuple[int, ...] | None = None
    add_bos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str | int, ...] = ()
    stream: bool = False
    reply: str = "stream"
    batch: str | None = None
    deadline_ms: int | None = None
    ttl: int = 3600
    n: int = 1
    """Samples of the prompt."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told with each new token."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    return_token_ids: bool = False
    token_healing: bool = False
    banned_strings: tuple[str, ...] = ()

    @property
    def combination(self) -> str:
        """What a slot must hold to run this job."""
        return combination(self.lora.ids, self.digests)

    def pack(self) -> bytes:
        """The request as stored in Redis: a msgpack map with the format's version in `v`."""
        packed: bytes = msgpack.packb(self._body())
        return packed

    def _body(self) -> dict[str, Any]:
        """Fields that came after the first version are there only if they are set: the digests of others stay."""
        body = {name: getattr(self, name) for name in _FIRST_FIELDS}
        body |= {name: getattr(self, name) for name in _LATER_FIELDS if getattr(self, name) != _LATER_FIELDS[name]}
        return body | {"v": WIRE_VERSION, "lora": self.lora.adapters, "sampling": packed(self.sampling)}

    @classmethod
    def unpack(cls, data: bytes) -> Job:
        """Inverse of `pack`. Raises Refused("internal") for another version: the caller leaves newer jobs queued."""
        body = msgpack.unpackb(data, use_list=False, strict_map_key=True)
        version = body.pop("v")
        if version != WIRE_VERSION:
            raise Refused("internal", f"the request has format {version}; this worker reads {WIRE_VERSION}")
        body["lora"] = LoraSet(body["lora"])
        body["sampling"] = SamplingParams(**body["sampling"])
        return cls(**body)

    def fingerprint(self, drawn_seed: bool) -> str:
        """Digest of the request itself: equal for a re-submission, whatever seed and adapter bytes were bound to it."""
        body = self._body() | {"digests": ()}
        if drawn_seed:
            body["sampling"]["seed"] = None
        return hashlib.blake2b(msgpack.packb(body), digest_size=16).hexdigest()


_LATER_FIELDS = {field.name: field.default for field in fields(Job)[17:]}
_FIRST_FIELDS = [field.name for field in fields(Job) if field.name not in _LATER_FIELDS]
