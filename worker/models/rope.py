"""Rotary position embedding: its settings in config.json, and the angles that they mean.

Kinds and formulas are those of transformers' modeling_rope_utils. A cache keeps keys as they were turned, so an angle
may depend on the position alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lorayard.shared.errors import ModelError, NotSupported

from ..files import JsonFile

COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


class Scaling(Protocol):
    """A way to reach further than a model was trained for. amplitude: factor of cos and sin."""

    @property
    def amplitude(self) -> float: ...

    def apply(self, plain: Tensor, base: float) -> Tensor:
        """Frequencies [D/2] from those of the base alone."""


@dataclass(frozen=True, slots=True)
class Linear:
    """Positions divided by factor (Chen 2023)."""

    factor: float
    amplitude: float = 1.0

    def apply(self, plain: Tensor, base: float) -> Tensor:
        return plain / self.factor


@dataclass(frozen=True, slots=True)
class Dynamic:
    """NTK scaling by the length of the text, which changes nothing up to `limit` tokens and is not done beyond."""

    limit: int
    amplitude: float = 1.0

    def apply(self, plain: Tensor, base: float) -> Tensor:
        return plain


@dataclass(frozen=True, slots=True)
class Llama3:
    """Llama 3.1: waves over original / low are stretched by factor, under original / high kept, blended between."""

    factor: float
    low: float
    high: float
    original: int
    amplitude: float = 1.0

    def apply(self, plain: Tensor, base: float) -> Tensor:
        wave = 2 * math.pi / plain
        kept = ((self.original / wave - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - kept) * plain / self.factor + kept * plain


@dataclass(frozen=True, slots=True)
class Yarn:
    """Peng 2023: pairs that turn more than `fast` times in `original` positions are kept, fewer than `slow` divided."""

    factor: float
    original: int
    fast: float
    slow: float
    truncate: bool
    amplitude: float

    def apply(self, plain: Tensor, base: float) -> Tensor:
        dim = 2 * len(plain)
        low, high = (
            dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (self.fast, self.slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        divided = ((torch.arange(len(plain)) - low) / ((high - low) or 0.001)).clamp(0, 1)
        return plain / self.factor * divided + plain * (1 - divided)


@dataclass(frozen=True, slots=True)
class Rope:
    """The angles of a layer. alpha: NTK stretch of the base theta. scale: positions are divided by it."""

    theta: float
    scaling: Scaling | None = None
    alpha: float = 1.0
    scale: float = 1.0

    def frequencies(self, dim: int) -> Tensor:
        """Radians a position of each pair of a head's `dim` numbers, float32 [dim / 2]."""
        base = self.theta * self.alpha ** (dim / max(dim - 2, 1))
        plain = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
        return (self.scaling.apply(plain, base) if self.scaling else plain) / self.scale

    def turns(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [T, D/2], of the angles at positions int64 [T]."""
        angles = positions[:, None] * frequencies
        amplitude = self.scaling.amplitude if self.scaling else 1.0
        return angles.cos() * amplitude, angles.sin() * amplitude


def read_ropes(file: JsonFile, theta: float, local: float | None) -> tuple[Rope, Rope]:
    """RoPE of layers that see the whole text and of those with a window.

    theta, local: bases where config.json has none; local is None for a model whose layers all turn alike. Read from
    `rope_theta`, `rope_scaling` and `rope_local_base_freq`, or from the `rope_parameters` that transformers 5 writes.
    """
    newer, older = file.get("rope_parameters", dict, {}), file.get("rope_scaling", dict, {})
    theta = file.get("rope_theta", float, theta)
    if local is None:
        both = _rope(file, older or newer, theta)
        return both, both
    for name in newer.keys() - {"full_attention", "sliding_attention"}:
        raise NotSupported(f"{file.path}: rope_parameters has {name[:60]!r}; this model has them by kind of layer")
    full, sliding = (file.get(kind, dict, {}, newer) for kind in ("full_attention", "sliding_attention"))
    return _rope(file, full | older, theta), _rope(file, sliding, file.get("rope_local_base_freq", float, local))


def _rope(file: JsonFile, section: dict[str, Any], theta: float) -> Rope:
    theta = file.get("rope_theta", float, theta, section)
    if not 1 < theta < 1e30:
        raise ModelError(f"{file.path}: rope_theta must be between 1 and 1e30, not {theta}")
    turned = file.get("partial_rotary_factor", float, file.get("partial_rotary_factor", float, 1.0), section)
    if turned != 1:
        raise NotSupported(f"{file.path}: partial_rotary_factor {turned}; this version does 1.0")
    kind = file.get("rope_type", str, file.get("type", str, "default", section), section)
    if kind not in KINDS:
        raise NotSupported(f"{file.path}: RoPE scaling {kind[:60]!r}; this version does {', '.join(KINDS)}")
    read, known = KINDS[kind]
    for name in section.keys() - known - COMMON:
        if section[name] is not None:
            raise NotSupported(f"{file.path}: RoPE scaling {kind!r} has {name[:60]!r}, which this version does not do")
    return Rope(theta, read(file, section))


def _number(file: JsonFile, section: dict[str, Any], name: str, default: Any = ..., least: float = 0.0) -> float:
    value = file.get(name, float, within=section) if default is ... else file.get(name, float, default, section)
    if not least <= value < 1e6 or not value:
        raise ModelError(f"{file.path}: {name} of RoPE must be between {least:g} and 1e6, not {value}")
    return value


def _original(file: JsonFile, section: dict[str, Any]) -> int:
    whole = file.size("original_max_position_embeddings", file.size("max_position_embeddings"))
    return file.size("original_max_position_embeddings", whole, section)


def _default(file: JsonFile, section: dict[str, Any]) -> None:
    return None


def _linear(file: JsonFile, section: dict[str, Any]) -> Linear:
    return Linear(_number(file, section, "factor", least=1))


def _dynamic(file: JsonFile, section: dict[str, Any]) -> Dynamic:
    _number(file, section, "factor", least=1)
    return Dynamic(file.size("max_position_embeddings"))


def _llama3(file: JsonFile, section: dict[str, Any]) -> Llama3:
    factor = _number(file, section, "factor", least=1)
    low, high = (_number(file, section, name) for name in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise ModelError(f"{file.path}: low_freq_factor must be less than high_freq_factor")
    return Llama3(factor, low, high, _original(file, section))


def _yarn(file: JsonFile, section: dict[str, Any]) -> Yarn:
    factor = _number(file, section, "factor", least=1)
    fast, slow = _number(file, section, "beta_fast", 32.0), _number(file, section, "beta_slow", 1.0)
    if slow > fast:
        raise ModelError(f"{file.path}: beta_slow must not be more than beta_fast")
    over, under = (file.get(name, float, 0.0, section) for name in ("mscale", "mscale_all_dim"))
    grown = 0.1 * math.log(factor)
    amplitude = (over * grown + 1) / (under * grown + 1) if over and under else grown + 1
    amplitude = _number(file, section, "attention_factor", amplitude)
    return Yarn(factor, _original(file, section), fast, slow, file.get("truncate", bool, True, section), amplitude)


ORIGINAL = "original_max_position_embeddings"
KINDS: Mapping[str, tuple[Callable[[JsonFile, dict[str, Any]], Scaling | None], set[str]]] = {
    "default": (_default, set()),
    "linear": (_linear, {"factor"}),
    "dynamic": (_dynamic, {"factor"}),
    "llama3": (_llama3, {"factor", "low_freq_factor", "high_freq_factor", ORIGINAL}),
    "yarn": (_yarn, {"factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate",
                     ORIGINAL}),
}  # fmt: skip
"""What each kind reads, and the fields that it knows besides COMMON."""
