"""What a model folder's config.json says, checked field by field."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lorayard.shared.errors import ModelError, NotSupported, UsageError

from ..files import JsonFile
from ..linear.quantisation import Quantisation

MAX_LAYERS = 4096
OVERRIDES = ("max_seq_len", "rope_theta", "rope_alpha")


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """RoPE scaling of Llama 3.1: waves over original / low are stretched by factor, under original / high kept."""

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama model's shape. rope_alpha: NTK stretch of the RoPE base, 1 for none."""

    path: Path
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    max_seq_len: int
    tied_head: bool
    attention_bias: bool
    mlp_bias: bool
    quantisation: Quantisation
    rope_alpha: float = 1.0

    @classmethod
    def from_directory(cls, path: str | Path, **overrides: float) -> ModelConfig:
        """Read `path`/config.json; `overrides` may set max_seq_len, rope_theta and rope_alpha.

        Raises ModelError naming a missing or malformed field, NotSupported naming what this version does not do,
        UsageError for an override that is unknown or out of range.
        """
        path = Path(path)
        if not path.is_dir():
            raise ModelError(f"{path} is not a folder; expected a model with config.json and *.safetensors")
        file = JsonFile(path / "config.json", ModelError)
        _refuse_other_mathematics(file)
        heads, hidden = file.size("num_attention_heads"), file.size("hidden_size")
        config = cls(
            path=path,
            vocab_size=file.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=file.size("intermediate_size"),
            num_layers=file.size("num_hidden_layers", most=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=file.size("num_key_value_heads", heads),
            head_dim=file.size("head_dim", hidden // heads),
            norm_eps=file.get("rms_norm_eps", float),
            rope_theta=_rope(file).theta,
            rope_scaling=_rope(file).scaling,
            max_seq_len=file.size("max_position_embeddings"),
            tied_head=file.get("tie_word_embeddings", bool, False),
            attention_bias=file.get("attention_bias", bool, False),
            mlp_bias=file.get("mlp_bias", bool, False),
            quantisation=Quantisation.of(file),
        )
        if config.num_heads % config.num_kv_heads or config.head_dim % 2:
            raise ModelError(
                f"{file.path}: num_attention_heads must be a multiple of num_key_value_heads and head_dim even"
            )
        return config._overridden(overrides)

    def _overridden(self, overrides: dict[str, float]) -> ModelConfig:
        kinds = {f.name: int if f.name == "max_seq_len" else float for f in fields(self)}
        for name, value in overrides.items():
            if name not in OVERRIDES:
                raise UsageError(f"a model has no override {name!r}; there are {', '.join(OVERRIDES)}")
            if isinstance(value, bool) or not isinstance(value, int | kinds[name]) or not 1 <= value <= 1 << 30:
                raise UsageError(f"{name} must be a number between 1 and 2^30, not {value!r}")
        return replace(self, **{name: kinds[name](value) for name, value in overrides.items()})  # type: ignore[arg-type]


def _refuse_other_mathematics(file: JsonFile) -> None:
    names = file.get("architectures", list)
    if names != ["LlamaForCausalLM"]:
        raise NotSupported(f"{file.path}: architectures {names}; this version runs LlamaForCausalLM")
    expected: dict[str, Any] = {"hidden_act": "silu", "partial_rotary_factor": 1.0}
    for name, value in expected.items():
        if file.data.get(name, value) != value:
            raise NotSupported(f"{file.path}: {name} {str(file.data[name])[:60]!r}; this version does {value!r}")


@dataclass(frozen=True, slots=True)
class _Rope:
    theta: float
    scaling: Llama3Scaling | None


def _rope(file: JsonFile) -> _Rope:
    """From `rope_theta` and `rope_scaling`, or from the `rope_parameters` that transformers 5 writes instead."""
    newer = file.get("rope_parameters", dict, {})
    theta = file.get("rope_theta", float, newer.get("rope_theta", 10000.0))
    if not isinstance(theta, int | float) or not 1 <= theta < 1e30:
        raise ModelError(f"{file.path}: rope_theta must be a number of at least 1, not {str(theta)[:60]!r}")
    scaling = file.get("rope_scaling", dict, newer)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return _Rope(float(theta), None)
    if kind != "llama3":
        raise NotSupported(f"{file.path}: RoPE scaling {str(kind)[:60]!r}; this version does default and llama3")
    names = ("factor", "low_freq_factor", "high_freq_factor")
    factor, low, high = (file.get(name, float, within=scaling) for name in names)
    original = file.size("original_max_position_embeddings", within=scaling)
    if not (1 <= factor < 1e6 and 0 < low < high < 1e6):
        raise ModelError(f"{file.path}: llama3 needs factor >= 1 and 0 < low_freq_factor < high_freq_factor")
    return _Rope(float(theta), Llama3Scaling(factor, low, high, original))
