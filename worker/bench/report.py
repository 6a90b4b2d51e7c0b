"""What was measured, for a person."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from lorayard.shared import __version__

from .workloads import DECODE, MS, OUT, PREFILL, Others, Row, others

Shown = tuple[Row, Row, list[dict[str, Any]]]
"""A row, the row as it was run, and what was found."""
WORDS = {DECODE: "decode tok/s", OUT: "tok/s", PREFILL: "prompt tok/s", MS: "ms"}
KERNELS = 30


def machine(on_cpu: bool) -> dict[str, str]:
    """The device and the versions that figures depend on."""
    device = f"CPU, {torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name()
    driver = "" if on_cpu else _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": device, "driver": driver,
        "torch": torch.__version__, "python": platform.python_version(), "lorayard": __version__, "commit": _commit(),
    }  # fmt: skip


def _commit() -> str:
    """The checkout's commit, or "" for an installed package."""
    return os.environ.get("LORAYARD_COMMIT") or _said("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")[:9]


def _said(*words: str) -> str:
    """The first line that a command prints, "" if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0] if done.returncode == 0 else ""


def print_rows(facts: dict[str, Any], shown: Iterable[Shown], shape: str | None, kind: str | None) -> None:
    """A line for each row with everything that was measured, and others' figures beside what counts."""
    columns = ["", "out tok/s", "decode tok/s", "ms a step", "prompt tok/s", "counts", "vLLM", "x", "first", "goal"]
    table = Table(*columns, box=box.SIMPLE_HEAD, title=_title(facts))
    for row, _, (found,) in shown:
        known = others(row, shape, kind) or Others(None)
        figure, vllm = found.get(row.figure), known.vllm
        better = (vllm / figure if row.figure == MS else figure / vllm) if figure and vllm else None
        table.add_row(
            f"{row.workload} {row.label}", *(_number(found.get(name)) for name in (OUT, DECODE, "ms_step", PREFILL)),
            f"{_number(figure)} {WORDS[row.figure]}", _number(vllm), _number(better),
            _number(known.first), _number(known.goal),
        )  # fmt: skip
        if phases := {name: value for name, value in found.items() if name.endswith("_ms")}:
            table.add_row("  " + ", ".join(f"{name[:-3]} {value:,.0f} ms" for name, value in phases.items()))
    Console(width=180).print(table)


def print_profiles(facts: dict[str, Any], shown: Iterable[Shown]) -> None:
    """A table of kernels for each row."""
    for row, _, lines in shown:
        title = f"{row.workload} {row.label}: {_title(facts)}"
        table = Table("kernel", "calls", "us a step", "share", box=box.SIMPLE_HEAD, title=title)
        for line in lines[: KERNELS + 2]:
            table.add_row(line["kernel"], f"{line['calls']:.1f}", f"{line['us']:.1f}", f"{line['share']:.1%}")
        Console(width=140).print(table)


def _title(facts: dict[str, Any]) -> str:
    names = ("device", "driver", "model", "cache_dtype", "max_batch", "chunk", "torch", "commit")
    return ", ".join(f"{name.replace('_', ' ')} {facts[name]}" for name in names if facts[name])


def _number(value: float | None) -> str:
    """With as many digits as say something."""
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
