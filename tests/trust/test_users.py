"""The users of deploy/redis: a yard runs under `service`, a client under `producer`, and neither asks for more."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from lorayard.demo import ADAPTERS, BASE
from lorayard.dispatcher.client import Client, JobFailed
from lorayard.dispatcher.serve import Dispatcher
from lorayard.shared import embedded
from lorayard.shared.connect import connect
from lorayard.shared.keys import Keys
from lorayard.shared.scripts import LUA, Scripts
from lorayard.worker.queue.spec import WorkerSpec
from lorayard.worker.queue.supervisor import Supervisor

from .conftest import BINARIES, DEPLOY, Server, password, write_users


@pytest.fixture(scope="module", params=BINARIES)
def yard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The whole yard under the shipped users: dispatcher and supervisor in threads, the worker a process."""
    folder = tmp_path_factory.mktemp("users")
    server = guarded(folder, request.param)
    redis = connect(url_of(server, "service"))
    dispatcher = Dispatcher(redis, Keys())
    spec = WorkerSpec("cpu-h-0", "", str(BASE), (str(ADAPTERS),), "cpu", "yard:", 2, 4, 4096, 0.0)
    supervisor = Supervisor(Scripts(connect(url_of(server, "service")), Keys()), url_of(server, "service"), [spec])
    # The thread that starts a child must live as long as the child.
    threads = [threading.Thread(target=target) for target in (dispatcher.serve, supervisor.run)]
    for thread in threads:
        thread.start()
    admin = server.client(username="admin", password=password("admin"), decode_responses=True)
    yield SimpleNamespace(
        client=Client(url_of(server, "producer")), admin=admin, server=server, major=server.version[0],
        producer=server.client(username="producer", password=password("producer")),
    )  # fmt: skip
    for one in (supervisor, dispatcher):
        one.stop()
    for thread in threads:
        thread.join()
    refused = admin.acl_log()
    server.close()
    assert refused == [], "the end of a yard asks for nothing more either"


def guarded(folder: Path, binary: str) -> Server:
    """A server with the shipped configuration and users."""
    folder.mkdir(exist_ok=True)
    shutil.copy(DEPLOY / "redis.conf", folder)
    write_users(folder, embedded._version_of(binary))
    return Server(folder, "redis.conf", binary=binary)


def url_of(server: Server, user: str) -> str:
    return f"redis://{user}:{quote(password(user), safe='')}@127.0.0.1:{server.port}/0"


def test_jobs_of_every_kind_run_and_nothing_is_asked_for_in_vain(yard: Any) -> None:
    yard.admin.acl_log_reset()
    client, ask = yard.client, {"prompt": "What does len do?", "max_tokens": 8}
    plain = client.submit(**ask, stream=True)
    adapted = client.submit(**ask, adapter="shout")
    bad = client.submit(**ask, adapter="nobody")
    early, listed = client.submit(**ask, cls="batch"), client.submit(**ask, cls="urgent", reply="list")
    batched = client.submit(**ask, reply="batch", batch="b1")
    client.cancel(early)
    assert client.result(plain, 90).new_tokens > 0
    assert client.result(adapted, 30).fields["adapter"] == "shout"
    with pytest.raises(JobFailed, match="no_adapter"):
        client.result(bad, 30)
    assert yard.producer.blpop(f"yard:reply:{listed}", 30)
    assert yard.producer.xread({"yard:res:b1": 0}, block=30_000)[0][1][0][1][b"id"] == batched.encode()
    assert b"model" in yard.producer.hgetall("yard:info") and b"shout" in yard.producer.hgetall("yard:adapters")
    if yard.major >= 7:
        yard.producer.xgroup_create("yard:res:b1", "sink", "0")
        [[_, [[entry, _]]]] = yard.producer.xreadgroup("sink", "s1", {"yard:res:b1": ">"})
        assert yard.producer.xack("yard:res:b1", "sink", entry) == yard.producer.xdel("yard:res:b1", entry) == 1
    assert [(one["username"], one["object"], one["client-info"]) for one in yard.admin.acl_log()] == []


FORBIDDEN = {
    "read others' requests": "HGETALL rq:job:x",
    "read the intake": "XRANGE yard:in - +",
    "answer in a worker's name": "XADD yard:out:x * ev done",
    "take from the intake": "XREADGROUP GROUP yard c STREAMS yard:in >",
    "delete": "DEL yard:out:x",
    "delete an entry": "XDEL yard:in 1-0",
    "trim": "XTRIM yard:in MAXLEN 0",
    "queue by itself": "RPUSH rq:queue:gpu-0 x",
    "run scripts": "EVAL return 0",
    "list names": "KEYS *",
    "scan": "SCAN 0",
    "empty everything": "FLUSHALL",
    "configure": "CONFIG GET *",
    "listen in": "MONITOR",
    "publish": "PUBLISH rq:pubsub:w x",
    "publish adapters": "HSET yard:adapters a b",
    "change users": "ACL SETUSER producer allkeys",
    "know users": "ACL LIST",
    "stop the server": "SHUTDOWN NOSAVE",
    "load code": "MODULE LIST",
}
ONLY_BY_7 = {"read the intake", "answer in a worker's name"}
"""Redis 6.2 knows no rights to read or to write alone."""


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_producer_may_not(yard: Any, what: str) -> None:
    words = FORBIDDEN[what].split()
    if what in ONLY_BY_7 and yard.major < 7:
        yard.producer.execute_command(*words)  # documented as allowed
        return
    with pytest.raises(NoPermissionError):
        yard.producer.execute_command(*words)
    yard.admin.acl_log_reset()


@pytest.mark.parametrize(
    "words",
    ["FLUSHALL", "KEYS *", "SET foreign 1", "CONFIG GET *", "EVAL return 0", "ACL LIST", "PUBLISH rq:pubsub:w x"],
)
def test_the_service_may_not(yard: Any, words: str) -> None:
    service = yard.server.client(username="service", password=password("service"))
    with pytest.raises(NoPermissionError):
        service.execute_command(*words.split())
    yard.admin.acl_log_reset()


def test_nobody_comes_in_without_a_name(yard: Any) -> None:
    with pytest.raises((AuthenticationError, ResponseError)):
        yard.server.client().ping()
    yard.admin.acl_log_reset()


def test_the_shipped_file_has_no_password_that_works(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "redis.conf", tmp_path)
    shutil.copy(DEPLOY / "users-7.acl", tmp_path / "users.acl")
    with pytest.raises(AssertionError, match="(?s)password hash must be exactly 64"):
        Server(tmp_path, "redis.conf")


@pytest.mark.parametrize("file", ["users-7.acl", "users-6.2.acl"])
def test_the_service_may_all_that_the_scripts_do(file: str) -> None:
    """Also on the paths that no yard of the tests takes."""
    [rights] = [line.split() for line in (DEPLOY / file).read_text().splitlines() if line.startswith("user service")]
    called = {
        name for path in LUA.glob("*.lua") for name in re.findall(r"\bcall\('([A-Z]+)'", path.read_text())
    }  # fmt: skip
    assert len(called) > 20 and {f"+{name.lower()}" for name in called} <= set(rights)


def test_every_line_of_the_configuration_is_explained() -> None:
    text = (DEPLOY.parent.parent / "docs/operations.md").read_text()
    lines = [line for line in (DEPLOY / "redis.conf").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 8 and not [line for line in lines if f"`{line}`" not in text]
