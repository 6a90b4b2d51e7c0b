"""The gate of Llama's feed-forward block."""

from __future__ import annotations

from torch import Tensor


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [T, N] -> gate * sigmoid(gate) * up in their dtype, computed in float32.

    Written with exp because torch's own silu gives other bits in the vector part of a tensor than in its tail.
    """
    wide = gate.float()
    return (wide / (1 + (-wide).exp()) * up).to(gate.dtype)
