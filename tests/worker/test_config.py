"""config.json: what is read from every way of writing it, and overrides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorayard.demo import BASE
from lorayard.shared.errors import LorayardError, ModelError, NotSupported, UsageError
from lorayard.worker import ModelConfig
from lorayard.worker.models.rope import Rope

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip


def read(path: Path, **fields: Any) -> ModelConfig:
    """The config of SMALL with `fields`; ... takes one away."""
    (path / "config.json").write_text(json.dumps({k: v for k, v in (SMALL | fields).items() if v is not ...}))
    return ModelConfig.from_directory(path)


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.query_scale) == (4, 16, 0.25)
    assert (config.ropes, config.windows) == ((Rope(10000.0),) * 2, (0, 0))
    assert (config.tied_head, config.biases, config.max_seq_len) == (False, frozenset(), 512)


def test_the_demo_model() -> None:
    config = ModelConfig.from_directory(BASE)
    assert (config.quantisation.group_size, config.tied_head, config.num_layers) == (64, True, 5)


def test_the_architecture_by_either_name(tmp_path: Path) -> None:
    for fields in ({"model_type": "llama"}, {"architectures": ..., "model_type": "llama"}):
        assert read(tmp_path, **fields).architecture.model_type == "llama"


REFUSED: list[tuple[dict[str, Any], type[LorayardError], str]] = [
    ({"architectures": ..., "model_type": "gpt2"}, NotSupported, "model_type 'gpt2'"),
    ({"architectures": ["Gemma3ForConditionalGeneration"]}, NotSupported, "Gemma3ForConditionalGeneration"),
    ({"model_type": "granite"}, NotSupported, "model_type 'granite'"),
    ({"architectures": ["LlamaForCausalLM", "X"]}, NotSupported, "'X'"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, ModelError, "need a sliding_window"),
    ({"layer_types": ["chunked_attention"] * 2}, NotSupported, "'chunked_attention'"),
    ({"layer_types": ["full_attention"]}, ModelError, "must name 2 layers"),
]


@pytest.mark.parametrize(("fields", "error", "words"), REFUSED)
def test_what_is_not_done(fields: dict[str, Any], error: type[LorayardError], words: str, tmp_path: Path) -> None:
    with pytest.raises(error) as refused:
        read(tmp_path, **fields)
    assert type(refused.value) is error and words in str(refused.value)


def test_overrides(tmp_path: Path) -> None:
    read(tmp_path)
    config = ModelConfig.from_directory(tmp_path, max_seq_len=77, rope_theta=1e6, rope_alpha=2, rope_scale=3)
    assert (config.max_seq_len, config.ropes) == (77, (Rope(1e6, None, 2.0, 3.0),) * 2)
    for overrides in (
        {"max_len": 5},
        {"max_seq_len": 0},
        {"max_seq_len": 5.5},
        {"rope_alpha": "2"},
        {"rope_alpha": True},
    ):
        with pytest.raises(UsageError, match=next(iter(overrides))):
            ModelConfig.from_directory(tmp_path, **overrides)  # type: ignore[arg-type]
