"""Random schedules through the real scripts, intake and placer on a real Redis; see `yard.py` for what must hold."""

from __future__ import annotations

import random

import pytest
import redis as redis_py

from lorayard.shared.scripts import Scripts

from .fake import KEYS
from .yard import SimulatedYard

CHUNKS, PER_CHUNK = 20, 100
OPERATIONS = {"submit": 12, "repeat": 2, "cancel": 2, "crash": 1, "leave": 1, "join": 2, "haunt": 1}


def run(scripts: Scripts, seed: int) -> SimulatedYard:
    """One schedule, drawn from the seed alone."""
    scripts.redis.flushdb()
    draw = random.Random(seed)
    yard = SimulatedYard(
        scripts, seed, gpus=draw.randint(1, 2), slots=draw.randint(1, 4), seats=draw.randint(1, 4),
        longest_ms=draw.choice([50, 1000, 4000]),
    )  # fmt: skip
    for _ in range(draw.randint(2, 6)):
        for name in draw.choices(list(OPERATIONS), list(OPERATIONS.values()), k=draw.randint(1, 6)):
            if yard.workers or name not in ("crash", "leave"):
                getattr(yard, name)()
        yard.turn(draw.choice([1, 20, 300, 2600, 11000]))
    yard.finish()
    return yard


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_schedules_keep_every_promise(redis: redis_py.Redis, chunk: int) -> None:
    scripts = Scripts(redis, KEYS)
    for seed in range(chunk * PER_CHUNK, (chunk + 1) * PER_CHUNK):
        try:
            run(scripts, seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
