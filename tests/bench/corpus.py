"""Cost of a corpus for each row: real Redis, dispatcher, worker and client, and an engine that answers at once.

    python -m tests.bench.corpus [--rows 100000]

CPU is user and system time of the whole process, with its start, all its threads together. Memory is the most that
the client's process had and that Redis said to use; it is compared with that of a corpus of a tenth of the rows.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import click

from lorayard.shared.embedded import EmbeddedRedis
from lorayard.shared.keys import GROUP, Keys

from .jobs import SPAWN, Yard, cpu_s

TICKS = os.sysconf("SC_CLK_TCK")
GOALS = {"client": 120, "dispatcher": 130, "worker": 100, "Redis": 200}
"""us of CPU for a row."""


class Cost(NamedTuple):
    """Of one corpus. cpu: process -> us for a row; peaks: process -> MiB."""

    rows: int
    rows_per_s: float
    cpu: dict[str, float]
    peaks: dict[str, float]


def fill(url: str, source: str, out: str, pipe: Any, words: tuple[str, ...]) -> None:
    """The client as a process: says what it has used."""
    from lorayard.dispatcher.corpus.commands import corpus

    argv = ["run", source, "-o", out, "--id-column", "id", "--max-tokens", "1", "--redis", url, "--json", *words]
    status = corpus.main(argv, standalone_mode=False)
    pipe.send((status, cpu_s(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def used_s(pid: int) -> float:
    """CPU time of another process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure(folder: Path, rows: int, words: tuple[str, ...]) -> Cost:
    """Fill a corpus of so many rows on a new Redis."""
    source = folder / "rows.jsonl"
    with source.open("w") as file:
        for at in range(rows):
            file.write(
                json.dumps({"id": f"row-{at}", "prompt": f"Explain in one sentence what item {at} is for."}) + "\n"
            )
    with (
        EmbeddedRedis(folder / "redis", max_memory=1 << 30) as server,
        closing(Yard(server.url, server.client())) as yard,
    ):
        yard.redis.xgroup_create(Keys().stream("batch"), GROUP, "0", mkstream=True)
        worker = yard.worker()
        worker.go()
        dispatcher = yard.dispatcher()
        yard.until(lambda: yard.redis.exists(Keys().control))
        others = {"dispatcher": dispatcher.pid, "worker": worker.process.pid}
        before = {name: used_s(pid) for name, pid in others.items()}
        redis_before, start = yard.redis_cpu_s(), time.monotonic()
        here, there = SPAWN.Pipe()
        client = yard._start(fill, server.url, str(source), str(folder / "out"), there, words)
        status, client_s, client_mib = here.recv()
        client.join()
        assert status == 0, f"the corpus ended with status {status}"
        seconds = time.monotonic() - start
        spent = {"client": client_s} | {name: used_s(pid) - before[name] for name, pid in others.items()}
        spent["Redis"] = yard.redis_cpu_s() - redis_before
        peaks = {"client": client_mib, "Redis": yard.redis.info("memory")["used_memory_peak"] / 2**20}
        return Cost(rows, rows / seconds, {name: 1e6 * one / rows for name, one in spent.items()}, peaks)


@click.command(context_settings={"show_default": True, "ignore_unknown_options": True})
@click.option("--rows", default=100_000, help="Rows of the larger corpus.")
@click.argument("words", nargs=-1, metavar="[OPTIONS OF CORPUS RUN]")
def main(rows: int, words: tuple[str, ...]) -> None:
    """Measure what a corpus costs."""
    costs = []
    for count in (rows // 10, rows):
        with tempfile.TemporaryDirectory() as folder:
            costs.append(measure(Path(folder), count, words))
    small, large = costs
    lines = [("rows/s, all on this machine", small.rows_per_s, large.rows_per_s, "")]
    for name, goal in GOALS.items():
        lines.append((f"CPU of the {name}, us a row", small.cpu[name], large.cpu[name], f"<= {goal}"))
    for name, peak in small.peaks.items():
        lines.append((f"most memory of the {name}, MiB", peak, large.peaks[name], f"<= {1.1 * peak:.0f}"))
    click.echo(f"{'':<40} {small.rows:>10,} {large.rows:>10,} {'goal':>8}")
    for what, few, many, wanted in lines:
        click.echo(f"{what:<40} {few:>10,.0f} {many:>10,.0f} {wanted:>8}")


if __name__ == "__main__":
    main()
