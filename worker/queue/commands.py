"""`lorayard worker`: the workers of this host."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys

import click

from lorayard.shared.cli import redis_options
from lorayard.shared.connect import connect
from lorayard.shared.errors import UsageError
from lorayard.shared.keys import Keys
from lorayard.shared.scripts import Scripts

from ..models.devices import limited
from ..models.options import model_options, overrides
from .spec import CACHE_TOKENS, GRACE_S, HANG_S, MAX_BATCH, SLOTS, WorkerSpec, gpu_name
from .supervisor import Supervisor

EXAMPLE = """\b
Examples:
  lorayard worker /models/llama --adapters /adapters
  lorayard worker /models/llama --adapters /adapters --devices cuda:0,cuda:1 --slots 16
  lorayard worker /models/large --adapters /adapters --gpu-split 60,60 --cache-dtype q8
  lorayard worker /models/small --adapters /adapters --cpu-workers 2"""


@click.command(epilog=EXAMPLE)
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--adapters",
    multiple=True,
    type=click.Path(exists=True, file_okay=False),
    help="Folder with a folder for each adapter, looked at again every few seconds. May be given again.",
)
@click.option("--cpu-workers", type=click.IntRange(0), help="Run this many workers on the CPU instead of GPUs.")
@click.option("--devices", help="GPUs to use, one worker each, such as cuda:0,cuda:1. Default: all.")
@click.option(
    "--gpu-split",
    metavar="GIB,...",
    help="Spread each worker over as many GPUs as there are sizes: GiB of each for model, cache and slots.",
)
@click.option(
    "--slots",
    type=click.IntRange(1, 4096),
    default=SLOTS,
    show_default=True,
    help="Combinations of adapters resident at once.",
)
@click.option(
    "--max-batch", type=click.IntRange(1, 4096), default=MAX_BATCH, show_default=True, help="Jobs that run at once."
)
@click.option(
    "--cache-tokens", type=click.IntRange(256), default=CACHE_TOKENS, show_default=True, help="Tokens of K/V cache."
)
@click.option("--cache-dtype", metavar="TYPE", help="fp16, bf16, fp32, q8, q6 or q4. Default: fp16; fp32 on the CPU.")
@click.option("--host", help="Name of this host in the names of its workers. Default: the system's.")
@click.option(
    "--grace",
    type=click.FloatRange(0),
    default=GRACE_S,
    show_default=True,
    metavar="S",
    help="Seconds that running jobs get to finish when the workers are stopped.",
)
@click.option(
    "--hang",
    type=click.FloatRange(1),
    default=HANG_S,
    show_default=True,
    metavar="S",
    help="Seconds that a step may take. A worker that takes longer counts as hung, ends and is started again.",
)
@model_options
@redis_options
def worker(
    model: str,
    adapters: tuple[str, ...],
    cpu_workers: int | None,
    devices: str | None,
    gpu_split: str | None,
    slots: int,
    max_batch: int,
    cache_tokens: int,
    cache_dtype: str | None,
    host: str | None,
    grace: float,
    hang: float,
    redis_url: str,
    prefix: str,
    **changes: float | None,
) -> int:
    """Run the workers of this host for the model in folder MODEL, one per GPU, and start again those that die.

    Ctrl-C or SIGTERM lets running jobs finish for a while; the rest go back to their lanes, and run elsewhere or after
    the next start.
    """
    if cpu_workers and devices:
        raise UsageError("--cpu-workers and --devices exclude each other")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    specs = [
        WorkerSpec(
            gpu, "", os.path.abspath(model), tuple(map(os.path.abspath, adapters)), over, prefix, slots, max_batch,
            cache_tokens, grace, hang, cache_dtype=cache_dtype,
            overrides=overrides(changes),
        )
        for gpu, over in grouped(places(host or socket.gethostname(), cpu_workers, devices), gpu_split)
    ]  # fmt: skip
    if cpu_workers:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // cpu_workers)))
    supervisor = Supervisor(Scripts(connect(redis_url, socket_timeout=5.0), Keys(prefix)), redis_url, specs)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    return supervisor.run()


def places(host: str, cpu_workers: int | None, devices: str | None) -> list[tuple[str, str]]:
    """(queue name, torch device) of each worker. Raises UsageError."""
    if cpu_workers:
        return [(gpu_name("cpu", host, i), "cpu") for i in range(cpu_workers)]
    names = devices.split(",") if devices else [f"cuda:{i}" for i in range(_gpu_count())]
    if not names:
        raise UsageError("no GPU is visible here; `--cpu-workers 1` runs the model on the CPU")
    found = []
    for name in names:
        kind, _, index = name.strip().partition(":")
        if kind != "cuda" or not index.isdecimal():
            raise UsageError(f"--devices must be GPUs such as cuda:0,cuda:1, not {name!r}")
        found.append((gpu_name("gpu", host, int(index)), f"cuda:{int(index)}"))
    if len(set(found)) < len(found):
        raise UsageError(f"--devices names a GPU twice: {devices}")
    return found


def grouped(found: list[tuple[str, str]], gpu_split: str | None) -> list[tuple[str, str | tuple[str, ...]]]:
    """(queue name, devices) of each worker, over as many GPUs as `--gpu-split` has sizes; the first names the queue."""
    if gpu_split is None:
        return [(gpu, device if device == "cpu" else (device,)) for gpu, device in found]
    count = gpu_split.count(",") + 1
    if len(found) % count or found[0][1] == "cpu":
        raise UsageError(f"--gpu-split has {count} sizes, which do not share out {len(found)} devices: "
                         f"{', '.join(device for _, device in found)}")  # fmt: skip
    groups = [found[start : start + count] for start in range(0, len(found), count)]
    return [(group[0][0], tuple(limited([device for _, device in group], gpu_split))) for group in groups]


def _gpu_count() -> int:
    """GPUs that torch sees, counted in a process of its own: the supervisor needs no torch."""
    count = "import torch; print(torch.cuda.device_count())"
    said = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True)
    if said.returncode:
        raise UsageError(f"torch cannot be asked for the GPUs: {said.stderr.strip().splitlines()[-1]}")
    return int(said.stdout)
