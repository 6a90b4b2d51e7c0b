"""The gate of Llama's feed-forward block."""

from __future__ import annotations

import torch
from torch import Tensor

from .arranged import Arranged, new_image
from .launch import Kernel, Launch, launch, usable

THREADS = 256


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [T, N] -> gate * sigmoid(gate) * up in their dtype, computed in float32.

    Written with exp because torch's own silu gives other bits in the vector part of a tensor than in its tail.
    """
    if usable(gate) and fits(gate) and fits(up) and gate.stride() == up.stride():
        out = gate.new_empty(gate.shape)
        launch(gated(gate, up, out))
        return out
    wide = gate.float()
    return (wide / (1 + (-wide).exp()) * up).to(gate.dtype)


def silu_mul_arranged(gate: Tensor, up: Tensor) -> Arranged:
    """silu_mul of fp16 on a GPU, before a linear of q4_mid; N is a multiple of 64."""
    out = gate.new_empty(gate.shape)
    image = new_image(out)
    launch(gated(gate, up, out, image))
    return Arranged(out, image)


def fits(x: Tensor) -> bool:
    """Whether the kernel takes rows like these; they may be columns of a wider tensor."""
    aligned = x.shape[-1] % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(1) == 1 and x.data_ptr() % 16 == 0
    return x.dtype in (torch.float16, torch.bfloat16) and aligned and len(x) > 0


def gated(gate: Tensor, up: Tensor, out: Tensor, image: Tensor | None = None) -> Launch:
    """out = silu_mul(gate, up), also as an image."""
    rows, width = gate.shape
    if out.shape != gate.shape or out.dtype != gate.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {gate.dtype} {list(gate.shape)}, but is {out.dtype} {list(out.shape)}"
        )
    sizes = {"WIDTH": width, "THREADS": THREADS, "BFLOAT": int(gate.dtype == torch.bfloat16)}
    macros = sizes | {"IMAGE": int(image is not None)}
    grid = rows, -(-width // (8 * THREADS)), 1
    arguments = gate, up, out, image, gate.stride(0), 0 if image is None else image.shape[1]
    return Launch(Kernel("silu_mul", tuple(macros.items())), grid, THREADS, arguments)
