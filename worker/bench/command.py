"""`lorayard bench`: the workloads on a model that it makes itself, or on a given one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch

from lorayard.shared.errors import UsageError

from ..cache.storage import PAGE, Cache
from ..models.config import ModelConfig
from ..models.model import Model
from ..text.tokenizer import Tokenizer
from .measure import Engine, cold_load, measure, swap
from .profile import profile_steps
from .ready import ready
from .report import Shown, machine, print_profiles, print_rows
from .shapes import FORMATS, SHAPES, made
from .workloads import COLD, DECODE, MS, OUT, READY, ROWS, WORKLOADS, Row

EXAMPLES = """\b
Examples:
  lorayard bench --shape tiny --devices cpu W1 W2
  lorayard bench
  lorayard bench W2 --loras 64 --json
  lorayard bench W1 --profile

\b
W1  one sequence, prompt 512, 256 new tokens, without LoRA and with one
W2  64 sequences of this kind, without LoRA, with one for all, with 64 different ones
W3  256 sequences, without LoRA and with 64
W4  1,024 requests, prompt 256 (128 of them shared), 128 new, 32 LoRAs, in 32 slots and in 4
W5  16 prompts of 2,048 tokens, without LoRA and with one each
W6  a process until it is ready, an adapter's folder until it is in its slot, an adapter from memory into a slot"""


@click.command(epilog=EXAMPLES)
@click.argument("workloads", metavar="[W1 ... W6]...", nargs=-1, type=click.Choice(WORKLOADS))
@click.option("--model", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A folder to measure on.")
@click.option("--shape", type=click.Choice(list(SHAPES)), help="What to make.  [llama-8b, on the CPU tiny]")
@click.option("--format", "kind", type=click.Choice(list(FORMATS)), help="Of the made model's linears.  [gptq4]")
@click.option("--folder", type=click.Path(path_type=Path), help="For made models.  [~/.cache/lorayard/bench]")
@click.option("--loras", type=click.IntRange(0), help="Only rows with so many LoRAs.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Their medians are told.")
@click.option("--devices", default="auto", show_default=True, help="cpu, or cuda:0,cuda:1 or cuda:0=20GiB,cuda:1=8GiB.")
@click.option("--cache-dtype", help="fp16, bf16, fp32, q8, q6 or q4.  [fp16, on the CPU fp32]")
@click.option("--max-batch", type=click.IntRange(1), default=256, show_default=True, help="Most sequences in a step.")
@click.option("--chunk", type=click.IntRange(1), default=8192, show_default=True, help="Prompt tokens in a step.")
@click.option("--slots", type=click.IntRange(1), help="Of adapters.  [as many as a row has adapters; W4: 32 and 4]")
@click.option("--profile", is_flag=True, help="Show the kernels of a decode step instead.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each row.")
def bench(
    workloads: tuple[str, ...], model: Path | None, shape: str | None, kind: str | None, folder: Path | None,
    loras: int | None, devices: str, cache_dtype: str | None, profile: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Measure the engine alone, without Redis: tokens a second of workloads by name, all if none is named.

    The weights are random, as speed does not depend on them; so are the prompts, which no repeat sees again. Every
    answer is greedy and has exactly the tokens that are asked for. The shape tiny runs a sixteenth of each workload.
    """
    if model and (shape or kind):
        raise UsageError("--model brings its own shape and format: leave --shape and --format out")
    on_cpu = "cpu" in devices or not torch.cuda.is_available()
    shape, kind = (None, None) if model else (shape or ("tiny" if on_cpu else "llama-8b"), kind or "gptq4")
    if profile and on_cpu:
        raise UsageError("--profile needs a GPU")
    rows = [row for row in ROWS if row.workload in (workloads or WORKLOADS) and loras in (None, row.adapters)]
    if not rows:
        raise UsageError(f"no row of {', '.join(workloads or WORKLOADS)} has {loras} LoRAs")
    if profile and (short := [row.workload for row in rows if row.figure not in (DECODE, OUT)]):
        raise UsageError(f"--profile is for workloads that decode, such as W1 or W2, not {short[0]}")
    if shape and kind:
        model = made(folder or _folder(), shape, kind)
    assert model
    cache_dtype = cache_dtype or ("fp32" if on_cpu else "fp16")
    share = SHAPES[shape].share if shape else 1
    runs = [(row, fitted(row, share, options["slots"])) for row in rows]
    facts = {"model": model.name, "devices": devices, "cache_dtype": cache_dtype, **options, **machine(on_cpu)}
    shown = _run(runs, model, devices, cache_dtype, profile, options)
    if as_json:
        for row, run, found in shown:
            for each in found:
                click.echo(json.dumps(facts | {"workload": row.workload, "row": row.label} | asdict(run) | each))
    elif profile:
        print_profiles(facts, shown)
    else:
        print_rows(facts, shown, shape, kind)


def fitted(row: Row, share: int, slots: int | None) -> Row:
    """The row as it is run."""
    row = row.smaller(share) if share > 1 else row
    return replace(row, slots=slots) if slots else row


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lorayard" / "bench"


def _run(
    runs: list[tuple[Row, Row]], model: Path, devices: str, cache_dtype: str, profile: bool, options: dict[str, Any]
) -> Iterator[Shown]:
    """(row of ROWS, the row as it is run, what was found) one after another, the model loaded when it is needed."""
    engine: Engine | None = None
    for row, run in runs:
        if row == READY:
            yield row, run, [ready(model, devices, cache_dtype, options["repeats"])]
            continue
        engine = engine or _engine([run for _, run in runs], model, devices, cache_dtype, options)
        yield row, run, profile_steps(engine, run) if profile else [_found(engine, row, run, options["repeats"])]


def _found(engine: Engine, row: Row, run: Row, repeats: int) -> dict[str, float]:
    if row.figure != MS:
        return measure(engine, run, repeats)
    return {MS: cold_load(engine, repeats) if row == COLD else swap(engine, repeats)}


def _engine(runs: list[Row], folder: Path, devices: str, cache_dtype: str, options: dict[str, Any]) -> Engine:
    """The model, with a cache for the largest batch."""
    pages = max(run.pages(options["max_batch"]) for run in runs)
    model = Model(ModelConfig.from_directory(folder))
    cache = Cache(model, (pages + 1) * PAGE, cache_dtype)
    model.load(cache, devices)
    return Engine(model, cache, Tokenizer.from_directory(folder), options["max_batch"], options["chunk"])
