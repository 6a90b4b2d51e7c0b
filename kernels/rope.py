"""Rotary position embedding (Su 2021) of the two halves of a head, as Llama's checkpoints want it."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D], cos and sin float32 [T, D/2] of each token's position -> x turned, in x's dtype."""
    low, high = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)
