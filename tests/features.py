"""Every feature of PEFT's LoRA as a random adapter, made and saved by peft itself on any model of transformers.

`FEATURES` is what parity tests enumerate: a new feature is a new line. All that peft trains is random, so no part of
an adapter is without effect.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from .tiny import LINEARS, quiet

QV = ["q_proj", "v_proj"]
FEATURES: dict[str, dict[str, Any]] = {
    "linears": {},
    "list": {"target_modules": [*QV, "model.layers.1.mlp.down_proj"]},
    "regex": {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(?:[qk]_proj|up_proj$)"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "model.layers.0.self_attn.k_proj"]},
    "excluded by regex": {"exclude_modules": r".*\.1\..*_proj"},
    "layers": {"layers_to_transform": [1]},
    "one layer": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "patterns": {
        "rank_pattern": {"0.self_attn.q_proj": 2, r"1\.mlp\.(up|gate)_proj": 5, "[qv]_proj": 6, "^model.*o_proj": 7,
                         "v_proj": 3},
        "alpha_pattern": {r".*layers\.1\..*": 3.0, "k_proj": 20, "model.layers.0.mlp.up_proj$": 1},
    },
    "rslora": {"use_rslora": True, "r": 9, "lora_alpha": 6},
    "rslora patterns": {"use_rslora": True, "rank_pattern": {"o_proj": 16}, "alpha_pattern": {"o_proj|down_proj": 2}},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "fan_in_fan_out, dora": {"fan_in_fan_out": True, "use_dora": True, "target_modules": [*QV, "embed_tokens"]},
    "no start": {"init_lora_weights": False},
    "bias all": {"bias": "all", "target_modules": QV},
    "bias lora_only": {"bias": "lora_only", "target_modules": [*QV, "down_proj"]},
    "lora_bias": {"lora_bias": True},
    "lora_bias, bias": {"lora_bias": True, "bias": "all", "target_modules": [*QV, "lm_head"]},
    "dora": {"use_dora": True},
    "dora, bias": {"use_dora": True, "bias": "all", "target_modules": [*QV, "up_proj"]},
    "dora everywhere": {"use_dora": True, "use_rslora": True, "target_modules": [*QV, "embed_tokens", "lm_head"],
                        "rank_pattern": {"embed_tokens": 7, "lm_head": 3}},
    "embedding": {"target_modules": [*QV, "embed_tokens"], "rank_pattern": {"embed_tokens": 2}},
    "head": {"target_modules": [*QV, "lm_head"], "alpha_pattern": {"lm_head": 2}},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding and head, tied": {"target_modules": [*QV, "embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "own embedding": {"modules_to_save": ["embed_tokens"]},
    "own head": {"modules_to_save": ["lm_head"], "target_modules": QV},
    "own embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "own embedding and head, tied": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "own head, LoRA embedding": {"modules_to_save": ["lm_head"], "target_modules": [*QV, "embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 150, 9, 11, 40, 41], "target_modules": QV},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [9, 3, 80]}},
    "much": {"use_dora": True, "bias": "lora_only", "modules_to_save": ["lm_head"], "target_modules": "all-linear",
             "rank_pattern": {"1.mlp.*": 8}, "use_rslora": True},
}  # fmt: skip
"""Name -> what it changes of LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS).

peft writes the keys of a pattern in the order of their text, and the first that matches counts.
"""
ALONE = {
    "bias all", "bias lora_only", "lora_bias, bias", "dora", "dora, bias", "dora everywhere", "fan_in_fan_out, dora",
    "own embedding", "own head", "own embedding and head", "own embedding and head, tied", "own head, LoRA embedding",
    "tokens", "tokens of both", "much",
}  # fmt: skip
"""Features whose adapters run alone and at scale 1, on a base that has biases."""


@quiet()
def write_feature(path: Path, base: Path, name: str, seed: int = 1) -> Path:
    """Save an adapter of FEATURES[name] for the model in the folder `base`, its folder `path` naming it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM"} | FEATURES[name]
    tuned = get_peft_model(model, LoraConfig(**config))
    for key, parameter in tuned.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn_like(parameter)
        if "lora_magnitude" in key:
            parameter.data *= 1 + 0.3 * noise
        elif "lora_" in key:
            parameter.data.copy_(0.15 * noise)
        else:
            parameter.data += 0.1 * noise
    tuned.save_pretrained(path)
    return path
