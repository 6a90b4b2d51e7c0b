"""Random schedules through the real scripts, intake and placer on a real Redis; see `yard.py` for what must hold."""

from __future__ import annotations

import random

import pytest
import redis as redis_py

from lorayard.shared.scripts import Scripts

from .fake import KEYS
from .yard import HOLD_MS, SETS, SimulatedYard

CHUNKS, PER_CHUNK = 20, 100
OPERATIONS = {"submit": 12, "repeat": 2, "cancel": 2, "crash": 1, "leave": 1, "join": 2, "haunt": 1, "meddle": 1,
              "shelve": 1}  # fmt: skip


def run(scripts: Scripts, seed: int) -> SimulatedYard:
    """One schedule, drawn from the seed alone."""
    scripts.redis.flushdb()
    draw = random.Random(seed)
    yard = SimulatedYard(
        scripts, seed, gpus=draw.randint(1, 2), slots=draw.randint(1, 4), seats=draw.choice([1, 3, 8]),
        longest_ms=draw.choice([50, 1000, 4000]),
    )  # fmt: skip
    for _ in range(draw.randint(2, 5)):
        for name in draw.choices(list(OPERATIONS), list(OPERATIONS.values()), k=draw.randint(1, 6)):
            if yard.workers or name not in ("crash", "leave", "meddle"):
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


TURNS, TURN_MS = 80, 500


SIZES = [
    (1, 1, 1, 400),
    (1, 2, 4, 2000),
    (1, 4, 2, 400),
    (2, 1, 4, 2000),
    (2, 2, 1, 400),
    (1, 5, 8, 2000),
    (2, 2, 8, 800),
]


@pytest.mark.parametrize(("gpus", "slots", "seats", "longest_ms"), SIZES)
def test_no_lane_starves_past_the_documented_bound(
    redis: redis_py.Redis, gpus: int, slots: int, seats: int, longest_ms: int
) -> None:
    yard = SimulatedYard(Scripts(redis, KEYS), 0, gpus=gpus, slots=slots, seats=seats, longest_ms=longest_ms)
    hot = random.Random(slots).sample(SETS, k=7)
    for _ in range(TURNS):
        yard.press(hot)
        yard.turn(TURN_MS)
    assert yard.longest_homeless_ms >= HOLD_MS
    yard.finish()
