"""The engine's face. Names load on first use, so that the supervisor can live here without torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorayard.shared.job import LoraSet, SamplingParams

    from .cache.storage import Cache
    from .generate.generator import Event, Generator, Handle
    from .lora.peft import Lora
    from .models.config import ModelConfig
    from .models.model import Model
    from .text.tokenizer import Tokenizer

__all__ = [
    "Cache", "Event", "Generator", "Handle", "Lora", "LoraSet", "Model", "ModelConfig", "SamplingParams", "Tokenizer",
]  # fmt: skip

_HOME = {
    "Cache": ".cache.storage",
    "Event": ".generate.generator",
    "Generator": ".generate.generator",
    "Handle": ".generate.generator",
    "Lora": ".lora.peft",
    "LoraSet": "lorayard.shared.job",
    "Model": ".models.model",
    "ModelConfig": ".models.config",
    "SamplingParams": "lorayard.shared.job",
    "Tokenizer": ".text.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
