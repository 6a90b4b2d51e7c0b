"""The commands that look at a yard: info and adapters, and the tables of `top`. They only read."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click
from rich import box
from rich.console import Console, RenderableType
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
    console().print(table(("yard", display(redis_url)), rows), *tables(yard))


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


def tables(yard: Snapshot, chosen: str = "") -> Iterator[RenderableType]:
    """The GPUs, and the lanes if any wait."""
    sensors = any("vram_total" in gpu.figures for gpu in yard.gpus)
    if yard.gpus:
        header = ("gpu", "state", "queued", "running", "tokens/s", "in/s", "wait p50/95/99", "swaps", "failed", "beat",
                  *(("memory", "use", "heat", "power") if sensors else ()), "slots")  # fmt: skip
        rows = [_gpu_row(gpu, sensors) for gpu in yard.gpus]
        yield table(header, rows, range(2, len(header) - 1), [gpu.name == chosen for gpu in yard.gpus])
    if yard.lanes:
        lanes = [(lane.name, f"{lane.jobs:,}", f"{lane.age_s:.1f} s") for lane in yard.lanes]
        yield table(("waiting lane", "jobs", "oldest"), lanes, {1, 2}, [lane.name == chosen for lane in yard.lanes])
    if yard.lanes_in_all > len(yard.lanes):
        yield Text(f"and {yard.lanes_in_all - len(yard.lanes):,} lanes with younger jobs")


def _gpu_row(gpu: GpuSeen, sensors: bool) -> tuple[str | Text, ...]:
    slots = Text("\n").join(map(_slot, gpu.slots)) if gpu.slots else Text("-", "dim")
    said = gpu.figures
    hardware = (
        f"{said.get('vram_used', 0) / 2**30:.1f}/{said.get('vram_total', 0) / 2**30:.0f} GiB",
        figure(gpu, "util_percent", " %"), figure(gpu, "temperature_c", " °C"), figure(gpu, "power_w", " W"),
    )  # fmt: skip
    return (
        gpu.name, Text(gpu.state, STYLES.get(gpu.state, "")), str(gpu.queued), f"{gpu.running}/{gpu.seats}",
        f"{gpu.tokens_per_s:,.1f}", figure(gpu, "prompt_tokens_per_s"), waits(gpu), f"{gpu.swaps:,}",
        f"{failures(gpu):,}", f"{gpu.beat_age_s:.1f} s", *(hardware if sensors else ()), slots,
    )  # fmt: skip


def figure(gpu: GpuSeen, name: str, unit: str = "") -> str:
    """A figure without decimals, `-` if the worker does not say it."""
    return f"{gpu.figures[name]:,.0f}{unit}" if name in gpu.figures else "-"


def waits(gpu: GpuSeen) -> str:
    """Percentiles of the waits in ms."""
    return "/".join(figure(gpu, f"wait_p{part}_ms") for part in (50, 95, 99))


def failures(gpu: GpuSeen) -> int:
    """Jobs that failed on a GPU, or whose lease was lost there."""
    return int(gpu.figures.get("jobs_failed", 0) + gpu.figures.get("jobs_lost", 0))


def _slot(slot: SlotSeen) -> Text:
    """Its adapters with their jobs; an idle one is dim."""
    count = f" {slot.jobs} {'job' if slot.jobs == 1 else 'jobs'}" if slot.jobs else ""
    return Text(
        f"{slot.combination}{count}{'' if slot.state == 'open' else f' {slot.state}'}", "" if slot.jobs else "dim"
    )


def memory(yard: Snapshot) -> str:
    if yard.memory < 0:
        return "does not say its memory"
    limit = f" of {yard.memory_limit / 2**20:,.0f} MiB" if yard.memory_limit else ""
    return f"{yard.memory / 2**20:,.1f} MiB{limit}"


def console() -> Console:
    """Standard output; rich itself honours NO_COLOR."""
    return Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)


def table(
    header: tuple[str, ...], rows: Iterable[tuple[str | Text, ...]], right: Iterable[int] = (),
    chosen: Sequence[bool] = (),
) -> Table:  # fmt: skip
    """A table of texts, which are shown as they are. right: columns of numbers; chosen: which rows are."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for at, name in enumerate(header):
        made.add_column(name, justify="right" if at in right else "left", overflow="fold")
    for at, row in enumerate(rows):
        style = "reverse" if at < len(chosen) and chosen[at] else ""
        made.add_row(*(cell if isinstance(cell, Text) else Text(clean(cell)) for cell in row), style=style)
    return made
