"""The Python client and the commands, against a running yard."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from lorayard.dispatcher.client import AsyncClient, Client, JobFailed, NoAnswer
from lorayard.shared.errors import UsageError

from .conftest import HOLD, LiveYard, command
from .fake import KEYS


@pytest.fixture
def client(yard: LiveYard) -> Client:
    return Client(yard.server.client())


def test_submit_stream_and_result(client: Client) -> None:
    job = client.submit(prompt="hello", adapter="a*0.5", temperature=0, stop=["\n"], stream=True, cls="urgent")
    assert [event.kind for event in client.stream(job, 20)] == ["tok", "done"]
    result = client.result(job, 20)
    assert (result.id, result.text, result.finish) == (job, "echo hello", "stop")


def test_failures_are_errors_with_their_code(client: Client) -> None:
    with pytest.raises(JobFailed) as failed:
        client.result(client.submit(prompt="p", adapter="nobody"), 20)
    assert failed.value.code == "no_adapter" and failed.value.exit_status == 1
    job = client.submit(HOLD)
    with pytest.raises(NoAnswer):
        client.result(job, 0.05)
    client.cancel(job)
    with pytest.raises(JobFailed) as failed:
        client.result(job, 20)
    assert failed.value.code == "cancelled"


def test_a_restarted_stream_leaves_out_the_earlier_attempt(client: Client) -> None:
    told: list[dict[Any, Any]] = [
        {"ev": "tok", "text": "old", "attempt": 1}, {"ev": "restart", "attempt": 2},
        {"ev": "tok", "text": "ghost", "attempt": 1}, {"ev": "tok", "text": "new", "attempt": 2},
        {"ev": "done", "text": "new", "attempt": 2},
    ]  # fmt: skip
    for event in told:
        client.redis.xadd(KEYS.out("j"), event)
    assert [(event.kind, event.text) for event in client.stream("j", 5)] == [
        ("tok", "old"), ("restart", ""), ("tok", "new"), ("done", "new"),
    ]  # fmt: skip


def test_answers_of_lists_are_taken_once(client: Client) -> None:
    job = client.submit("hello", reply="list")
    assert client.take(job, 20).text == "echo hello"
    with pytest.raises(NoAnswer):
        client.take(job, 0.05)
    with pytest.raises(JobFailed, match="bad_field"):
        client.take(client.submit("hello", reply="list", temperature="hot"), 20)


def test_answers_of_a_batch_come_once_and_again_to_who_died(client: Client) -> None:
    jobs = {client.submit(str(at), reply="batch", batch="corpus", cls="batch") for at in range(5)}
    dying = client.results("corpus", 20)
    first, event = next(dying)
    dying.close()  # before it asked for the next
    assert first in jobs and event.kind == "done"
    read = []
    for job, _ in client.results("corpus", 20):
        read.append(job)
        if len(read) == 5:
            break
    assert sorted(read) == sorted(jobs)
    assert client.redis.xlen("yard:res:corpus") == 1, "the last one is not known to be stored"
    assert len(list(client.results("corpus", 0.05))) == 1 and list(client.results("corpus", 0.05)) == []


def test_a_batch_that_expired_meanwhile_is_read_on(client: Client) -> None:
    assert list(client.results("corpus", 0.01)) == []
    client.redis.delete("yard:res:corpus")
    job = client.submit("hello", reply="batch", batch="corpus")
    assert next(client.results("corpus", 20))[0] == job


def test_the_same_verbs_for_asyncio(yard: LiveYard) -> None:
    async def talk() -> None:
        async with AsyncClient(yard.server.url) as client:
            jobs = [await client.submit(f"hello {at}", adapter="a", stream=True) for at in range(20)]
            results = await asyncio.gather(*(client.result(job, 20) for job in jobs))
            assert [result.text for result in results] == [f"echo hello {at}" for at in range(20)]
            assert [event.kind async for event in client.stream(jobs[0], 20)] == ["tok", "done"]
            assert (await client.take(await client.submit("l", reply="list"), 20)).text == "echo l"
            batched = await client.submit("b", reply="batch", batch="corpus")
            assert [(job, event.text) async for job, event in client.results("corpus", 1)] == [(batched, "echo b")]
            held = await client.submit(HOLD)
            with pytest.raises(NoAnswer):
                await client.result(held, 0.05)
            await client.cancel(held)
            with pytest.raises(JobFailed, match="cancelled"):
                await client.result(held, 20)

    asyncio.run(talk())


def test_both_clients_have_the_same_verbs() -> None:
    verbs = {name for name in vars(Client) if not name.startswith("_")}
    assert verbs == {name for name in vars(AsyncClient) if not name.startswith("_")}
    for name in verbs:
        sync, other = (list(inspect.signature(getattr(one, name)).parameters) for one in (Client, AsyncClient))
        assert sync == other


def test_a_malformed_address_is_one_sentence() -> None:
    for one in (Client, AsyncClient):
        with pytest.raises(UsageError, match="malformed"):
            one("nonsense://here")


def test_submit_prints_the_answer(yard: LiveYard) -> None:
    done = command(yard, "submit", "hello", "--adapter", "a", "--max-tokens", "5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "echo hello\n", "")
    done = command(yard, "submit", "-", "--no-stream", input="from a pipe")
    assert done.stdout == "echo from a pipe\n"
    done = command(yard, "submit", "hello", "--json", "--id", "mine")
    assert json.loads(done.stdout).items() >= {"ev": "done", "id": "mine", "text": "echo hello"}.items()


def test_submit_takes_chats(yard: LiveYard) -> None:
    assert command(yard, "submit", "--chat", "hello").stdout == "echo ['hello']\n"
    message = {"role": "user", "content": "hello"}
    two = command(yard, "submit", "--messages", json.dumps([message, message]))
    assert two.stdout == "echo ['hello', 'hello']\n"
    both = command(yard, "submit", "--chat", "--messages", "[]")
    assert both.returncode == 2 and "use one of them" in both.stderr


def test_submit_says_why_a_job_failed(yard: LiveYard) -> None:
    failed = command(yard, "submit", "hello", "--adapter", "nobody")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("lorayard: no_adapter: ") and "Traceback" not in failed.stderr
    failed = command(yard, "submit", "hello", "--temperature", "-1", "--json")
    assert failed.returncode == 1 and json.loads(failed.stdout)["code"] == "bad_field"
    failed = command(yard, "submit", "{", "--messages")
    assert failed.returncode == 2 and "JSON list" in failed.stderr


def interruptible() -> None:
    """Undo what a shell does to a command in the background: such a test run ignores Ctrl-C, and so would its child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_cancels_the_job(yard: LiveYard) -> None:
    env = os.environ | {"LORAYARD_REDIS_URL": yard.server.url}
    argv = [sys.executable, "-m", "lorayard.shared.cli", "submit", HOLD, "--id", "held"]
    with subprocess.Popen(
        argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    ) as process:
        yard.running("held")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and "job held is cancelled" in stderr
    assert yard.final("held") == {"ev": "cancelled"}
