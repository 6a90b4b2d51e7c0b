"""Root mean square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Kernel, Launch, launch, require, usable

THREADS = 256


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., K], weight [K] -> x / sqrt(mean(x²) + eps) * weight in `dtype`, or x's.

    Normalised in float32, rounded to the weight's dtype, multiplied in it: a Llama's weight has x's, a Gemma's float32.
    """
    if usable(x) and fits(x) and weight.dtype == (dtype or x.dtype) == x.dtype:
        y = torch.empty_like(x)
        rows = x.view(-1, x.shape[-1])
        launch(norm(rows, None, weight, None, y.view(rows.shape), eps))
        return y
    wide = x.float()
    normal = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normal.to(weight.dtype) * weight).to(dtype or x.dtype)


def add_norm(
    delta: Tensor, h: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """delta, h [T, K] -> h + delta, and rms_norm of it in `dtype`, or h's."""
    alike = delta.dtype == h.dtype == weight.dtype == (dtype or h.dtype)
    if usable(h) and alike and fits(h) and fits(delta):
        total, y = torch.empty_like(h), torch.empty_like(h)
        launch(norm(h, delta, weight, total, y, eps))
        return total, y
    total = h + delta
    return total, rms_norm(total, weight, eps, dtype)


def fits(x: Tensor) -> bool:
    """Whether the kernel takes rows like these."""
    return x.dtype in (torch.float16, torch.bfloat16) and x.is_contiguous() and x.shape[-1] % 8 == 0 and x.numel() > 0


def norm(x: Tensor, residual: Tensor | None, weight: Tensor, total: Tensor | None, y: Tensor, eps: float) -> Launch:
    """total = x + residual, y = rms_norm(total); without a residual y = rms_norm(x)."""
    rows, width = x.shape
    require("weight", weight, x.dtype, width, like=x)
    for name, each in (("x", x), ("residual", residual), ("total", total), ("y", y)):
        if each is not None:
            require(name, each, x.dtype, rows, width, like=x)
    macros = ("WIDTH", width), ("THREADS", THREADS), ("BFLOAT", int(x.dtype == torch.bfloat16))
    return Launch(Kernel("rms_norm", macros), (rows, 1, 1), THREADS, (x, residual, weight, total, y, float(eps)))
