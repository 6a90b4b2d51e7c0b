"""A yard under SIGKILLs: every job has one final event, with the text that it has undisturbed, and nobody is condemned.

`python tests/soak/chaos.py` is the long form: 20,000 jobs, 300 kills. The short form runs among the tests.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import redis as redis_py
from redis.exceptions import RedisError

from lorayard.demo import ADAPTERS, BASE
from lorayard.shared.children import spawn, stop
from lorayard.shared.embedded import EmbeddedRedis

HERE = Path(__file__).parent
YARD_JS = HERE.parent.parent / "deploy" / "examples" / "node" / "yard.js"
FINAL = ("done", "error", "cancelled")
WORDS = "list dict set tuple zip map len sum min max any all print open range sorted".split()
KINDS = 64
"""Jobs that differ; those of one kind have one text."""
DUPLICATES = 0.1
WINDOW = 48
"""Jobs that a Python client has open at once."""
AGAIN_S = 5.0
"""A client that sees no end of a job for so long sends it again."""
VICTIMS = (["worker"] * 5) + (["dispatcher"] * 4) + (["redis"] * 2) + ["supervisor"]
INTAKE = ("yard:in", "yard:in:batch")
SETTLED_S = 60.0
LAST_KILL = 0.85
"""Part of the jobs that is answered when the last kill is due."""
DISPATCHERS = ("dispatcher-0", "dispatcher-1")


def job(name: str, number: int, **fields: Any) -> dict[str, Any]:
    """A short job; the number says of which kind."""
    kind = number % KINDS
    return {
        "id": f"{name}-{number}", "prompt": f"What does {WORDS[kind % len(WORDS)]} do?", "temperature": 0,
        "adapter": ("", "shout", "bullets", "json")[kind // len(WORDS)], "max_tokens": 1 + kind % 4, **fields,
    }  # fmt: skip


class Processes:
    """Redis, two dispatchers, and a supervisor with two workers, all started again when they die.

    To be used by one thread, which must live on: the processes die with it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._server = EmbeddedRedis(folder / "redis", port=self._port)
        self.url = self._server.url
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self.tend()

    def tend(self) -> None:
        """Start what does not run."""
        if not self._server.alive:
            self._server.close()
            self._server = EmbeddedRedis(self._folder / "redis", port=self._port)
        for name in (*DISPATCHERS, "supervisor"):
            if name not in self._children or self._children[name].poll() is not None:
                self._children[name] = self._start(name)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        worker = ["worker", str(BASE), "--adapters", str(ADAPTERS), "--cpu-workers", "2", "--host", "chaos"]
        argv = worker if name == "supervisor" else ["dispatcher"]
        with (self._folder / f"{name}.log").open("ab") as log:
            return spawn(
                [sys.executable, "-m", "lorayard.shared.cli", *argv], parent_death=signal.SIGKILL, stdout=log,
                stderr=log, env=os.environ | {"LORAYARD_REDIS_URL": self.url, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def kill(self, victim: str, chance: random.Random) -> bool:
        """SIGKILL one of a kind; False if there is none now."""
        pids = {
            "redis": self._redis, "worker": self._workers, "supervisor": lambda: [self._children["supervisor"].pid],
            "dispatcher": lambda: [self._children[name].pid for name in DISPATCHERS],
        }[victim]()  # fmt: skip
        if pids:
            os.kill(chance.choice(pids), signal.SIGKILL)
        return bool(pids)

    def _workers(self) -> list[int]:
        supervisor = self._children["supervisor"].pid
        try:
            said = [task.read_text() for task in Path(f"/proc/{supervisor}/task").glob("*/children")]
        except OSError:  # it died meanwhile
            return []
        return [int(pid) for pids in said for pid in pids.split()]

    def _redis(self) -> list[int]:
        return [int(self._server.client().info("server")["process_id"])]

    def close(self) -> None:
        """Stop all of it."""
        stop(self._children.values(), 45)
        self._server.close()


class Client(threading.Thread):
    """Sends jobs, and sends them again until it has seen their final events: id -> event in `finals`."""

    def __init__(self, url: str, jobs: list[dict[str, Any]]) -> None:
        super().__init__(daemon=True)
        self.url, self.jobs = url, jobs
        self.finals: dict[str, dict[str, str]] = {}
        self.redis: Any = redis_py.Redis.from_url(url, decode_responses=True, socket_timeout=10)

    def run(self) -> None:
        """Work through the list, a window at a time."""
        for start in range(0, len(self.jobs), WINDOW):
            window, sent = self.jobs[start : start + WINDOW], 0.0
            while open_ := [one for one in window if one["id"] not in self.finals]:
                try:
                    if time.monotonic() - sent > AGAIN_S:
                        self.send(open_)
                        sent = time.monotonic()
                    self.listen({one["id"] for one in open_})
                except RedisError:
                    sent = 0.0
                time.sleep(0.02)

    def send(self, jobs: list[dict[str, Any]]) -> None:
        """Submit them all."""
        pipe = self.redis.pipeline(transaction=False)
        for one in jobs:
            pipe.xadd("yard:in", one)
        pipe.execute()

    def listen(self, ids: set[str]) -> None:
        """Look at the ends of the jobs' own streams."""
        pipe = self.redis.pipeline(transaction=False)
        for name in sorted(ids):
            pipe.xrevrange(f"yard:out:{name}", count=1)
        for name, entries in zip(sorted(ids), pipe.execute(), strict=True):
            if entries and entries[0][1]["ev"] in FINAL:
                self.finals[name] = entries[0][1]


class BatchClient(Client):
    """The same in class batch, with one stream for all answers."""

    last = "0"

    def send(self, jobs: list[dict[str, Any]]) -> None:
        pipe = self.redis.pipeline(transaction=False)
        for one in jobs:
            pipe.xadd("yard:in:batch", one)
        pipe.execute()

    def listen(self, ids: set[str]) -> None:
        for _, entries in self.redis.xread({"yard:res:chaos": self.last}):
            for self.last, event in entries:
                self.finals[event["id"]] = event


class NodeClient(Client):
    """The same in node, by the example of deploy/examples."""

    def run(self) -> None:
        node = shutil.which("node")
        assert node, "node must be installed"
        with subprocess.Popen(
            [node, str(HERE / "client.js"), str(YARD_JS), self.url],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdin and process.stdout
            process.stdin.writelines(json.dumps(one) + "\n" for one in self.jobs)
            process.stdin.close()
            for line in process.stdout:
                event = json.loads(line)
                self.finals[event["id"]] = event


def with_duplicates(jobs: list[dict[str, Any]], chance: random.Random) -> list[dict[str, Any]]:
    """The jobs, and a tenth of them once more somewhere later."""
    jobs = [*jobs]
    for again in chance.sample(jobs, int(DUPLICATES * len(jobs))):
        jobs.insert(chance.randint(jobs.index(again) + 1, len(jobs)), again)
    return jobs


def finish(processes: Processes, clients: list[Client], seconds: float) -> Iterator[int]:
    """Keep all running until the clients have all they want; yields how many final events they have."""
    deadline = time.monotonic() + seconds
    while any(client.is_alive() for client in clients):
        processes.tend()
        yield sum(len(client.finals) for client in clients)
        if time.monotonic() > deadline:
            missing = [one["id"] for client in clients for one in client.jobs if one["id"] not in client.finals]
            raise TimeoutError(f"{len(missing)} jobs have no final event, such as {missing[:5]}")
        time.sleep(0.02)


def start_clients(url: str, jobs: int, chance: random.Random) -> list[Client]:
    """Three clients with a third of the jobs each."""
    shares = [range(at, jobs, 3) for at in range(3)]
    clients: list[Client] = []
    for kind, fields, numbers in zip(
        (Client, BatchClient, NodeClient), ({}, {"reply": "batch", "batch": "chaos"}, {}), shares, strict=True
    ):
        clients.append(kind(url, with_duplicates([job("chaos", number, **fields) for number in numbers], chance)))
    for client in clients:
        client.start()
    return clients


def chaos(folder: Path, jobs: int, kills: int, seed: int, seconds: float, say: Any = lambda _: None) -> dict[str, Any]:
    """Run it; returns the figures. Raises AssertionError for a broken promise, TimeoutError for a lost job."""
    chance = random.Random(seed)
    processes = Processes(folder)
    try:
        calm = Client(processes.url, [job("calm", number) for number in range(KINDS)])
        calm.start()
        for _ in finish(processes, [calm], 90):
            pass
        texts = [calm.finals[f"calm-{number}"]["text"] for number in range(KINDS)]
        victims = (VICTIMS * (kills // len(VICTIMS) + 1))[:kills]
        chance.shuffle(victims)
        moments = sorted(chance.uniform(0, LAST_KILL * jobs) for _ in victims)
        began, killed = time.monotonic(), Counter[str]()
        clients = start_clients(processes.url, jobs, chance)
        for done in finish(processes, clients, seconds):
            if victims and done >= moments[0] and processes.kill(victims[0], chance):
                killed[victims.pop(0)] += 1
                moments.pop(0)
                say(f"{time.monotonic() - began:6.1f} s  {done} answered, {killed.total()} killed")
        assert not victims, f"the jobs ended before {len(victims)} of the kills"
        took = round(time.monotonic() - began, 1)
        return {"jobs": jobs, "seconds": took, **killed} | check(calm.redis, clients, texts, jobs)
    finally:
        processes.close()


def check(redis: Any, clients: list[Client], texts: list[str], jobs: int) -> dict[str, int]:
    """Hold what the clients saw, and what Redis recorded, to the promises; returns the figures."""
    deadline = time.monotonic() + SETTLED_S
    while any(map(int, redis.hvals("yard:depth"))) or any(
        map(redis.xlen, INTAKE)
    ):  # repeats may come after the answers
        left = {stream: redis.xlen(stream) for stream in INTAKE}
        assert time.monotonic() < deadline, f"jobs are left over: {redis.hgetall('yard:depth')}, {left}"
        time.sleep(0.1)
    finals = {name: event for client in clients for name, event in client.finals.items()}
    recorded = [(event["id"], event) for _, event in redis.xrange("yard:res:chaos")]
    for name in finals:
        recorded += [(name, event) for _, event in redis.xrange(f"yard:out:{name}") if event["ev"] in FINAL]
    assert len(finals) == jobs
    for name, event in [*finals.items(), *recorded]:
        assert event["ev"] == "done", (name, event)
        assert event["text"] == texts[int(name.rpartition("-")[2]) % KINDS], (name, event)
    twice = [name for name, count in Counter(name for name, _ in recorded).items() if count > 1]
    assert not twice, twice
    deaths = Counter[str]()
    for name in finals:
        known = redis.hmget(f"rq:job:{name}", "deaths", "deaths_alone")
        deaths["died"] += known[0] is not None
        deaths["died_alone"] += known[1] is not None
    assert redis.xlen("yard:dead") == 0
    return {
        "finals": len(finals),
        "recorded": len(recorded),
        "died": deaths["died"],
        "died_alone": deaths["died_alone"],
    }


@click.command()
@click.option("--jobs", default=20_000, show_default=True)
@click.option("--kills", default=300, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--seconds", default=7200.0, show_default=True, help="Give up after so long.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for data and logs, kept.")
def main(jobs: int, kills: int, seed: int, seconds: float, keep: Path | None) -> None:
    """Run a yard of two CPU workers and two dispatchers under SIGKILLs."""
    with tempfile.TemporaryDirectory() as folder:
        click.echo(json.dumps(chaos(keep or Path(folder), jobs, kills, seed, seconds, click.echo)))


if __name__ == "__main__":
    main()
