"""A PEFT adapter's adapter_config.json: what is read, what is harmless, and what is refused by name. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lorayard.shared.errors import AdapterError, NotSupported

from ..files import JsonFile
from ..pattern import MAX_STEPS, Pattern

Number = TypeVar("Number", int, float)
READ = {
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r", "rank_pattern",
    "target_modules", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
"""Keys of training and bookkeeping, and fan_in_fan_out, which no linear of ours has (PEFT, too, then sets it to false).

Any key that is neither here nor in READ must be null, false or empty.
"""
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that left the base's weights as they were."""
STARTS_AT_ZERO = (True, "gaussian", "eva")
"""Values of it for which a linear without tensors has no effect."""
INPUT, OUTPUT = "model.embed_tokens", "lm_head"
"""PEFT's names of the embedding and of the head."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What the file says, in PEFT's words.

    saved: modules_to_save. tokens: trainable_token_indices by module. tie: ensure_weight_tying. starts_at_zero: whether
    init_lora_weights makes a linear without tensors have no effect.
    """

    path: Path
    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | list[str] | None
    exclude_modules: str | list[str] | None
    layers_to_transform: list[int] | None
    layers_pattern: list[str]
    starts_at_zero: bool
    bias: str
    lora_bias: bool
    use_dora: bool
    saved: tuple[str, ...]
    tokens: dict[str, list[int]]
    tie: bool

    @classmethod
    def from_directory(cls, path: Path) -> AdapterConfig:
        """Read `path`/adapter_config.json. Raises AdapterError, or NotSupported naming the key."""
        file = JsonFile(path / "adapter_config.json", AdapterError)
        _refuse_other_mathematics(file)
        ranks, alphas = (file.get(name, dict, {}) for name in ("rank_pattern", "alpha_pattern"))
        config = cls(
            path=file.path,
            r=file.size("r"),
            alpha=file.get("lora_alpha", float),
            use_rslora=file.get("use_rslora", bool, False),
            rank_pattern={name: file.size(name, within=ranks) for name in ranks},
            alpha_pattern={name: file.get(name, float, within=alphas) for name in alphas},
            target_modules=_names(file, "target_modules"),
            exclude_modules=_names(file, "exclude_modules") or None,
            layers_to_transform=_layers(file),
            layers_pattern=_plain(file, "layers_pattern"),
            starts_at_zero=file.data.get("init_lora_weights", True) in STARTS_AT_ZERO,
            bias=_bias(file),
            lora_bias=file.get("lora_bias", bool, False),
            use_dora=file.get("use_dora", bool, False),
            saved=tuple(_whole(file, "modules_to_save", name) for name in _plain(file, "modules_to_save")),
            tokens=_tokens(file),
            tie=file.get("ensure_weight_tying", bool, False),
        )
        if not all(map(math.isfinite, (config.alpha, *config.alpha_pattern.values()))):
            raise AdapterError(f"{file.path}: lora_alpha must be finite")
        if config.use_dora and config.lora_bias:
            raise AdapterError(f"{file.path}: PEFT has no lora_bias together with use_dora")
        return config

    def on_tied(self) -> AdapterConfig:
        """The same for a base whose head is its embedding: what PEFT then takes as said of both."""
        saved, tokens = self.saved, dict(self.tokens)
        if self.tie and INPUT in saved:
            saved = (INPUT, OUTPUT)
        if tokens.get(INPUT) == tokens.get(OUTPUT):
            tokens.pop(OUTPUT, None)
        return replace(self, saved=saved, tokens=tokens)

    @property
    def max_rank(self) -> int:
        """The largest rank that the file speaks of."""
        return max(self.r, *self.rank_pattern.values(), 1)

    def ranks(self, modules: Iterable[str]) -> dict[str, int]:
        """Rank at each linear."""
        return self._of_each(modules, self.rank_pattern, self.r)

    def scalings(self, modules: Iterable[str]) -> dict[str, float]:
        """alpha / r at each linear, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        ranks = self.ranks(modules)
        alphas = self._of_each(modules, self.alpha_pattern, self.alpha)
        return {m: alphas[m] / (math.sqrt(rank) if self.use_rslora else rank) for m, rank in ranks.items()}

    def _of_each(self, modules: Iterable[str], values: dict[str, Number], default: Number) -> dict[str, Number]:
        """For each module the value of the first pattern that matches its name, or the end of it after a dot."""
        patterns = [(Pattern(text, str(self.path), MAX_STEPS // len(values)), value) for text, value in values.items()]
        return {
            module: next((value for pattern, value in patterns if pattern.fullmatch_end(module)), default)
            for module in modules
        }


def _names(file: JsonFile, key: str) -> str | list[str] | None:
    """A pattern, or a list of names."""
    if type(file.data.get(key)) is str:
        return file.get(key, str)
    names = file.get(key, list, None)
    if names is not None and not all(type(name) is str for name in names):
        raise AdapterError(f"{file.path}: {key} must be a text or a list of texts")
    return names


def _plain(file: JsonFile, key: str) -> list[str]:
    """A name or a list of names, without any pattern."""
    names = _names(file, key) or []
    names = [names] if isinstance(names, str) else names
    for name in names:
        if not name.replace(".", "").replace("_", "").isalnum():
            raise NotSupported(f"{file.path}: {key} {name[:60]!r}; this version takes plain names there")
    return names


def _whole(file: JsonFile, key: str, name: str) -> str:
    """The embedding or the head, of which alone an adapter may bring rows of its own."""
    for module in (INPUT, OUTPUT):
        if f".{module}".endswith(f".{name}"):
            return module
    raise NotSupported(f"{file.path}: {key} names {name[:60]!r}; this version does embed_tokens and lm_head")


def _layers(file: JsonFile) -> list[int] | None:
    value = file.data.get("layers_to_transform")
    layers = [value] if type(value) is int else file.get("layers_to_transform", list, None)
    if layers and not all(type(layer) is int for layer in layers):
        raise AdapterError(f"{file.path}: layers_to_transform must be a whole number or a list of them")
    return layers or None


def _bias(file: JsonFile) -> str:
    bias = file.get("bias", str, "none")
    if bias not in ("none", "all", "lora_only"):
        raise NotSupported(f"{file.path}: bias {bias[:40]!r}; this version does none, all and lora_only")
    return bias


def _tokens(file: JsonFile) -> dict[str, list[int]]:
    """Ids by module. A list alone is of the embedding."""
    value: Any = file.data.get("trainable_token_indices")
    by_name = value if isinstance(value, dict) else {INPUT: value} if value else {}
    for name, ids in by_name.items():
        if type(ids) is not list or not all(type(each) is int for each in ids) or len(set(ids)) < len(ids):
            raise AdapterError(f"{file.path}: trainable_token_indices of {name[:60]} must be a list of different ids")
    return {_whole(file, "trainable_token_indices", name): ids for name, ids in by_name.items() if ids}


def _refuse_other_mathematics(file: JsonFile) -> None:
    kind = file.get("peft_type", str)
    if kind != "LORA":
        raise NotSupported(f"{file.path}: peft_type {kind[:40]!r}; this version does LORA")
    if file.data.get("init_lora_weights", True) not in KEEPS_BASE:
        start = str(file.data["init_lora_weights"])[:40]
        raise NotSupported(f"{file.path}: init_lora_weights {start!r} changes the base model; this version keeps it")
    for name, value in file.data.items():
        if value and name not in READ | HARMLESS:
            raise NotSupported(f"{file.path}: {name[:60]} is set; this version does not do it")
