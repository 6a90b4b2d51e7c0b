"""Models and adapters of random numbers, made fast: speed does not depend on what the weights are."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorayard.demo import BASE
from lorayard.shared.errors import UsageError

from ..lora.peft import Lora
from ..models.model import Model

GROUP, RANK, ALPHA = 128, 16, 32
FORMATS = {"gptq4": torch.float16, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Formats of the linears -> dtype of the rest."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes. share: what part of a workload's sequences and tokens is run on it, 1 for all."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    share: int = 1

    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's linears by name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, queries), "self_attn.k_proj": (self.hidden, keys),
            "self_attn.v_proj": (self.hidden, keys), "self_attn.o_proj": (queries, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate), "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }  # fmt: skip


SHAPES = {
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "llama-1b": Shape(2048, 8192, 16, 32, 8, 64, 128256),
    "tiny": Shape(256, 384, 2, 4, 2, 64, 2048, share=16),
}
"""Llama 3.1 8B, Llama 3.2 1B with a head of its own, and one for the CPU."""


class Random:
    """Random tensors on the GPU if there is one, the same for the same seed and device."""

    def __init__(self, seed: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 0.02) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self.generator, device=self.device).mul_(scale).to(dtype)

    def gptq(self, inputs: int, outputs: int) -> dict[str, Tensor]:
        """The tensors of a GPTQ linear of 4 bits (v1: zero points less one)."""
        words = torch.empty(inputs // 8, outputs, dtype=torch.int32, device=self.device)
        words.random_(-(1 << 31), 1 << 31, generator=self.generator)
        groups = inputs // GROUP
        scales = torch.rand(groups, outputs, generator=self.generator, device=self.device).mul_(0.001).add_(0.003)
        zeros = torch.full((groups, outputs // 8), 0x77777777, dtype=torch.int32)
        return {
            "qweight": words,
            "qzeros": zeros,
            "scales": scales.half(),
            "g_idx": torch.arange(inputs).int() // GROUP,
        }


def made(cache: Path, shape: str, format: str) -> Path:
    """The folder of a model of random weights, written if `cache` has none of this shape and format yet."""
    folder = cache / f"{shape}-{format}"
    if not folder.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f"{folder.name}-") as unfinished:
                _write_model(Path(unfinished) / "model", SHAPES[shape], format)
                (Path(unfinished) / "model").rename(folder)
        except OSError as reason:
            raise UsageError(f"{folder} cannot be written: {reason.strerror}; choose another --cache-dir") from None
    return folder


def _write_model(folder: Path, shape: Shape, format: str) -> None:
    """config.json, a tokenizer of as many tokens, and one file of tensors a layer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_config(shape, format), indent=1))
    tokenizer = json.loads((BASE / "tokenizer.json").read_bytes())
    words = tokenizer["model"]["vocab"]
    words |= {f"filler {i}": i for i in range(1 + max(words.values()), shape.vocab)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    random = Random(0)
    with ThreadPoolExecutor(4) as pool:
        saves = [
            pool.submit(save_file, {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, folder / name)
            for name, tensors in _files(shape, format, random)
        ]
    for save in saves:
        save.result()


def _files(shape: Shape, format: str, random: Random) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and tensors of each file."""
    dtype = FORMATS[format]
    ends = {name: random.normal(shape.vocab, shape.hidden, dtype=dtype)
            for name in ("model.embed_tokens.weight", "lm_head.weight")}  # fmt: skip
    yield "ends.safetensors", ends | {"model.norm.weight": torch.ones(shape.hidden, dtype=dtype)}
    for i in range(shape.layers):
        prefix, tensors = f"model.layers.{i}", dict[str, Tensor]()
        for name, (inputs, outputs) in shape.linears().items():
            packed = format == "gptq4"
            parts = random.gptq(inputs, outputs) if packed else {"weight": random.normal(outputs, inputs, dtype=dtype)}
            tensors |= {f"{prefix}.{name}.{part}": tensor for part, tensor in parts.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(shape.hidden, dtype=dtype)
        yield f"layer-{i:02d}.safetensors", tensors


def _config(shape: Shape, format: str) -> dict[str, object]:
    """config.json. No token ends a text, so that every answer has the length that is measured."""
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "torch_dtype": str(FORMATS[format]).removeprefix("torch."),
    }  # fmt: skip
    if format == "gptq4":
        config["quantization_config"] = {
            "quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False,
            "checkpoint_format": "gptq",
        }  # fmt: skip
    return config


def adapters(model: Model, count: int) -> list[Lora]:
    """Adapters of rank RANK with content of their own on all linears of the layers, in the host's memory alone."""
    return [Lora(f"random-{i}", f"random-{i}", _halves(model, Random(1 + i))).pack(model) for i in range(count)]


def _halves(model: Model, random: Random) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each linear, alpha / rank in B, copied from the device in one piece."""
    sizes = {name: (RANK * each.in_features, each.out_features * RANK) for name, each in model.linears.items()}
    flat = random.normal(sum(a + b for a, b in sizes.values()), dtype=model.dtype, scale=0.01).cpu()
    halves, start = {}, 0
    for name, (a, b) in sizes.items():
        halves[name] = (flat[start : start + a].view(RANK, -1), flat[start + a : start + a + b].view(-1, RANK))
        start += a + b
    return halves


def write_adapter(folder: Path, model: Model) -> Path:
    """The PEFT folder of such an adapter."""
    folder.mkdir()
    targets = sorted({name.rpartition(".")[2] for name in model.linears})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "task_type": "CAUSAL_LM",
                "target_modules": targets}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    dtype = torch.float16 if model.dtype == torch.float32 else model.dtype
    tensors = {
        f"base_model.model.{name}.lora_{half}.weight": tensor.to(dtype).contiguous()
        for name, pair in _halves(model, Random(0)).items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
