"""config.json of every architecture in the ways it is written: the same mathematics as transformers reads from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorayard.shared.errors import LorayardError, ModelError, NotSupported
from lorayard.worker import Model, ModelConfig
from lorayard.worker.models import model as model_module
from lorayard.worker.models.architectures import ARCHITECTURES

from ..tiny import FAMILIES, reference, reference_logits, relative, write_model

PROMPT = torch.randint(3, 160, (90,), generator=torch.Generator().manual_seed(4)).tolist()
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
Variant = tuple[str, dict[str, Any]]
VARIANTS: dict[str, Variant] = {
    "Mistral without a window": ("MistralForCausalLM", {"sliding_window": None}),
    "Mistral by default": ("MistralForCausalLM", {"sliding_window": ...}),
    "Mistral of version 4": ("MistralForCausalLM", {"rope_parameters": ..., "rope_theta": 1e6, "sliding_window": 7}),
    "Qwen2 without windows": ("Qwen2ForCausalLM", {"use_sliding_window": False, "layer_types": ...}),
    "Qwen2 by its layers": ("Qwen2ForCausalLM", {"max_window_layers": 0, "layer_types": ...}),
    "Qwen2 by layer_types": ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}),
    "Qwen2 by default": ("Qwen2ForCausalLM", {"max_window_layers": ..., "layer_types": ..., "sliding_window": 5}),
    "Qwen2 with yarn": ("Qwen2ForCausalLM", {"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": YARN}),
    "Qwen3 with yarn": ("Qwen3ForCausalLM", {"rope_parameters": YARN | {"rope_theta": 1e6}}),
    "Gemma of the first release": ("GemmaForCausalLM", {"hidden_act": "gelu", "tie_word_embeddings": ...}),
    "Gemma of version 4": ("GemmaForCausalLM", {"hidden_activation": "gelu_pytorch_tanh", "rope_parameters": ...,
                                                "rope_theta": 5000.0}),
    "Gemma 2 by default": ("Gemma2ForCausalLM", {"layer_types": ..., "attn_logit_softcapping": ...,
                                                 "final_logit_softcapping": ..., "hidden_activation": ...}),
    "Gemma 2 without caps": ("Gemma2ForCausalLM", {"attn_logit_softcapping": None, "final_logit_softcapping": None,
                                                   "query_pre_attn_scalar": ...}),
    "Gemma 3 by default": ("Gemma3ForCausalLM", {"layer_types": ..., "rope_parameters": ...}),
    "Gemma 3 of version 4": ("Gemma3ForCausalLM", {"layer_types": ..., "sliding_window_pattern": 2,
                                                   "rope_parameters": ..., "rope_theta": 2e4,
                                                   "rope_local_base_freq": 500.0, "rope_scaling": LINEAR}),
    "Gemma 3 of version 5": ("Gemma3ForCausalLM", {"final_logit_softcapping": 3.0, "rope_parameters": {
        "full_attention": LINEAR | {"rope_theta": 2e4}, "sliding_attention": {"rope_type": "default",
                                                                               "rope_theta": 500.0}}}),
}  # fmt: skip
"""Architecture and what is changed in config.json; ... takes a field away."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("architectures")
    return {name: write_model(root / name, seed=5, architecture=name) for name in FAMILIES}


def changed(models: dict[str, Path], variant: Variant, folder: Path) -> Path:
    """The model with another config.json."""
    name, fields = variant
    config = json.loads((models[name] / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    (folder / "model.safetensors").symlink_to(models[name] / "model.safetensors")
    return folder


def logits(path: Path) -> torch.Tensor:
    model = Model(ModelConfig.from_directory(path))
    model.load(devices="cpu")
    return model.logits(PROMPT)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_means_what_it_means_to_transformers(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    path = changed(models, VARIANTS[name], tmp_path)
    got = logits(path)
    assert relative(got, reference_logits(reference(path, []), PROMPT)) < 1e-3
    unchanged = relative(got, logits(models[VARIANTS[name][0]])) < 1e-3
    assert unchanged == (name == "Gemma of the first release")


REFUSED: dict[str, tuple[Variant, type[LorayardError], str]] = {
    "both sides": (("GemmaForCausalLM", {"use_bidirectional_attention": True}), NotSupported, "use_bidirectional"),
    "cap of Gemma 3": (("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}), NotSupported, "attn_logit_softcapping"),
    "activation": (("Gemma2ForCausalLM", {"hidden_activation": "relu"}), NotSupported, "hidden_activation 'relu'"),
    "exact gelu": (("Gemma2ForCausalLM", {"hidden_activation": "gelu"}), NotSupported, "hidden_activation 'gelu'"),
    "cap": (("Gemma2ForCausalLM", {"final_logit_softcapping": 0}), ModelError, "final_logit_softcapping must be"),
    "scale": (("Gemma2ForCausalLM", {"query_pre_attn_scalar": -1}), ModelError, "query_pre_attn_scalar must be"),
    "window": (("Gemma2ForCausalLM", {"sliding_window": 0}), ModelError, "sliding_window must be between"),
    "no window": (("Gemma2ForCausalLM", {"sliding_window": None}), ModelError, "need a sliding_window"),
    "kinds": (("MistralForCausalLM", {"layer_types": ["full_attention"] * 2}), NotSupported, "layer_types, which"),
    "flat": (("Gemma3ForCausalLM", {"rope_parameters": LINEAR}), NotSupported, "rope_parameters has"),
    "part": (("Qwen3ForCausalLM", {"partial_rotary_factor": 0.5}), NotSupported, "partial_rotary_factor 0.5"),
    "images": (("Gemma3ForCausalLM", {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}),
               NotSupported, "Gemma3ForConditionalGeneration"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_is_refused_by_name(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    variant, error, words = REFUSED[name]
    with pytest.raises(error) as refused:
        ModelConfig.from_directory(changed(models, variant, tmp_path))
    assert type(refused.value) is error and words in str(refused.value)


def test_overrides_leave_the_layers_with_a_theta_of_their_own(models: dict[str, Path]) -> None:
    for name in ARCHITECTURES:
        ropes = ModelConfig.from_directory(models[name], rope_alpha=3).ropes
        assert [rope.alpha for rope in ropes] == ([1.0, 3.0] if name == "Gemma3ForCausalLM" else [3.0, 3.0])


def close(path: Path, expected: torch.Tensor, devices: str, dtype: torch.dtype) -> None:
    """The model computes in 16 bits what it does in 32."""
    model = Model(ModelConfig.from_directory(path))
    model.load(devices=devices)
    assert model.dtype == dtype
    assert relative(model.logits(PROMPT), expected) < {torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sixteen_bits(name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; the residual stream of a Gemma then holds what fp16 cannot."""
    monkeypatch.setattr(model_module, "compute_dtype", lambda tensors, placed: dtype)
    path = write_model(tmp_path, 5, architecture=name, tie_word_embeddings=False)
    if ARCHITECTURES[name].gemma:
        tensors = load_file(path / "model.safetensors")
        tensors["model.embed_tokens.weight"] *= 1e5
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    expected = reference_logits(reference(path, []), PROMPT)
    assert expected.std() > 0.1
    close(path, expected, "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sixteen_bits_on_cuda(name: str, models: dict[str, Path]) -> None:
    close(models[name], logits(models[name]), "cuda", torch.float16)
