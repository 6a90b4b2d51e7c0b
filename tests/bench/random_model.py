"""Writes random weights in the shape of Llama 3.1 8B, 4-bit GPTQ, and one adapter for them, to measure speed on.

    python tests/bench/random_model.py --out DIR [--layers 32]

Speed does not depend on what the weights are, only on their sizes. The tokenizer is the demo's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorayard.demo import BASE

GROUP = 128
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256
LINEARS = {  # name: (inputs, outputs)
    "self_attn.q_proj": (HIDDEN, HEADS * HEAD_DIM),
    "self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "self_attn.o_proj": (HEADS * HEAD_DIM, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
RANK, ALPHA = 16, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def config(layers: int) -> dict[str, object]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False,
            "checkpoint_format": "gptq",
        },
    }  # fmt: skip


def linear(inputs: int, outputs: int) -> dict[str, Tensor]:
    """The tensors of one GPTQ linear (v1: zero points less one)."""
    words = torch.randint(-(1 << 31), 1 << 31, (inputs // 8, outputs), device=DEVICE).int()
    zeros = torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32)
    scales = (0.003 + 0.001 * torch.rand(inputs // GROUP, outputs)).half()
    return {"qweight": words, "qzeros": zeros, "scales": scales, "g_idx": torch.arange(inputs).int() // GROUP}


def normal(*shape: int, scale: float = 0.02) -> Tensor:
    """Random fp16."""
    return (torch.randn(*shape, device=DEVICE) * scale).half()


def write_model(folder: Path, layers: int) -> None:
    """config.json, the demo's tokenizer, and one file of tensors a layer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(layers), indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder)
    ends = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN), "lm_head.weight": normal(VOCAB, HIDDEN),
            "model.norm.weight": torch.ones(HIDDEN).half()}  # fmt: skip
    write(ends, folder / "ends.safetensors")
    for i in range(layers):
        tensors = {
            f"model.layers.{i}.{name}.{part}": tensor
            for name, shape in LINEARS.items()
            for part, tensor in linear(*shape).items()
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(HIDDEN).half()
        write(tensors, folder / f"layer-{i:02d}.safetensors")


def write_adapter(folder: Path, layers: int) -> None:
    """A PEFT folder with every linear as a target."""
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "task_type": "CAUSAL_LM",
                "target_modules": sorted(name.split(".")[1] for name in LINEARS)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for i in range(layers):
        for name, (inputs, outputs) in LINEARS.items():
            prefix = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = normal(RANK, inputs)
            tensors[f"{prefix}.lora_B.weight"] = normal(outputs, RANK)
    write(tensors, folder / "adapter_model.safetensors")


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Save from whatever device."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder that gets base/ and adapters/one/.")
@click.option("--layers", default=32)
def main(out: Path, layers: int) -> None:
    """Write the model and its adapter."""
    torch.manual_seed(0)
    write_model(out / "base", layers)
    write_adapter(out / "adapters" / "one", layers)


if __name__ == "__main__":
    main()
