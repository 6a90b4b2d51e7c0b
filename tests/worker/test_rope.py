"""RoPE: every kind that the engine does, against transformers; every other one refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lorayard.shared.errors import LorayardError, ModelError, NotSupported, UsageError
from lorayard.worker import ModelConfig
from lorayard.worker.models.rope import KINDS, Rope

from ..tiny import quiet
from .test_config import SMALL, read

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "theta": {"rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
    "llama3 of the whole length": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": None},
    "yarn": YARN,
    "yarn, large base": YARN | {"rope_theta": 1e6},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, betas": YARN | {"beta_fast": 16, "beta_slow": 2.0},
    "yarn, attention_factor": YARN | {"attention_factor": 1.7},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, mscale alone": YARN | {"mscale": 0.7},
    "yarn, short": YARN | {"original_max_position_embeddings": 4},
}


def turns(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    rope = config.ropes[0]
    return rope.turns(torch.arange(512), rope.frequencies(config.head_dim))


@pytest.mark.parametrize("name", CASES)
def test_angles_as_transformers_has_them(name: str, tmp_path: Path) -> None:
    section = {key: value for key, value in CASES[name].items() if value is not None}
    config = read(tmp_path, rope_parameters=CASES[name])
    with quiet():
        theirs = LlamaConfig(**SMALL, rope_parameters=dict(section))
        cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(512)[None])
    for mine, full in zip(turns(config), (cos[0], sin[0]), strict=True):
        assert torch.allclose(mine, full[:, :8], atol=2e-5)
    same = name in ("default", "dynamic")
    assert torch.allclose(turns(config)[0], turns(read(tmp_path))[0], atol=1e-2) == same
    older = {"type" if key == "rope_type" else key: value for key, value in section.items()}
    theta = {"rope_theta": older.pop("rope_theta", ...)}
    assert read(tmp_path, rope_scaling=older or None, **theta).ropes == config.ropes


def test_every_kind_is_tried() -> None:
    assert {section.get("rope_type", "default") for section in CASES.values()} == set(KINDS)


REFUSED: list[tuple[dict[str, Any], type[LorayardError], str]] = [
    ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, NotSupported, "'longrope'"),
    ({"type": "su"}, NotSupported, "'su'"),
    ({"rope_type": ["x"]}, ModelError, "rope_type must be a text"),
    ({"mrope_section": [4, 4]}, NotSupported, "'mrope_section'"),
    ({"full_attention": {"rope_type": "default"}}, NotSupported, "'full_attention'"),
    ({"partial_rotary_factor": 0.5}, NotSupported, "partial_rotary_factor 0.5"),
    ({"rope_theta": 1}, ModelError, "rope_theta must be between"),
    ({"rope_type": "linear"}, ModelError, "has no factor"),
    ({"rope_type": "linear", "factor": 0.5}, ModelError, "factor of RoPE must be between 1 and"),
    ({"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}, ModelError, "low_freq_factor must be less"),
    (YARN | {"beta_slow": 40}, ModelError, "beta_slow must not"),
    (YARN | {"attention_factor": 0}, ModelError, "attention_factor of RoPE"),
    (YARN | {"original_max_position_embeddings": 0}, ModelError, "original_max_position_embeddings"),
]


@pytest.mark.parametrize(("section", "error", "words"), REFUSED)
def test_what_is_not_done(section: dict[str, Any], error: type[LorayardError], words: str, tmp_path: Path) -> None:
    with pytest.raises(error) as refused:
        read(tmp_path, rope_parameters=section)
    assert type(refused.value) is error and words in str(refused.value)


def test_dynamic_ends_at_the_length_of_training(tmp_path: Path) -> None:
    read(tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert ModelConfig.from_directory(tmp_path, max_seq_len=512).max_seq_len == 512
    with pytest.raises(UsageError, match="beyond 512 tokens.*rope_alpha"):
        ModelConfig.from_directory(tmp_path, max_seq_len=513)


def test_stretches_of_the_base_and_of_the_positions() -> None:
    stretched = Rope(10000.0, alpha=2.0, scale=4.0).frequencies(16)
    assert torch.allclose(stretched, (10000.0 * 2 ** (16 / 14)) ** -(torch.arange(0, 16, 2) / 16) / 4)


def test_rope_scaling_wins_over_rope_parameters(tmp_path: Path) -> None:
    """As in transformers; a null in either counts for nothing."""
    linear = {"rope_type": "linear", "factor": 2.0}
    both = read(tmp_path, rope_scaling=linear, rope_parameters={"rope_type": "default", "rope_theta": 7e5})
    assert both.ropes[0] == Rope(10000.0, read(tmp_path, rope_scaling=linear).ropes[0].scaling)
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"rope_scaling": None, "rope_theta": 7e5}))
    assert ModelConfig.from_directory(tmp_path).ropes[0] == Rope(7e5)
