"""After a death: suspects run in ever smaller groups, apart from the others, and only a killer is condemned."""

from __future__ import annotations

import pytest
import redis as redis_py

from ..dispatcher.fake import FakeWorker, events
from .direct import Client

SEATS = 128


class Deaths:
    """A GPU whose worker dies again and again."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.worker = self._start()

    def _start(self) -> FakeWorker:
        worker = FakeWorker(self.client.scripts, seats=SEATS)
        assert worker.register()
        return worker

    def claim(self) -> list[str]:
        self.client.scripts.assign("normal:base", self.worker.gpu, 256)
        return [lease.id for lease in self.worker.claim()]

    def die(self) -> None:
        self.client.scripts.reclaim(self.worker.gpu, self.worker.name)
        self.worker = self._start()


@pytest.fixture
def client(redis: redis_py.Redis) -> Client:
    return Client(redis)


def test_groups_shrink_and_the_innocent_finish(client: Client) -> None:
    jobs = [f"j{at:03}" for at in range(100)]
    for job in jobs:
        client.send(job, "base")
    yard = Deaths(client)
    sizes = []
    for _ in range(400):
        batch = yard.claim()
        if not batch:
            break
        sizes.append(len(batch))
        if "j042" in batch:  # it kills whoever runs it
            yard.die()
        else:
            for job in batch:
                yard.worker.done(job)
    assert sizes[0] == 100 and max(sizes[1:]) == 64 and {64, 8, 1} <= set(sizes)
    assert events(client.redis, "j042")[-1]["code"] == "crashed"
    assert all(events(client.redis, job)[-1]["ev"] == "done" for job in jobs if job != "j042")
    assert client.depth() == 0


def test_suspects_wait_for_the_others_and_the_others_for_them(client: Client) -> None:
    for job in ("s1", "s2"):
        client.send(job, "base")
    yard = Deaths(client)
    yard.claim()
    yard.die()
    client.send("clean", "base")
    assert yard.claim() == ["s1"], "a group of two is suspect one by one"
    assert yard.claim() == []
    yard.worker.done("s1")
    assert yard.claim() == ["s2"]
    yard.worker.done("s2")
    assert yard.claim() == ["clean"]


def test_two_deaths_together_condemn_nobody(client: Client) -> None:
    for job in ("a", "b"):
        client.send(job, "base")
    yard = Deaths(client)
    yard.claim()
    yard.die()
    assert yard.claim() == ["a"]
    yard.die()  # a is alone and dies once
    for _ in range(3):
        for job in yard.claim():
            yard.worker.done(job)
    assert [events(client.redis, job)[-1]["ev"] for job in ("a", "b")] == ["done", "done"]


def test_a_first_death_alone_only_makes_a_suspect(client: Client) -> None:
    client.send("a", "base")
    yard = Deaths(client)
    for deaths in (1, 2, 3):
        assert yard.claim() == ["a"]
        yard.die()
        ended = [event["code"] for event in events(client.redis, "a") if event["ev"] == "error"]
        assert ended == (["crashed"] if deaths == 3 else [])
    assert client.redis.hmget("rq:job:a", "deaths", "deaths_alone") == [b"3", b"2"]
