"""Many entries in one call of ACCEPT."""

from __future__ import annotations

import redis as redis_py

from .direct import Client


def test_many_are_accepted_in_order_and_a_broken_one_harms_no_other(redis: redis_py.Redis) -> None:
    client = Client(redis)
    jobs = [client.arrival(f"j{at}", req=b"r" * (100_000 if at < 15 else 10)) for at in range(70)]
    client.redis.rpush("rq:job:j3", "is no hash")
    client.redis.config_resetstat()
    outcomes = client.scripts.accept(jobs, 68)
    assert outcomes[3].startswith("-") and "WRONGTYPE" in outcomes[3]
    assert outcomes[:3] + outcomes[4:] == ["accepted"] * 68 + ["busy"]
    assert client.lane() == [f"j{at}" for at in range(69) if at != 3]
    assert client.redis.hget("rq:job:j1", "req") == b"r" * 100_000
    assert client.redis.info("commandstats")["cmdstat_evalsha"]["calls"] == 3, "a MiB, 32 entries, the rest"


def test_a_redis_that_has_forgotten_its_scripts_is_told_them_again(redis: redis_py.Redis) -> None:
    client = Client(redis)
    assert client.send("j") == "accepted"
    client.redis.script_flush()
    assert client.send("k") == "accepted"
    assert client.lane() == ["j", "k"]
