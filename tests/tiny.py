"""Random tiny checkpoints and PEFT adapters, written to disk by transformers and peft themselves."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from lorayard.worker.models.architectures import ARCHITECTURES

torch.set_num_threads(1)
SHAPE: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.1, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 40},
    "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    "Qwen3ForCausalLM": {"head_dim": 32, "use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    "GemmaForCausalLM": {"head_dim": 32, "num_key_value_heads": 1},
    "Gemma2ForCausalLM": {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 40,
                          "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    "Gemma3ForCausalLM": {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 40,
                          "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
"""What each architecture changes of SHAPE; a test fails for one that is missing."""
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WITH_SCALING = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let transformers and peft warn each other about their own names."""
    with warnings.catch_warnings(action="ignore"):
        yield


@quiet()
def write_model(
    path: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    architecture: str = "LlamaForCausalLM",
    **changes: Any,
) -> Path:
    """Save a model of SHAPE (with `changes` to its config) and random weights, norms and biases too, at `path`."""
    torch.manual_seed(seed)
    shape = SHAPE | FAMILIES[architecture] | changes
    config = AutoConfig.for_model(ARCHITECTURES[architecture].model_type, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(path)
    return path


@quiet()
def write_adapter(path: Path, base: Path, seed: int = 1, r: int = 4, alpha: float = 8, **changes: Any) -> Path:
    """Save a LoRA adapter with A and B both random, its folder `path` naming it."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": r, "lora_alpha": alpha, "target_modules": LINEARS, "task_type": "CAUSAL_LM"} | changes)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.15 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


@quiet()
def reference(base: Path, adapters: list[tuple[Path, float]]) -> torch.nn.Module:
    """transformers and peft in float32 with the weighted sum of some adapters."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return with_adapters(model, adapters)


@quiet()
def with_adapters(model: torch.nn.Module, adapters: list[tuple[Path, float]]) -> torch.nn.Module:
    """The model of transformers, changed in place by peft."""
    if not adapters:
        return model
    scales = {path.name: scale for path, scale in adapters}
    tuned = PeftModel.from_pretrained(model, adapters[0][0], adapter_name=adapters[0][0].name)
    for path, _ in adapters[1:]:
        tuned.load_adapter(path, path.name)
    tuned.base_model.set_adapter(list(scales))
    for module in tuned.modules():
        for name in scales.keys() & module.scaling.keys() if isinstance(module, LoraLayer) else ():
            module.scaling[name] *= scales[name]
    return tuned.eval()


@torch.no_grad()
def reference_logits(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """float32 [tokens, vocab]."""
    logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0].float()
    return logits


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())
