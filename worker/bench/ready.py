"""From the start of a process until its engine could answer, by phases: `python -m lorayard.worker.bench.ready`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import click

from lorayard.shared.errors import LorayardError


def ready(model: Path, devices: str, cache_dtype: str, repeats: int) -> dict[str, float]:
    """Median ms of each phase in processes of their own; a first one on GPUs only fills the caches; `ms`: in all."""
    runs: list[dict[str, float]] = []
    for _ in range(repeats + ("cpu" not in devices)):
        words = [sys.executable, "-m", "lorayard.worker.bench.ready", str(model), devices, cache_dtype]
        begin = time.time()
        done = subprocess.run([*words, str(begin)], capture_output=True, text=True)
        if done.returncode:
            raise LorayardError(f"the engine did not start: {done.stderr.strip().splitlines()[-1:]}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: median(run[name] for run in runs[-repeats:]) for name in runs[0]}


def main(model: str, devices: str, cache_dtype: str, begin: float) -> None:
    """Do what a worker does before it takes jobs, and print the phases as JSON."""
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        marks[f"{name}_ms"] = 1e3 * (time.time() - begin - sum(marks.values()) / 1e3)

    import torch

    from .. import Cache, Generator, Model, ModelConfig, Tokenizer
    from ..models.model import checkpoint

    names: tuple[Any, ...] = Cache, Generator, Model, ModelConfig, Tokenizer
    mark("import")
    assert all(names)
    if devices != "cpu" and torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        mark("context")
    tokenizer = Tokenizer.from_directory(model)
    mark("tokenizer")
    config = ModelConfig.from_directory(model)
    checkpoint(config)
    mark("headers")
    engine = Model(config)
    cache = Cache(engine, 32768, cache_dtype)
    engine.load(cache, devices)
    mark("load")
    Generator(engine, cache, tokenizer).warmup()
    mark("warmup")
    click.echo(json.dumps(marks | {"ms": sum(marks.values())}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
