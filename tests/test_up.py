"""`lorayard up` with the demo's model: it opens, repairs itself, stops cleanly, and dies whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from lorayard.shared.connect import connect

pytestmark = pytest.mark.slow
UP = [sys.executable, "-m", "lorayard.shared.cli", "up"]
TIMEOUT_S = 60.0


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT_S:.0f} s: {what}"
        time.sleep(0.05)


def command_line(pid: int) -> list[str]:
    """Arguments of a process; [] when it is gone or only waits to be reaped."""
    try:
        return [word for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0") if word]
    except OSError:
        return []


def family(pid: int) -> list[int]:
    """The process's living descendants."""
    found = []
    with suppress(OSError):  # a process may end while we look
        for listing in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, listing.read_text().split()):
                found += [child, *family(child)]
    return [child for child in found if command_line(child)]


class Opened:
    """A yard opened by the command in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "up.log"
        with self.log.open("wb") as log:
            clean = {name: value for name, value in os.environ.items() if not name.startswith("LORAYARD_")}
            arguments = ["--demo", "--data", str(folder), "--cache-tokens", "4096", "--max-batch", "4"]
            self.process = subprocess.Popen([*UP, *arguments], stdout=log, stderr=log, env=clean)
        until(lambda: "Ctrl-C stops it" in self.said() or self.process.poll() is not None, "the yard is open")
        assert self.process.poll() is None, self.said()
        self.redis: Any = connect(f"unix://{folder}/redis.sock", decode_responses=True)
        self.family = family(self.process.pid)

    def said(self) -> str:
        return self.log.read_text()

    def child(self, word: str) -> int:
        """Pid of the child whose arguments contain a word."""
        return next(pid for pid in family(self.process.pid) if word in command_line(pid))

    def answer(self, prompt: str) -> dict[str, str]:
        """The final event of a job."""
        job = self.redis.xadd("yard:in", {"prompt": prompt, "temperature": "0", "max_tokens": "4"})
        ((_, entries),) = self.redis.xread({f"yard:out:{job}": "0"}, block=30_000)
        return dict(entries[-1][1])


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Opened]:
    opened = Opened(tmp_path)
    yield opened
    opened.redis.close()
    opened.process.kill()
    opened.process.wait()


def test_it_answers_repairs_itself_and_stops_cleanly(yard):
    assert yard.answer("What is a list?")["ev"] == "done"
    for name in ("model     base", "bullets, json, shout", "redis-cli -s", "lorayard submit"):
        assert name in yard.said()
    [page] = re.findall(r"monitor +(http://127\.0\.0\.1:\d+)", yard.said())
    with urlopen(f"{page}/api/state", timeout=20) as answer:
        assert [gpu["state"] for gpu in json.load(answer)["yard"]["gpus"]] == ["ready"]
    for pid in yard.family:
        assert not any(
            "redis.sock" in word for word in command_line(pid)[1:] if "://" in word
        )  # an address may hold a password
    os.kill(yard.child("dispatcher"), signal.SIGKILL)
    until(lambda: "the dispatcher died (status -9): starting another" in yard.said(), "the death is noticed")
    assert yard.answer("What is a set?")["ev"] == "done"
    yard.process.send_signal(signal.SIGTERM)
    assert yard.process.wait(TIMEOUT_S) == 0, yard.said()
    assert not any(map(command_line, yard.family))


def test_a_kill_takes_everything_along(yard):
    assert len(yard.family) >= 4  # Redis, dispatcher, supervisor, worker
    yard.process.kill()
    yard.process.wait()
    until(lambda: not any(map(command_line, yard.family)), "all processes are gone")


def test_the_tour_shows_streams_a_swap_and_a_mixed_batch():
    done = subprocess.run([*UP, "--demo", "--show"], capture_output=True, text=True, timeout=2 * TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    for label in ("base", "shout", "bullets", "json"):
        assert len(re.findall(rf"^ +{label} \| ", done.stdout, re.MULTILINE)) >= 3, done.stdout  # pieces, whole
    assert re.search(r"slot \d : \w+ had drained, now \w+", done.stdout), done.stdout
    together = re.search(r"together: (.*)", done.stdout)
    assert together and {"base", "bullets", "json"} <= set(re.findall(r"x (\w+)", together[1])), done.stdout


def test_a_model_that_does_not_load_is_one_sentence(tmp_path):
    (tmp_path / "model").mkdir()
    arguments = [str(tmp_path / "model"), "--cpu-workers", "1", "--data", str(tmp_path / "data")]
    done = subprocess.run([*UP, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 4
    assert re.fullmatch(r"lorayard: the worker did not start \(status 4\): \S+/model\b.*tokenizer.*\n", done.stderr), (
        done.stderr
    )
