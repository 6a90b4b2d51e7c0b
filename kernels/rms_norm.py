"""Root mean square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from .arranged import Arranged, Partial, new_image
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


def add_norm_arranged(delta: Tensor | Partial, h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Arranged]:
    """add_norm of fp16 on a GPU, between linears of q4_mid; K is a multiple of 64."""
    total, y, image = torch.empty_like(h), torch.empty_like(h), new_image(h)
    launch(norm(delta, h, weight, total, y, eps, image))
    return total, Arranged(y, image)


def fits(x: Tensor) -> bool:
    """Whether the kernel takes rows like these."""
    return x.dtype in (torch.float16, torch.bfloat16) and x.is_contiguous() and x.shape[-1] % 8 == 0 and x.numel() > 0


def norm(
    x: Tensor | Partial,
    residual: Tensor | None,
    weight: Tensor,
    total: Tensor | None,
    y: Tensor,
    eps: float,
    image: Tensor | None = None,
) -> Launch:
    """total = x + residual, y = rms_norm(total), also as an image; without a residual y = rms_norm(x)."""
    rows, width = y.shape
    own, bias, parts = (x, None, 0) if isinstance(x, Tensor) else (x.parts, x.bias, len(x.parts))
    require("weight", weight, y.dtype, width, like=y)
    if parts:
        require("parts", own, torch.float32, parts, rows, own.shape[2], like=y)
    for name, each in (("x", own), ("residual", residual), ("total", total), ("y", y)):
        if each is not None and (each is not own or not parts):
            require(name, each, y.dtype, rows, width, like=y)
    sizes = {"WIDTH": width, "THREADS": THREADS, "BFLOAT": int(y.dtype == torch.bfloat16)}
    macros = sizes | {"PARTS": parts, "IMAGE": int(image is not None)}
    padded = 0 if image is None else image.shape[1]
    arguments = own, bias, residual, weight, total, y, image, own.shape[-1], padded, float(eps)
    return Launch(Kernel("rms_norm", tuple(macros.items())), (rows, 1, 1), THREADS, arguments)
