"""The decoder layer that all architectures share: its tensors, and one step through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorayard.kernels.attention import Tiles, attend, decode_tiles, tile
from lorayard.kernels.pool import Pool
from lorayard.kernels.rms_norm import add_norm, rms_norm
from lorayard.kernels.rope_append import turn_and_append

from ..cache.storage import PAGE
from ..linear import formats
from ..linear.joined import Joined
from ..linear.linear import Shape
from ..linear.tensors import Tensors
from .adapters import Bank
from .batch import Batch
from .config import ModelConfig
from .rope import Rope

CPU_BLOCK = 64
"""Keys that attention reads at a time on the CPU: most texts there are short."""


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer of one device needs of a forward.

    tiles: by window. turns: cos and sin [T, D/2] by RoPE. pages, offsets int64 [T]: of each token.
    """

    tiles: Mapping[int, Tiles]
    turns: Mapping[Rope, tuple[Tensor, Tensor]]
    pages: Tensor
    offsets: Tensor
    bank: Bank | None
    loras: Any

    @classmethod
    def of(
        cls,
        batch: Batch,
        device: torch.device,
        windows: tuple[int, ...],
        frequencies: Mapping[Rope, Tensor],
        bank: Bank | None,
    ) -> Step:
        """From a batch on the CPU, the layers' windows, and RoPE's frequencies on the device."""
        block = CPU_BLOCK if device.type == "cpu" else PAGE
        tiles = {
            window: tile(batch.sequence, batch.positions, batch.page_table, PAGE, block, device, window)
            for window in set(windows)
        }
        positions = batch.positions.to(device)
        turns = {rope: rope.turns(positions, each) for rope, each in frequencies.items()}
        pages = batch.page_table[batch.sequence, batch.positions // PAGE].to(device)
        loras = bank.prepare(batch.loras, device) if bank and batch.loras else None
        return cls(tiles, turns, pages, positions % PAGE, bank, loras)

    @classmethod
    def decoding(
        cls,
        positions: Tensor,
        page_table: Tensor,
        windows: tuple[int, ...],
        frequencies: Mapping[Rope, Tensor],
        bank: Bank | None,
        loras: Any,
    ) -> Step:
        """One token of each sequence, at positions int64 [B], page_table int64 [B, P]; all is on the device and stays
        there, so that a graph can hold it. loras: as the bank prepares them."""
        tiles = {window: decode_tiles(positions, page_table, PAGE, window) for window in set(windows)}
        turns = {rope: rope.turns(positions, each) for rope, each in frequencies.items()}
        pages = page_table.gather(1, (positions // PAGE)[:, None]).flatten()
        return cls(tiles, turns, pages, positions % PAGE, bank, loras)

    def project(self, linears: Joined, x: Tensor) -> Tensor:
        """The linears, called once for all rows, and each slot's delta for its rows."""
        y = linears(x)
        return self.bank.apply(linears.names, x, y, self.loras) if self.bank and self.loras is not None else y


def layer_linears(config: ModelConfig, index: int) -> dict[str, Shape]:
    """The linears of a layer by their last name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    mlp = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    return {
        last: Shape(f"model.layers.{index}.{block}.{last}", *sizes, last in config.biases)
        for block, shapes in (("self_attn", attention), ("mlp", mlp))
        for last, sizes in shapes.items()
    }


def layer_norms(config: ModelConfig, index: int) -> dict[str, tuple[str, int]]:
    """Tensor and size of the layer's norms by their place (see Architecture)."""
    sizes = {"q": config.head_dim, "k": config.head_dim}
    return {
        place: (f"model.layers.{index}.{name}.weight", sizes.get(place, config.hidden_size))
        for place, name in config.architecture.norms.items()
    }


def read_norm(config: ModelConfig, tensors: Tensors, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What the norm multiplies by: the tensor, or 1 + it in float32 (see Architecture.gemma)."""
    weight = tensors.read(name).to(device)
    return 1.0 + weight.float() if config.architecture.gemma else weight.to(dtype)


class Layer:
    """One decoder layer on one device."""

    def __init__(
        self, config: ModelConfig, tensors: Tensors, index: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.window, self.rope = config.windows[index], config.ropes[index]
        self.linears = {
            last: formats.read(tensors, shape, config.quantisation, device, dtype)
            for last, shape in layer_linears(config, index).items()
        }
        self.norms = {
            place: read_norm(config, tensors, name, device, dtype)
            for place, (name, _) in layer_norms(config, index).items()
        }

        self._qkv = Joined([self.linears[last] for last in ("q_proj", "k_proj", "v_proj")])
        self._out = Joined([self.linears["o_proj"]])
        self._gate_up = Joined([self.linears[last] for last in ("gate_proj", "up_proj")])
        self._down = Joined([self.linears["down_proj"]])

    def forward(self, h: Tensor, delta: Tensor | None, step: Step, k_pool: Pool, v_pool: Pool) -> tuple[Tensor, Tensor]:
        """h [T, hidden] and what is still to be added to it -> the same; writes the tokens' K and V, then attends."""
        h, x = self._add_norm("attention_in", h, delta)
        out = self._norm("attention_out", self._attention(x, step, k_pool, v_pool), h.dtype)
        h, x = self._add_norm("mlp_in", h, out)
        return h, self._norm("mlp_out", self._mlp(x, step), h.dtype)

    def _add_norm(self, place: str, h: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """h + delta, and its norm."""
        if delta is None:
            return h, self._norm(place, h, self.dtype)
        return add_norm(delta, h, self.norms[place], self.config.norm_eps, self.dtype)

    def _norm(self, place: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        weight = self.norms.get(place)
        return x if weight is None else rms_norm(x.contiguous(), weight, self.config.norm_eps, dtype)

    def _attention(self, x: Tensor, step: Step, k_pool: Pool, v_pool: Pool) -> Tensor:
        config = self.config
        heads = step.project(self._qkv, x).view(len(x), -1, config.head_dim)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], 1)
        q, k = (self._norm(place, each, self.dtype) for place, each in (("q", q), ("k", k)))
        q = turn_and_append(q, k, v, step.turns[self.rope], (k_pool, v_pool), (step.pages, step.offsets))
        out = attend(q, k_pool, v_pool, step.tiles[self.window], config.query_scale, config.attention_cap)
        return step.project(self._out, out.flatten(1))

    def _mlp(self, x: Tensor, step: Step) -> Tensor:
        gate, up = step.project(self._gate_up, x).chunk(2, -1)
        return step.project(self._down, self.config.architecture.gate(gate, up))
