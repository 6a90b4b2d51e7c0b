"""`lorayard up`: a whole yard on this machine, for as long as the command runs."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import click

from .cli import Decorated, prefix_option
from .connect import connect, display
from .embedded import EmbeddedRedis
from .errors import LorayardError, UsageError
from .keys import Keys
from .yard import Yard

WATCH_S = 0.25
MONITOR_PORT = 9180
SHOW_SLOTS = 2
"""Fewer than the demo has adapters, so that the tour shows a swap."""

EXAMPLE = """\b
Examples:
  lorayard up --demo --redis-port 6390       the model that comes along, open to redis-cli on this machine
  lorayard up --demo --show                  the same, shown off and stopped
  lorayard up /models/llama --adapters /adapters --data /var/lib/yard
  LORAYARD_REDIS_URL=rediss://me:secret@host/0 lorayard up /models/llama --adapters /adapters"""


def worker_options(function: Decorated) -> Decorated:
    """Options that `up` hands to `lorayard worker` as they are; the command gets those under their own names."""
    for name, kind, text in reversed([
        ("--cpu-workers", click.IntRange(0), "Run this many workers on the CPU."),
        ("--devices", str, "GPUs to use, such as cuda:0,cuda:1. Default: all."),
        ("--gpu-split", str, "GiB of each GPU that a worker is spread over, such as 20,20."),
        ("--slots", click.IntRange(1), "Combinations of adapters resident on a worker at once."),
        ("--max-batch", click.IntRange(1), "Jobs that a worker runs at once."),
        ("--cache-tokens", click.IntRange(256), "Tokens of K/V cache of a worker."),
        ("--cache-dtype", str, "fp16, bf16, fp32, q8, q6 or q4."),
        ("--max-seq-len", click.IntRange(1), "Longest text in tokens. Default: what config.json says."),
        ("--rope-alpha", click.FloatRange(1), "Stretch RoPE's base (NTK)."),
        ("--rope-scale", click.FloatRange(1), "Divide positions by this."),
        ("--host", str, "Name of this host in the names of its workers."),
    ]):  # fmt: skip
        function = click.option(name, type=kind, help=text)(function)
    return function


@click.command(epilog=EXAMPLE)
@click.argument("model", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--demo", is_flag=True, help="Serve the small model and the three adapters that come along.")
@click.option("--show", is_flag=True, help="With --demo: send prompts, show what happens, and stop.")
@click.option(
    "--adapters",
    multiple=True,
    type=click.Path(exists=True, file_okay=False),
    help="Folder with a folder for each adapter, looked at again every few seconds. May be given again.",
)
@click.option("--redis", "redis_url", metavar="URL", help="Use this Redis; else one is started here.")
@click.option("--redis-port", type=click.IntRange(1, 65535), help="Let the started Redis listen on 127.0.0.1 too.")
@click.option("--data", type=click.Path(file_okay=False), help="Folder for the started Redis and the logs; kept.")
@click.option("--monitor/--no-monitor", default=True, show_default=True, help="Serve the web page and /metrics here.")
@click.option("--monitor-port", type=click.IntRange(1, 65535), help="Its port.  [default: 9180, else one that is free]")
@prefix_option
@worker_options
def up(
    model: str | None,
    demo: bool,
    show: bool,
    adapters: tuple[str, ...],
    redis_url: str | None,
    redis_port: int | None,
    data: str | None,
    monitor: bool,
    monitor_port: int | None,
    prefix: str,
    **worker: Any,
) -> None:
    """Start a whole yard here and keep it running: Redis, a dispatcher, and workers for MODEL.

    Redis is our own child on a private socket, with its data in --data (default .yard), unless --redis names another;
    LORAYARD_REDIS_URL does so too, unless --demo, --redis-port or --data ask for our own. Ctrl-C stops all of it;
    what was not answered is answered after the next start.
    """
    if redis_url and redis_port:
        raise UsageError("--redis-port is for the Redis that `up` starts; it does not go with --redis")
    if not (demo or redis_port or data):
        redis_url = redis_url or os.environ.get("LORAYARD_REDIS_URL")
    arguments = _worker_arguments(model, demo, show, adapters, worker)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's stop is a Ctrl-C
    with ExitStack() as cleanup:
        temporary = show and not data
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()) if temporary else data or ".yard")
        folder.mkdir(parents=True, exist_ok=True)
        embedded = None if redis_url else cleanup.enter_context(EmbeddedRedis(folder, port=redis_port or 0))
        url = embedded.url if embedded else str(redis_url)
        redis = connect(url, decode_responses=True, encoding_errors="replace")
        yard = Yard(
            redis, url, Keys(prefix), folder, arguments, monitor_port or _free_port() if monitor and not show else 0
        )
        cleanup.callback(yard.stop)
        click.echo("opening the yard: Redis runs, the model is being loaded")
        yard.start()
        if show:
            from lorayard.demo.tour import tour

            tour(redis, Keys(prefix))
        else:
            _watch(yard, embedded, yard.screen(_redis_cli(embedded, url), display(url)))
        click.echo("closing the yard: running jobs finish or go back to their lanes")


def _worker_arguments(
    model: str | None, demo: bool, show: bool, adapters: tuple[str, ...], options: dict[str, Any]
) -> list[str]:
    """Arguments of `lorayard worker`. Raises UsageError unless there is exactly one model."""
    if bool(model) == demo:
        raise UsageError("name the folder of a MODEL or ask for --demo, one of the two: lorayard up --help")
    if show and not demo:
        raise UsageError("--show is a tour of the demo: lorayard up --demo --show")
    if demo:
        from lorayard.demo import ADAPTERS, BASE

        model, adapters = str(BASE), (str(ADAPTERS), *adapters)
        if options["cpu_workers"] is None and options["devices"] is None:
            options["cpu_workers"] = 1
        if show and options["slots"] is None:
            options["slots"] = SHOW_SLOTS
    arguments = [str(model)]
    for folder in adapters:
        arguments += ["--adapters", folder]
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments


def _free_port() -> int:
    """The monitor's own port of this host, or any other that is free."""
    for port in (MONITOR_PORT, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise LorayardError("no port is free for the monitor; --no-monitor does without it")


def _redis_cli(embedded: EmbeddedRedis | None, url: str) -> str:
    """The redis-cli that reaches the yard's Redis."""
    if "+sentinel" in url.partition("://")[0]:
        return "redis-cli -h HOST -p PORT (of the primary that the sentinels name)"
    if embedded is None:
        return f"redis-cli -u {display(url)}"
    return (
        f"redis-cli -p {url.rpartition(':')[2].partition('/')[0]}"
        if "127.0.0.1" in url
        else f"redis-cli -s {embedded.socket}"
    )


def _watch(yard: Yard, embedded: EmbeddedRedis | None, screen: str) -> None:
    """Show the screen and keep the yard running until Ctrl-C. Raises RedisUnavailable if our own Redis is lost."""
    with suppress(KeyboardInterrupt):
        click.echo(screen)
        while True:
            if embedded and not embedded.alive:
                raise embedded.failure("it ended while the yard was open")
            yard.tend()
            time.sleep(WATCH_S)
