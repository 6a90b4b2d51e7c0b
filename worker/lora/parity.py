"""An adapter's logits by the engine and by transformers and peft, in float32 on the CPU over the same weights."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lorayard.shared.errors import AdapterError

from ..linear.tensors import Tensors
from ..models.config import ModelConfig
from ..models.model import Model
from .peft import Lora

TOLERANCE = 1e-3
TOKENS = 48


class NotMeasured(Exception):
    """Why there is no figure."""


def measure(base: Path, adapter: Path) -> float:
    """Relative L2 distance of the logits of a fixed random prompt.

    Raises NotMeasured where a package or memory is missing, AdapterError for what the engine refuses.
    """
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if missing:
        raise NotMeasured(f"{' and '.join(missing)} not installed")
    config = ModelConfig.from_directory(base)
    _check_memory(config)
    model = Model(config)
    model.load(devices="cpu")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, config.vocab_size, (min(TOKENS, config.max_seq_len),), generator=generator)
    got = model.logits(prompt, [Lora.from_directory(model, adapter)])
    expected = _reference(model, adapter, prompt)
    return float((got - expected).norm() / expected.norm())


def _check_memory(config: ModelConfig) -> None:
    """Two models in float32 at once, by the sizes of their linears."""
    linear = config.hidden_size * (2 * config.num_heads * config.head_dim + 3 * config.intermediate_size)
    needed = 8 * (config.num_layers * linear + 2 * config.vocab_size * config.hidden_size)
    said = Path("/proc/meminfo").read_text()
    free = int(said.partition("MemAvailable:")[2].split()[0]) << 10
    if needed > free:
        raise NotMeasured(f"two models in float32 take {needed >> 20:,} MiB, {free >> 20:,} MiB are free")


@torch.no_grad()
def _reference(model: Model, adapter: Path, prompt: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, vocab]."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    with warnings.catch_warnings(action="ignore"):
        config = AutoConfig.from_pretrained(model.config.path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        theirs.load_state_dict(_weights(model, theirs.state_dict()), strict=True)
        try:
            tuned = PeftModel.from_pretrained(theirs, adapter).eval()
        except Exception as reason:
            raise AdapterError(f"{adapter}: peft does not load it: {str(reason).splitlines()[0][:200]}") from None
        logits: torch.Tensor = tuned(prompt[None]).logits[0].float()
    return logits


def _weights(model: Model, wanted: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The checkpoint's float tensors, and the dequantised weights of its linears."""
    tensors = Tensors(sorted(model.config.path.glob("*.safetensors")), AdapterError)
    linears = dict(model.linears)
    assert model.head is not None
    linears["lm_head"] = model.head
    weights = {}
    for name in wanted:
        linear = linears.get(name.removesuffix(".weight"))
        weights[name] = linear.dense() if linear is not None else tensors.read(name)
    return weights
