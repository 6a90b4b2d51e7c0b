"""The demo: a small 4-bit Llama that knows Python's standard library, and three LoRA adapters that change its voice."""

from pathlib import Path

BASE = Path(__file__).parent / "base"
ADAPTERS = Path(__file__).parent / "adapters"
PROMPTS = Path(__file__).parent / "prompts.json"
