"""The paged K/V cache: one pool of pages for each layer's K and one for its V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from lorayard.kernels.pool import GROUP, RUN, FloatPool, Pool, QuantisedPool
from lorayard.shared.errors import NotSupported, UsageError

PAGE = 256
"""Tokens of a page."""


@dataclass(frozen=True, slots=True)
class CacheType:
    """What K and V are held in: floats of a torch dtype, or numbers of so many bits with a scale for each 32."""

    k: torch.dtype | int
    v: torch.dtype | int

    def bytes(self, head_dim: int) -> int:
        """Of K and V of one head of one token."""
        return sum(
            head_dim * kind // 8 + head_dim // GROUP * 2 if isinstance(kind, int) else head_dim * kind.itemsize
            for kind in (self.k, self.v)
        )

    def takes(self, head_dim: int) -> bool:
        """Whether heads of this size can be held."""
        return head_dim % RUN == 0 or not isinstance(self.k, int)


TYPES = {
    "fp16": CacheType(torch.float16, torch.float16),
    "bf16": CacheType(torch.bfloat16, torch.bfloat16),
    "fp32": CacheType(torch.float32, torch.float32),
    "q8": CacheType(8, 8),
    "q6": CacheType(8, 4),
    "q4": CacheType(4, 4),
}
"""Those after fp32 are ExLlamaV2's, the larger first; Q6 has its name for 6 bits on average."""


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
        if max_tokens < 1:
            raise UsageError(f"a cache needs at least one token, not {max_tokens}")
        shape = model.config
        self.dtype, self.type = dtype, cache_type(dtype, shape.head_dim)
        self.pages = -(-max_tokens // PAGE)
        self.max_tokens = self.pages * PAGE
        self.pool_shape = (self.pages, shape.num_kv_heads, PAGE, shape.head_dim)
        self.layers: list[tuple[Pool, Pool] | None] = [None] * shape.num_layers
        for layer, device in enumerate(model.layer_devices):
            self.allocate(layer, device)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's K and V."""
        return self.pages * page_bytes(self.type, self.pool_shape[1], self.pool_shape[3])

    @property
    def scratch(self) -> int:
        """A page that belongs to no sequence, for rows that only fill up a batch; on a GPU alone."""
        return self.pages

    def allocate(self, layer: int, device: torch.device) -> None:
        """Give the layer its pools, zeros; on a GPU they have one page more, see `scratch`."""
        pages, heads, page, dim = self.pool_shape
        shape = (pages + (device.type == "cuda"), heads, page, dim)
        k, v = (
            QuantisedPool(shape, kind, device) if isinstance(kind, int) else FloatPool(shape, kind, device)
            for kind in (self.type.k, self.type.v)
        )
        self.layers[layer] = (k, v)

    def __getitem__(self, layer: int) -> tuple[Pool, Pool]:
        pools = self.layers[layer]
        if pools is None:
            raise UsageError("the cache has no memory yet: give it to model.load, or make it after")
        return pools

    def copy_prefix(self, source: int, target: int, tokens: int) -> None:
        """Copy K and V of the first `tokens` tokens of page `source` to page `target`, in every layer."""
        for layer in range(len(self.layers)):
            for pool in self[layer]:
                pool.copy(source, target, tokens)

    def free(self) -> None:
        """Give the memory back."""
        self.layers = [None] * len(self.layers)


def cache_type(name: str, head_dim: int) -> CacheType:
    """The type of that name. Raises UsageError if there is none, NotSupported if it cannot hold such heads."""
    if name not in TYPES:
        raise UsageError(f"a cache's dtype is one of {', '.join(TYPES)}, not {name!r}")
    if not TYPES[name].takes(head_dim):
        raise NotSupported(
            f"a cache of {name} for head_dim {head_dim}: it takes multiples of {RUN}; fp16 takes any"
        )  # fmt: skip
    return TYPES[name]


def page_bytes(held: CacheType, kv_heads: int, head_dim: int) -> int:
    """Bytes of one page of one layer, K and V."""
    return PAGE * kv_heads * held.bytes(head_dim)
