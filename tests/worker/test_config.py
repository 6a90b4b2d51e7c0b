"""config.json: what is read from every way of writing it, and overrides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lorayard.demo import BASE
from lorayard.shared.errors import UsageError
from lorayard.worker import ModelConfig
from lorayard.worker.models.config import Gptq, Llama3Scaling
from lorayard.worker.models.rope import frequencies, turns

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def read(path: Path, **fields: Any) -> ModelConfig:
    """The config of SMALL with `fields`."""
    (path / "config.json").write_text(json.dumps(SMALL | fields))
    return ModelConfig.from_directory(path)


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.rope_scaling) == (4, 16, 10000.0, None)
    assert (config.tied_head, config.attention_bias, config.mlp_bias, config.max_seq_len) == (False, False, False, 512)


def test_the_demo_model(tmp_path: Path) -> None:
    config = ModelConfig.from_directory(BASE)
    assert (config.gptq, config.tied_head, config.num_layers) == (Gptq(64, False, 1), True, 5)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 500000, "rope_scaling": {"type": "llama3", **SCALING}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}},
    ],
)
def test_llama3_scaling_as_transformers_has_it(fields: dict[str, Any], tmp_path: Path) -> None:
    config = read(tmp_path, **fields)
    assert (config.rope_theta, config.rope_scaling) == (5e5, Llama3Scaling(8.0, 1.0, 4.0, 64))
    theirs = LlamaConfig(**SMALL, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **SCALING})
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(512)[None])
    for mine, full in zip(turns(torch.arange(512), frequencies(config)), (cos[0], sin[0]), strict=True):
        assert torch.allclose(mine, full[:, :8], atol=1e-5)
    assert not torch.allclose(frequencies(config), frequencies(read(tmp_path, rope_theta=5e5)), rtol=0.1)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, Gptq(128, True, 1)),
        ({"group_size": -1, "checkpoint_format": "gptq_v2"}, Gptq(-1, False, 0)),
    ],
)
def test_gptq_fields_in_the_config_or_beside_it(section: dict[str, Any], expected: Gptq, tmp_path: Path) -> None:
    assert read(tmp_path, quantization_config=section).gptq == expected
    (tmp_path / "quantize_config.json").write_text(json.dumps(section))
    assert read(tmp_path).gptq == expected


def test_overrides(tmp_path: Path) -> None:
    read(tmp_path)
    config = ModelConfig.from_directory(tmp_path, max_seq_len=77, rope_theta=1e6, rope_alpha=2)
    assert (config.max_seq_len, config.rope_theta, config.rope_alpha) == (77, 1e6, 2.0)
    for overrides in (
        {"max_len": 5},
        {"max_seq_len": 0},
        {"max_seq_len": 5.5},
        {"rope_alpha": "2"},
        {"rope_alpha": True},
    ):
        with pytest.raises(UsageError, match=next(iter(overrides))):
            ModelConfig.from_directory(tmp_path, **overrides)  # type: ignore[arg-type]
