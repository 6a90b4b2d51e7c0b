"""What the workers publish of the yard: what requests are checked against, and who holds which adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from redis import Redis

from lorayard.shared.job import ADAPTER_ID, combination
from lorayard.shared.keys import Keys

DIGEST = re.compile(r"[0-9a-f]{8,128}")


class Adapter(NamedTuple):
    """One adapter. digest: hex of its bytes and config."""

    rank: int
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Published:
    """The limits of the model and the adapters that exist.

    cache_tokens: largest prompt + new tokens of one job. max_rank: largest rank sum of a slot.
    """

    cache_tokens: int
    max_rank: int
    vocab_size: int
    has_chat_template: bool
    adapters: Mapping[str, Adapter]


def read_published(redis: Redis, keys: Keys) -> Published | None:
    """What the workers have published, None before a worker has done so. Malformed adapters count as absent."""
    pipe = redis.pipeline(transaction=False)
    pipe.hgetall(keys.info)
    pipe.hgetall(keys.adapters)
    info, adapters = pipe.execute()
    try:
        limits = [int(info[name]) for name in (b"cache_tokens", b"max_rank", b"vocab_size", b"has_chat_template")]
    except (KeyError, ValueError):
        return None
    return Published(limits[0], limits[1], limits[2], bool(limits[3]), read_adapters(adapters))


def read_adapters(published: Mapping[bytes, bytes]) -> dict[str, Adapter]:
    """Adapters by id, in order; malformed ones are left out."""
    adapters = {}
    for name, text in sorted(published.items()):
        try:
            facts = json.loads(text)
            adapter = Adapter(int(facts["rank"]), facts["digest"], int(facts["bytes"]))
            if ADAPTER_ID.fullmatch(name.decode()) and DIGEST.fullmatch(adapter.digest):
                adapters[name.decode()] = adapter
        except (ValueError, KeyError, TypeError):
            continue
    return adapters


class Holdings:
    """What each holder has, read again when its version says that it has changed."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis, self.keys = redis, keys
        self._versions: dict[str, bytes] = {}
        self._held: dict[str, frozenset[str]] = {}

    def refresh(self, holders: Mapping[bytes, bytes]) -> None:
        """Follow the hash of holders."""
        versions = {name.decode(errors="replace"): said.rpartition(b":")[2] for name, said in holders.items()}
        changed = [name for name, version in versions.items() if self._versions.get(name) != version]
        for name in changed:
            adapters = read_adapters(self.redis.hgetall(self.keys.held(name)))  # type: ignore[arg-type]
            self._held[name] = frozenset(combination((id,), (one.digest,)) for id, one in adapters.items())
        for name in self._held.keys() - versions.keys():
            del self._held[name]
        self._versions = versions

    def of(self, holder: str) -> frozenset[str] | None:
        """The `ID@DIGEST8` of a holder, none before it has said so; None for a worker that names no holder."""
        return self._held.get(holder, frozenset()) if holder else None

    def knows(self, holder: str) -> bool:
        """Whether a holder has said what it has."""
        return holder in self._held

    def missing(self, name: str) -> bool:
        """Whether there are holders, and none has all adapters of a combination."""
        adapters = set(name.split("+"))
        return bool(self._held) and not any(adapters <= held for held in self._held.values())

    def reason(self, name: str) -> str:
        """Why a combination is missing, for the clients of its jobs."""
        everywhere = frozenset[str]().union(*self._held.values())
        ids = {one.partition("@")[0] for one in everywhere}
        for adapter in sorted(set(name.split("+")) - everywhere):
            id, _, digest = adapter.partition("@")
            if id in ids:
                return (
                    f"the bytes of adapter {id} were replaced after the job was accepted; no host has {digest} any more"
                )
            return f"adapter {id} has vanished from every host since the job was accepted"
        return f"no host has all adapters of {name} any more"


def whole(said: bytes | str | None) -> int:
    """A number that somebody published, 0 if it is none."""
    try:
        return int(said or 0)
    except ValueError:
        return 0
