"""`lorayard adapters check`: what an adapter's folder does to a base, or why it is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorayard.shared.cli import HELP
from lorayard.shared.errors import AdapterError
from lorayard.shared.job import MAX_RANK_SUM

from ..models.config import ModelConfig
from .contents import Contents
from .folders import adapter_digest
from .parity import TOLERANCE, NotMeasured, measure
from .targets import short

EXAMPLES = """\b
Examples:
  lorayard adapters check MODEL ADAPTERS/sql
  lorayard adapters check MODEL ADAPTERS/sql --no-parity --json | jq .features"""


@click.command(epilog=EXAMPLES, context_settings=HELP)
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--no-parity", is_flag=True, help="Do not load the model: check by the headers of the files alone.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(base: Path, adapter: Path, no_parity: bool, as_json: bool) -> int:
    """Say what the folder ADAPTER does to the model in the folder BASE, or why it is refused (exit status 4).

    Where transformers and peft are installed and memory allows, the logits of a fixed random prompt are compared with
    theirs, on the CPU in float32; exit status 1 if they differ by more than a thousandth.
    """
    contents = Contents.of(adapter.resolve(), ModelConfig.from_directory(base))
    said = describe(contents)
    error = None
    if not no_parity:
        try:
            error = measure(base, adapter.resolve())
            said["parity"] = error
        except NotMeasured as reason:
            said["parity"] = f"not measured: {reason}"
    _show(said, as_json)
    return 1 if error is not None and not error < TOLERANCE else 0


def describe(contents: Contents) -> dict[str, Any]:
    """What the headers tell. Raises AdapterError for ranks that no slot holds."""
    config, ranks = contents.config, contents.ranks
    if max(ranks.values()) > MAX_RANK_SUM:
        raise AdapterError(f"{contents.file} has rank {max(ranks.values())}; a slot holds {MAX_RANK_SUM}")
    folder = contents.file.parent
    return {
        "adapter": folder.name,
        "digest": adapter_digest(folder),
        "modules": short(ranks),
        "rank": _span(ranks.values()),
        "scaling": f"alpha / {'sqrt(r)' if config.use_rslora else 'r'} = {_span(config.scalings(ranks).values())}",
        "features": contents.features(),
        "other_tensors": [f"{part} of {short(m)}" for part, m in _others(contents.modules).items()],
        "bytes_on_disk": contents.file.stat().st_size,
        "bytes_in_a_slot": contents.slot_bytes(itemsize=2),
        "notes": contents.notes,
    }


def _others(modules: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Modules by each part beside A and B."""
    found: dict[str, list[str]] = {}
    for module, parts in modules.items():
        for part in parts.keys() - {"A", "B"}:
            found.setdefault(part, []).append(module)
    return dict(sorted(found.items()))


def _span(values: Iterable[float]) -> str:
    values = sorted(values)
    least, most = f"{values[0]:g}", f"{values[-1]:g}"
    return least if least == most else f"{least} to {most}"


def _show(said: dict[str, Any], as_json: bool) -> None:
    """A table on a terminal, else a line for each thing that there is to say, or JSON."""
    if as_json:
        click.echo(json.dumps(said, ensure_ascii=False))
        return
    rows = [(name.replace("_", " "), line) for name, value in said.items() for line in _lines(name, value)]
    console = Console()
    if not console.is_terminal:
        for name, line in rows:
            click.echo(f"{name}: {line}")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    for name, line in rows:
        table.add_row(Text(name, "bold"), Text(line, overflow="fold"))
    console.print(table)


def _lines(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return value if name == "notes" else [", ".join(value) or "none"]
    if isinstance(value, float):
        return [f"logits differ from peft's by {value:.1e}{'' if value < TOLERANCE else ', MORE THAN 0.001'}"]
    return [f"{value:,}" if isinstance(value, int) else str(value)]
