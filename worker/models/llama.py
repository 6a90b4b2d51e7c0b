"""Llama's decoder layer: its tensors, and one step through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorayard.kernels.attention import Tiles, attend, tile, write
from lorayard.kernels.rms_norm import rms_norm
from lorayard.kernels.rope import rope
from lorayard.kernels.silu_mul import silu_mul

from ..cache.storage import PAGE
from ..linear import formats
from ..linear.linear import Linear, Shape
from ..linear.tensors import Tensors
from .adapters import Bank
from .batch import Batch
from .config import ModelConfig
from .rope import turns

CPU_BLOCK = 64
"""Keys that attention reads at a time on the CPU: most texts there are short."""


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer of one device needs of a forward. cos, sin [T, D/2]; pages, offsets int64 [T] of each token."""

    tiles: Tiles
    cos: Tensor
    sin: Tensor
    pages: Tensor
    offsets: Tensor
    bank: Bank | None
    loras: Any

    @classmethod
    def of(cls, batch: Batch, device: torch.device, frequencies: Tensor, bank: Bank | None) -> Step:
        """From a batch on the CPU, and RoPE's frequencies on the device."""
        block = CPU_BLOCK if device.type == "cpu" else PAGE
        tiles = tile(batch.sequence, batch.positions, batch.page_table, PAGE, block, device)
        positions = batch.positions.to(device)
        cos, sin = turns(positions, frequencies)
        pages = batch.page_table[batch.sequence, batch.positions // PAGE].to(device)
        loras = bank.prepare(batch.loras, device) if bank and batch.loras else None
        return cls(tiles, cos, sin, pages, positions % PAGE, bank, loras)

    def project(self, module: Linear, x: Tensor) -> Tensor:
        """The linear, called once for all rows, and each slot's delta for its rows."""
        y = module(x)
        return self.bank.apply(module.name, x, y, self.loras) if self.bank and self.loras is not None else y


def layer_linears(config: ModelConfig, index: int) -> dict[str, Shape]:
    """The linears of a layer by their last name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    blocks = (("self_attn", attention, config.attention_bias), ("mlp", mlp, config.mlp_bias))
    return {
        last: Shape(f"model.layers.{index}.{block}.{last}", *sizes, bias)
        for block, shapes, bias in blocks
        for last, sizes in shapes.items()
    }


def layer_norms(index: int) -> tuple[str, str]:
    """Names of the norms before attention and before the feed-forward block."""
    return f"model.layers.{index}.input_layernorm.weight", f"model.layers.{index}.post_attention_layernorm.weight"


class Layer:
    """One decoder layer on one device."""

    def __init__(
        self, config: ModelConfig, tensors: Tensors, index: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.device = config, device
        self.linears = {
            last: formats.read(tensors, shape, config.quantisation, device, dtype)
            for last, shape in layer_linears(config, index).items()
        }
        self.norm1, self.norm2 = (tensors.read(name).to(device, dtype) for name in layer_norms(index))

    def forward(self, h: Tensor, step: Step, k_pool: Tensor, v_pool: Tensor) -> Tensor:
        """h [T, hidden] -> h [T, hidden]; writes the tokens' K and V, then attends."""
        h = h + self._attention(rms_norm(h, self.norm1, self.config.norm_eps), step, k_pool, v_pool)
        return h + self._mlp(rms_norm(h, self.norm2, self.config.norm_eps), step)

    def _attention(self, x: Tensor, step: Step, k_pool: Tensor, v_pool: Tensor) -> Tensor:
        q, k, v = (
            step.project(self.linears[last], x).view(len(x), -1, self.config.head_dim)
            for last in ("q_proj", "k_proj", "v_proj")
        )
        write(rope(k, step.cos, step.sin), v, k_pool, v_pool, step.pages, step.offsets)
        out = attend(rope(q, step.cos, step.sin), k_pool, v_pool, step.tiles)
        return step.project(self.linears["o_proj"], out.flatten(1))

    def _mlp(self, x: Tensor, step: Step) -> Tensor:
        gate, up = (step.project(self.linears[last], x) for last in ("gate_proj", "up_proj"))
        return step.project(self.linears["down_proj"], silu_mul(gate, up))
