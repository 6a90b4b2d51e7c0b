"""`lorayard top`: the yard in a terminal, with keys to sort and to look into a GPU, a lane or a job."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from lorayard.shared.cli import redis_options
from lorayard.shared.connect import connect, display
from lorayard.shared.keys import CLASSES, Keys

from .monitor.way import way
from .snapshot import GpuSeen, Snapshot, clean, look
from .validate import JOB_ID
from .watch import HELP, console, failures, figure, memory, table, tables, waits

EXAMPLES = """\b
Examples:
  lorayard top
  lorayard top --once
  lorayard top | grep '^gpu'
\b
Keys:
  s  sort the GPUs by the next column      r      turn the order round
  j, k or arrows  choose a GPU or a lane   Enter  look into it
  /  look into a job by its id             Esc    back      q  end"""

SORTS: dict[str, Callable[[GpuSeen], Any]] = {
    "tokens/s": lambda gpu: gpu.tokens_per_s, "queued": lambda gpu: gpu.queued, "running": lambda gpu: gpu.running,
    "wait": lambda gpu: gpu.figures.get("wait_p95_ms", 0), "failed": failures, "swaps": lambda gpu: gpu.swaps,
}  # fmt: skip
IDS_SHOWN = 20


@click.command(epilog=EXAMPLES, context_settings=HELP)
@click.option("--once", is_flag=True, help="Show it once and end.")
@click.option("--every", type=click.FloatRange(0.1), default=1.0, show_default=True, metavar="S",
              help="Seconds between two looks.")  # fmt: skip
@redis_options
def top(once: bool, every: float, redis_url: str, prefix: str) -> None:
    """Watch a yard: each GPU with its queue, speed and slots, and the lanes where jobs wait, until Ctrl-C.

    Into a file or a pipe it writes plain lines, a block for each look. It only reads.
    """
    redis, keys, screen = connect(redis_url), Keys(prefix), console()
    shown = Top(redis, keys, display(redis_url))
    with suppress(KeyboardInterrupt):
        if not screen.is_terminal:
            while True:
                click.echo("\n".join(lines(look(redis, keys), shown.title)))
                sys.stdout.flush()
                if once:
                    return
                time.sleep(every)
        elif once:
            screen.print(shown.view(look(redis, keys)))
        else:
            with pressed() as keyboard, Live(console=screen, screen=True, auto_refresh=False) as live:
                while not shown.ended:
                    live.update(shown.view(look(redis, keys)), refresh=True)
                    for key in keyboard(every):
                        shown.press(key)


@contextmanager
def pressed() -> Iterator[Callable[[float], list[str]]]:
    """A function that waits so many seconds at most and gives the keys that were pressed; for a time without echo."""
    if not sys.stdin.isatty():
        yield _none
        return
    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    tty.setcbreak(file)

    def keys(seconds: float) -> list[str]:
        if not select.select([file], [], [], seconds)[0]:
            return []
        return _keys(os.read(file, 256).decode(errors="ignore"))

    try:
        yield keys
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)


def _none(seconds: float) -> list[str]:
    time.sleep(seconds)
    return []


def _keys(typed: str) -> list[str]:
    """Keys of what a terminal sends: arrows are j and k, any other sequence is nothing."""
    if typed.startswith("\x1b") and len(typed) > 1:
        return {"\x1b[A": ["k"], "\x1bOA": ["k"], "\x1b[B": ["j"], "\x1bOB": ["j"]}.get(typed, [])
    return list(typed)


class Top:
    """What is shown: the yard, or one `kind` (gpu, lane, job) of it by its name."""

    def __init__(self, redis: Any, keys: Keys, title: str) -> None:
        self.title, self.ended = title, False
        self._redis, self._keys = redis, keys
        self._sort, self._turned = "", False
        self._rows: list[tuple[str, str]] = []
        self._chosen = -1
        self._into: tuple[str, str] | None = None
        self._typed: str | None = None

    def press(self, key: str) -> None:
        """Obey a key."""
        if self._typed is not None:
            self._type(key)
        elif key == "q":
            self.ended = True
        elif key == "s":
            names = ["", *SORTS]
            self._sort = names[(names.index(self._sort) + 1) % len(names)]
        elif key == "r":
            self._turned = not self._turned
        elif key == "/":
            self._typed = ""
        elif key in "jk":
            self._chosen = min(max(self._chosen + (1 if key == "j" else -1), 0), len(self._rows) - 1)
        elif key in "\r\n" and 0 <= self._chosen < len(self._rows):
            self._into = self._rows[self._chosen]
        elif key in "\x1b\x7f":
            self._into = None

    def _type(self, key: str) -> None:
        typed, self._typed = self._typed or "", None
        if key in "\r\n":
            if JOB_ID.fullmatch(typed):
                self._into = ("job", typed)
        elif key in "\x7f\b":
            self._typed = typed[:-1]
        elif key != "\x1b":
            self._typed = typed + clean(key)

    def view(self, yard: Snapshot) -> Group:
        """A snapshot for a terminal."""
        gpus = yard.gpus
        if self._sort:
            gpus = tuple(sorted(gpus, key=SORTS[self._sort], reverse=not self._turned))
        elif self._turned:
            gpus = gpus[::-1]
        yard = replace(yard, gpus=gpus)
        self._rows = [*(("gpu", gpu.name) for gpu in gpus), *(("lane", lane.name) for lane in yard.lanes)]
        self._chosen = min(self._chosen, len(self._rows) - 1)
        chosen = self._rows[self._chosen][1] if self._chosen >= 0 else ""
        body = self._inside(yard, *self._into) if self._into else tables(yard, chosen)
        return Group(self._head(yard), Text(), *body, self._foot())

    def _head(self, yard: Snapshot) -> Text:
        at = time.strftime("%H:%M:%S", time.gmtime(yard.time_ms / 1000))
        return Text.assemble(
            (clean(yard.info.get("model", "no model yet")), "bold"), f"  {self.title}  {at} UTC\n",
            "  ".join(f"{cls} {yard.depth[cls]:,}" for cls in CLASSES),
            f"  unread {yard.unread:,}{f' for {yard.lag_s:.1f} s' if yard.unread else ''}  refused {yard.refused:,}",
            f"  adapters {yard.adapters:,}  Redis {memory(yard)}",
        )  # fmt: skip

    def _foot(self) -> Text:
        if self._typed is not None:
            return Text(f"id of a job: {self._typed}_")
        order = f"sorted by {self._sort or 'name'}"
        return Text(f"{order} · s sort  r reverse  j k choose  Enter look  / job  Esc back  q end", "dim")

    def _inside(self, yard: Snapshot, kind: str, name: str) -> Iterator[RenderableType]:
        if kind == "job":
            yield from self._job(name)
        elif kind == "lane":
            yield from self._lane(yard, name)
        else:
            yield from _gpu([gpu for gpu in yard.gpus if gpu.name == name], name)

    def _lane(self, yard: Snapshot, name: str) -> Iterator[RenderableType]:
        found = [f"{lane.jobs:,} jobs, the oldest for {lane.age_s:.1f} s" for lane in yard.lanes if lane.name == name]
        yield Text(f"{name}: {found[0] if found else 'no job waits'}", "bold")
        cls, _, combination = name.partition(":")
        ids = self._redis.lrange(self._keys.lane(cls, combination), 0, IDS_SHOWN - 1)
        yield table(("first jobs",), [(clean(each),) for each in ids])

    def _job(self, job_id: str) -> Iterator[RenderableType]:
        found = way(self._redis, self._keys, job_id)
        yield Text(f"job {job_id}{'' if found['books'] else ' is not known'}", "bold")
        yield table(("what", "is"), list(found["books"].items()))
        told = [*found["events"], *found["refused"]]
        rows = [
            (time.strftime("%H:%M:%S", time.gmtime(one["time_ms"] / 1000)), one["fields"].get("ev", "refused"),
             one["fields"].get("error") or one["fields"].get("text", ""))
            for one in told
        ]  # fmt: skip
        if rows:
            yield table(("at (UTC)", "event", ""), rows)


def _gpu(found: list[GpuSeen], name: str) -> Iterator[RenderableType]:
    if not found:
        yield Text(f"{name} is gone", "bold")
        return
    [gpu] = found
    yield Text(f"{name}: {gpu.state}, heartbeat {gpu.beat_age_s:.1f} s ago", "bold")
    rows = [
        ("queued", str(gpu.queued)),
        ("running", f"{gpu.running} of {gpu.seats}"),
        ("wait p50/95/99 ms", waits(gpu)),
        ("tokens/s", f"{gpu.tokens_per_s:,.1f}"),
        *((word, figure(gpu, word)) for word in gpu.figures),
    ]
    yield table(("figure", "value"), rows, {1})
    slots = [(slot.combination, slot.state, str(slot.jobs)) for slot in gpu.slots]
    yield table(("slot", "state", "jobs"), slots, {2})


def lines(yard: Snapshot, title: str) -> Iterator[str]:
    """A snapshot as words: one line for the yard, for each GPU and for each lane."""
    depth = " ".join(f"{cls} {yard.depth[cls]}" for cls in CLASSES)
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(yard.time_ms / 1000))
    yield (
        f"yard {title} at {at} {depth} unread {yard.unread} refused {yard.refused} lanes {yard.lanes_in_all} "
        f"memory {yard.memory}"
    )
    for gpu in yard.gpus:
        slots = " ".join(
            f"{one.combination}:{one.jobs}{'' if one.state == 'open' else f':{one.state}'}" for one in gpu.slots
        )
        yield (
            f"gpu {gpu.name} {gpu.state.replace(' ', '-')} queued {gpu.queued} running {gpu.running}/{gpu.seats} "
            f"tokens/s {gpu.tokens_per_s:.1f} in/s {figure(gpu, 'prompt_tokens_per_s')} "
            f"wait-ms {waits(gpu).replace(',', '')} swaps {gpu.swaps} failed {failures(gpu)} slots {slots or '-'}"
        )
    for lane in yard.lanes:
        yield f"lane {lane.name} jobs {lane.jobs} oldest {lane.age_s:.1f}s"
