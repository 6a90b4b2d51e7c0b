"""Root mean square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, K], weight [K] -> x / sqrt(mean(x²) + eps) * weight in x's dtype, the mean in float32."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight
