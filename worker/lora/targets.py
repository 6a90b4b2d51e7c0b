"""Which modules an adapter's config targets, by PEFT's rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lorayard.shared.errors import AdapterError

from ..pattern import Pattern
from .config import INPUT, OUTPUT, AdapterConfig

ALL_LINEAR = "all-linear"


def targeted(config: AdapterConfig, modules: Sequence[str], tied: bool) -> set[str]:
    """Those of the base's `modules` (linears, embedding, head) that get LoRA; `tied` if the head is the embedding.

    modules_to_save and exclude_modules win over target_modules. Raises AdapterError if there are none.
    """
    if config.target_modules is None:
        raise AdapterError(f"{config.path} has no target_modules")
    kept = [module for module in modules if module not in config.saved]
    excluded, wanted = (_named(config, key, kept) for key in ("exclude_modules", "target_modules"))
    found = wanted - excluded
    if config.tie and tied and found & {INPUT, OUTPUT}:
        found |= {INPUT, OUTPUT}
    if not found:
        raise AdapterError(f"{config.path}: target_modules names no module of the base; the adapter is for another one")
    return found


def short(modules: Iterable[str]) -> str:
    """Modules in few words: `q_proj, v_proj x 32 layers, lm_head`."""
    layers: dict[str, set[str]] = {}
    for module in sorted(modules):
        place = re.fullmatch(r".*?\.(\d+)\.(?:.*\.)?([^.]+)", module)
        layers.setdefault(place[2] if place else module, set()).update([place[1]] if place else [])
    groups: dict[frozenset[str], list[str]] = {}
    for name, where in layers.items():
        groups.setdefault(frozenset(where), []).append(name)
    return ", ".join(
        ", ".join(names) + (f" x {len(where)} layer{'s' * (len(where) > 1)}" if where else "")
        for where, names in groups.items()
    )


def _named(config: AdapterConfig, key: str, modules: Sequence[str]) -> set[str]:
    """The modules that a pattern matches whole, or that a list names whole or by their end after a dot."""
    names: str | list[str] | None = getattr(config, key)
    if not names:
        return set()
    if isinstance(names, str):
        if key == "target_modules" and names.lower() == ALL_LINEAR:
            return {module for module in modules if module not in (INPUT, OUTPUT)}
        pattern = Pattern(names, f"{config.path}: {key}")
        return {module for module in modules if pattern.fullmatch(module)}
    exact, ends = set(names), tuple(f".{name}" for name in names)
    in_layers = key == "exclude_modules" or config.layers_to_transform is None
    return {
        module
        for module in modules
        if module in exact or (module.endswith(ends) and (in_layers or _in_layers(config, module)))
    }


def _in_layers(config: AdapterConfig, module: str) -> bool:
    """Whether the layer's number, the first in the name (behind layers_pattern, if given), is one to transform."""
    before = "|".join(map(re.escape, config.layers_pattern)) or r"[^.]*\.[^.]*"
    place = re.match(rf"(?:.*?\.)??(?:{before})\.(\d+)\.", module)
    return place is not None and int(place[1]) in (config.layers_to_transform or ())
