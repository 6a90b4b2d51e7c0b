"""The families of models: what sets each apart from Llama, as data over one decoder layer.

The facts are those of the classes of the same names in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lorayard.kernels.gelu_mul import gelu_mul
from lorayard.kernels.silu_mul import silu_mul

from ..files import JsonFile

NORMS = {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
AROUND = {"attention_in": "input_layernorm", "attention_out": "post_attention_layernorm",
          "mlp_in": "pre_feedforward_layernorm", "mlp_out": "post_feedforward_layernorm"}  # fmt: skip
QUERY_KEY = {"q": "self_attn.q_norm", "k": "self_attn.k_norm"}
GELU = "gelu_pytorch_tanh"
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def never(file: JsonFile, layer: int) -> bool:
    """No layer has a window."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A family of models.

    model_type: its other name in config.json. defaults: what transformers puts in for fields that are absent (null is
    a value); of the fields that not all families have, those named here count. refused: fields that must be absent,
    null or false. biases: linears that have a bias; those of a field if it is true. slides: whether a layer has the
    window, if config.json has no layer_types. activations: the names that mean `gate`. norms: tensors by their place
    in the layer, attention_in, attention_out, mlp_in, mlp_out, q, k; a place without one does nothing. local_theta:
    the RoPE base of layers with a window, if it is one of its own. gemma: norms multiply by 1 + w in float32,
    embeddings are multiplied by sqrt(hidden_size), and the residual stream, which fp16 cannot hold, is float32.
    """

    model_type: str
    defaults: Mapping[str, Any]
    refused: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    slides: Callable[[JsonFile, int], bool] = never
    activations: tuple[str, ...] = ("silu",)
    gate: Callable[[Tensor, Tensor], Tensor] = silu_mul
    norms: Mapping[str, str] = field(default_factory=lambda: NORMS)
    theta: float = 10000.0
    local_theta: float | None = None
    gemma: bool = False


LLAMA = Architecture(
    model_type="llama",
    defaults={"hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
)
MISTRAL = Architecture(
    model_type="mistral",
    defaults={"hidden_act": "silu", "tie_word_embeddings": False, "sliding_window": 4096},
    slides=lambda file, layer: True,
)
QWEN2 = Architecture(
    model_type="qwen2",
    defaults={
        "hidden_act": "silu", "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 28, "layer_types": None,
    },
    biases=("q_proj", "k_proj", "v_proj"),
    slides=lambda file, layer: layer >= file.get("max_window_layers", int),
)  # fmt: skip
QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    defaults={**QWEN2.defaults, "head_dim": 128, "attention_bias": False},
    biases=(),
    norms=NORMS | QUERY_KEY,
)
GEMMA = Architecture(
    model_type="gemma",
    defaults={
        "hidden_act": GELU, "hidden_activation": None, "tie_word_embeddings": True, "head_dim": 256,
        "attention_bias": False,
    },
    refused=("use_bidirectional_attention",),
    activations=(GELU, "gelu"),
    gate=gelu_mul,
    gemma=True,
)  # fmt: skip
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    defaults={
        "hidden_activation": GELU, "tie_word_embeddings": True, "head_dim": 256, "attention_bias": False,
        "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "sliding_window": 4096, "layer_types": None,
    },
    activations=(GELU,),
    slides=lambda file, layer: layer % 2 == 0,
    norms=AROUND,
)  # fmt: skip
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    defaults={
        "hidden_activation": GELU, "tie_word_embeddings": True, "head_dim": 256, "attention_bias": False,
        "query_pre_attn_scalar": 256, "final_logit_softcapping": None, "sliding_window": 4096,
        "sliding_window_pattern": 6, "layer_types": None,
    },
    refused=("use_bidirectional_attention", "attn_logit_softcapping"),
    slides=lambda file, layer: (layer + 1) % file.size("sliding_window_pattern") > 0,
    norms=AROUND | QUERY_KEY,
    theta=1e6,
    local_theta=1e4,
)  # fmt: skip
ARCHITECTURES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
}
"""By the name in `architectures` of config.json."""
