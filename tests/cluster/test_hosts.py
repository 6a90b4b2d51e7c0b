"""Two hosts with different adapters, as real processes on one machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorayard.demo import ADAPTERS, BASE
from lorayard.dispatcher.client import Client, JobFailed, NoAnswer
from lorayard.shared.embedded import EmbeddedRedis

QUESTION = "What does len mean?"
pytestmark = pytest.mark.slow


class Processes:
    """`lorayard dispatcher` and `lorayard worker --host NAME`, against one Redis."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self.redis_url, self.folder = redis_url, folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str) -> None:
        env = os.environ | {"LORAYARD_REDIS_URL": self.redis_url, "OMP_NUM_THREADS": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            argv = [sys.executable, "-m", "lorayard.shared.cli", *words]
            self.running[name] = subprocess.Popen(argv, env=env, stdout=log, stderr=log)

    def host(self, name: str, *adapters: str) -> None:
        """Start the workers of a host that has these adapters."""
        root = self.folder / name
        for adapter in adapters:
            shutil.copytree(ADAPTERS / adapter, root / adapter, dirs_exist_ok=True)
        self.start(
            name, "worker", str(BASE), "--adapters", str(root), "--cpu-workers", "1", "--host", name, "--slots", "2",
            "--max-batch", "4", "--cache-tokens", "4096",
        )  # fmt: skip

    def end(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        process = self.running.pop(name)
        process.send_signal(how)
        process.wait(60)


@pytest.fixture
def hosts(redis_server: EmbeddedRedis, redis: object, tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(redis_server.url, tmp_path)
    processes.start("dispatcher", "dispatcher")
    yield processes
    for name in list(processes.running):
        processes.end(name)


def test_jobs_go_where_their_adapters_are(hosts: Processes, redis_server: EmbeddedRedis) -> None:
    hosts.host("one", "shout", "json")
    hosts.host("two", "bullets", "json")
    client = Client(redis_server.client())

    def send(adapter: str) -> str:
        return client.submit(QUESTION, adapter=adapter, temperature=0, max_tokens=4)

    def ran_on(job: str) -> str:
        return client.result(job, 60).fields["gpu"]

    while set(client.redis.hkeys("yard:adapters")) != {b"shout", b"bullets", b"json"}:
        assert all(process.poll() is None for process in hosts.running.values())
    assert ran_on(send("shout")) == "cpu-one-0" and ran_on(send("bullets+json")) == "cpu-two-0"
    nowhere = send("shout+bullets")
    hosts.end("two", signal.SIGKILL)
    waiting = send("bullets")
    with pytest.raises(NoAnswer):
        client.result(waiting, 12)
    with pytest.raises(JobFailed, match="no_adapter: no host has all adapters"):
        client.result(nowhere, 12)
    hosts.host("two", "bullets", "json")
    assert ran_on(waiting) == "cpu-two-0"
