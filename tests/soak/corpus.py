"""A corpus under SIGKILLs: of its client, workers, dispatchers, the supervisor and Redis. Each row is there once, and
the canonical export has the very bytes of an undisturbed run.

`python -m tests.soak.corpus` is the long form: 20,000 rows of 8 LoRA sets, 50 kills. The short form runs among the
tests.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import redis as redis_py

from lorayard.shared.children import spawn

from .chaos import Processes

SETS = ("", "shout", "bullets", "json", "shout*0.5", "shout*0.8+bullets*0.2", "json*0.7", "bullets+json*0.5")
WORDS = "list dict set tuple zip map len sum min max any all print open range sorted".split()
VICTIMS = ("client", "worker", "worker", "dispatcher", "redis", "client", "worker", "supervisor")
LAST_KILL = 0.9


def rows(count: int) -> str:
    """The input: JSON lines."""
    found = [
        {"id": at, "prompt": f"What does {WORDS[at // len(SETS) % len(WORDS)]} do?", "set": SETS[at % len(SETS)]}
        for at in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in found)


class Run:
    """The client as a process, started again until it has ended well."""

    def __init__(self, url: str, source: Path, out: Path) -> None:
        self.out, self.log = out, out.with_suffix(".log")
        self.words = [
            *"corpus run".split(), str(source), "-o", str(out), *"--id-column id --adapter-column set".split(),
            *"--missing-adapter base --max-tokens 4 --window 64 --shard-rows 50 --seed 5 --json".split(),
        ]  # fmt: skip
        self.env = os.environ | {"LORAYARD_REDIS_URL": url}
        self.child: subprocess.Popen[bytes] | None = None
        self.whole = False

    def tend(self) -> None:
        """Start it if it does not run and has not ended well."""
        if self.child is not None and (status := self.child.poll()) is not None:
            assert status in (0, 3, -signal.SIGKILL), f"status {status}: {self.log.read_text()[-2000:]}"
            self.whole = status == 0
        if not self.whole and (self.child is None or self.child.poll() is not None):
            with self.log.open("ab") as log:
                self.child = spawn(
                    [sys.executable, "-m", "lorayard.shared.cli", *self.words],
                    env=self.env, parent_death=signal.SIGKILL, stdout=log, stderr=log,
                )  # fmt: skip

    def done(self) -> int:
        """Texts that are safe."""
        try:
            with closing(sqlite3.connect(f"file:{self.out}/ledger.sqlite?mode=ro", uri=True)) as book:
                return int(book.execute("SELECT COUNT(*) FROM texts").fetchone()[0])
        except sqlite3.OperationalError:  # it is not there yet
            return 0

    def ask(self, command: str, *words: str) -> str:
        """Output of a command about the folder, which must end well."""
        argv = [sys.executable, "-m", "lorayard.shared.cli", "corpus", command, str(self.out), *words]
        return subprocess.run(argv, env=self.env, capture_output=True, text=True, check=True, timeout=120).stdout

    def canonical(self) -> bytes:
        """The canonical export, after a verification."""
        assert "each once" in self.ask("verify")
        path = self.out.with_suffix(".jsonl")
        self.ask("export", "-o", str(path), "--canonical")
        return path.read_bytes()


def disturbed(
    folder: Path, count: int, kills: int, seed: int, seconds: float, say: Callable[[str], object] = lambda _: None
) -> dict[str, Any]:
    """Run it twice, calm and under kills; returns the figures. Raises AssertionError for a broken promise."""
    source = folder / "rows.jsonl"
    source.write_text(rows(count))
    chance = random.Random(seed)
    processes = Processes(folder)
    try:
        calm, wild = (Run(processes.url, source, folder / name) for name in ("calm", "wild"))
        redis: Any = redis_py.Redis.from_url(processes.url)
        while not redis.hexists("yard:info", "model"):
            time.sleep(0.1)
        _until_whole(processes, calm, time.monotonic() + seconds)
        victims = [VICTIMS[at % len(VICTIMS)] for at in range(kills)]
        chance.shuffle(victims)
        moments = sorted(chance.uniform(0, LAST_KILL * count) for _ in victims)
        killed: Counter[str] = Counter()
        began = time.monotonic()

        def kill(done: int) -> None:
            while victims and done >= moments[0] and _kill(processes, wild, victims[0], chance):
                killed[victims.pop(0)] += 1
                moments.pop(0)
                say(f"{time.monotonic() - began:6.1f} s  {done} safe, {killed.total()} killed")

        _until_whole(processes, wild, time.monotonic() + seconds, kill)
        assert not victims, f"the corpus was whole before {len(victims)} of the kills"
        assert wild.canonical() == calm.canonical()
        return {"rows": count, "seconds": round(time.monotonic() - began, 1), **killed}
    finally:
        processes.close()


def _kill(processes: Processes, run: Run, victim: str, chance: random.Random) -> bool:
    if victim != "client":
        return processes.kill(victim, chance)
    if run.child is None or run.child.poll() is not None:
        return False
    run.child.kill()
    return True


def _until_whole(
    processes: Processes, run: Run, deadline: float, heard: Callable[[int], None] = lambda done: None
) -> None:  # fmt: skip
    while not run.whole:
        assert time.monotonic() < deadline, f"{run.done()} texts are safe: {run.log.read_text()[-2000:]}"
        processes.tend()
        run.tend()
        heard(run.done())
        time.sleep(0.05)


@click.command()
@click.option("--rows", "count", default=20_000, show_default=True)
@click.option("--kills", default=50, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--seconds", default=7200.0, show_default=True, help="Give up after so long.")
def main(count: int, kills: int, seed: int, seconds: float) -> None:
    """Fill a corpus on two CPU workers under SIGKILLs."""
    with tempfile.TemporaryDirectory() as folder:
        click.echo(json.dumps(disturbed(Path(folder), count, kills, seed, seconds, click.echo)))


if __name__ == "__main__":
    main()
