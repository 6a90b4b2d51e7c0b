"""The embedded server is a real one: started and killed for real, with every server binary that this machine has."""

from __future__ import annotations

import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from lorayard.shared import embedded
from lorayard.shared.children import spawn, stop
from lorayard.shared.connect import OLDEST, connect, display
from lorayard.shared.embedded import EmbeddedRedis, find_server
from lorayard.shared.errors import RedisUnavailable, UsageError

SERVERS = {
    path
    for path in (shutil.which("redis-server"), shutil.which("valkey-server"), embedded._bundled_server())
    if path and embedded._version_of(path) >= OLDEST
}


@pytest.fixture(params=sorted(SERVERS))
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each server of this machine in turn, chosen by REDIS_SERVER."""
    monkeypatch.setenv("REDIS_SERVER", request.param)
    return str(request.param)


def runs(pid: int) -> bool:
    """Whether the process exists and is more than a zombie that nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_data_is_kept_and_settings_are_as_promised(server, tmp_path):
    with EmbeddedRedis(tmp_path / "with space") as yard:
        client = yard.client()
        client.set("n", 41)
        promised = {
            "appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "port": "0",
            "stream-node-max-bytes": "1024", "maxmemory": str(embedded.memory_bytes() // 4),
        }  # fmt: skip
        assert {name: client.config_get(name)[name] for name in promised} == promised
        assert stat.S_IMODE(yard.socket.stat().st_mode) == 0o700
        assert stat.S_IMODE(yard.data_dir.stat().st_mode) == 0o700
    assert not yard.socket.exists()
    with EmbeddedRedis(tmp_path / "with space", max_memory=64 << 20) as yard:
        assert connect(yard.url).incr("n") == 42
        assert yard.client().config_get("maxmemory") == {"maxmemory": str(64 << 20)}
    yard.close()  # again: does nothing
    assert not yard.alive


def test_a_second_start_on_the_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "LOCK_TIMEOUT_S", 0.05)
    with EmbeddedRedis(tmp_path), pytest.raises(RedisUnavailable, match="in use by another yard; stop that one"):
        EmbeddedRedis(tmp_path)
    EmbeddedRedis(tmp_path).close()


def test_a_killed_parent_takes_it_along_and_its_data_stays(server, tmp_path):
    code = f"""
import time
from lorayard.shared.embedded import EmbeddedRedis
yard = EmbeddedRedis({str(tmp_path)!r})
yard.client().set("k", "kept")
print(yard.client().info("server")["process_id"], flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    redis_pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    with EmbeddedRedis(tmp_path) as yard:  # waits for the old server: it holds the folder's lock until it is gone
        assert not runs(redis_pid)
        assert yard.client().get("k") == b"kept"


def test_a_long_folder_name_moves_the_socket(tmp_path):
    folder = tmp_path / ("long" * 30)
    with EmbeddedRedis(folder) as yard:
        assert len(str(yard.socket)) < 100 and yard.socket.parent != folder
        assert yard.client().ping()
    assert not yard.socket.parent.exists()


def test_a_port_is_open_to_loopback_only(tmp_path):
    port = free_port()
    with EmbeddedRedis(tmp_path, port=port) as yard:
        assert yard.url == f"redis://127.0.0.1:{port}/0"
        client = connect(yard.url)
        assert client.config_get("bind")["bind"] == "127.0.0.1"
        assert client.config_get("protected-mode")["protected-mode"] == "yes"


def test_a_failed_start_says_why_and_lets_go_of_the_folder(server, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(
            RedisUnavailable, match="redis-server failed: it ended; the end of .*(?s:.*)Address already in use"
        ):
            EmbeddedRedis(tmp_path, port=other.getsockname()[1])
    EmbeddedRedis(tmp_path).close()


def test_data_of_a_newer_server_is_not_taken_for_no_data(tmp_path, monkeypatch):
    (tmp_path / "appendonlydir").mkdir()
    monkeypatch.setattr(embedded, "find_server", lambda: ("/old/redis-server", (6, 2, 14)))
    with pytest.raises(RedisUnavailable, match="was written by Redis 7 or newer, which /old/redis-server cannot read"):
        EmbeddedRedis(tmp_path)


def test_an_unusable_folder_is_named():
    with pytest.raises(RedisUnavailable, match=r"the data folder /proc/none cannot be used"):
        EmbeddedRedis("/proc/none")


def fake_server(folder: Path, says: str) -> str:
    path = folder / "redis-server"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


def test_the_server_is_chosen_by_variable_then_path_then_wheel(tmp_path, monkeypatch):
    newer, older = tmp_path / "newer", tmp_path / "older"
    newer.mkdir(), older.mkdir()
    new = fake_server(newer, "Valkey server v=8.0.1 sha=0:0 malloc=libc bits=64")
    old = fake_server(older, "Redis server v=6.0.16 sha=0:0 malloc=libc bits=64")
    monkeypatch.delenv("REDIS_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(newer))
    assert find_server() == (new, (8, 0, 1))
    monkeypatch.setenv("PATH", str(older))
    monkeypatch.setattr(embedded, "_bundled_server", lambda: None)
    with pytest.raises(RedisUnavailable, match="no redis-server of version 6.2 or newer"):
        find_server()
    monkeypatch.setattr(embedded, "_bundled_server", lambda: new)
    assert find_server()[0] == new
    for unfit in (old, str(tmp_path / "missing"), fake_server(tmp_path, "hello")):
        monkeypatch.setenv("REDIS_SERVER", unfit)
        with pytest.raises(RedisUnavailable, match="REDIS_SERVER=.* is not a Redis or Valkey server of version 6.2"):
            find_server()


@pytest.fixture
def acl(redis, redis_server) -> Iterator[str]:
    """URL template for a user who may do nothing but GET."""
    redis.execute_command("ACL", "SETUSER", "poor", "on", ">secret", "+get", "~*")
    yield redis_server.url.replace("unix://", "unix://poor:{}@")
    redis.execute_command("ACL", "DELUSER", "poor")


def test_a_user_with_few_rights_connects_and_a_stranger_is_told_why_not(acl):
    assert connect(acl.format("secret")).get("k") is None
    with pytest.raises(RedisUnavailable, match="does not let us in: .*LORAYARD_REDIS_URL") as refusal:
        connect(acl.format("guess"))
    assert "guess" not in str(refusal.value)


def test_nobody_there():
    with pytest.raises(RedisUnavailable, match="no Redis answers at redis://127.0.0.1:1/0: .*refused.*lorayard up"):
        connect("redis://127.0.0.1:1/0")


@pytest.mark.parametrize("url", ["http://host/", "redis://host:port/0", "unix:///x?nonsense=1"])
def test_a_malformed_url_is_a_usage_error(url):
    with pytest.raises(UsageError, match="the Redis URL .* is malformed"):
        connect(url)


def test_a_password_is_never_shown():
    assert display("redis://me:se/cr:et@host:1/0?password=x") == "redis://me:***@host:1/0"
    assert display("redis://:secret@host") == "redis://:***@host"
    assert display("unix:///a/b.sock?db=0") == "unix:///a/b.sock"


class FakeServer(threading.Thread):
    """Answers HELLO with a version and PING from a list whose last answer stays; hangs up on INCR."""

    def __init__(self, version: str, pings: Sequence[str] = ("+PONG\r\n",)) -> None:
        super().__init__(daemon=True)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self._hello = f"*2\r\n$7\r\nversion\r\n${len(version)}\r\n{version}\r\n"
        self._pings = list(pings)
        self.seen: list[str] = []
        self.start()

    def run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        while data := connection.recv(4096).decode():
            for word in (word for word in data.split("\r\n") if word in ("HELLO", "PING", "CLIENT", "INCR")):
                self.seen.append(word)
                if word == "INCR":
                    return
                connection.sendall(self._answer(word).encode())

    def _answer(self, word: str) -> str:
        if word == "HELLO":
            return self._hello
        if word == "CLIENT":
            return "+OK\r\n"
        return self._pings.pop(0) if len(self._pings) > 1 else self._pings[0]


def test_loading_is_waited_for():
    loading = "-LOADING Redis is loading the dataset in memory\r\n"
    fake = FakeServer("7.0.15", [loading, loading, "+PONG\r\n"])
    start = time.monotonic()
    connect(fake.url, protocol=2).close()
    assert time.monotonic() - start >= 0.04


def test_an_old_server_is_refused():
    fake = FakeServer("6.0.16")
    with pytest.raises(RedisUnavailable, match="is version 6.0.16; 6.2.0 or newer is needed"):
        connect(fake.url, protocol=2)


def test_a_command_is_never_sent_twice():
    fake = FakeServer("7.0.15")
    client = connect(fake.url, protocol=2)
    with pytest.raises(RedisConnectionError):
        client.execute_command("INCR", "n")
    client.ping()
    assert fake.seen.count("INCR") == 1


def test_stop_is_polite_first_and_certain_then():
    gentle = spawn(["sleep", "60"], parent_death=signal.SIGKILL)
    deaf = spawn(["sh", "-c", "trap '' TERM; echo; while :; do sleep 0.01; done"], parent_death=signal.SIGKILL,
                 stdout=subprocess.PIPE)  # fmt: skip
    assert deaf.stdout
    deaf.stdout.readline()  # the trap is set
    stop([gentle, deaf], 0.2)
    deaf.stdout.close()
    assert (gentle.returncode, deaf.returncode) == (-signal.SIGTERM, -signal.SIGKILL)
