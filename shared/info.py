"""`lorayard info`: a running yard, or what a model would need here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from .cli import HELP, redis_options
from .errors import UsageError

EXAMPLES = """\b
Examples:
  lorayard info
  lorayard info /models/llama --adapters /adapters --cache-dtype q4
  lorayard info /models/llama --devices cuda:0=80GiB,cuda:1=80GiB --json"""


@click.command(epilog=EXAMPLES, context_settings=HELP)
@click.argument("model", required=False)
@click.option("--adapters", multiple=True, metavar="DIR", help="A folder of adapter folders. May be given again.")
@click.option("--devices", metavar="LIST", help="auto, cpu, cuda:0,cuda:1, or with limits cuda:0=20GiB.")
@click.option("--gpu-split", metavar="GIB,...", help="What each device may give, in order.")
@click.option("--slots", type=click.IntRange(1, 4096), help="Combinations of adapters resident at once.")
@click.option("--cache-tokens", type=click.IntRange(1), help="Tokens of K/V cache.")
@click.option("--cache-dtype", metavar="TYPE", help="fp16, bf16, fp32, q8, q6 or q4.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@redis_options
def info(model: str | None, redis_url: str, prefix: str, **plan: Any) -> int:
    """Show a running yard: its model, each GPU with its queue and slots, and the jobs that wait.

    With the folder MODEL, show instead what it would take of each device, before anything is loaded: weights, cache,
    LoRA slots and workspace, and what to change if it does not fit; the exit status is then 1. Only headers are read.
    """
    if model is not None:
        return int(import_module("lorayard.worker.queue.plan").show(model, **plan))
    if given := [name for name, value in plan.items() if value]:
        raise UsageError(f"--{given[0].removeprefix('as_').replace('_', '-')} is for a model: lorayard info MODEL")
    import_module("lorayard.dispatcher.watch").show_yard(redis_url, prefix)
    return 0
