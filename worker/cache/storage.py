"""The paged K/V cache: one pool of pages for each layer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lorayard.shared.errors import NotSupported, UsageError

PAGE = 256
"""Tokens of a page."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Shape(Protocol):
    """What a cache needs of a model's config."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class Owner(Protocol):
    """What a cache needs of a model."""

    @property
    def config(self) -> Shape: ...
    @property
    def layer_devices(self) -> tuple[torch.device, ...]: ...


class Cache:
    """K and V of up to `max_tokens` tokens (rounded up to whole pages), each pool [pages, kv_heads, PAGE, head_dim].

    A layer's pools are allocated when the model loads that layer, or at once if the model is loaded.
    """

    def __init__(self, model: Owner, max_tokens: int = 32768, dtype: str = "fp16") -> None:
        if dtype in ("q8", "q6", "q4"):
            raise NotSupported(f"a cache of {dtype}; this version does {', '.join(DTYPES)}")
        if dtype not in DTYPES:
            raise UsageError(f"a cache's dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
        if max_tokens < 1:
            raise UsageError(f"a cache needs at least one token, not {max_tokens}")
        self.pages = -(-max_tokens // PAGE)
        self.max_tokens = self.pages * PAGE
        self.dtype = DTYPES[dtype]
        shape = model.config
        self.pool_shape = (self.pages, shape.num_kv_heads, PAGE, shape.head_dim)
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * shape.num_layers
        for layer, device in enumerate(model.layer_devices):
            self.allocate(layer, device)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's K and V."""
        return 2 * torch.Size(self.pool_shape).numel() * self.dtype.itemsize

    def allocate(self, layer: int, device: torch.device) -> None:
        """Give the layer its pools, zeros."""
        k, v = (torch.zeros(self.pool_shape, dtype=self.dtype, device=device) for _ in range(2))
        self.layers[layer] = (k, v)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        pools = self.layers[layer]
        if pools is None:
            raise UsageError("the cache has no memory yet: give it to model.load, or make it after")
        return pools

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """Copy K and V of the first `tokens` tokens of page `source` to page `target`, in every layer."""
        for layer in range(len(self.layers)):
            for pool in self[layer]:
                pool[target, :, :tokens] = pool[source, :, :tokens]

    def free(self) -> None:
        """Give the memory back."""
        self.layers = [None] * len(self.layers)
