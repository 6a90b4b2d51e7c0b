"""What a model folder's config.json says, checked field by field."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from lorayard.shared.errors import ModelError, NotSupported, UsageError

from ..files import JsonFile
from ..linear.quantisation import Quantisation
from .architectures import ARCHITECTURES, ATTENTION, MLP, Architecture
from .rope import Dynamic, Rope, read_ropes

MAX_LAYERS = 4096
OVERRIDES = ("max_seq_len", "rope_theta", "rope_alpha", "rope_scale")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's shape and mathematics.

    windows: keys that a query of each layer sees, itself included, 0 for all. ropes: of each layer. query_scale: of
    the scores. attention_cap, logit_cap: c of c * tanh(x / c), 0 for none. biases: linears that have one.
    """

    path: Path
    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    query_scale: float
    attention_cap: float
    logit_cap: float
    windows: tuple[int, ...]
    ropes: tuple[Rope, ...]
    max_seq_len: int
    tied_head: bool
    biases: frozenset[str]
    quantisation: Quantisation

    @classmethod
    def from_directory(cls, path: str | Path, **overrides: float) -> ModelConfig:
        """Read `path`/config.json; `overrides` may set max_seq_len, and rope_theta, rope_alpha (NTK stretch of theta)
        and rope_scale (positions are divided by it) of the layers that see the whole text.

        Raises ModelError naming a missing or malformed field, NotSupported naming what this version does not do,
        UsageError for an override that is unknown or out of range.
        """
        path = Path(path)
        if not path.is_dir():
            raise ModelError(f"{path} is not a folder; expected a model with config.json and *.safetensors")
        file = JsonFile(path / "config.json", ModelError)
        architecture = _architecture(file)
        heads, hidden = file.size("num_attention_heads"), file.size("hidden_size")
        layers = file.size("num_hidden_layers", most=MAX_LAYERS)
        head_dim = file.size("head_dim", hidden // heads)
        windows = _windows(file, architecture, layers)
        config = cls(
            path=path,
            architecture=architecture,
            vocab_size=file.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=file.size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=file.size("num_key_value_heads", heads),
            head_dim=head_dim,
            norm_eps=file.get("rms_norm_eps", float),
            query_scale=_positive(file, architecture, "query_pre_attn_scalar", head_dim) ** -0.5,
            attention_cap=_positive(file, architecture, "attn_logit_softcapping"),
            logit_cap=_positive(file, architecture, "final_logit_softcapping"),
            windows=windows,
            ropes=_ropes(file, architecture, windows, _checked(overrides)),
            max_seq_len=int(overrides.get("max_seq_len", file.size("max_position_embeddings"))),
            tied_head=file.get("tie_word_embeddings", bool, False),
            biases=_biases(file, architecture),
            quantisation=Quantisation.of(file),
        )
        config._check(file)
        return config

    def _check(self, file: JsonFile) -> None:
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ModelError(
                f"{file.path}: num_attention_heads must be a multiple of num_key_value_heads and head_dim even"
            )
        for scaling in {rope.scaling for rope in self.ropes}:
            if isinstance(scaling, Dynamic) and self.max_seq_len > scaling.limit:
                raise UsageError(
                    f"{file.path}: dynamic RoPE scaling turns all keys anew beyond {scaling.limit} tokens, which a "
                    "cache cannot; keep max_seq_len within it, or stretch RoPE for every length with rope_alpha"
                )


def _checked(overrides: dict[str, float]) -> dict[str, float]:
    for name, value in overrides.items():
        kind = int if name == "max_seq_len" else float
        if name not in OVERRIDES:
            raise UsageError(f"a model has no override {name!r}; there are {', '.join(OVERRIDES)}")
        if isinstance(value, bool) or not isinstance(value, int | kind) or not 1 <= value <= 1 << 30:
            raise UsageError(f"{name} must be a number between 1 and 2^30, not {value!r}")
    return overrides


def _architecture(file: JsonFile) -> Architecture:
    """The one that config.json names; its defaults are put in for absent fields."""
    names = file.get("architectures", list, [a for a, each in ARCHITECTURES.items() if each.model_type == _type(file)])
    if not names and not _type(file):
        raise ModelError(f"{file.path} has no architectures")
    found = ARCHITECTURES.get(str(names[0])) if len(names) == 1 else None
    if found is None:
        said = str(names)[:100] if names else f"of model_type {_type(file)[:60]!r}"
        raise NotSupported(f"{file.path}: architectures {said}; this version runs {', '.join(ARCHITECTURES)}")
    if _type(file) not in ("", found.model_type):
        raise NotSupported(f"{file.path}: architectures {names} with model_type {_type(file)[:60]!r}")
    file.data = {**found.defaults, **file.data}
    for name in found.refused:
        if file.data.get(name):
            raise NotSupported(f"{file.path}: {name} {str(file.data[name])[:60]!r}; this version does not do it")
    for name in ("hidden_act", "hidden_activation"):
        value = file.data.get(name)
        if name in found.defaults and value is not None and value not in found.activations:
            raise NotSupported(
                f"{file.path}: {name} {str(value)[:60]!r}; this version does {' or '.join(found.activations)}"
            )
    return found


def _type(file: JsonFile) -> str:
    return file.get("model_type", str, "")


def _positive(file: JsonFile, architecture: Architecture, name: str, default: float = 0.0) -> float:
    """A field that counts in some families only."""
    value = file.get(name, float, float(default)) if name in architecture.defaults else float(default)
    if not 0 <= value < math.inf or not value and file.data.get(name) is not None:
        raise ModelError(f"{file.path}: {name} must be positive, not {value}")
    return value


def _biases(file: JsonFile, architecture: Architecture) -> frozenset[str]:
    """The linears of a layer that have a bias, by their last names."""
    flags = {"attention_bias": ATTENTION, "mlp_bias": MLP}
    said = [names for flag, names in flags.items() if flag in architecture.defaults and file.get(flag, bool, False)]
    return frozenset(architecture.biases).union(*said)


def _windows(file: JsonFile, architecture: Architecture, layers: int) -> tuple[int, ...]:
    """Each layer's window, from `layer_types` or by the family's rule."""
    window = 0
    if "sliding_window" in architecture.defaults and file.data.get("use_sliding_window", True):
        window = file.size("sliding_window", 0) if file.data["sliding_window"] is not None else 0
    rule = [SLIDING if window and architecture.slides(file, layer) else FULL for layer in range(layers)]
    types = file.get("layer_types", list, rule)
    for name in types:
        if name not in (FULL, SLIDING):
            raise NotSupported(f"{file.path}: layer_types has {str(name)[:60]!r}; this version does {FULL}, {SLIDING}")
    if len(types) != layers or (SLIDING in types and not window):
        raise ModelError(f"{file.path}: layer_types must name {layers} layers, and sliding ones need a sliding_window")
    if "layer_types" not in architecture.defaults and types != rule:
        raise NotSupported(f"{file.path}: layer_types, which {architecture.model_type} does not have")
    return tuple(window if name == SLIDING else 0 for name in types)


def _ropes(
    file: JsonFile, architecture: Architecture, windows: tuple[int, ...], overrides: dict[str, float]
) -> tuple[Rope, ...]:
    full, sliding = read_ropes(file, architecture.theta, architecture.local_theta)
    changed = replace(
        full,
        theta=float(overrides.get("rope_theta", full.theta)),
        alpha=float(overrides.get("rope_alpha", 1)),
        scale=float(overrides.get("rope_scale", 1)),
    )
    return tuple(sliding if window and architecture.local_theta else changed for window in windows)
