"""The commands that look at a yard: info, top, adapters. They only read."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import click
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lorayard.shared.cli import redis_options
from lorayard.shared.connect import connect, display
from lorayard.shared.errors import LorayardError
from lorayard.shared.keys import CLASSES, Keys

from .published import read_adapters
from .snapshot import GpuSeen, SlotSeen, Snapshot, clean, look

HELP = {"help_option_names": ["-h", "--help"]}
PIPED_WIDTH = 160
"""Columns of a table that goes into a file or a pipe."""

STYLES = {"ready": "green", "loading": "yellow", "draining": "yellow", "silent": "bold red", "no worker": "dim"}
TOP_EXAMPLES = """\b
Examples:
  lorayard top
  lorayard top --once
  lorayard top | grep '^gpu'"""


def show_yard(redis_url: str, prefix: str) -> None:
    """`lorayard info`: a running yard's model, each GPU with its queue and slots, and the jobs that wait."""
    yard = look(connect(redis_url), Keys(prefix))
    if not yard.info:
        raise LorayardError(f"no worker has joined a yard at {display(redis_url)} with prefix {prefix}")
    said = yard.info
    rows = [
        ("model", f"{said.get('model')}, digest {said.get('base_digest', '')[:12]}"),
        ("version", f"{said.get('version')}, wire {said.get('wire_version')}"),
        ("tokens of a job", f"{said.get('cache_tokens')} at most, prompt and answer together"),
        ("adapters", str(yard.adapters)),
        *((f"{cls} jobs", str(yard.depth[cls])) for cls in CLASSES),
        ("refused entries", str(yard.refused)),
    ]
    console().print(table(("yard", display(redis_url)), rows), *_tables(yard))


@click.command(epilog="Example: LORAYARD_REDIS_URL=redis://127.0.0.1:6390/0 lorayard adapters", context_settings=HELP)
@redis_options
def adapters(redis_url: str, prefix: str) -> None:
    """List the adapters that jobs may name, and how many hosts hold each."""
    redis: Any = connect(redis_url)
    keys = Keys(prefix)
    found = read_adapters(redis.hgetall(keys.adapters))
    if not found:
        raise LorayardError(f"no worker has published an adapter at {display(redis_url)} with prefix {prefix}")
    held = [read_adapters(redis.hgetall(keys.held(name.decode()))) for name in redis.hkeys(keys.holders)]
    rows = []
    for name, one in found.items():
        digests = [have[name].digest for have in held if name in have]
        others = len(digests) - digests.count(one.digest)
        hosts = f"{digests.count(one.digest)}{f' ({others} with other bytes)' if others else ''}"
        rows.append((name, str(one.rank), f"{one.size:,}", one.digest[:12], hosts))
    console().print(table(("adapter", "rank", "bytes", "digest", "hosts"), rows, right={1, 2}))


@click.command(epilog=TOP_EXAMPLES, context_settings=HELP)
@click.option("--once", is_flag=True, help="Show it once and end.")
@click.option(
    "--every",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds between two looks.",
)
@redis_options
def top(once: bool, every: float, redis_url: str, prefix: str) -> None:
    """Watch a yard: each GPU with its queue, speed and slots, and the lanes where jobs wait, until Ctrl-C.

    Into a file or a pipe it writes plain lines, a block for each look. It only reads.
    """
    redis, keys, screen = connect(redis_url), Keys(prefix), console()
    title = display(redis_url)

    def looks() -> Iterator[Snapshot]:
        yield look(redis, keys)
        while not once:
            time.sleep(every)
            yield look(redis, keys)

    with suppress(KeyboardInterrupt):
        if not screen.is_terminal:
            for yard in looks():
                click.echo("\n".join(lines(yard, title)))
                sys.stdout.flush()
        elif once:
            screen.print(_view(look(redis, keys), title))
        else:
            with Live(console=screen, screen=True, auto_refresh=False) as live:
                for yard in looks():
                    live.update(_view(yard, title), refresh=True)


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
            f"tokens/s {gpu.tokens_per_s:.1f} swaps {gpu.swaps} slots {slots or '-'}"
        )
    for lane in yard.lanes:
        yield f"lane {lane.name} jobs {lane.jobs} oldest {lane.age_s:.1f}s"


def _view(yard: Snapshot, title: str) -> Group:
    """A snapshot for a terminal."""
    at = time.strftime("%H:%M:%S", time.gmtime(yard.time_ms / 1000))
    words = Text.assemble(
        (clean(yard.info.get("model", "no model yet")), "bold"), f"  {title}  {at} UTC\n",
        "  ".join(f"{cls} {yard.depth[cls]:,}" for cls in CLASSES),
        f"  unread {yard.unread:,}  refused {yard.refused:,}  adapters {yard.adapters:,}  Redis {_memory(yard)}",
    )  # fmt: skip
    return Group(words, Text(), *_tables(yard))


def _tables(yard: Snapshot) -> Iterator[RenderableType]:
    """The GPUs, and the lanes if any wait."""
    if yard.gpus:
        header = ("gpu", "state", "queued", "running", "tokens/s", "swaps", "slots")
        yield table(header, map(_gpu_row, yard.gpus), right={2, 3, 4, 5})
    if yard.lanes:
        rows = [(lane.name, f"{lane.jobs:,}", f"{lane.age_s:.1f} s") for lane in yard.lanes]
        yield table(("waiting lane", "jobs", "oldest"), rows, right={1, 2})
    if yard.lanes_in_all > len(yard.lanes):
        yield Text(f"and {yard.lanes_in_all - len(yard.lanes):,} lanes with younger jobs")


def _gpu_row(gpu: GpuSeen) -> tuple[str | Text, ...]:
    slots = Text("\n").join(map(_slot, gpu.slots)) if gpu.slots else Text("-", "dim")
    return (
        gpu.name, Text(gpu.state, STYLES.get(gpu.state, "")), str(gpu.queued), f"{gpu.running}/{gpu.seats}",
        f"{gpu.tokens_per_s:,.1f}", f"{gpu.swaps:,}", slots,
    )  # fmt: skip


def _slot(slot: SlotSeen) -> Text:
    """Its adapters with their jobs; an idle one is dim."""
    count = f" {slot.jobs} {'job' if slot.jobs == 1 else 'jobs'}" if slot.jobs else ""
    return Text(
        f"{slot.combination}{count}{'' if slot.state == 'open' else f' {slot.state}'}", "" if slot.jobs else "dim"
    )


def _memory(yard: Snapshot) -> str:
    if yard.memory < 0:
        return "does not say its memory"
    limit = f" of {yard.memory_limit / 2**20:,.0f} MiB" if yard.memory_limit else ""
    return f"{yard.memory / 2**20:,.1f} MiB{limit}"


def console() -> Console:
    """Standard output; rich itself honours NO_COLOR."""
    return Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)


def table(
    header: tuple[str, ...], rows: Iterable[tuple[str | Text, ...]], right: Iterable[int] = ()
) -> Table:  # fmt: skip
    """A table of texts, which are shown as they are. right: columns of numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for at, name in enumerate(header):
        made.add_column(name, justify="right" if at in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(clean(cell)) for cell in row))
    return made
