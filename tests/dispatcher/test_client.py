"""The Python client and the commands, against a running yard."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from lorayard.dispatcher.client import Client, JobFailed, NoAnswer

from .conftest import HOLD, LiveYard
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


def command(yard: LiveYard, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"LORAYARD_REDIS_URL": yard.server.url}
    argv = [sys.executable, "-m", "lorayard.shared.cli", *words]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, **more)


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


def test_info_and_adapters(yard: LiveYard) -> None:
    yard.final(yard.send(adapter="a"))
    said = command(yard, "info").stdout
    assert all(word in said for word in ("fake", "gpu-h-0", "ready", "a@11111111", "4096"))
    said = command(yard, "adapters").stdout
    assert all(word in said for word in ("a", "f", "1,000", "111111111111"))


def test_an_empty_yard_is_one_sentence(empty_yard: LiveYard) -> None:
    for name in ("info", "adapters"):
        said = command(empty_yard, name)
        assert said.returncode == 1 and said.stderr.startswith("lorayard: no worker has")
