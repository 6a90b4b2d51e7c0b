"""What a worker publishes of its model: yard:info, which clients read and dispatchers check requests against."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from redis.exceptions import RedisError

from lorayard.shared import WIRE_VERSION, __version__
from lorayard.shared.connect import is_away
from lorayard.shared.errors import ModelError
from lorayard.shared.scripts import Scripts, Value

from .prepare import DEFAULT_MAX_TOKENS

log = logging.getLogger(__name__)

SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
BLOCK, BLOCKS = 1 << 16, 256
AWAY_S = 0.5  # between tries while Redis is away


def base_digest(model: Path, overrides: Mapping[str, float] = MappingProxyType({})) -> str:
    """blake2b of 16 bytes, in hex, of a model folder: its config, its tokenizer, and of each weights file the name, the
    size and 256 blocks of 64 KiB spread over it (all of it up to 16 MiB), since reading all would take minutes; and of
    what the worker's command line puts in the place of the config's.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(overrides):
        digest.update(f"{name} {overrides[name]}\n".encode())
    small = [*(model / name for name in SMALL_FILES), *sorted(model.glob("additional_chat_templates/*.jinja"))]
    for path in [*small, *sorted(model.glob("*.safetensors"))]:
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for start in range(0, size, max(BLOCK, size // BLOCKS)):
                    file.seek(start)
                    digest.update(file.read(BLOCK))
    return digest.hexdigest()


def info(
    model: Path, digest: str, capacity: int, max_seq_len: int, vocab_size: int, slots: int, max_batch: int,
    max_rank: int, has_chat_template: bool,
) -> dict[str, Value]:  # fmt: skip
    """Fields of yard:info. capacity: the most tokens, prompt and new ones together, of one job."""
    return {
        "version": __version__, "wire_version": WIRE_VERSION, "model": model.name, "base_digest": digest,
        "max_seq_len": max_seq_len, "cache_tokens": capacity, "max_tokens_default": DEFAULT_MAX_TOKENS,
        "vocab_size": vocab_size, "slots": slots, "max_batch": max_batch, "max_rank": max_rank,
        "has_chat_template": int(has_chat_template),
    }  # fmt: skip


def publish(
    scripts: Scripts, gpu: str, fields: Mapping[str, Value], lease_ms: int, given_up: Callable[[], bool] = lambda: False
) -> None:  # fmt: skip
    """Write yard:info; while Redis is away, try again until it is back or `given_up()`.

    Raises ModelError if live workers serve another base: one yard has one.
    """
    said = False
    while not given_up():
        try:
            return _publish(scripts, gpu, fields, lease_ms)
        except RedisError as error:
            if not is_away(error):
                raise
            if not said:
                log.warning("the model is loaded, but Redis is away: %s", error)
            said = True
            time.sleep(AWAY_S)


def _publish(scripts: Scripts, gpu: str, fields: Mapping[str, Value], lease_ms: int) -> None:
    redis: Any = scripts.redis
    keys = scripts.keys
    present = redis.hget(keys.info, "base_digest")
    if present is not None and present.decode() != fields["base_digest"]:
        seconds, micros = redis.time()
        for other in (name.decode() for name in redis.smembers(keys.gpus)):
            beat = redis.hget(keys.gpu(other), "beat_ms")
            if other != gpu and beat is not None and seconds * 1000 + micros // 1000 - int(beat) < lease_ms:
                raise ModelError(
                    f"this yard serves the base {present.decode()[:8]} (worker on {other}), the folder holds "
                    f"{str(fields['base_digest'])[:8]}; stop its workers first, or give this one another --prefix"
                )
    pipe = redis.pipeline()
    pipe.delete(keys.info)
    pipe.hset(keys.info, mapping=dict(fields))
    pipe.execute()
