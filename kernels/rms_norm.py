"""Root mean square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., K], weight [K] -> x / sqrt(mean(x²) + eps) * weight in `dtype`, or x's.

    Normalised in float32, rounded to the weight's dtype, multiplied in it: a Llama's weight has x's, a Gemma's float32.
    """
    wide = x.float()
    normal = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normal.to(weight.dtype) * weight).to(dtype or x.dtype)
