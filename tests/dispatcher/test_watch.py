"""The commands for people: info, top, adapters, cancel, dead."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from typing import Any

import msgpack
import pytest
from rich.console import Console

from lorayard.dispatcher.snapshot import clean, look
from lorayard.dispatcher.top import Top, _keys
from lorayard.shared.scripts import Scripts

from .conftest import HOLD, LiveYard, command
from .fake import KEYS, combination, hold


def test_info_and_adapters(yard: LiveYard) -> None:
    yard.final(yard.send(adapter="a"))
    hold(Scripts(yard.redis, KEYS), "h", a="1" * 64)
    hold(Scripts(yard.redis, KEYS), "i", a="2" * 64)
    said = command(yard, "info").stdout
    assert all(word in said for word in ("fake", "gpu-h-0", "ready", "a@11111111", "4096"))
    said = command(yard, "adapters").stdout
    assert all(word in said for word in ("a", "f", "1,000", "111111111111", "1 (1 with other bytes)"))


def test_an_empty_yard_is_one_sentence(empty_yard: LiveYard) -> None:
    for name in ("info", "adapters"):
        said = command(empty_yard, name)
        assert said.returncode == 1 and said.stderr.startswith("lorayard: no worker has")
    assert command(empty_yard, "top", "--once").stdout.startswith("yard ")
    assert command(empty_yard, "dead", "list").stdout == "nothing was refused\n"


def crowded(yard: LiveYard) -> None:
    """Four jobs run, jobs of two lanes wait, one entry was refused."""
    for _ in range(4):
        yard.running(yard.send(prompt=HOLD, adapter="a"))
    for _ in range(12):
        yard.send("yard:in:batch", prompt=HOLD, adapter="a")
    yard.until(lambda: yard.redis.hget(KEYS.depth, "batch") == b"12")
    yard.send(id="a b")
    yard.until(lambda: yard.dead() and yard.redis.llen(KEYS.lane("batch", combination("a"))) == 4)


def test_a_snapshot_counts_what_is_there(yard: LiveYard) -> None:
    crowded(yard)
    seen = look(yard.redis, KEYS)
    (gpu,) = seen.gpus
    assert (gpu.name, gpu.state, gpu.queued, gpu.running, gpu.seats) == ("gpu-h-0", "ready", 8, 4, 4)
    assert gpu.slots == ((combination("a"), "open", 12),)
    assert [(lane.name, lane.jobs) for lane in seen.lanes] == [(f"batch:{combination('a')}", 4)]
    assert 0 <= seen.lanes[0].age_s < 60 and seen.lanes_in_all == 1
    assert seen.depth == {"urgent": 0, "normal": 4, "batch": 12} and (seen.refused, seen.adapters) == (1, 6)
    assert seen.memory > 0 and seen.memory_limit == 256 << 20
    yard.redis.hset(KEYS.gpu("gpu-h-0"), mapping={"seats": "many", "tokens_per_s": "fast", "swaps": b"\xff"})
    (gpu,) = look(yard.redis, KEYS).gpus
    assert (gpu.seats, gpu.tokens_per_s, gpu.swaps) == (0, 0.0, 0)


def test_states_that_only_others_see(empty_yard: LiveYard) -> None:
    empty_yard.work()
    empty_yard.redis.sadd(KEYS.gpus, "gpu-h-10", "gpu-h-9")
    empty_yard.close()
    empty_yard.redis.hset(KEYS.gpu("gpu-h-0"), "beat_ms", 1)
    seen = look(empty_yard.redis, KEYS)
    assert [(gpu.name, gpu.state) for gpu in seen.gpus] == [
        ("gpu-h-0", "silent"), ("gpu-h-9", "no worker"), ("gpu-h-10", "no worker"),
    ]  # fmt: skip


def test_what_comes_from_redis_cannot_steer_a_terminal() -> None:
    assert clean(b"a\x1b[31m\n\xffb") == "a�[31m��b"


def test_top_writes_plain_lines_into_a_pipe_and_disturbs_nothing(yard: LiveYard) -> None:
    crowded(yard)
    yard.close()
    before = {key: yard.redis.dump(key) for key in yard.redis.keys()}
    said = command(yard, "top", "--once")
    assert {key: yard.redis.dump(key) for key in yard.redis.keys()} == before
    a = re.escape(combination("a"))
    first, second, third = said.stdout.splitlines()
    assert re.fullmatch(r"yard \S+ at \S+Z urgent 0 normal 4 batch 12 unread 0 refused 1 lanes 1 memory \d+", first)
    expected = (
        rf"gpu gpu-h-0 ready queued 8 running 4/4 tokens/s 0\.0 in/s - wait-ms -/-/- swaps 0 failed 0 slots {a}:12"
    )
    assert re.fullmatch(expected, second)
    assert re.fullmatch(rf"lane batch:{a} jobs 4 oldest \d+\.\ds", third)


def test_top_goes_on_until_it_is_stopped(yard: LiveYard) -> None:
    env = os.environ | {"LORAYARD_REDIS_URL": yard.server.url}
    argv = [sys.executable, "-m", "lorayard.shared.cli", "top", "--every", "0.1"]
    with subprocess.Popen(
        argv, env=env, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    ) as process:  # fmt: skip
        assert process.stdout
        seen = 0
        while seen < 3:
            seen += process.stdout.readline().startswith("yard ")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@pytest.mark.parametrize("no_color", [False, True])
def test_top_in_a_terminal(yard: LiveYard, no_color: bool) -> None:
    yard.final(yard.send(adapter="a"))
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "CI")} | {
        "LORAYARD_REDIS_URL": yard.server.url, "TERM": "xterm-256color", "COLUMNS": "140",
    }  # fmt: skip
    argv = [sys.executable, "-m", "lorayard.shared.cli", "top", "--once"]
    env |= {"NO_COLOR": "1"} if no_color else {}
    with subprocess.Popen(argv, env=env, stdout=theirs, stderr=theirs) as process:
        assert process.wait(20) == 0
    os.close(theirs)
    said = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert all(word in said for word in ("fake", "gpu-h-0", "0/4", "a@11111111", "tokens/s"))
    assert ("\x1b[32m" in said) is not no_color


def test_cancel(yard: LiveYard) -> None:
    held = [yard.send(prompt=HOLD) for _ in range(2)]
    for job in held:
        yard.running(job)
    said = command(yard, "cancel", *held)
    assert (said.returncode, said.stdout) == (0, "asked for the end of 2 jobs\n")
    assert [yard.final(job)["ev"] for job in held] == ["cancelled"] * 2
    bad = command(yard, "cancel", "good", "a b")
    assert bad.returncode == 2 and "'a b'" in bad.stderr and not yard.redis.exists("yard:cancelled:good")


def refused(yard: LiveYard, code: str) -> str:
    """The entry of yard:dead that was refused with this code."""
    (entry,) = [entry for entry, fields in yard.redis.xrange(KEYS.dead) if fields[b"code"] == code.encode()]
    return str(entry.decode())


def test_dead_entries_are_listed_and_shown(yard: LiveYard) -> None:
    yard.final(yard.send(id="one", adapter="nobody"))
    yard.final(yard.send(id="two", colour="[red]\x1b"))
    said = command(yard, "dead", "list").stdout
    assert said.index("two") < said.index("one"), "the latest first"
    only = command(yard, "dead", "list", "--code", "no_adapter").stdout
    assert "one" in only and "two" not in only
    assert command(yard, "dead", "list", "--code", "busy").stdout == "nothing was refused as busy\n"
    shown = command(yard, "dead", "show", refused(yard, "bad_field")).stdout
    assert all(word in shown for word in ("colour", "[red]�", "prompt", "yard:in", "bad_field"))
    for words, status in ((("1-1",), 1), (("nonsense",), 2)):
        failed = command(yard, "dead", "show", *words)
        assert failed.returncode == status and "lorayard dead list" in failed.stderr


def test_a_refused_job_is_sent_again(yard: LiveYard) -> None:
    payload = msgpack.packb({"id": "one", "prompt": "\xff", "adapter": "late"})
    yard.redis.xadd("yard:in:urgent", {"payload": payload})
    yard.final("one")
    entry = refused(yard, "no_adapter")
    failed = command(yard, "dead", "resubmit", entry)
    assert failed.returncode == 2 and "--id" in failed.stderr
    hold(Scripts(yard.redis, KEYS), "h", late="3" * 64)
    said = command(yard, "dead", "resubmit", entry, "--id", "again").stdout
    assert said.startswith("sent to yard:in:urgent as entry ")
    assert yard.final("again")["text"] == "echo \xff" and not yard.dead()
    assert yard.redis.hget("rq:job:again", "lane") == b"urgent:late@33333333"


def test_a_busy_job_is_sent_again_under_its_id(empty_yard: LiveYard) -> None:
    empty_yard.work()
    dispatcher = empty_yard.serve(limit=1)
    held = empty_yard.send(prompt=HOLD)
    empty_yard.running(held)
    empty_yard.send(id="j", prompt="hello")
    assert empty_yard.final("j")["code"] == "busy"
    empty_yard.halt(dispatcher)
    empty_yard.serve()
    assert command(empty_yard, "dead", "resubmit", refused(empty_yard, "busy")).stdout.endswith("id j\n")
    empty_yard.until(lambda: empty_yard.redis.hget("rq:job:j", "status") == b"finished")


@pytest.mark.parametrize(
    ("stream", "fields", "word"),
    [("yard:ctl", {"op": "stop", "id": "j"}, "was no job"), ("yard:in", {"colour": "x" * 5000}, "too long")],
)
def test_what_cannot_be_sent_again(yard: LiveYard, stream: str, fields: dict[str, Any], word: str) -> None:
    yard.redis.xadd(stream, fields)
    yard.until(yard.dead)
    failed = command(yard, "dead", "resubmit", refused(yard, "bad_field"), "--id", "again")
    assert failed.returncode == 2 and word in failed.stderr and len(yard.dead()) == 1


def test_keys_of_top_sort_and_look_into_things(yard: LiveYard) -> None:
    crowded(yard)
    yard.redis.sadd(KEYS.gpus, "gpu-h-9")
    shown = Top(yard.redis, KEYS, "here")

    def said(keys: str = "") -> str:
        for key in keys:
            shown.press(key)
        screen = Console(width=200)
        with screen.capture() as capture:
            screen.print(shown.view(look(yard.redis, KEYS)))
        return capture.get()

    assert said().index("gpu-h-0") < said().index("gpu-h-9")
    assert said("r").index("gpu-h-9") < said().index("gpu-h-0") and "sorted by name" in said()
    assert said("rs").index("gpu-h-0") and "sorted by tokens/s" in said()
    assert "sorted by queued" in said("s") and said().index("gpu-h-0") < said().index("gpu-h-9")
    inside = said("j\r")
    assert "gpu-h-0: ready, heartbeat" in inside and combination("a") in inside and "12" in inside
    lane = said("\x1bjj\r")
    assert f"batch:{combination('a')}: 4 jobs" in lane and lane.count("\n") > 8
    assert "a@11111111" in said("\x1b")
    assert "id of a job: a!_" in said("/a!") and "not known" not in said("\r")
    assert "nobody is not known" in said("/nobody\r")
    [refused_one] = yard.dead()
    assert refused_one["id"] == "a b" and not shown.ended
    said("q")
    assert shown.ended
    assert [_keys(typed) for typed in ("\x1b[A", "\x1b[B", "\x1b", "\x1b[5~", "jj")] == [
        ["k"], ["j"], ["\x1b"], [], ["j", "j"],
    ]  # fmt: skip
