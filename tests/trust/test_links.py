"""Ways to a Redis: TLS with a CA of one's own, and sentinels that know which server is the primary now."""

from __future__ import annotations

import asyncio
import gc
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from lorayard.dispatcher.client import AsyncClient, Client
from lorayard.shared.connect import connect, connect_async, display
from lorayard.shared.embedded import find_server
from lorayard.shared.errors import RedisUnavailable, UsageError

from ..conftest import missing
from .conftest import DEPLOY, Server, Starter, documented, free_port, password, run, write_users
from .test_trouble import Yard, until

OPENSSL = shutil.which("openssl")


def make_certificates(folder: Path) -> None:
    """ca.crt, redis.crt and redis.key for localhost, as docs/operations.md makes them."""
    run("sh", "-euc", documented("openssl"), cwd=folder)


@pytest.fixture
def tls(tmp_path: Path) -> Any:
    """A server with the shipped configuration, users and TLS."""
    if OPENSSL is None:
        missing("the openssl command")
    folder = tmp_path / "tls"
    folder.mkdir()
    make_certificates(folder)
    for name in ("redis.conf", "tls.conf"):
        shutil.copy(DEPLOY / name, folder)
    binary, version = find_server()
    write_users(folder, version)
    port = free_port()
    try:
        server = Server(folder, "redis.conf", "--include", "tls.conf", "--tls-port", str(port), binary=binary)
    except AssertionError as error:
        if "tls" not in str(error).lower():
            raise
        missing("a redis-server with TLS")
    server.port = port
    yield server
    server.close()


def test_tls_with_a_private_ca_and_a_password(tls: Server) -> None:
    user = f"service:{quote(password('service'), safe='')}"
    url = f"rediss://{user}@localhost:{tls.port}/0?ssl_ca_certs={quote(str(tls.folder / 'ca.crt'))}"
    yard = Yard(url)
    try:
        yard.all_done(yard.submit(3))
        producer = Client(url.replace(user, f"producer:{quote(password('producer'), safe='')}"))
        assert producer.result(producer.submit(tokens=[1, 2], max_tokens=2), 10).text == "1 2 "
    finally:
        yard.close()
    for wrong, why in (
        (url.replace("?ssl_ca_certs", "?ssl_ca_path"), "certificate verify failed"),
        (url.replace("localhost", "127.0.0.2"), "certificate verify failed|not valid"),
        (url.replace("rediss:", "redis:").partition("?")[0], "no Redis answers"),
        (url.replace(user, "service:wrong"), "does not let us in"),
    ):
        with pytest.raises(RedisUnavailable, match=why) as error:
            connect(wrong)
        assert password("service") not in str(error.value) and quote(password("service"), safe="") not in str(
            error.value
        )


@pytest.fixture
def cluster(server: Starter) -> Any:
    """(primary, replica, sentinels), with times for tests in the shipped sentinel.conf."""
    primary = server("--save", "", "--repl-diskless-sync-delay", "0")
    replica = server("--save", "", "--replicaof", f"127.0.0.1 {primary.port}")
    text = (DEPLOY / "sentinel.conf").read_text()
    for old, new in (("127.0.0.1 6379", f"127.0.0.1 {primary.port}"), ("5000", "600"), ("30000", "2000")):
        text = text.replace(old, new)
    sentinels: list[Server] = []
    for _ in range(3):
        at = Path(primary.folder) / f"sentinel-{len(sentinels)}"
        at.mkdir()
        (at / "sentinel.conf").write_text(text)
        sentinels.append(Sentinel(at, "sentinel.conf", "--sentinel"))
    until(lambda: replica.client().info("replication")["master_link_status"] == "up")
    until(lambda: all(one.client().sentinel_master("yard")["num-other-sentinels"] == 2 for one in sentinels))
    until(lambda: all(one.client().sentinel_master("yard")["num-slaves"] == 1 for one in sentinels))
    yield primary, replica, sentinels
    for one in sentinels:
        one.close()


class Sentinel(Server):
    """A server that is a sentinel."""

    ready = "+monitor master"


def test_a_fail_over_loses_nothing(cluster: Any) -> None:
    primary, replica, sentinels = cluster
    url = f"redis+sentinel://{','.join(f'127.0.0.1:{one.port}' for one in sentinels)}/yard/0"
    yard = Yard(url)
    try:
        jobs = yard.submit(30, tokens=100)
        until(lambda: yard.redis.exists(f"rq:job:{jobs[20]}"))
        client = primary.client()
        client.set("mark", 1)
        assert client.wait(1, 5000) == 1  # the replica has what was submitted
        primary.kill()
        patient = replica.client(retry=Retry(ConstantBackoff(0.1), 50))  # a new primary ends its old connections
        until(lambda: patient.info("replication")["role"] == "master", 20)
        yard.all_done(jobs + yard.submit(5, "later"))
        assert asyncio.run(ask(url)) == "1 2 "
        gc.collect()  # pytest fails for a connection that is left open
    finally:
        yard.close()


async def ask(url: str) -> str:
    async with AsyncClient(url) as client:
        return (await client.result(await client.submit(tokens=[1, 2], max_tokens=2), 10)).text


def test_sentinel_addresses_are_read_and_refused_by_name() -> None:
    with pytest.raises(RedisUnavailable, match=r"no Redis answers at redis\+sentinel://me:\*\*\*@127.0.0.1:1/yard: "):
        connect("redis+sentinel://me:secret@127.0.0.1:1/yard")
    for url, why in {
        "redis+sentinel://h1:1,h2:2": "must name the service",
        "redis+sentinel://h1:x/yard": "'h1:x' is not HOST:PORT",
        "redis+sentinel://h1,,h2/yard": "'' is not HOST:PORT",
        "redis+sentinel://h1/yard/zero": "SERVICE/DB",
        "redis+sentinel://127.0.0.1:1/yard?nonsense=1": "nonsense",
        "redis+cluster://h1:1/0": "malformed",
    }.items():
        with pytest.raises(UsageError, match=why):
            connect(url)
        with pytest.raises(UsageError, match=why):
            connect_async(url)
    assert display("redis+sentinel://u:p@h:1,h:2/yard?sentinel_password=x") == "redis+sentinel://u:***@h:1,h:2/yard"
