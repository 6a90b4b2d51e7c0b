"""A whole yard as a user starts it, and what a user needs to talk to it: a Redis client."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py

from lorayard.shared.embedded import find_server

FINAL = ("done", "error", "cancelled")


class Yard:
    """`lorayard up --demo` with its own Redis on a free port, in a folder of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / "up.log"
        self.data = folder / "data"
        argv = ["up", "--demo", "--redis-port", str(self.port), "--data", str(self.data), *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lorayard.shared.cli", *argv], stdout=log, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self.until(lambda: "The yard is open" in self.log.read_text(), 90)
        self.redis: Any = redis_py.Redis(port=self.port, decode_responses=True, encoding_errors="replace")
        self._number = 0

    def submit(self, to: str = "yard:in", **fields: Any) -> str:
        """Add a job; returns its id."""
        if "id" not in fields and "payload" not in fields:
            self._number += 1
            fields["id"] = f"job-{self._number}"
        entry = self.redis.xadd(to, fields)
        return str(fields.get("id", entry))

    def events(self, job_id: str) -> list[dict[str, str]]:
        """All events of a job so far."""
        return [fields for _, fields in self.redis.xrange(f"yard:out:{job_id}")]

    def final(self, job_id: str, seconds: float = 60) -> dict[str, str]:
        """The final event, when it has come; fails if there is a second."""
        self.until(lambda: any(event["ev"] in FINAL for event in self.events(job_id)), seconds)
        [event] = [event for event in self.events(job_id) if event["ev"] in FINAL]
        return event

    def cancel(self, job_id: str) -> None:
        """Ask for a job's end."""
        self.redis.xadd("yard:ctl", {"op": "cancel", "id": job_id})

    def dead(self, **match: str) -> list[dict[str, str]]:
        """The entries of yard:dead that have these fields."""
        entries = [fields for _, fields in self.redis.xrange("yard:dead")]
        return [fields for fields in entries if match.items() <= fields.items()]

    def until(self, condition: Callable[[], object], seconds: float = 30) -> None:
        """Wait for a condition; shows the logs when it does not come true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                logs = [self.log, *self.data.glob("*.log")]
                pytest.fail("\n".join(f"{log}:\n{log.read_text(errors='replace')[-4000:]}" for log in logs))
            time.sleep(0.02)

    def talk(self, *words: str) -> str:
        """What redis-cli prints; without one, Redis' own words over a plain socket."""
        beside = Path(find_server()[0]).with_name("redis-cli")
        cli = shutil.which("redis-cli") or (str(beside) if beside.exists() else None)
        if cli:
            return subprocess.run(
                [cli, "-p", str(self.port), *words], capture_output=True, text=True, check=True
            ).stdout
        request = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w.encode()), w.encode()) for w in words)
        with socket.create_connection(("127.0.0.1", self.port)) as plain:
            plain.settimeout(1)
            plain.sendall(request)
            answer = b""
            try:
                while block := plain.recv(1 << 16):
                    answer += block
            except TimeoutError:
                pass
        return answer.decode()

    def children(self, word: str, of: int | None = None) -> list[int]:
        """Process ids below `up` (or another process) whose command line has the word."""
        found = []
        with suppress(OSError):  # a process may end while we look
            for child in Path(f"/proc/{of or self.process.pid}/task").glob("*/children"):
                for pid in map(int, child.read_text().split()):
                    with suppress(OSError):
                        if word in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                            found.append(pid)
                    found += self.children(word, pid)
        return found

    def workers(self) -> dict[str, int]:
        """GPU -> process id of its ready worker."""
        said = {gpu: self.redis.hgetall(f"yard:gpu:{gpu}") for gpu in sorted(self.redis.smembers("yard:gpus"))}
        return {gpu: int(fields["pid"]) for gpu, fields in said.items() if fields.get("state") == "ready"}

    def close(self) -> int:
        """Stop it as a service manager does; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Yard]]:
    """Starts yards, and stops them after the module's tests."""
    yards: list[Yard] = []

    def start(*options: str) -> Yard:
        yards.append(Yard(tmp_path_factory.mktemp("yard"), *options))
        return yards[-1]

    yield start
    for yard in yards:
        if yard.process.poll() is None:
            yard.close()
