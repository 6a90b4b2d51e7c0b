"""What the workers publish of the yard, as far as a request is checked against it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from redis import Redis

from lorayard.shared.job import ADAPTER_ID
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
