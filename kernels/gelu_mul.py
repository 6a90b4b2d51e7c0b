"""The gate of Gemma's feed-forward block."""

from __future__ import annotations

import math

from torch import Tensor


def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [T, N] -> gelu(gate) * up in their dtype, computed in float32.

    gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³))) (Hendrycks and Gimpel 2016, their approximation).
    """
    wide = gate.float()
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (wide * 0.5 * (1 + inner.tanh()) * up).to(gate.dtype)
