"""A PEFT adapter's adapter_config.json: what is read, what is harmless, and what is refused by name."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorayard.shared.errors import AdapterError, NotSupported

from ..files import JsonFile

Number = TypeVar("Number", int, float)
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
"""Keys of training and bookkeeping: the tensors are the whole effect. Any other key must be null or false."""
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that left the base's weights as they were."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Rank and alpha, the same for every linear but those that a pattern names (by the end of their names)."""

    path: Path
    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    @classmethod
    def from_directory(cls, path: Path) -> AdapterConfig:
        """Read `path`/adapter_config.json. Raises AdapterError, or NotSupported naming the key."""
        file = JsonFile(path / "adapter_config.json", AdapterError)
        _refuse_other_mathematics(file)
        ranks, alphas = (file.get(name, dict, {}) for name in ("rank_pattern", "alpha_pattern"))
        for name in (*ranks, *alphas):
            if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
                raise NotSupported(f"{file.path}: pattern {name[:60]!r}; this version does plain module names")
        config = cls(
            path=file.path,
            r=file.size("r"),
            alpha=file.get("lora_alpha", float),
            use_rslora=file.get("use_rslora", bool, False),
            rank_pattern={name: file.size(name, within=ranks) for name in ranks},
            alpha_pattern={name: file.get(name, float, within=alphas) for name in alphas},
        )
        if not all(map(math.isfinite, (config.alpha, *config.alpha_pattern.values()))):
            raise AdapterError(f"{file.path}: lora_alpha must be finite")
        return config

    @property
    def max_rank(self) -> int:
        """The largest rank that the file speaks of."""
        return max(self.r, *self.rank_pattern.values(), 1)

    def rank(self, module: str) -> int:
        """Rank at the linear `module`."""
        return _matching(self.rank_pattern, module) or self.r

    def scaling(self, module: str) -> float:
        """alpha / r at the linear `module`, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        rank, alpha = self.rank(module), _matching(self.alpha_pattern, module)
        return (self.alpha if alpha is None else alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _matching(pattern: dict[str, Number], module: str) -> Number | None:
    return next((value for key, value in pattern.items() if f".{module}".endswith(f".{key}")), None)


def _refuse_other_mathematics(file: JsonFile) -> None:
    kind = file.get("peft_type", str)
    if kind != "LORA":
        raise NotSupported(f"{file.path}: peft_type {kind[:40]!r}; this version does LORA")
    if file.get("bias", str, "none") != "none":
        raise NotSupported(f"{file.path}: bias {file.data['bias'][:40]!r}; this version does 'none'")
    if file.data.get("init_lora_weights", True) not in KEEPS_BASE:
        start = str(file.data["init_lora_weights"])[:40]
        raise NotSupported(f"{file.path}: init_lora_weights {start!r} changes the base model; this version keeps it")
    for name, value in file.data.items():
        if value and name not in READ | HARMLESS:
            raise NotSupported(f"{file.path}: {name[:60]} is set; this version does not do it")
