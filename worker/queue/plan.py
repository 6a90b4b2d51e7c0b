"""`lorayard info MODEL`: the plan that a worker would load by, for a person."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from ..cache.storage import cache_type
from ..lora.space import SlotSpace, slot_space
from ..models.config import ModelConfig
from ..models.devices import over
from ..models.memory import Needs, Wish, advice
from ..models.model import checkpoint, compute_dtype, needs
from ..models.placement import Plan, find_budgets, gib
from .spec import CACHE_TOKENS, SLOTS

COLUMNS = ("device", "layers", "weights", "cache", "slots", "sum", "room", "workspace")


def show(
    model: str, adapters: tuple[str, ...], devices: str | None, gpu_split: str | None, slots: int | None,
    cache_tokens: int | None, cache_dtype: str | None, as_json: bool,
) -> int:  # fmt: skip
    """Print what the model takes of each device -> exit status 0 if it fits, else 1."""
    config = ModelConfig.from_directory(model)
    tensors, budgets = checkpoint(config), find_budgets(over(devices or "auto", gpu_split), absent=True)
    dtype = compute_dtype(tensors, budgets)
    on_cpu = dtype.itemsize == 4
    wish = Wish(cache_tokens or CACHE_TOKENS, cache_dtype or ("fp32" if on_cpu else "fp16"), slots or SLOTS)
    cache_type(wish.cache_dtype, config.head_dim)
    space = slot_space(config, list(map(Path, adapters)), dtype.itemsize)
    need = needs(config, tensors, budgets, space.modules)
    plan = need.plan(wish, budgets)
    said = describe(config.path.name, need, plan, wish, space)
    said["change"] = [] if plan.fits else advice(need, wish, budgets)
    _print(said, as_json)
    return 0 if plan.fits else 1


def describe(model: str, need: Needs, plan: Plan, wish: Wish, space: SlotSpace) -> dict[str, Any]:
    """The plan as JSON has it; every size in bytes."""
    slot = sum(space.modules.values())
    kept = space.files[: 2 * wish.slots + 8]
    return {
        "model": model,
        "fits": plan.fits,
        "weights": dict(need.formats),
        "cache": {
            "dtype": wish.cache_dtype, "tokens": 256 * wish.pages, "pages": wish.pages,
            "bytes": sum(part.cache for part in plan.parts),
        },
        "slots": {"count": wish.slots, "rank": space.rank, "bytes_each": slot, "bytes": slot * wish.slots},
        "adapters": {"count": len(space.files), "problems": list(space.problems)},
        "host": {"adapters": sum(kept), "pinned": 0},
        "devices": [_device(plan, index) for index in range(len(plan.budgets))],
        "unplaced": [part.name for part in plan.parts[len(plan.places) :]],
    }  # fmt: skip


def _device(plan: Plan, index: int) -> dict[str, Any]:
    budget, here = plan.budgets[index], plan.on(index)
    names = [part.name for part, place in zip(plan.parts, plan.places, strict=False) if place == index]
    workspace = plan.workspace if budget.device.type == "cuda" else 0
    return {
        "device": str(budget.device), "layers": sum(name.startswith("layer") for name in names),
        "weights": here.weights, "cache": here.cache, "slots": here.slots, "sum": here.total,
        "room": budget.room(plan.workspace), "workspace": workspace,
    }  # fmt: skip


def _print(said: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(said, ensure_ascii=False))
        return
    console = Console()
    if not console.is_terminal:
        for line in _lines(said):
            click.echo(line)
        for each in said["devices"]:
            click.echo(" ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, _row(each), strict=True)))
    else:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for name in COLUMNS:
            table.add_column(name, justify="left" if name == "device" else "right")
        for each in said["devices"]:
            table.add_row(*_row(each))
        console.print("\n".join(_lines(said)), table, markup=False, highlight=False)
    for line in _verdict(said):
        click.echo(line)


def _lines(said: dict[str, Any]) -> Iterator[str]:
    cache, slots, adapters = said["cache"], said["slots"], said["adapters"]
    weights = ", ".join(f"{name} {gib(size)}" for name, size in said["weights"].items())
    yield f"model {said['model']}: {weights}"
    yield f"cache: {cache['tokens']:,} tokens of {cache['dtype']} in {cache['pages']:,} pages, {gib(cache['bytes'])}"
    rank = f"rank class {slots['rank']}" + ("" if adapters["count"] else ", assumed, as there are no --adapters")
    yield f"slots: {slots['count']} of {gib(slots['bytes_each'])} ({rank}), {gib(slots['bytes'])}"
    yield f"host: {gib(said['host']['adapters'])} of {adapters['count']:,} adapters kept ready; nothing is pinned"
    for problem in adapters["problems"]:
        yield f"passed over: {problem}"


def _row(device: dict[str, Any]) -> list[str]:
    sizes = ("-" if device[name] is None else gib(device[name]) for name in COLUMNS[2:])
    return [device["device"], str(device["layers"]), *sizes]


def _verdict(said: dict[str, Any]) -> Iterator[str]:
    if said["fits"]:
        yield "it fits"
        return
    unplaced = said["unplaced"]
    yield f"it does not fit: no room for {len(unplaced)} parts, from {unplaced[0]} on; what would, each by itself:"
    for change in said["change"]:
        yield f"  {change}"
