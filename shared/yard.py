"""The processes of one yard on this machine, below its Redis."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import click
from redis import Redis

from .children import spawn, stop
from .errors import LorayardError
from .keys import Keys

STOP_GRACE_S = 45.0  # a worker lets running jobs finish for 30 of them
RESTART_PAUSE_S = 1.0
PATIENCE_S = 15.0


class ChildEnded(LorayardError):
    """A process of the yard ended while it should have started; the end of its log says why."""

    def __init__(self, name: str, status: int, log_file: Path) -> None:
        last = (log_file.read_text(errors="replace").split("\n")[:-1] or ["it said nothing"])[-1]
        is_sentence = last.startswith("lorayard: ")  # it reported a fault of the user
        why = last.removeprefix("lorayard: ") if is_sentence else f"{last}; {log_file} has all that it said"
        super().__init__(f"the {name} did not start (status {status}): {why}")
        self.exit_status = status if status > 0 else LorayardError.exit_status


class Yard:
    """A dispatcher and a worker's supervisor as children that are started again when they die.

    `redis` decodes its replies. `worker`: the arguments of `lorayard worker`. `logs`: a folder for what both print.
    `monitor_port`: where a third child serves the page, 0 for none.
    The address goes to the children by environment, since everybody may read an argument.
    """

    def __init__(
        self, redis: Redis, url: str, keys: Keys, logs: Path, worker: Sequence[str], monitor_port: int = 0
    ) -> None:  # fmt: skip
        self.redis = cast(Any, redis)  # its types leave open whether replies are decoded
        self.keys, self._logs = keys, logs
        self._env = os.environ | {"LORAYARD_REDIS_URL": url, "LORAYARD_PREFIX": keys.prefix}
        self._argv = {"dispatcher": ["dispatcher"], "worker": ["worker", *worker]}
        self._monitor = f"http://127.0.0.1:{monitor_port}" if monitor_port else ""
        if monitor_port:
            self._argv["monitor"] = ["monitor", "--port", str(monitor_port)]
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start both and wait until a worker is ready, saying now and then why it is not. Raises ChildEnded."""
        seconds, microseconds = self.redis.time()
        since_ms = int(seconds) * 1000 + int(microseconds) // 1000
        for name in self._argv:
            self._spawn(name)
        word = time.monotonic() + PATIENCE_S
        while not (self.redis.exists(self.keys.info) and self.ready_gpus(since_ms)):
            for name, child in self._children.items():
                if child.poll() is not None:
                    raise ChildEnded(name, child.returncode, self._log_file(name))
            if time.monotonic() > word:
                last = self._log_file("worker").read_text(errors="replace").splitlines()[-1:]
                click.echo(f"no worker is ready yet; the end of {self._log_file('worker')}: {' '.join(last)}", err=True)
                word = time.monotonic() + PATIENCE_S
            time.sleep(0.05)

    def tend(self) -> None:
        """Start again what has died."""
        for name, child in self._children.items():
            if child.poll() is not None:
                click.echo(f"the {name} died (status {child.returncode}): starting another", err=True)
                time.sleep(RESTART_PAUSE_S)
                self._spawn(name)

    def stop(self) -> None:
        """Let running jobs finish or go back to their lanes, then see both gone."""
        stop(self._children.values(), STOP_GRACE_S)

    def ready_gpus(self, since_ms: int = 0) -> dict[str, dict[str, str]]:
        """GPU -> what its worker says of itself, for workers that are ready and have beaten since."""
        gpus = sorted(self.redis.smembers(self.keys.gpus))
        said = {gpu: self.redis.hgetall(self.keys.gpu(gpu)) for gpu in gpus}
        return {
            gpu: fields
            for gpu, fields in said.items()
            if fields.get("state") == "ready" and int(fields["beat_ms"]) >= since_ms
        }

    def screen(self, redis_cli: str, url: str) -> str:
        """What a person needs to know to use the yard. `redis_cli`: a command; `url`: fit to be shown."""
        adapters = sorted(self.redis.hkeys(self.keys.adapters))
        rows = [
            ("redis", url),
            ("model", self.redis.hget(self.keys.info, "model")),
            ("adapters", ", ".join(adapters) or "none yet"),
            *(
                ("worker", f"{gpu}: {fields.get('slots')} slots, {fields.get('seats')} jobs at once")
                for gpu, fields in self.ready_gpus().items()
            ),
            *([("monitor", self._monitor)] if self._monitor else []),
            ("logs", f"{self._logs}/*.log"),
        ]
        table = "\n".join(f"  {name:<9} {value}" for name, value in rows)
        job = f"id hello prompt 'What does len do?'{f' adapter {adapters[-1]}' if adapters else ''}"
        option = f" --adapter {adapters[-1]}" if adapters else ""
        return f"""
The yard is open. Ctrl-C stops it.

{table}

Send it a job and read the answer, with any Redis client or with ours:

  {redis_cli} XADD {self.keys.stream("normal")} '*' {job}
  {redis_cli} XREAD BLOCK 30000 STREAMS {self.keys.out("hello")} 0
  export LORAYARD_REDIS_URL='{url}'
  lorayard submit 'What does len do?'{option}
  lorayard top
"""

    def _spawn(self, name: str) -> None:
        with self._log_file(name).open("ab") as log:
            self._children[name] = spawn(
                [sys.executable, "-m", "lorayard.shared.cli", *self._argv[name]],
                parent_death=signal.SIGKILL,  # their Redis goes too, so there is nothing to say to it
                env=self._env,
                stdout=log,
                stderr=log,
            )

    def _log_file(self, name: str) -> Path:
        return self._logs / f"{name}.log"
